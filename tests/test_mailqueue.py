"""Mails in the shared store: Salmon's queue, without its Maildir, and without its ways to lose a mail."""

from __future__ import annotations

import contextlib
import itertools
import json
import smtplib
import socket
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import getaddresses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from salmon import mail, queue, routing
from salmon._vendor import asyncore
from salmon.server import SMTPError, SMTPReceiver

from beaker_statestore import mailqueue
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    DocumentRefusedError,
    OutcomeUnknown,
    QueueFullError,
    StateStoreError,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.fanout import Queue
from beaker_statestore.mailqueue import (
    LONGEST_ANSWER,
    LONGEST_DIALOGUE,
    SENDING_LEASE,
    Envelope,
    MailQueue,
    QueuedMail,
    count_by_queue,
    smtp,
)
from beaker_statestore.queuedmail import LOOKED_THROUGH, MULTIPARTS, canonical, one_address
from beaker_statestore.router import install
from beaker_statestore.stores import open_store
from beaker_statestore.testing import FaultyStore, ServerProcess, free_port

#: Salmon's own use of what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Access to .* on SMTPChannel:DeprecationWarning")

_numbers = itertools.count(1)

MAIL = b"From: Zed <zed@example.com>\r\nTo: news@localhost\r\nSubject: hello\r\n\r\nbody\r\n"


@pytest.fixture(params=["memory", "tyrant", "lmdb"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "lmdb":
        return {"url": f"lmdb://{tmp_path}/mails.lmdb"}
    url = "memory:" if request.param == "memory" else request.getfixturevalue("tyrant_server").url
    return {"url": url, "prefix": f"mails{next(_numbers)}."}


@pytest.fixture
def mails(options: dict[str, Any]) -> MailQueue:
    return _queue(options)


def _queue(options: dict[str, Any], name: str = "undeliverable", **limits: Any) -> MailQueue:
    options = dict(options)
    return MailQueue(options.pop("url"), name, **limits, **options)


def received(data: bytes = MAIL, sender: str = "Zed@Example.com") -> Any:
    return mail.MailRequest(("127.0.0.1", 4711), sender, ["News@localhost"], data)


# What salmon.queue.Queue does


def test_what_is_pushed_is_popped_once_the_oldest_first(mails: MailQueue) -> None:
    keys = [mails.push(f"Subject: {number}\n\nbody\n") for number in range(20)]
    assert keys == sorted(set(keys))
    assert mails.keys() == keys
    popped = [mails.pop() for _ in range(21)]
    assert [key for key, _ in popped] == [*keys, None]
    assert [request["subject"] for _, request in popped if request is not None] == [str(number) for number in range(20)]
    assert len(mails) == mails.count() == 0


def test_of_the_keys_that_are_listed_the_oldest_is_popped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokyo Tyrant's hash databases list them in no order."""
    mails = MailQueue("memory:", f"order{next(_numbers)}")
    keys = [mails.push(MAIL) for _ in range(4)]
    monkeypatch.setattr(mails._mails, "pages", lambda: iter([keys[1::-1], keys[:1:-1]]))
    assert [mails.pop()[0] for _ in range(5)] == [*keys, None]


def test_what_is_got_stays(mails: MailQueue) -> None:
    key = mails.push(MAIL)
    assert mails.get(key).Data == mails.get(key).Data == MAIL
    assert mails.remove(key)
    assert (mails.get(key), mails.remove(key), mails.keys()) == (None, False, [])


# Salmon's queue leaves the file of a message that it has read to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# And it warns of its own choice of a charset.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UnicodeWarning")
@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.sampled_from(["bytes", "str", "request", "response"]), st.integers(0, 99)),
            st.tuples(st.sampled_from(["remove", "get"]), st.integers(0, 5)),
            st.tuples(st.sampled_from(["pop all", "clear"])),
        )
    )
)
def test_it_answers_as_salmons_own(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]) -> None:
    theirs = queue.Queue(str(tmp_path_factory.mktemp("maildir") / "queue"))
    ours = MailQueue("memory:", f"differential{next(_numbers)}")
    keys: list[tuple[str, str]] = []
    for verb, *arguments in steps:
        if verb == "push":
            text = f"From: zed@example.com\nTo: news@localhost\nSubject: {arguments[1]}\n\nbody\n"
            message = {
                "bytes": text.encode(),
                "str": text,
                "request": received(text.encode()),
                "response": mail.MailResponse("a@localhost", "b@localhost", str(arguments[1]), "body"),
            }[arguments[0]]
            keys.append((theirs.push(message), ours.push(message)))
        elif verb in ("remove", "get"):
            if len(keys) <= arguments[0]:
                continue
            their_key, our_key = keys[arguments[0]]
            assert _said(theirs.get(their_key)) == _said(ours.get(our_key))
            if verb == "remove":
                theirs.remove(their_key)
                ours.remove(our_key)
                del keys[arguments[0]]
        elif verb == "pop all":
            popped = [[each.pop() for _ in range(len(keys) + 1)] for each in (theirs, ours)]
            assert popped[0][-1] == popped[1][-1] == (None, None)
            assert Counter(_said(m) for _, m in popped[0]) == Counter(_said(m) for _, m in popped[1])
            keys = []
        else:
            theirs.clear()
            ours.clear()
            keys = []
        assert len(theirs) == len(ours) == theirs.count() == ours.count() == len(keys)
        assert ours.keys() == [key for _, key in keys]
    ours.clear()


def _said(request: Any) -> Any:
    """What handlers see of a mail. (Salmon writes a MailRequest anew where we keep what was received.)"""
    return request and (request["subject"], request["from"], request["to"], request.body().strip())


# What is ours: nothing is lost, and everything can be read


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_come_back(data: bytes) -> None:
    mails = MailQueue("memory:", "any bytes", store_key="0123456789abcdef" * 4)
    key = mails.push(data)
    kept = mails.read(key)
    assert kept is not None
    assert kept.data == data
    kept.text()
    kept.headers()
    request = mails.get(key)
    assert request is None or request.Data == data
    mails.remove(key)


def test_a_header_that_would_take_long_to_decode_is_shown_as_it_is(mails: MailQueue) -> None:
    kept = mails.read(mails.push(b"Subject: " + b"=?a?q? " * 9000 + b"\n\ntext"))
    assert kept is not None
    began = time.process_time()
    assert dict(kept.headers())["Subject"].startswith("=?a?q? =?a?q?")
    assert time.process_time() - began < 5  # it took twelve


def test_a_mail_is_a_readable_document(mails: MailQueue, options: dict[str, Any]) -> None:
    data = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\nFrom: José <josé@exämple.com>\n\nein Gruß\n".encode()
    key = mails.push(received(data))
    stored = open_store(options["url"]).get(f"{options.get('prefix', '')}mail:undeliverable:{key}".encode())
    assert stored is not None
    document = json.loads(stored)
    assert abs(document.pop("at") - time.time()) < 60
    assert document == {
        "envelope": {"peer": ["127.0.0.1", 4711], "from": "zed@example.com", "to": "news@localhost"},
        "mail": data.decode(),
    }


@pytest.mark.parametrize("data", [b"Subject: \xff\n\n", b"Subject: a\n\n\x00", b"\x80"])
def test_what_is_no_text_is_base64(data: bytes) -> None:
    mails = MailQueue("memory:", "no text")
    key = mails.push(data)
    document = mails._mails.read(key)
    assert document is not None
    assert "mail" not in document
    assert "mail_base64" in document
    assert mails.get(key).Data == data


def test_the_envelope_is_kept(mails: MailQueue) -> None:
    mails.push(received())
    _, request = mails.pop()
    assert request is not None
    assert (request.Peer, request.From, request.To) == (("127.0.0.1", 4711), "zed@example.com", "news@localhost")


def test_of_a_bounce_salmon_has_the_header_and_so_has_it_again(mails: MailQueue) -> None:
    header = "Mail System <postmaster@mx.Example>"
    bounce = received(f"From: {header}\n\n".encode(), sender="")
    assert bounce.From == header
    key = mails.push(bounce)
    assert mails.get(key).From == header
    kept = mails.read(key)
    assert kept is not None
    assert kept.sender == ""


@pytest.mark.parametrize(
    ("header", "sender"),
    [
        ("From: mailer-daemon@evil.example", ""),
        ("From: MAILER-DAEMON@evil.example", ""),
        ("From: z@evil.example\nContent-Type: multipart/report; report-type=delivery-status", ""),
        ("From: z@evil.example\nAuto-Submitted: auto-replied", ""),
        ("From: z@evil.example\nReturn-Path: <>", ""),
        ("From: z@evil.example\nAuto-Submitted: no", "z@evil.example"),
        ("From: z@evil.example\nReturn-Path: <z@evil.example>", "z@evil.example"),
    ],
)
def test_nobody_is_the_sender_of_what_a_program_wrote(header: str, sender: str) -> None:
    """Of a bounce whose From header is a bare address, Salmon has that, as if the envelope had named it."""
    bounce = received(f"{header}\n\n".encode(), sender="")
    envelope = Envelope(bounce.Peer, bounce.From, bounce.To)
    for kept in (QueuedMail("a", 0.0, bounce.Data, envelope), QueuedMail("b", 0.0, bounce.Data, None)):
        assert kept.sender == sender


MULTIPART = (
    b"From: z@example.com\nContent-Type: multipart/mixed; boundary=xyz\n\n--xyz\nContent-Type: text/plain\n\nhello\n"
    b"--xyz\nContent-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\nAAEC\n--xyz--\n"
)


@pytest.mark.parametrize(
    "data", [MAIL, MULTIPART, b"", b"\xff\xfe", b"Content-Type: a/b/c; =\n\n\xe4", b"To: \xe4\n\n"]
)
def test_a_request_that_nobody_has_changed_is_kept_as_it_was_received(data: bytes) -> None:
    mails = MailQueue("memory:", "as received")
    kept = mails.read(mails.push(received(data)))
    assert kept is not None
    assert kept.data == data


def test_what_a_handler_has_made_of_a_request_is_kept_as_text() -> None:
    mails = MailQueue("memory:", "tagged")
    request = received(MULTIPART)
    request["X-Tagged"] = "yes"
    assert mails.get(mails.push(request))["x-tagged"] is None
    assert mails.get(mails.push(str(request)))["x-tagged"] == "yes"
    mails.clear()


def test_other_messages(mails: MailQueue) -> None:
    message = EmailMessage()
    message["Subject"] = "grüße"
    message.set_content("ß")
    kept = mails.read(mails.push(message))
    assert kept is not None
    assert (kept.data, kept.subject, kept.text(), kept.envelope) == (message.as_bytes(), "grüße", "ß\n", None)
    with pytest.raises(DocumentRefusedError, match="push bytes"):
        mails.push("\ud800")


@pytest.mark.parametrize(
    ("data", "subject", "text"),
    [
        (b"Subject: =?utf-8?q?a=0A=1B[31mb?=\n\nx", "a \x1b[31mb", "x"),
        (b"Subject: =?nonsense?q?a?=\n\nx", "=?nonsense?q?a?=", "x"),
        (b"Subject: =?utf-8?b?a?=\nContent-Type: text/plain; charset=nonsense\n\n\xc3\xa4", "=?utf-8?b?a?=", "ä"),
        (b"Subject: " + b"x" * 10_000 + b"\n\n", "x" * 199 + "…", ""),
        (b"Subject: \xe4\n\n", "\ufffd", ""),
        (b"Content-Type: text/html\n\n<b>", "", None),
        (b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\nContent-Type: multipart/mixed\n\n" * 3000, "", None),
        # What Python's parsers raise something for: UnicodeEncodeError, CharsetError, RecursionError.
        (b"Subject: Gr\xc3\xbc\xc3\x9fe \xe2\x80\n\nx", "Grüße \ufffd", "x"),
        ("Subject: =?ü?q?x?=\n\nx".encode(), "=?ü?q?x?=", "x"),
        (b"Subject: =?hex?q?x?=\n\nx", "=?hex?q?x?=", "x"),
        (b"From: " + b"(" * 3000 + b"\nSubject: a\n\nx", "a", "x"),
    ],
)
def test_what_anybody_makes_up_can_be_looked_at(data: bytes, subject: str, text: str | None) -> None:
    mails = MailQueue("memory:", "made up")
    kept = mails.read(mails.push(data))
    assert kept is not None
    assert (kept.subject, kept.text(), kept.recipients) == (subject, text, [])
    assert kept.headers()
    assert kept.sender == ""
    mails.clear()


def test_no_mail_keeps_who_reads_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = BytesParser.parsebytes

    def parsebytes(parser: BytesParser, data: bytes) -> Any:
        parsed.append(data)
        return real(parser, data)

    monkeypatch.setattr(BytesParser, "parsebytes", parsebytes)
    nested = "".join(
        f"Content-Type: Multipart/mixed; boundary=b{number}\n\n--b{number}\n" for number in range(MULTIPARTS + 1)
    )
    many = QueuedMail("many", 0.0, nested.encode() + b"\nx", None)
    long = QueuedMail("long", 0.0, b"\n" + b"x" * 2 * LOOKED_THROUGH, None)
    assert many.text() is None
    assert long.text() == "x" * (LOOKED_THROUGH - 1)
    assert [len(data) for data in parsed] == [LOOKED_THROUGH]


ADDRESSES = {
    "zed@example.com": "zed@example.com",
    " Zed@Example.COM\r\n": "Zed@Example.COM",
    "Zed <zed@example.com>": "zed@example.com",
    '"Shaw, Zed (the A.)" <zed@example.com>': "zed@example.com",
    "zed@[192.0.2.1]": "zed@[192.0.2.1]",
    "josé@exämple.com": "josé@exämple.com",
    None: None,
    "": None,
    "zed": None,
    "victim@x.org,attacker@y.org": None,
    "attacker@y.org (\r\nBcc: victim@x.org)": None,
    "attacker@y.org\r\nBcc: victim@x.org": None,
    "victim@x.org <attacker@y.org>": None,
    '"x\r\nBcc: v@x" <attacker@y.org>': None,
    "a@b> SIZE=1 X=<c": None,
    "<a@b>, c@d": None,
    "a@b\x00": None,
    "(" * 3000: None,
    "a" * 70_000 + "@example.com": None,
}


@pytest.mark.parametrize("text", ADDRESSES, ids=lambda text: repr(text)[:20])
def test_one_address_is_one(text: str | None) -> None:
    assert one_address(text) == ADDRESSES[text]


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from('ab@.,<>() "\\:;[]\r\n\x00%é\u212a')))
def test_whatever_reads_an_address_reads_the_same(text: str) -> None:
    for known in (canonical(text), canonical(f"Zed <{text}>")):
        if known is not None:
            assert getaddresses([known]) == [("", known)]
            assert canonical(known) == known
            assert known.isprintable()


def test_a_mail_that_salmon_cannot_read_is_passed_over_and_stays(
    mails: MailQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = mails.push(b"Subject: bad\n\n")
    good = mails.push(b"Subject: good\n\n")
    real = mail.encoding.from_string

    def from_string(data: bytes) -> Any:
        if b"bad" in data:
            raise mail.encoding.EncodingError("bad")
        return real(data)

    monkeypatch.setattr(mail.encoding, "from_string", from_string)
    assert mails.pop()[0] == good
    assert mails.pop() == (None, None)
    assert mails.keys() == [bad]
    assert bad in caplog.text


def test_a_damaged_record_does_not_hide_the_others(mails: MailQueue, caplog: pytest.LogCaptureFixture) -> None:
    key = mails.push(MAIL)
    for number, damaged in enumerate(
        [b"{}", b"garbage", b'{"mail": 3, "at": 1}', b'{"mail_base64": "\xc3\xa4", "at": 1}']
    ):
        mails._mails.store.put(mails._mails.records.record(f"damaged{number}"), damaged)
    assert [kept.key for kept in mails.mails()] == [key]
    assert [mails.pop()[0], mails.pop()[0]] == [key, None]
    assert "damaged3" in caplog.text
    with pytest.raises(DocumentDamagedError):
        mails.read("damaged0")


def test_clear_touches_only_its_own(mails: MailQueue, options: dict[str, Any]) -> None:
    neighbours = [_queue(options, "undeliverable.x"), _queue({**options, "prefix": options.get("prefix", "") + "x."})]
    for each in (mails, *neighbours):
        each.push(MAIL)
    mails.clear()
    assert [len(each) for each in (mails, *neighbours)] == [0, 1, 1]


def test_queues_are_counted(options: dict[str, Any]) -> None:
    for name, number in (("b:%", 2), ("a", 1)):
        for _ in range(number):
            _queue(options, name).push(MAIL)
    counts = count_by_queue(**_named(options))
    assert list(counts.items()) == [("a", 1), ("b:%", 2)]


def _named(options: dict[str, Any]) -> dict[str, Any]:
    return {"store" if name == "url" else name: value for name, value in options.items()}


def test_an_empty_queue_is_a_queue(mails: MailQueue) -> None:
    assert mails


def test_mails_end_with_their_lifetime(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mails = _queue(options, "pending", lifetime=100)
    key = mails.push(MAIL)
    assert mails.read(key) is not None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert (mails.read(key), mails.keys(), len(mails), mails.pop()) == (None, [], 0, (None, None))


# Limits


def test_what_is_too_large_is_refused_with_the_size(options: dict[str, Any]) -> None:
    mails = _queue(options, largest=100)
    mails.push(b"x" * 100)
    with pytest.raises(ValueTooLargeError, match=r"101 bytes.* 'undeliverable' takes up to 100 "):
        mails.push(b"x" * 101)
    assert len(mails) == 1


@pytest.mark.parametrize("data", [b'"' * 50_000, b"\n" * 50_000, b"\x01" * 50_000, b"\xff" * 50_000])
def test_what_is_within_the_limit_fits_into_its_document(data: bytes) -> None:
    mails = MailQueue("memory:", "fits", largest=50_000)
    kept = mails.read(mails.push(data))
    assert kept is not None
    assert kept.data == data
    mails.clear()


@pytest.mark.long
def test_the_largest_mail(options: dict[str, Any]) -> None:
    mails = _queue(options)
    data = b"Subject: large\n\n" + b"0123456789abcde\n" * (2 * 1024 * 1024 - 1)
    key = mails.push(data)
    kept = mails.read(key)
    assert kept is not None
    assert kept.data == data
    assert mails.remove(key)


def test_a_full_queue_refuses_and_forgets_nothing(options: dict[str, Any]) -> None:
    first, second = _queue(options, limit=40), _queue(options, limit=40)
    for number in range(40):
        (first, second)[number % 2].push(MAIL)
    for mails in (first, second):
        with pytest.raises(QueueFullError, match="limit"):
            mails.push(MAIL)
    assert first.pop() != (None, None)
    assert _queue(options, limit=40).push(MAIL)
    assert issubclass(QueueFullError, StoreUnavailable)


def test_a_full_queue_is_not_counted_for_every_push(monkeypatch: pytest.MonkeyPatch) -> None:
    mails = MailQueue("memory:", f"full{next(_numbers)}", limit=1)
    key = mails.push(MAIL)
    counts = 0

    def count() -> int:
        nonlocal counts
        counts += 1
        return len(mails.keys())

    monkeypatch.setattr(mails, "count", count)
    for _ in range(5):
        with pytest.raises(QueueFullError, match="limit"):
            mails.push(MAIL)
    assert counts == 1
    mails.remove(key)
    mails.limit = 1000
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
    for _ in range(5):
        mails.push(MAIL)
    assert counts == 2


def test_who_waits_for_a_count_has_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or in an outage one push after the other would wait for a time-out of its own."""
    mails = MailQueue("memory:", f"away{next(_numbers)}")
    counting, go_on = threading.Event(), threading.Event()
    answers: list[str] = []

    def count() -> int:
        answers.append("counted")
        counting.set()
        assert go_on.wait(20)
        raise OutcomeUnknown("away")

    monkeypatch.setattr(mails, "count", count)
    real = time.monotonic
    begun = threading.Semaphore(0)

    def monotonic() -> float:
        now = real()
        begun.release()
        return now

    monkeypatch.setattr(time, "monotonic", monotonic)

    def push() -> None:
        with pytest.raises(StoreUnavailable, match="away"):
            mails.push(MAIL)

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=20)
    assert counting.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert answers == ["counted"]


@pytest.mark.parametrize("lifetime", [0, -1, True, "3600", float("nan"), float("inf")])
def test_a_lifetime_is_a_length_of_time(lifetime: Any) -> None:
    with pytest.raises(ConfigurationError, match="lifetime"):
        MailQueue("memory:", "pending", lifetime=lifetime)


# Many at once


def test_threads_that_push_and_pop_at_once_share_every_mail(options: dict[str, Any]) -> None:
    popped: list[str] = []
    pushing = threading.Barrier(6)
    done = threading.Event()
    failures: list[BaseException] = []

    def push(number: int) -> None:
        mails = _queue(options)
        pushing.wait(20)
        for count in range(15):
            mails.push(f"Subject: {number} {count}\n\n")

    def pop() -> None:
        try:
            mails = _queue(options)
            pushing.wait(20)
            while True:
                over = done.is_set()
                _, request = mails.pop()
                if request is not None:
                    popped.append(request["subject"])
                elif over:
                    return
        except BaseException as error:
            failures.append(error)
            raise

    pushers = [threading.Thread(target=push, args=(number,)) for number in range(3)]
    poppers = [threading.Thread(target=pop) for _ in range(3)]
    for thread in (*pushers, *poppers):
        thread.start()
    for thread in pushers:
        thread.join(30)
    done.set()
    for thread in poppers:
        thread.join(30)
    assert not failures
    assert Counter(popped) == Counter(f"{number} {count}" for number in range(3) for count in range(15))


def test_processes_that_pop_at_once_share_every_mail(tyrant_server: ServerProcess) -> None:
    mails = MailQueue(tyrant_server.url, "processes")
    for number in range(60):
        mails.push(f"Subject: {number}\n\n")
    code = (
        "import sys; from beaker_statestore.mailqueue import MailQueue; import salmon.mail\n"
        "mails = MailQueue(sys.argv[1], 'processes'); print('ready', flush=True); sys.stdin.readline()\n"
        "while (popped := mails.pop())[0] is not None: print(popped[1]['subject'])"
    )
    poppers = [
        subprocess.Popen(
            [sys.executable, "-c", code, tyrant_server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for popper in poppers:
        assert popper.stdout is not None
        assert popper.stdout.readline() == "ready\n"
    outputs: list[str] = []

    def go_on(popper: subprocess.Popen[str]) -> None:
        outputs.append(popper.communicate("\n", 60)[0])

    threads = [threading.Thread(target=go_on, args=(popper,)) for popper in poppers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(int(line) for output in outputs for line in output.split()) == list(range(60))


# Outages


def test_no_mail_is_lost_to_a_pop_that_an_outage_meets() -> None:
    faulty = FaultyStore(open_store(f"memory:mail-faults-{next(_numbers)}"))
    mails = MailQueue(faulty, "undeliverable")
    for executed, nth in itertools.product((False, True), range(1, 6)):
        mails.clear()
        key = mails.push(MAIL)
        faulty.fail(nth, executed=executed)
        got = 0
        with contextlib.suppress(StoreUnavailable):
            got += mails.pop()[0] == key
        met = faulty.has_failed
        faulty.heal()
        while mails.pop()[0] is not None:
            got += 1
        assert got == 1, (nth, executed)
        if not met:
            assert nth > 3


def test_a_push_that_an_outage_meets_raises_or_is_done() -> None:
    faulty = FaultyStore(open_store(f"memory:mail-faults-{next(_numbers)}"))
    for nth in range(1, 20):
        mails = MailQueue(faulty, "undeliverable")
        mails.clear()
        faulty.fail(nth)
        try:
            mails.push(MAIL)
            pushed = True
        except StoreUnavailable:
            pushed = False
        met = faulty.has_failed
        faulty.heal()
        assert len(mails) == pushed
        if not met:
            return
    raise AssertionError("the number of store calls of one push seems to have no end")


# Re-delivery


class Sink:
    """Who takes mails; with a failure, none."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.taken: list[tuple[bytes, str, list[str]]] = []
        self.failure = failure

    def __call__(self, data: bytes, sender: str, recipients: Sequence[str]) -> None:
        if self.failure is not None:
            raise self.failure
        self.taken.append((data, sender, list(recipients)))


def test_what_was_taken_is_removed(mails: MailQueue) -> None:
    key = mails.push(received())
    sink = Sink(smtplib.SMTPServerDisconnected("gone"))
    with pytest.raises(smtplib.SMTPServerDisconnected):
        mails.redeliver(key, sink)
    assert mails.keys() == [key]
    sink.failure = None
    assert mails.redeliver(key, sink)
    assert not mails.redeliver(key, sink)
    assert sink.taken == [(MAIL, "zed@example.com", ["news@localhost"])]
    assert mails.keys() == []


def test_of_two_at_once_one_sends(options: dict[str, Any]) -> None:
    key = _queue(options).push(received())
    sending, go_on = threading.Event(), threading.Event()
    taken: list[bytes] = []

    def deliver(data: bytes, _sender: str, _recipients: Sequence[str]) -> None:
        sending.set()
        assert go_on.wait(20)
        taken.append(data)

    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(_queue(options).redeliver(key, deliver))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert sending.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [False, False, True]
    assert taken == [MAIL]


def test_without_an_envelope_somebody_has_to_say_to_whom(mails: MailQueue) -> None:
    """Whoever wrote it can write to anybody by its To header."""
    sink = Sink()
    key = mails.push(b"From: Zed <Zed@example.com>\nTo: victim@example.com, other@example.com\n\n")
    with pytest.raises(StateStoreError, match="to whom"):
        mails.redeliver(key, sink)
    mails.redeliver(key, sink, to=["c@example.com"])
    assert [taken[1:] for taken in sink.taken] == [("Zed@example.com", ["c@example.com"])]
    # Salmon takes the header for the recipient if the envelope has none that it can read.
    unread = mail.MailRequest("p", "zed@example.com", "()", b"To: victim@example.com, other@example.com\n\n")
    assert unread.To == "victim@example.com, other@example.com"
    with pytest.raises(StateStoreError, match="to whom"):
        mails.redeliver(mails.push(unread), sink)


def test_a_server_cannot_keep_a_mail_for_longer_than_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers every line in time, with one more that is not the last."""
    monkeypatch.setattr(mailqueue, "LONGEST_DIALOGUE", 0.3)
    assert LONGEST_DIALOGUE + LONGEST_ANSWER < SENDING_LEASE
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"220 hello\r\n")
                while not over.wait(0.01):
                    connection.sendall(b"250-more\r\n")

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(smtplib.SMTPException):
            smtp("127.0.0.1", listening.getsockname()[1])(MAIL, "a@example.com", ["b@example.com"])
        over.set()
        server.join(20)


class Receiver:
    """Salmon's real SMTPReceiver on a real port, and its one loop."""

    def __init__(self) -> None:
        self.port = free_port()
        self._receiver = SMTPReceiver("127.0.0.1", self.port)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            asyncore.loop(timeout=0.02, count=1, use_poll=True)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(20)
        for channel in list(asyncore.socket_map.values()):
            channel.socket.close()  # Salmon's close() only logs who called it
        asyncore.socket_map.clear()

    def gets(self, data: bytes = MAIL, sender: str = "zed@example.com", to: str = "news@localhost") -> int:
        """The code that a mail is answered with."""
        return self.answers(data, sender, to)[0]

    def answers(self, data: bytes, sender: str, to: str) -> tuple[int, bytes]:
        """What a mail is answered with."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=20) as client:
            client.ehlo()
            client.mail(sender)
            client.rcpt(to)
            return client.data(data)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Salmon's one Router as a fresh process has it, with a handler that raises what it is told to."""
    fresh = routing.RoutingBase()
    monkeypatch.setattr(routing, "Router", fresh)
    handlers = types.ModuleType("tests_mailqueue_handlers")
    handlers.failure = None  # type: ignore[attr-defined]

    def START(message: Any) -> None:  # noqa: N802 - states are functions in capitals, as Lamson has it
        if handlers.failure is not None:
            raise handlers.failure

    START.__module__ = handlers.__name__
    handlers.START = routing.route("news@localhost")(START)  # type: ignore[attr-defined]
    fresh.HANDLERS[handlers.__name__] = routing.DEFAULT_STATE_KEY
    monkeypatch.setitem(sys.modules, handlers.__name__, handlers)
    fresh.handlers = handlers
    return fresh


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_what_a_handler_fails_on_is_kept_and_can_be_redelivered(
    router: Any, receiver: Receiver, options: dict[str, Any]
) -> None:
    mapping = {f"beaker.session.{name}": value for name, value in options.items()}
    storage = install(router, mapping)
    router.UNDELIVERABLE_QUEUE = mails = MailQueue.from_settings(mapping, "undeliverable")
    router.handlers.failure = ValueError("a bug")
    data = b"Subject: keep\r\n\r\n.dot\r\n\r\nend \xe4\r\n"
    assert receiver.gets(data) == 250
    (kept,) = mails.mails()
    assert isinstance(kept.envelope, Envelope)
    assert kept.envelope.sender == "zed@example.com"
    assert storage.states_of("zed@example.com") == {router.handlers.__name__: "ERROR"}
    # The bug is mended, and its victim forgiven.
    router.handlers.failure = None
    storage.set_all("zed@example.com", "START")
    assert mails.redeliver(kept.key, smtp("127.0.0.1", receiver.port))
    assert len(mails) == 0


def test_it_comes_over_smtp_as_it_left(receiver: Receiver, router: Any) -> None:
    router.UNDELIVERABLE_QUEUE = arrived = MailQueue("memory:", f"arrived{next(_numbers)}")
    mails = MailQueue("memory:", f"sent{next(_numbers)}")
    for data in (b"Subject: a\n\n.dot\n\n..\nend \xe4\n", b"Subject: b\r\n\r\nmixed\rends\r\n\nx"):
        mails.redeliver(
            mails.push(received(data, "ann@example.com")), smtp("127.0.0.1", receiver.port), ["x@localhost"]
        )
        (kept,) = arrived.mails()
        assert kept.data.split() == data.split()
        assert kept.envelope is not None
        assert (kept.envelope.sender, kept.envelope.recipient) == ("ann@example.com", "x@localhost")
        arrived.clear()


def test_a_mail_that_is_not_taken_stays(router: Any, receiver: Receiver) -> None:
    router.handlers.failure = SMTPError(451, "not now")
    mails = MailQueue("memory:", f"stays{next(_numbers)}")
    key = mails.push(received())
    with pytest.raises(smtplib.SMTPDataError):
        mails.redeliver(key, smtp("127.0.0.1", receiver.port))
    with pytest.raises(OSError, match="refused"):
        mails.redeliver(key, smtp("127.0.0.1", free_port()))
    assert mails.keys() == [key]


@pytest.mark.parametrize("executed", [False, True])
def test_an_outage_at_that_moment_is_a_451_and_no_loss(router: Any, receiver: Receiver, executed: bool) -> None:
    """The handler has raised, and whichever call to the store fails then: the sender keeps the mail, or we have it."""
    faulty = FaultyStore(open_store(f"memory:mail-faults-{next(_numbers)}"))
    install(router, {"beaker.session.url": faulty})
    router.handlers.failure = ValueError("a bug")
    answers = []
    for nth in range(1, 30):
        router.UNDELIVERABLE_QUEUE = mails = MailQueue(faulty, "undeliverable")
        mails.clear()
        sender = f"zed{nth}-{executed:d}@example.com"
        faulty.fail(nth, for_good=True, executed=executed)
        code = receiver.gets(sender=sender)
        met = faulty.has_failed
        faulty.heal()
        answers.append(code)
        if code != 250:
            assert code == 451
            assert receiver.gets(sender=sender) == 250
        assert len(mails) >= 1
        if not met:
            assert len(mails) == 1
            break
    assert answers.count(451) >= 3
    assert answers[-1] == 250


def test_without_install_an_outage_is_no_250_either(router: Any, receiver: Receiver) -> None:
    faulty = FaultyStore(open_store(f"memory:mail-faults-{next(_numbers)}"))
    router.UNDELIVERABLE_QUEUE = mails = MailQueue(faulty, "undeliverable")
    faulty.fail(1, for_good=True)
    with pytest.raises(smtplib.SMTPServerDisconnected):
        receiver.gets(to="nobody@localhost")
    faulty.heal()
    assert len(mails) == 0
    assert receiver.gets(to="nobody@localhost") == 250
    assert len(mails) == 1


def test_a_handlers_mail_that_is_too_large_is_a_552(router: Any, receiver: Receiver) -> None:
    install(router, {"beaker.session.url": "memory:"})
    router.UNDELIVERABLE_QUEUE = MailQueue("memory:", "small", largest=50)
    router.handlers.failure = ValueError("a bug")
    assert receiver.gets(MAIL + b"x" * 100, sender="large@example.com") == 552
    assert receiver.gets(MAIL, to="nobody@localhost") == 552
    assert len(router.UNDELIVERABLE_QUEUE) == 0


def test_a_full_undeliverable_queue_is_a_451(router: Any, receiver: Receiver) -> None:
    install(router, {"beaker.session.url": "memory:"})
    router.UNDELIVERABLE_QUEUE = mails = MailQueue("memory:", f"full{next(_numbers)}", limit=1)
    assert receiver.gets(to="nobody@localhost") == 250
    code, text = receiver.answers(MAIL, "zed@example.com", "nobody@localhost")
    assert (code, text.split()[0]) == (451, b"4.3.1")
    # A handler whose own queue is full, too.
    router.handlers.failure = QueueFullError("full")
    assert b"4.3.1" in receiver.answers(MAIL, "ann@example.com", "news@localhost")[1]
    assert len(mails) == 1


def test_a_mail_that_nobody_can_parse_is_kept(router: Any, receiver: Receiver) -> None:
    router.UNDELIVERABLE_QUEUE = mails = MailQueue("memory:", f"broken{next(_numbers)}")
    data = "Subject: =?ü?q?x?=\nFrom: =?ü?q?x?= <zed@example.com>\n\nimportant".encode()
    assert receiver.gets(data, to="nobody@localhost") == 250
    (kept,) = mails.mails()
    assert (kept.data, kept.text()) == (data, "important")


# Settings


def test_by_an_ini_file_with_events(tmp_path: Path, tyrant_server: ServerProcess) -> None:
    ini = tmp_path / "app.ini"
    prefix = f"mails{next(_numbers)}."
    ini.write_text(
        f"[app:main]\nbeaker.session.url = {tyrant_server.url}\nbeaker.session.prefix = {prefix}\n"
        "beaker.session.events = events\n"
    )
    events = Queue.from_settings(str(ini), "events").follow(start=1)
    key = MailQueue.from_settings(str(ini), "undeliverable").push(MAIL)
    MailQueue.from_settings(str(ini), "pending", event=None).push(MAIL)
    message = events.receive(5)
    assert message is not None
    assert {name: message.body[name] for name in ("event", "queue", "mail")} == {
        "event": "undeliverable",
        "queue": "undeliverable",
        "mail": key,
    }
    assert events.receive(0) is None
    assert open_store(tyrant_server.url).get(f"{prefix}mail:undeliverable:{key}".encode()) is not None


def test_a_store_has_to_be_named() -> None:
    with pytest.raises(ConfigurationError):
        MailQueue("", "undeliverable")
