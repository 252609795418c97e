"""Which commands clients may use. Masking one closes every way to the same thing.

ttserver's masks have gaps: where ``put`` is masked, ``misc put`` and an HTTP POST still store; groups are flags of
their own, so that masking all and unmasking one opens nothing; and some masked commands answer as if they had found
nothing. Here a mask is a set of names of single commands. What a request does is a set of the same names, whatever
its protocol, and it is refused if one of them is masked.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.tyrant.calls import Call, Door
from beaker_statestore.tyrant.commands import (
    APPEND,
    CAS,
    COMMANDS,
    DECR,
    EXT,
    INCR,
    MISC,
    PREPEND,
    PROBE,
    REPLACE,
    SCAN,
    STATISTICS,
    WAIT,
    Request,
)
from beaker_statestore.tyrant.texts import function_name

__all__ = ["CLOSED", "OPEN", "Mask"]

#: The name for the operator's own ``ext`` functions.
FUNCTIONS: Final = "functions"

_COMMAND_NAMES: Final = frozenset(command.name for command in COMMANDS.values())
_READING: Final = frozenset({"get", "mget", "vsiz", "iterinit", "iternext", "fwmkeys", "rnum", "size", "stat"})
_WRITING: Final = frozenset({"put", "putkeep", "putcat", "putshl", "putnr", "out", "addint", "adddouble", "vanish"})
_MANAGING: Final = frozenset({"sync", "optimize", "copy", "restore", "setmst"})

#: What masks may name besides single commands, and what it stands for.
_GROUPS: Final[Mapping[str, frozenset[str]]] = {
    "all": _COMMAND_NAMES | {FUNCTIONS},
    "allread": _READING,
    "allwrite": _WRITING,
    "allmanage": _MANAGING,
    "slave": frozenset({"repl"}),
    **{door.value: frozenset({door.value}) for door in Door},
}
#: All that is masked in the end is among these.
_LEAVES: Final = _GROUPS["all"] | {door.value for door in Door}

#: What a session store never needs, and an attacker likes.
_DANGEROUS: Final = frozenset({"vanish", "copy", "restore", "setmst", "optimize", FUNCTIONS})

#: Commands that do what another does, under another name.
_SAME: Final[Mapping[str, frozenset[str]]] = {
    "putnr": frozenset({"put"}),
    "mget": frozenset({"get"}),
    "stat": frozenset({"rnum", "size"}),
}
#: What the functions of ``misc`` do. Those that are not here are not carried out.
_MISC: Final[Mapping[bytes, frozenset[str]]] = {
    name.encode(): frozenset(effects.split())
    for name, effects in {
        "put": "put",
        "putkeep": "putkeep",
        "putcat": "putcat",
        "putdup": "put",
        "putdupback": "put",
        "putlist": "put",
        "out": "out",
        "outlist": "out",
        "get": "get",
        "getlist": "get mget",
        "getpart": "get",
        "iterinit": "iterinit",
        "iternext": "iternext get",
        "sync": "sync",
        "optimize": "optimize",
        "vanish": "vanish",
        "regex": "fwmkeys get",
        "range": "fwmkeys get",
        "error": "",
        "defrag": "optimize",
        "cacheclear": "",
        "setindex": "optimize",
        "search": "fwmkeys get",
        "metasearch": "fwmkeys get",
        "genuid": "",
    }.items()
}
#: An argument with which a search removes what it finds: Tokyo Cabinet reads it up to a zero byte, in either case.
_REMOVING: Final = re.compile(rb"out|remove", re.IGNORECASE)
#: What the built-in functions of ``ext`` do. Every other one is the operator's.
_EXT: Final[Mapping[bytes, frozenset[str]]] = {
    PROBE: frozenset(),
    CAS: frozenset({"put", "out"}),
    SCAN: frozenset({"fwmkeys"}),
    WAIT: frozenset({"vsiz"}),
    STATISTICS: frozenset({"stat", "rnum", "size"}),
    REPLACE: frozenset({"put"}),
    APPEND: frozenset({"putcat"}),
    PREPEND: frozenset({"put"}),
    INCR: frozenset({"put", "addint"}),
    DECR: frozenset({"put", "addint"}),
}


@dataclass(frozen=True, slots=True)
class Mask:
    """What clients may not use: names of commands, ``functions``, and names of protocols."""

    forbidden: frozenset[str]

    @classmethod
    def of(cls, masked: Iterable[str], unmasked: Iterable[str], default: Mask) -> Mask:
        """The mask that these names make, whatever their order.

        What is said of one command goes before what is said of a group, that before what is said of all, and that
        before ``default``. What is both masked and unmasked is masked.

        :param masked: names of commands, groups and protocols, each text perhaps several with commas between.
        :raises ConfigurationError: a name is unknown.
        """
        closed, opened = _ranks(masked, "--mask"), _ranks(unmasked, "--unmask")
        return cls(
            frozenset(
                leaf
                for leaf in _LEAVES
                if (closed[leaf] >= opened[leaf] if closed[leaf] or opened[leaf] else leaf in default.forbidden)
            )
        )

    def forbids(self, call: Call) -> bool:
        """Whether ``call`` must not be carried out."""
        if not self.forbidden:
            return False
        if call.door.value in self.forbidden:
            return True
        return call.request is not None and not self.forbidden.isdisjoint(effects(call.request, call.door))


#: Nothing is forbidden.
OPEN: Final = Mask(frozenset())
#: What is for TCP unless somebody says otherwise: any program of this machine can come that way.
CLOSED: Final = Mask(_DANGEROUS)


def effects(request: Request, door: Door) -> frozenset[str]:
    """The names of all that ``request`` does."""
    command, arguments = request
    name = command.name
    if command is MISC:
        function = function_name(arguments[0])
        removes = function.endswith(b"search") and any(map(_REMOVING.match, arguments[1]))
        # With conditions that all records fulfil, such a search is as good as vanish.
        return _MISC.get(function, frozenset()) | {name} | ({"out", "vanish"} if removes else frozenset())
    if command is EXT:
        known = _EXT.get(arguments[0])
        # memcached's commands only travel as functions.
        own = frozenset() if door is Door.MEMCACHED else frozenset({name})
        return own | (known if known is not None else {FUNCTIONS})
    return _SAME.get(name, frozenset()) | {name}


def _ranks(names: Iterable[str], option: str) -> dict[str, int]:
    """For each leaf that ``names`` mention, how specific the most specific mention is, from 1."""
    ranks = dict.fromkeys(_LEAVES, 0)
    for name in (name.strip() for text in names for name in text.split(",")):
        if name in _GROUPS and name not in _LEAVES:
            leaves, rank = _GROUPS[name], 1 if name == "all" else 2
        elif name in _LEAVES:
            leaves, rank = frozenset({name}), 3
        else:
            known = sorted(_LEAVES | _GROUPS.keys())
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it may be {', '.join(known)}"
            raise ConfigurationError(f"{option} {name}: no such command or group; {hint}")
        for leaf in leaves:
            ranks[leaf] = max(ranks[leaf], rank)
    return ranks
