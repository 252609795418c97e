"""POSIX extended regular expressions over bytes, matched in time linear in the text, whatever the pattern.

``misc regex`` takes patterns from anybody who reaches the port. Python's own ``re`` backtracks, so a short pattern can
keep it busy for years, and it reads POSIX classes such as ``[[:alpha:]]`` as something else. This one follows all
alternatives at once (Ken Thompson, "Regular Expression Search Algorithm", 1968) and remembers the sets of them that it
has met. It tells only whether a text contains a match, which is all that is asked.

Spoken: the expressions of POSIX.1-2017, chapter 9.4, in the C locale. Refused, rather than misread: collating symbols
and equivalence classes (``[[.a.]]``, ``[[=a=]]``), and a backslash before a letter or a digit, which POSIX leaves
undefined.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Final, NamedTuple

#: Room for a pattern once its repetitions are written out, in instructions.
MAX_PROGRAM: Final = 1024
#: POSIX's RE_DUP_MAX, the largest count in braces.
MAX_REPEATS: Final = 255
#: So many places are remembered, over all steps, before the memory is begun anew.
MAX_REMEMBERED: Final = 100_000

_ANY: Final = frozenset(range(256))
_SPECIAL: Final = frozenset(b"^.[$()|*+?{\\")
_CLASSES: Final[dict[bytes, frozenset[int]]] = {
    b"alnum": frozenset((string.ascii_letters + string.digits).encode()),
    b"alpha": frozenset(string.ascii_letters.encode()),
    b"blank": frozenset(b" \t"),
    b"cntrl": frozenset((*range(32), 127)),
    b"digit": frozenset(string.digits.encode()),
    b"graph": frozenset(range(33, 127)),
    b"lower": frozenset(string.ascii_lowercase.encode()),
    b"print": frozenset(range(32, 127)),
    b"punct": frozenset(string.punctuation.encode()),
    b"space": frozenset(b" \t\n\v\f\r"),
    b"upper": frozenset(string.ascii_uppercase.encode()),
    b"xdigit": frozenset(string.hexdigits.encode()),
}


class PatternError(ValueError):
    """The pattern is no extended regular expression, or none that is spoken here."""


class _Byte(NamedTuple):
    """Go on behind one byte out of ``of``."""

    of: frozenset[int]


class _Fork(NamedTuple):
    """Go on at all of these, relative to here."""

    to: tuple[int, ...]


class _Begin(NamedTuple):
    """Go on only at the beginning of the text."""


class _End(NamedTuple):
    """Go on only at the end of the text."""


#: Instructions, each going on with the next unless it says otherwise. Behind the last, the text has matched.
Program = list["_Byte | _Fork | _Begin | _End"]


class Pattern:
    """A compiled expression."""

    def __init__(self, source: bytes, *, ignore_case: bool = False) -> None:
        """:raises PatternError: ``source`` cannot be read."""
        self._program = _Parser(source, ignore_case).parse()
        self._steps: dict[tuple[frozenset[int], int], frozenset[int]] = {}
        self._remembered = 0
        self._restart = self._reachable((0,))

    @property
    def size(self) -> int:
        """How many instructions it has, each of which a byte of a text can cost."""
        return len(self._program) + 1

    def found_in(self, text: bytes) -> bool:
        """Whether some part of ``text`` matches."""
        matched = len(self._program)
        places = self._reachable((0,), begin=True)
        for byte in text:
            if matched in places:
                return True
            step = (places, byte)
            known = self._steps.get(step)
            if known is None:
                known = self._step(places, byte)
                self._remember(step, known)
            places = known
        return matched in self._reachable(places, begin=not text, end=True)

    def _remember(self, step: tuple[frozenset[int], int], places: frozenset[int]) -> None:
        self._remembered += len(places)
        if self._remembered > MAX_REMEMBERED:
            self._steps.clear()
            self._remembered = len(places)
        self._steps[step] = places

    def _step(self, places: frozenset[int], byte: int) -> frozenset[int]:
        """Where one can be behind ``byte``; a match may begin anywhere, hence also at the start of the program."""
        taken = (
            place + 1
            for place in places
            if place < len(self._program)
            and isinstance(instruction := self._program[place], _Byte)
            and byte in instruction.of
        )
        return self._reachable(taken) | self._restart

    def _reachable(self, places: Iterable[int], *, begin: bool = False, end: bool = False) -> frozenset[int]:
        """``places`` and all that can be reached from them without reading on."""
        reached: set[int] = set()
        pending = list(places)
        while pending:
            place = pending.pop()
            if place in reached:
                continue
            reached.add(place)
            if place == len(self._program):
                continue
            instruction = self._program[place]
            if isinstance(instruction, _Fork):
                pending += (place + distance for distance in instruction.to)
            elif (isinstance(instruction, _Begin) and begin) or (isinstance(instruction, _End) and end):
                pending.append(place + 1)
        return frozenset(reached)


class _Parser:
    """Reads a pattern by recursive descent and writes its program."""

    def __init__(self, source: bytes, ignore_case: bool) -> None:
        self._source = source
        self._position = 0
        self._ignore_case = ignore_case

    def parse(self) -> Program:
        program = self._alternatives(depth=0)
        if self._position < len(self._source):
            raise PatternError("there is a ) without its (")
        return program

    def _peek(self) -> bytes:
        return self._source[self._position : self._position + 1]

    def _accept(self, wanted: bytes) -> bool:
        if not self._source.startswith(wanted, self._position):
            return False
        self._position += len(wanted)
        return True

    def _alternatives(self, depth: int) -> Program:
        program = self._sequence(depth)
        while self._accept(b"|"):
            other = self._sequence(depth)
            program = [_Fork((1, len(program) + 2)), *program, _Fork((len(other) + 1,)), *other]
            if len(program) > MAX_PROGRAM:
                raise PatternError("the pattern is too large")
        return program

    def _sequence(self, depth: int) -> Program:
        program: Program = []
        while self._peek() not in (b"", b"|", b")"):
            program += self._repeated(self._atom(depth))
            if len(program) > MAX_PROGRAM:
                raise PatternError("the pattern is too large")
        return program

    def _repeated(self, atom: Program) -> Program:
        while True:
            if self._accept(b"*"):
                least, most = 0, None
            elif self._accept(b"+"):
                least, most = 1, None
            elif self._accept(b"?"):
                least, most = 0, 1
            elif self._accept(b"{"):
                least, most = self._braces()
            else:
                return atom
            if len(atom) * max(least, most or 0, 1) > MAX_PROGRAM:
                raise PatternError("the pattern is too large")
            maybe = [_Fork((1, len(atom) + 1)), *atom]
            if most is None:
                tail: Program = [_Fork((1, len(atom) + 2)), *atom, _Fork((-len(atom) - 1,))]
            else:
                tail = maybe * (most - least)
            atom = atom * least + tail

    def _braces(self) -> tuple[int, int | None]:
        least = self._number()
        most: int | None = least
        if self._accept(b","):
            most = None if self._peek() == b"}" else self._number()
        if not self._accept(b"}") or max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            raise PatternError("what is in the braces is no count")
        return least, most

    def _number(self) -> int:
        start = self._position
        while self._peek().isdigit() and self._position - start < 4:
            self._position += 1
        if start == self._position:
            raise PatternError("there is no number in the braces")
        return int(self._source[start : self._position])

    def _atom(self, depth: int) -> Program:
        if self._accept(b"("):
            if depth == 100:
                raise PatternError("groups are nested too deep")
            group = self._alternatives(depth + 1)
            if not self._accept(b")"):
                raise PatternError("there is a ( without its )")
            return group
        if self._accept(b"["):
            return [_Byte(self._bracket())]
        if self._accept(b"."):
            return [_Byte(_ANY)]
        if self._accept(b"^"):
            return [_Begin()]
        if self._accept(b"$"):
            return [_End()]
        escaped = self._accept(b"\\")
        literal = self._peek()
        if not literal or (literal.isalnum() if escaped else literal[0] in _SPECIAL):
            raise PatternError(f"there is nothing that {self._source[self._position - 1 :][:2]!r} could mean")
        self._position += 1
        return [_Byte(self._either_case(frozenset(literal)))]

    def _bracket(self) -> frozenset[int]:
        complement = self._accept(b"^")
        members: set[int] = set()
        first = True
        while first or not self._accept(b"]"):
            first = False
            if self._source.startswith((b"[.", b"[="), self._position):
                raise PatternError("collating symbols and equivalence classes are not spoken here")
            if self._accept(b"[:"):
                name, closed, _ = self._source[self._position :].partition(b":]")
                if not closed or name not in _CLASSES:
                    raise PatternError(f"there is no class {name!r}")
                self._position += len(name) + 2
                members |= _CLASSES[name]
                continue
            low = high = self._member()
            rest = self._source[self._position : self._position + 2]
            if len(rest) == 2 and rest[:1] == b"-" and rest != b"-]":
                self._position += 1
                high = self._member()
            if high < low:
                raise PatternError("a range in the brackets runs backwards")
            members.update(range(low, high + 1))
        folded = self._either_case(frozenset(members))
        return _ANY - folded if complement else folded

    def _member(self) -> int:
        member = self._peek()
        if not member:
            raise PatternError("there is a [ without its ]")
        self._position += 1
        return member[0]

    def _either_case(self, members: frozenset[int]) -> frozenset[int]:
        if not self._ignore_case:
            return members
        return members | frozenset(bytes(members).lower()) | frozenset(bytes(members).upper())
