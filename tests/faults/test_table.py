"""The table of faults names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests import faults

HERE = Path(__file__).parent
NAMED = re.findall(r"(test_\w+)(?:::(test_\w+))?", faults.__doc__ or "")


def _tests(module: str) -> set[str]:
    path = next(path for path in (HERE / f"{module}.py", HERE.parent / f"{module}.py") if path.exists())
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_test_that_the_table_names_is_there() -> None:
    assert [f"{module}::{name}" for module, name in NAMED if name and name not in _tests(module)] == []
    assert all(_tests(module) for module, name in NAMED if not name)


def test_each_number_is_in_the_table() -> None:
    numbers = re.findall(r"^ ?(\d+)  ", faults.__doc__ or "", re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, 31))
