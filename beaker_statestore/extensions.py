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
from collections.abc import Mapping
from types import ModuleType
from typing import Final

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.tyrant.commands import MAX_NAME
from beaker_statestore.tyrant.verbs import BUILT_IN, Function

__all__ = ["load"]

ATTRIBUTE: Final = "EXTENSIONS"
#: The probe's answer has names with blanks between.
_NAME: Final = re.compile(rf"[!-~]{{1,{MAX_NAME}}}")


def load(module: str) -> dict[bytes, Function]:
    """The functions of ``module``, the name of one or the path of a ``.py`` file.

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
        functions[name.encode()] = function
    return functions


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
