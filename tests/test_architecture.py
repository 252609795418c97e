"""The rooms of the house: imports point down only, and looking in costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import beaker_statestore
from beaker_statestore import stores

ROOT = Path(beaker_statestore.__file__).parent
PACKAGE = "beaker_statestore"

#: Which layer each module is in; a module imports lower layers, or its own package.
LAYERS = [
    ["exceptions", "observe"],
    ["tyrant.commands", "tyrant.wire", "tyrant.swap", "tyrant", "documents", "payloads", "keys", "settings", "ports"],
    ["stores.base", "stores.memory", "stores.lmdb"],
    ["tyrant.client", "tyrant.pytyrant", "stores.tyrant", "stores", "tyrant.verbs", "tyrant.server"],
    ["sessionrecord", "namespace", "websession", "router"],
    ["cli", "testing", "__main__", ""],
]
#: Neighbours in one layer that build on each other, lower ones first.
NEIGHBOURS = [
    "exceptions", "observe", "keys", "documents", "payloads", "settings", "sessionrecord", "namespace", "websession", "router",
]  # fmt: skip
#: Who may import which framework; ``salmon`` only inside functions.
FRAMEWORKS = {
    "beaker": {"namespace", "websession"},
    "salmon": {"router"},
    "webob": {"websession"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


def layer_of(module: str) -> int:
    for layer, names in enumerate(LAYERS):
        if any(module == name or (name and module.startswith(name + ".")) for name in names if name != "tyrant"):
            return layer
    if module == "tyrant":
        return 1
    raise AssertionError(f"{module} is in no layer: draw it into LAYERS and into the design")


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    known = modules()
    names = {name.removeprefix(PACKAGE + ".") for name in found if name.startswith(PACKAGE + ".")}
    return {name for name in names if name in known}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    here = layer_of(module)
    package = module.rpartition(".")[0]
    for name in imports_of(modules()[module]):
        if name in ("tyrant", "stores") and package == name:
            continue
        there = layer_of(name)
        same_package = package and name.rpartition(".")[0] == package
        in_order = name in NEIGHBOURS and module in NEIGHBOURS and NEIGHBOURS.index(name) < NEIGHBOURS.index(module)
        inside = name.startswith(module + ".") if module else False
        assert there < here or (there == here and (same_package or in_order or inside or here in (3, 5))), (
            f"{module} (layer {here}) imports {name} (layer {there})"
        )


def test_the_scheme_table_points_down_too() -> None:
    for target in stores.SCHEMES.values():
        module = target.partition(":")[0].removeprefix(PACKAGE + ".")
        assert layer_of(module) <= layer_of("stores")
        assert hasattr(importlib.import_module(f"{PACKAGE}.{module}"), target.partition(":")[2])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_in_their_rooms(framework: str) -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == framework for name in names):
                assert module in FRAMEWORKS[framework], f"{module} imports {framework}"
                assert framework != "salmon" or node not in tree.body, "salmon is imported only inside functions"


def test_importing_the_package_loads_no_driver_and_no_framework() -> None:
    code = f"import sys, {PACKAGE}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"beaker", "webob", "salmon", "lmdb", "click", "rich", "orjson", "uvloop", "simplejson", "asyncio"}
    assert not heavy & set(loaded.stdout.split())


def test_the_core_never_mentions_vanish() -> None:
    """Nothing of ours empties a server that others may share; the command is only spoken and served."""
    spoken = {"tyrant.commands", "tyrant.verbs", "tyrant.server", "tyrant.pytyrant", "tyrant.wire"}
    for module, path in modules().items():
        if module not in spoken:
            assert "VANISH" not in path.read_text(), module
