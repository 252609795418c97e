"""The demo's mail application, as a real process that speaks real SMTP, with a real store and outbox.

Each test writes from addresses of its own, so that all can share the processes.
"""

from __future__ import annotations

import itertools
import smtplib
import sys
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import parseaddr, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from salmon import routing
from salmon.server import SMTPError

from beaker_statestore.mailqueue import MailQueue
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore
from wsgi_demo.browser import Browser
from wsgi_demo.check import LEAVE, NEWS, Person, link_in
from wsgi_demo.newsletter import CONFIRMING, ERROR, MEMBER, START
from wsgi_demo.outbox import KeptMail, Outbox, serve
from wsgi_demo.processes import Demo, free_ports
from wsgi_demo.settings import Endpoint, Settings

HOST = "127.0.0.1"
NOBODYS_SECRET = "0" * 32
_names = itertools.count(1)


class Writer(Person):
    """Somebody who writes to the list, and sees what is known of him."""

    def __init__(self, demo: Demo) -> None:
        super().__init__(f"person{next(_names)}@example.com", demo)
        self.demo = demo
        self._states = RouterStateStorage(url=f"{HOST}:{demo.ports['store']}")

    @property
    def state(self) -> str:
        return self._states.get("news", self.address)

    @property
    def mails(self) -> list[KeptMail]:
        """Newest first."""
        return Outbox(str(self.demo.directory / "outbox")).mails(self.address)

    def sends(self, to: str, *headers: tuple[str, str], envelope: str | None = None, content: Any = "Hello") -> str:
        """A mail in every detail; the answer to it."""
        message = EmailMessage(policy=SMTP)
        given = dict(headers)
        for name, value in {"From": self.address, "To": to, "Subject": "Hello", **given}.items():
            message[name] = value
        message.set_content(content)
        return self.sends_raw(to, message.as_bytes(), envelope)

    def sends_raw(self, to: str, data: bytes, envelope: str | None = None) -> str:
        with smtplib.SMTP(HOST, self.demo.ports["mail"], timeout=20) as smtp:
            smtp.ehlo()
            smtp.mail(self.address if envelope is None else envelope)
            code, text = smtp.rcpt(to)
            if code == 250:
                code, text = smtp.data(data)
            return f"{code} {text.decode()}"

    def joins(self) -> Writer:
        assert self.writes(NEWS) == "250 OK"
        assert self.replies(self.mail("confirm")) == "250 OK"
        assert self.state == MEMBER
        return self

    def replies(self, mail: KeptMail) -> str:
        return self.writes(parseaddr(mail.message["Reply-To"])[1], f"Re: {mail.subject}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo"), free_ports()) as running:
        yield running


@pytest.fixture
def ann(demo: Demo) -> Writer:
    return Writer(demo)


@pytest.fixture
def bob(demo: Demo) -> Writer:
    return Writer(demo)


# Joining


def test_who_writes_is_asked_and_not_yet_a_member(ann: Writer) -> None:
    assert ann.writes(NEWS) == "250 OK"
    assert ann.state == CONFIRMING
    assert [mail.subject for mail in ann.mails] == ["Please confirm: do you want to join?"]


def test_a_reply_confirms(ann: Writer) -> None:
    ann.writes(NEWS)
    assert ann.replies(ann.mail("confirm")) == "250 OK"
    assert ann.state == MEMBER
    assert ann.mails[0].subject == "You are a member"


def test_a_click_confirms_for_mail_too(ann: Writer) -> None:
    ann.writes(NEWS)
    ann.confirms_by_click()
    ann.writes(NEWS, "My first post")
    assert ann.mails[0].subject == "[news] My first post"


def test_a_reply_from_another_address_confirms_the_one_that_was_asked(ann: Writer, bob: Writer) -> None:
    """Mail may be forwarded, and answered from where it is read."""
    ann.writes(NEWS)
    bob.replies(ann.mail("confirm"))
    assert (ann.state, bob.state) == (MEMBER, START)
    assert ann.mails[0].subject == "You are a member"


def test_a_confirmation_survives_programs_that_change_the_case(ann: Writer) -> None:
    ann.writes(NEWS)
    to = parseaddr(ann.mail("confirm").message["Reply-To"])[1]
    ann.writes(to.upper())
    assert ann.state == MEMBER


@pytest.mark.parametrize("secret", [NOBODYS_SECRET, "cut0ff"])
def test_an_unknown_secret_gets_a_helpful_mail(ann: Writer, secret: str) -> None:
    assert ann.writes(f"news-confirm-{secret}@localhost") == "250 OK"
    assert ann.state == START
    assert ann.mails[0].subject == "That confirmation is no longer good"
    assert NEWS in ann.mails[0].text


def test_confirming_twice_is_harmless(ann: Writer) -> None:
    ann.writes(NEWS)
    confirmation = ann.mail("confirm")
    ann.replies(confirmation)
    ann.replies(confirmation)
    assert ann.state == MEMBER
    assert ann.mails[0].subject == "You are a member"


def test_an_old_confirmation_brings_nobody_back_who_has_left(ann: Writer) -> None:
    ann.writes(NEWS)
    confirmation = ann.mail("confirm")
    ann.replies(confirmation)
    ann.writes(LEAVE)
    ann.replies(confirmation)
    assert ann.state == START
    assert ann.mails[0].subject == "That confirmation is no longer good"


def test_what_he_wrote_is_shown_where_he_confirms_and_then_thrown_away(demo: Demo, ann: Writer) -> None:
    pending = MailQueue(f"{HOST}:{demo.ports['store']}", "pending")

    def kept() -> list[str]:
        return [mail.subject for mail in pending.mails() if mail.sender == ann.address]

    ann.writes(NEWS, "My first mail")
    assert kept() == ["My first mail"]
    ann.writes(NEWS, "My second mail")
    assert kept() == ["My second mail"], "there is one for everybody"
    assert "My second mail" in ann.browser.open(link_in(ann.mail("confirm"))).text
    ann.confirms_by_click()
    assert kept() == []
    assert ann.writes(NEWS, "My third mail") == "250 OK"
    assert kept() == []
    assert [mail.subject for mail in ann.mails if mail.subject.startswith("[news]")] == ["[news] My third mail"]


def test_who_writes_much_is_asked_all_the_same(demo: Demo, ann: Writer) -> None:
    """There is not much room for what people write who have not confirmed."""
    assert ann.sends(NEWS, content="much " * 20_000) == "250 OK"
    assert ann.sends(NEWS, ("Subject", "again"), content="much " * 20_000) == "250 OK"
    kept = MailQueue(f"{HOST}:{demo.ports['store']}", "pending").mails()
    assert ann.address not in {mail.sender for mail in kept}
    ann.confirms_by_click()
    assert ann.state == MEMBER


def test_who_writes_again_is_asked_again_a_few_times(ann: Writer) -> None:
    for _ in range(9):
        assert ann.writes(NEWS) == "250 OK"
    assert [mail.subject for mail in ann.mails] == ["Please confirm: do you want to join?"] * 6
    oldest, newest = ann.mails[-1], ann.mails[0]
    ann.replies(oldest)
    assert ann.state == CONFIRMING, "the newest is the one that is good"
    ann.replies(newest)
    assert ann.state == MEMBER


def test_a_confirmation_that_is_quicker_than_the_handler_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The link is clicked before the mail server has even said that it took the mail, and so before START returns."""

    class Clicker:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
            mail = KeptMail("", envelope.rcpt_tos[0], _parsed(envelope.content))
            browser = Browser()
            browser.press(browser.open(link_in(mail)), "Yes, join")
            return "250 Clicked"

    demo = Demo(tmp_path_factory.mktemp("quick"), free_ports())
    controller = Controller(Clicker(), hostname=HOST, port=demo.ports["outbox"])
    others = [demo.processes[name] for name in ("store", "mail", "web")]
    try:
        controller.start()
        for process in others:
            process.start()
        for process in others:
            process.wait_until_up()
        ann = Writer(demo)
        assert ann.writes(NEWS) == "250 OK"
        assert ann.state == MEMBER
    finally:
        demo.stop()
        controller.stop()


def _parsed(content: bytes) -> EmailMessage:
    import email
    import email.policy

    return email.message_from_bytes(content, policy=email.policy.default)


# Posting and leaving


def test_a_post_reaches_all_members_and_nobody_else(demo: Demo, ann: Writer, bob: Writer) -> None:
    stranger = Writer(demo)
    stranger.writes(NEWS)
    ann.joins()
    bob.joins()
    assert ann.writes(NEWS, "To all") == "250 OK"
    assert ann.mails[0].subject == bob.mails[0].subject == "[news] To all"
    assert stranger.mails[0].subject == "Please confirm: do you want to join?"


def test_a_post_says_whose_it_is_and_what_list_it_came_by(ann: Writer) -> None:
    ann.joins().writes(NEWS, "To all")
    message = ann.mails[0].message
    assert message["From"].addresses[0].addr_spec == NEWS
    assert message["From"].addresses[0].display_name == f"{ann.address} via news"
    assert message["Reply-To"] == ann.address
    assert message["Precedence"] == "list"
    assert message["Auto-Submitted"] is None


def test_every_mail_carries_what_list_mail_has_to(ann: Writer) -> None:
    ann.joins().writes(NEWS, "To all")
    ann.writes(LEAVE)
    mails = ann.mails
    assert len(mails) == 4
    for mail in mails:
        message = mail.message
        assert message["List-Id"] == "<news.localhost>"
        assert message["List-Unsubscribe"] == f"<mailto:{LEAVE}>"
        assert parsedate_to_datetime(message["Date"]).tzinfo is not None
        assert message["Precedence"] in ("bulk", "list")
        assert (message["Auto-Submitted"] == "auto-replied") == (message["Precedence"] == "bulk")
    assert len({mail.message["Message-ID"] for mail in mails}) == 4


def test_every_language_gets_through(ann: Writer) -> None:
    text = "Grüße aus Köln – 你好, ☃"
    ann.joins().sends(NEWS, ("Subject", text), content=text)
    assert ann.mails[0].subject == f"[news] {text}"
    assert ann.mails[0].text.strip() == text


def test_a_subject_cannot_add_headers(ann: Writer) -> None:
    ann.joins()
    head = b"From: x\r\nTo: news@localhost\r\nSubject: =?utf-8?q?Hello=0D=0ABcc:_victim@example.com?=\r\n\r\nHi"
    assert ann.sends_raw(NEWS, head) == "250 OK"
    assert ann.mails[0].subject == "[news] Hello Bcc: victim@example.com"
    assert ann.mails[0].message["Bcc"] is None


def test_a_post_without_plain_text_is_sent_back_with_the_reason(ann: Writer) -> None:
    ann.joins()
    assert ann.sends_raw(NEWS, b"Subject: x\r\nContent-Type: text/html\r\n\r\n<p>Hi") == "250 OK"
    assert ann.mails[0].subject == "Your mail did not go out"
    assert ann.sends_raw(NEWS, b"Content-Type: text/plain; charset=nonsense\r\n\r\nHi") == "250 OK"
    assert ann.mails[0].subject == "Your mail did not go out"
    assert ann.state == MEMBER


def test_who_leaves_gets_one_mail_and_then_none(ann: Writer, bob: Writer) -> None:
    ann.joins()
    bob.joins()
    assert bob.writes(LEAVE) == "250 OK"
    ann.writes(NEWS, "After he left")
    assert bob.state == START
    assert [mail.subject for mail in bob.mails[:2]] == ["You have left the list", "You are a member"]


def test_who_is_not_in_cannot_leave(ann: Writer) -> None:
    ann.writes(LEAVE)
    assert ann.state == START
    assert ann.mails[0].subject == "You are not a member"


def test_addresses_that_are_not_the_lists_are_refused(ann: Writer) -> None:
    assert ann.writes("nobody@localhost").startswith("550 ")
    assert ann.writes("news@elsewhere.example").startswith("550 ")
    assert ann.mails == []


# Machines

AUTOMATIC: dict[str, tuple[str, str]] = {
    "auto-replied": ("Auto-Submitted", "auto-replied (vacation)"),
    "bulk": ("Precedence", "Bulk"),
    "another list": ("List-Id", "<other.example.com>"),
    "report": ("Content-Type", "multipart/report; report-type=delivery-status"),
    "no return": ("Return-Path", "<>"),
}


@pytest.mark.parametrize("to", [NEWS, LEAVE, f"news-confirm-{NOBODYS_SECRET}@localhost", "news-bounces@localhost"])
@pytest.mark.parametrize("kind", AUTOMATIC)
def test_machines_get_no_answer(ann: Writer, to: str, kind: str) -> None:
    name, value = AUTOMATIC[kind]
    assert ann.sends_raw(to, f"From: {ann.address}\r\n{name}: {value}\r\n\r\nI am away.".encode()) == "250 OK"
    assert ann.mails == []
    assert ann.state == START


@pytest.mark.parametrize("sender", ["mailer-daemon@example.com", "other-bounces@example.com", "noreply@example.com"])
def test_addresses_of_machines_get_no_answer(ann: Writer, sender: str) -> None:
    ann.address = sender
    assert ann.writes(NEWS) == "250 OK"
    assert ann.mails == []
    assert ann.state == START


def test_a_bounce_gets_no_answer(ann: Writer) -> None:
    """Its From may be anything; the empty envelope sender is what makes it a bounce."""
    assert ann.sends(NEWS, envelope="") == "250 OK"
    assert ann.mails == []
    assert ann.state == START


def test_an_absence_note_confirms_nothing(ann: Writer) -> None:
    ann.writes(NEWS)
    to = parseaddr(ann.mail("confirm").message["Reply-To"])[1]
    ann.sends(to, ("Auto-Submitted", "auto-replied"))
    assert ann.state == CONFIRMING
    assert len(ann.mails) == 1


def test_human_mail_may_say_that_it_is_human(ann: Writer) -> None:
    ann.sends(NEWS, ("Auto-Submitted", "no"))
    assert ann.state == CONFIRMING


# What goes wrong


def test_a_handler_that_raises_moves_its_sender_to_error(demo: Demo, ann: Writer, bob: Writer) -> None:
    ann.joins()
    bob.joins()
    assert ann.writes(NEWS, "crash") == "250 OK"
    assert (ann.state, bob.state) == (ERROR, MEMBER)
    [kept] = MailQueue(f"{HOST}:{demo.ports['store']}", "undeliverable").mails()
    assert (kept.sender, kept.recipients, kept.subject) == (ann.address, [NEWS], "crash")
    ann.writes(NEWS, "Is anybody there?")
    assert ann.mails[0].subject == "Something of ours broke"
    assert ann.state == ERROR


def test_while_the_outbox_is_away_mail_is_deferred_and_nothing_is_lost(demo: Demo, ann: Writer, bob: Writer) -> None:
    bob.joins()
    outbox = demo.processes["outbox"]
    outbox.kill()
    try:
        for _ in range(9):
            assert ann.writes(NEWS).startswith("451 ")
            assert bob.writes(NEWS, "A post").startswith("451 ")
    finally:
        outbox.start()
        outbox.wait_until_up()
    assert (ann.state, bob.state) == (CONFIRMING, MEMBER)
    assert ann.writes(NEWS) == "250 OK"
    assert ann.mails[0].subject == "Please confirm: do you want to join?"
    assert bob.writes(NEWS, "A post") == "250 OK"
    assert [mail.subject for mail in bob.mails[:2]] == ["[news] A post", "You are a member"]


def test_while_the_store_is_away_mail_is_deferred_and_nobody_is_blamed(demo: Demo, ann: Writer, bob: Writer) -> None:
    bob.joins()
    store = demo.processes["store"]
    store.kill()
    try:
        assert ann.writes(NEWS).startswith("451 ")
        assert bob.writes(NEWS, "A post").startswith("451 ")
        assert bob.writes(LEAVE).startswith("451 ")
    finally:
        store.start()
        store.wait_until_up()
    assert (ann.state, bob.state) == (START, MEMBER)
    assert ann.writes(NEWS) == "250 OK"
    assert ann.state == CONFIRMING


class Router:
    """Salmon's router with the demo's handlers in this very process, over a store that can be made to fail."""

    def __init__(self, directory: Path) -> None:
        from wsgi_demo.mail import boot

        endpoint = Endpoint(HOST, free_ports()["outbox"])
        self.store = FaultyStore(MemoryStore())
        self.outbox = Outbox(str(directory / "outbox"))
        self.controller = serve(self.outbox, endpoint)
        boot(Settings.from_mapping({"beaker.session.url": self.store, "demo.relay": endpoint}))

    def takes(self, sender: str, to: str) -> bool:
        """Deliver a mail; False if it is deferred with 451."""
        from salmon.mail import MailRequest

        try:
            routing.Router.deliver(MailRequest(None, sender, [to], b"Subject: A post\r\n\r\nHello"))
        except SMTPError as error:
            if error.code != 451:
                raise
            return False
        return True

    def state(self, sender: str) -> str:
        return str(routing.Router.STATE_STORE.get("news", sender))

    def confirmation(self, sender: str) -> str:
        """Where a reply to the newest mail goes."""
        return parseaddr(self.outbox.mails(sender)[0].message["Reply-To"])[1]


@pytest.fixture
def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    # The router is one for the whole process; it shall be as before.
    fresh: dict[str, Any] = {"REGISTERED": {}, "ORDER": [], "DEFAULT_CAPTURES": {}, "HANDLERS": {}}
    for name in ("STATE_STORE", "UNDELIVERABLE_QUEUE", "deliver", *fresh):
        monkeypatch.setattr(routing.Router, name, fresh.get(name, getattr(routing.Router, name)))
    monkeypatch.delitem(sys.modules, "wsgi_demo.handlers", raising=False)
    running = Router(tmp_path)
    yield running
    running.controller.stop()
    sys.modules.pop("wsgi_demo.handlers", None)


ACTS: dict[str, tuple[str, str, str]] = {
    # to: (state before, state after, what he gets to read)
    "news (new)": (START, CONFIRMING, "Please confirm"),
    "news (asked)": (CONFIRMING, CONFIRMING, "Please confirm"),
    "news (member)": (MEMBER, MEMBER, "[news] A post"),
    "news (error)": (ERROR, ERROR, "Something of ours broke"),
    "news-confirm": (CONFIRMING, MEMBER, "You are a member"),
    "news-leave": (MEMBER, START, "You "),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
def test_whatever_store_call_fails_a_mail_is_done_or_deferred(
    router: Router, act: str, executed: bool, for_good: bool
) -> None:
    before, after, subject = ACTS[act]
    for n in itertools.count(1):
        ann = f"ann{n}@example.com"
        to = f"{act.partition(' ')[0]}@localhost"
        if act == "news-confirm":
            assert router.takes(ann, NEWS)
            to = router.confirmation(ann)
        routing.Router.STATE_STORE.set("news", ann, before)
        router.outbox.clear()
        router.store.fail(n, executed=executed, for_good=for_good)
        done = router.takes(ann, to)
        failed = router.store.has_failed
        router.store.heal()
        assert done or router.takes(ann, to), "the sending server tries again"
        assert router.state(ann) == after
        assert [mail for mail in router.outbox.mails(ann) if mail.subject.startswith(subject)]
        if not failed:
            break
    assert n > 2


def test_one_damaged_record_does_not_keep_posts_from_all_members(router: Router) -> None:
    for member in ("ann@example.com", "bob@example.com"):
        routing.Router.STATE_STORE.set("news", member, MEMBER)
    for key, garbage in {b"state:zz": b"garbage", b"state:%zz": b"{}", b"state:s\xff": b"[]"}.items():
        router.store.put(key, garbage)
    assert router.takes("ann@example.com", NEWS)
    assert router.state("ann@example.com") == MEMBER
    assert [mail.subject for mail in router.outbox.mails("bob@example.com")] == ["[news] A post"]


def test_what_the_sender_sees_is_one_recipient_at_a_time(demo: Demo, ann: Writer, bob: Writer) -> None:
    """Salmon can give one answer for one mail, so it takes the second recipient later."""
    with smtplib.SMTP(HOST, demo.ports["mail"], timeout=20) as smtp:
        refused = smtp.sendmail(ann.address, [NEWS, LEAVE], b"Subject: x\r\n\r\nHi")
    assert [code for code, _ in refused.values()] == [451]
    assert ann.state == CONFIRMING
