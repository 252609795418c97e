"""``serve --ext``: the operator's own ``ext`` functions, Python in a module of theirs.

The module has a mapping ``EXTENSIONS`` of names to functions::

    def take(records, key, value):
        found = records.get(key)
        records.delete(key)
        return found

    EXTENSIONS = {"take": take}

A function gets the verbs of the transaction (`beaker_statestore.stores.base.Verbs`), the key and the value of the
request, both bytes, and answers bytes, or None for failure. It runs between the requests of others, who wait for it,
and is atomic. It may be called again from the start, so it must have no effect but through the verbs.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.stores.base import Verbs
from beaker_statestore.tyrant.commands import MAX_NAME
from beaker_statestore.tyrant.verbs import BUILT_IN, Function

__all__ = ["ExtensionError", "load"]

ATTRIBUTE: Final = "EXTENSIONS"
#: The probe's answer has names with blanks between.
_NAME: Final = re.compile(rf"[!-~]{{1,{MAX_NAME}}}")
_OURS: Final = __name__.partition(".")[0]


class ExtensionError(StateStoreError):
    """A function of the operator's has a defect. The message says which, and has the traceback."""


def load(module: str) -> dict[bytes, Function]:
    """The functions of ``module``, the name of one or the path of a ``.py`` file.

    Whatever one of them raises, ``sys.exit()`` included, is an `ExtensionError`, except for a `StateStoreError`.

    :raises ConfigurationError: there is no such module, it fails, or has no such mapping; or a name is taken.
    """
    found = getattr(_import(module), ATTRIBUTE, None)
    if not isinstance(found, Mapping) or not found:
        raise ConfigurationError(f"--ext {module}: it has no mapping {ATTRIBUTE} of names to functions")
    functions: dict[bytes, Function] = {}
    for name, function in found.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not callable(function):
            raise ConfigurationError(
                f"--ext {module}: {name!r} in {ATTRIBUTE} is not a name (ASCII, no blanks) with a function"
            )
        if name.encode() in BUILT_IN:
            raise ConfigurationError(f"--ext {module}: {name!r} is the name of a built-in function; choose another")
        functions[name.encode()] = _guarded(function, f"the function {name!r} of --ext {module}")
    return functions


def _guarded(function: Any, what: str) -> Function:
    def guarded(records: Verbs, key: bytes, value: bytes) -> bytes | None:
        handled = sys.exc_info()[1]  # an engine may be about to run its operations again
        try:
            answer = function(records, key, value)
        except BaseException as error:
            if isinstance(error, StateStoreError) or _is_an_engines(error):
                raise
            _cut(error, handled)
            own_frames = error.__traceback__ and error.__traceback__.tb_next
            why = "".join(traceback.format_exception_only(error)).strip()
            trace = "".join(traceback.format_exception(type(error), error, own_frames)).rstrip()
            raise ExtensionError(f"{what} raised {why}\n{trace}") from None
        if answer is None:
            return None
        if not isinstance(answer, (bytes, bytearray, memoryview)):  # of a number, bytes() makes so many zeros
            raise ExtensionError(f"{what} answered {type(answer).__name__}, not bytes or None")
        return bytes(answer)

    return guarded


def _cut(error: BaseException, handled: BaseException | None) -> None:
    """Have ``error`` not be told as raised while ``handled`` was, which its function knows nothing of."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    error.__context__ = None


def _is_an_engines(error: BaseException) -> bool:
    """Whether a verb raised ``error`` for the engine below it, which may have the transaction begin anew.

    What a verb says of the arguments it was given is one of Python's own exceptions.
    """
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    module = str(innermost.f_globals.get("__name__", ""))
    return module.startswith(f"{_OURS}.stores.") and type(error).__module__ != "builtins"


def _import(module: str) -> ModuleType:
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        # Under its path, so that it takes no other module's name.
        spec = importlib.util.spec_from_file_location(module, module)
        assert spec is not None  # as there is a loader for .py
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"--ext {module} cannot be imported: {error!r}") from error
    return loaded
