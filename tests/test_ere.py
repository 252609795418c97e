"""Regular expressions from anybody: read as POSIX says, and matched in time linear in the text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore.tyrant.ere import Pattern, PatternError


@pytest.mark.parametrize(
    ("source", "found", "missed"),
    [
        (b"", [b"", b"a"], []),
        (b"b", [b"b", b"abc"], [b"", b"a"]),
        (b"^b", [b"bc"], [b"ab"]),
        (b"b$", [b"ab"], [b"ba"]),
        (b"^$", [b""], [b"a"]),
        (b"^f[0-2]$", [b"f0", b"f2"], [b"f3", b"f00"]),
        (b"a.c", [b"abc", b"a\x00c", b"a\xffc", b"a\nc"], [b"ac"]),
        (b"^a|b$", [b"ax", b"xb"], [b"xax"]),
        (b"^(a|)b$", [b"ab", b"b"], [b"aab"]),
        (b"^(ab)*$", [b"", b"abab"], [b"aba"]),
        (b"^a+b?$", [b"a", b"aab"], [b"b", b"abb"]),
        (b"^a{2}$", [b"aa"], [b"a", b"aaa"]),
        (b"^a{2,}$", [b"aa", b"aaaa"], [b"a"]),
        (b"^a{1,2}$", [b"a", b"aa"], [b"", b"aaa"]),
        (b"^a{0}$", [b""], [b"a"]),
        (b"^a{1,2}{2}$", [b"aa", b"aaaa"], [b"a", b"aaaaa"]),
        (rb"^\.\*\[\]\\$", [rb".*[]\\"[:-1]], [b"x"]),
        (b"^[]x-]$", [b"]", b"x", b"-"], [b"y"]),
        (b"^[^]x]$", [b"y", b"\xff"], [b"]", b"x"]),
        (b"^[[:alpha:]_][[:alnum:]_]*$", [b"_a1"], [b"1a", b""]),
        (b"^[[:digit:][:space:]]+$", [b"1 2\t"], [b"a"]),
        (b"^[a-]$", [b"a", b"-"], [b"b"]),
        (rb"^[\.]$", [b"\\", b"."], [b"x"]),
        (b"]}", [b"]}"], [b"]"]),
        ("^é$".encode(), ["é".encode()], [b"e"]),
    ],
)
def test_patterns_are_read_as_posix_says(source: bytes, found: list[bytes], missed: list[bytes]) -> None:
    pattern = Pattern(source)
    assert [text for text in found if not pattern.found_in(text)] == []
    assert [text for text in missed if pattern.found_in(text)] == []


def test_case_is_ignored_on_request() -> None:
    pattern = Pattern(b"^sEs[a-c]$", ignore_case=True)
    assert pattern.found_in(b"SesB")
    assert not Pattern(b"^sEs[a-c]$").found_in(b"SesB")
    assert not Pattern(b"^[^a]$", ignore_case=True).found_in(b"A")


@pytest.mark.parametrize(
    "source",
    [
        b"(", b")", b"a)", b"[", b"[a", b"[]", b"*a", b"+", b"a|*", b"(*a)", b"{1}", b"a{", b"a{x}", b"a{1", b"a{2,1}",
        b"a{256}", b"[z-a]", b"[[:nope:]]", b"[[:alpha:", b"[[.a.]]", b"[[=a=]]", b"\\", b"\\d", b"\\1",
        b"(" * 101 + b")" * 101, b"(a{255}){255}", b"a" * 2000,
    ],
)  # fmt: skip
def test_what_is_no_pattern_or_too_large_is_refused(source: bytes) -> None:
    with pytest.raises(PatternError):
        Pattern(source)


atoms = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^a]", "[a-c]", "^", "$", "()"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "{0}"])).map(
            lambda parts: f"({parts[0]}){parts[1]}"
        ),
    ),
    max_leaves=8,
)


@given(patterns.map(str.encode), st.text("abc", max_size=8).map(str.encode))
def test_it_finds_what_pythons_own_finds(source: bytes, text: bytes) -> None:
    assert Pattern(source).found_in(text) == bool(re.search(source, text, re.DOTALL))


@pytest.mark.parametrize(
    "source", [b"(a*)*b", b"(a|a)*b", b"(a+)+b", b"a*a*a*a*a*b", b"(a?){60}b", b"(.{1,20}){1,20}b"]
)
def test_no_pattern_takes_long(source: bytes) -> None:
    begun = time.process_time()
    assert not Pattern(source).found_in(b"a" * 20_000)
    assert time.process_time() - begun < 2
