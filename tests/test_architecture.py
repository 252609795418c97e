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

#: The modules of each layer, lowest layer first. In a layer, a module may import those that stand before it in its
#: row, and none of the other rows: rows are strangers to each other, as the client is to the server.
LAYERS = [
    [["exceptions"], ["observe"], ["ports"], ["complaints"]],
    [
        [
            "tyrant",
            "tyrant.commands",
            "tyrant.wire",
            "tyrant.calls",
            "tyrant.memcached",
            "tyrant.http",
            "tyrant.protocols",
            "tyrant.texts",
            "tyrant.ere",
            "tyrant.mask",
        ],
        ["tyrant.swap"],
        ["tyrant.paging"],
        ["tyrant.original"],
        ["tyrant.address"],
        ["tyrant.tls"],
        ["tyrant.stat"],
        ["documents", "tagged", "payloads"],
        ["sealing"],
        ["keys", "settings"],
    ],
    [["stores.base"], ["stores.urls"], ["stores.tokyocabinet"]],
    [
        ["stores.memory"],
        ["stores.lmdbpages", "stores.lmdbfile", "stores.lmdb"],
        ["stores.cabinetfile", "stores.cabinet"],
        ["tyrant.transport", "tyrant.client"],
        ["tyrant.encrypted"],
        ["tyrant.backups", "tyrant.apart", "tyrant.verbs", "tyrant.waiting"],
        ["tyrant.listening"],
        ["locks"],
        ["sweeper"],
    ],
    [["stores.tyrant"], ["tyrant.pytyrant"], ["tyrant.server"], ["stores"]],
    [
        [
            "codec",
            "collection",
            "queuerecords",
            "queuelog",
            "deadletters",
            "consumers",
            "fanout",
            "events",
            "sessionindex",
            "sessionrecord",
            "sessions",
            "namespace",
            "router",
            "queuedmail",
            "mailqueue",
            "confirmations",
            "webanswers",
            "websession",
            "tokens",
            "slates",
            "slatesession",
            "spynetransport",
        ],
        ["statistics", "report"],
    ],
    [["testing.processes", "testing.conformance", "testing.faults", "testing"], ["console"]],
    [
        ["extensions", "service", "serve"],
        ["records"],
        ["stats"],
        ["sweep"],
        ["reseal"],
        ["move"],
        ["who"],
        ["fanoutcommands"],
        ["mails"],
    ],
    [["cli", "__main__"]],
]
PLACES = {
    module: (layer, row, column)
    for layer, rows in enumerate(LAYERS)
    for row, names in enumerate(rows)
    for column, module in enumerate(names)
}
#: Who may import which framework; ``salmon`` only inside functions, since it is an optional extra under the GPL.
FRAMEWORKS = {
    "beaker": {"namespace", "websession"},
    "prometheus_client": {"report"},
    "salmon": {"router", "mailqueue", "confirmations"},
    "spyne": {"spynetransport"},
    "webob": {"report", "slatesession", "webanswers"},
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found["" if name == "__init__" else name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides the layer"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in whole if name.removeprefix(f"{PACKAGE}.") in MODULES}
            found |= ours or {node.module or ""}
    return {name.removeprefix(f"{PACKAGE}.") for name in found if name.startswith(f"{PACKAGE}.")}


def test_every_module_has_its_place() -> None:
    assert MODULES.keys() - {""} == PLACES.keys()


@pytest.mark.parametrize("module", sorted(PLACES))
def test_imports_point_down(module: str) -> None:
    layer, row, column = PLACES[module]
    for name in imported(MODULES[module]):
        their_layer, their_row, their_column = PLACES[name]
        assert their_layer < layer or (their_layer == layer and their_row == row and their_column < column), (
            f"{module} imports {name}, which is not below it"
        )


def test_the_scheme_table_points_down_too() -> None:
    for target in stores.SCHEMES.values():
        module, _, name = target.partition(":")
        assert PLACES[module.removeprefix(f"{PACKAGE}.")][0] <= PLACES["stores"][0]
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_in_their_rooms(framework: str) -> None:
    for module, path in MODULES.items():
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
    heavy = {"beaker", "webob", "salmon", "lmdb", "cffi", "click", "rich", "orjson", "uvloop", "simplejson", "asyncio"}
    assert not heavy & set(loaded.stdout.split())


def test_nothing_of_ours_empties_a_server() -> None:
    """Others may share it. The command is spoken and served, and offered to users of pytyrant's interface."""
    for module in PLACES.keys() - {"tyrant.commands", "tyrant.verbs", "tyrant.pytyrant", "tyrant.memcached"}:
        assert "VANISH" not in MODULES[module].read_text(), module
