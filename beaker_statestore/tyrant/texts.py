"""How ttserver, a program in C, reads names and numbers out of strings of bytes."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["function_name", "number"]

_DIGITS: Final = re.compile(rb"\s*([+-]?[0-9]{1,30})")


def function_name(name: bytes) -> bytes:
    """The name of a ``misc`` function: what stands before the first zero byte."""
    return name.partition(b"\0")[0]


def number(text: bytes) -> int:
    """``text`` as a signed number of 64 bits: what follows the digits is ignored, no digits are 0, and it wraps."""
    match = _DIGITS.match(text)
    return wrapped(int(match[1])) if match else 0


def wrapped(integer: int) -> int:
    """``integer`` as 64 bits hold it."""
    return (integer + 2**63) % 2**64 - 2**63
