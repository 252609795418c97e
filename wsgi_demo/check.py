"""`script/demo --check`: a conversation of two people with the demo's real processes, by real SMTP and HTTP.

Each step says what was done and what was seen. The store's server is killed in the middle of it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, make_msgid, parseaddr
from pathlib import Path
from typing import TypeVar

from beaker_statestore.stores import open_store
from wsgi_demo.browser import Browser, Page
from wsgi_demo.outbox import KeptMail, Outbox
from wsgi_demo.processes import Demo, ProcessFailed, free_ports
from wsgi_demo.relay import RelayError, submit
from wsgi_demo.settings import Endpoint

__all__ = ["UnexpectedError", "conversation", "main"]

T = TypeVar("T")

NEWS = "news@localhost"
LEAVE = "news-leave@localhost"


class UnexpectedError(Exception):
    """Something else was seen than the step promises."""


def main() -> int:
    """Run the demo in a directory of its own, on free ports, and play the conversation; the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="statestore-demo-") as directory:
        demo = Demo(Path(directory), free_ports())
        try:
            with demo:
                print(f"Four processes run on free ports of 127.0.0.1: {dict(demo.ports)}", flush=True)
                for number, (done, seen) in enumerate(conversation(demo), 1):
                    print(f"{number:2}. {done}\n      {seen}", flush=True)
                print(f"\nWhat the store holds now:\n{records(demo)}")
        except (UnexpectedError, LookupError, ProcessFailed) as error:
            print(f"\nFAILED: {error}")
            return 1
    print(f"\nAll as it should be, in {time.monotonic() - began:.1f} s.")
    return 0


class Person:
    """Somebody with a mail address and a browser."""

    def __init__(self, address: str, demo: Demo) -> None:
        self.address = address
        self._demo = demo
        self._smtp = Endpoint("127.0.0.1", demo.ports["mail"])
        self._outbox = Outbox(str(demo.directory / "outbox"))
        self.browser = Browser()

    def writes(self, to: str, subject: str = "Hello") -> str:
        """Send a mail; the mail application's answer."""
        message = EmailMessage(policy=SMTP)
        message["From"], message["To"], message["Subject"] = self.address, to, subject
        message["Date"], message["Message-ID"] = localtime(), make_msgid(domain="example.com")
        message.set_content("Hello from somebody who plays a conversation.")
        try:
            return submit(self._smtp, message, self.address, [to])
        except RelayError as error:
            return str(error)

    def mail(self, subject: str) -> KeptMail:
        """The newest mail that has come, which has to be about ``subject``."""
        mails = expect(self._outbox.mails(self.address, limit=1), lambda mails: len(mails) == 1)
        return expect(mails[0], lambda mail: subject in mail.subject)

    def page(self, status: int = 200) -> Page:
        """The front page."""
        return expect(self.browser.open(self._demo.base_url + "/"), lambda page: page.status == status)

    def undeliverable(self) -> Page:
        """The page of mails that made a handler raise; any browser on this machine sees it."""
        return expect(self.browser.open(self._demo.base_url + "/undeliverable"), lambda page: page.status == 200)

    def invites(self, path: str = "", status: int = 200) -> Page:
        """A page on which members invite others."""
        page = self.browser.open(f"{self._demo.base_url}/invite{path}")
        return expect(page, lambda page: page.status == status)

    def signs_in(self) -> Page:
        """Ask for a link, open it, press the button."""
        self.browser.press(self.page(), "Mail me a link", address=self.address)
        link = self.browser.open(link_in(self.mail("sign in")))
        return expect(self.browser.press(link, "Sign in"), lambda page: page.status == 200)

    def confirms_by_click(self) -> Page:
        """Open the link in the confirmation, press the button."""
        page = self.browser.open(link_in(self.mail("confirm")))
        return expect(self.browser.press(page, "Yes, join"), lambda page: "member" in page.text)


def conversation(demo: Demo) -> Iterator[tuple[str, str]]:
    """Play it, step by step: what was done, and what was seen.

    :raises UnexpectedError: something else was seen.
    """
    ann, bob = Person("ann@example.com", demo), Person("bob@example.com", demo)
    store = demo.processes["store"]

    answer = says(ann.writes(NEWS), "250")
    confirmation = ann.mail("confirm")
    yield f"Ann writes to {NEWS}", f"{answer}; she gets the mail {confirmation.subject!r}"

    page = ann.signs_in()
    yield "Ann signs in on the web page, by a link that is mailed to her", f"the page shows {state(page, 'CONFIRMING')}"

    reply_to = parseaddr(confirmation.message["Reply-To"])[1]
    with ann.browser.following(page) as events:
        says(ann.writes(reply_to, "Re: " + confirmation.subject), "250")
        event = expect(next(events, None), lambda event: event == {"event": "state", "key": "news", "state": "MEMBER"})
    yield (
        "Ann confirms by replying",
        f"the open page is told {event}, and shows {state(ann.page(), 'MEMBER')}; mail: {ann.mail('member').subject!r}",
    )

    says(bob.writes(NEWS), "250")
    link = link_in(bob.mail("confirm"))
    bob.browser.open(link)
    state(bob.signs_in(), "CONFIRMING")
    yield (
        "Bob writes, and his mail program opens the link by itself",
        "the page shows CONFIRMING: only a button confirms",
    )

    page = bob.browser.press(bob.browser.open(link), "Yes, join")
    yield "Bob opens the link and presses the button", f"the page shows {state(page, 'MEMBER')}"

    again = expect(bob.browser.open(link), lambda page: page.status == 410)
    yield "Bob opens the link once more", f"{again.status}: {heading(again, 'That link is no longer good')}"

    says(bob.writes(NEWS, "A post"), "250")
    seen = f"Ann gets {ann.mail('A post').subject!r}, and so does {bob.mail('A post').recipient}"
    yield "Bob posts, as a member at once", seen

    store.kill()
    page = ann.page(status=503)
    answer = says(bob.writes(NEWS, "Second post"), "451")
    seen = f"the page: 503, Retry-After {page.headers['Retry-After']}; mail: {answer}"
    yield "The store's server is killed (kill -9); Ann looks, Bob posts", seen

    store.start()
    store.wait_until_up()
    page = ann.page()
    yield "The server is started again; Ann looks", f"still signed in, still {state(page, 'MEMBER')}"

    says(bob.writes(NEWS, "Second post"), "250")
    yield "Bob's mail server tries again", f"Ann gets {ann.mail('Second post').subject!r}"

    says(bob.writes(LEAVE), "250")
    seen = f"the page shows {state(bob.page(), 'START')}; he gets {bob.mail('left').subject!r}"
    yield f"Bob writes to {LEAVE}", seen

    says(bob.writes(NEWS), "250")
    bob.confirms_by_click()
    says(bob.writes(NEWS, "crash"), "250")
    yield "Bob joins again, and posts what makes the handler raise", f"the page shows {state(bob.page(), 'ERROR')}"

    page = bob.browser.press(bob.page(), "Start again")
    yield "Bob presses 'Start again'", f"the page shows {state(page, 'START')}"

    page = bob.undeliverable()
    heading(page, "crash")
    page = bob.browser.press(page, "Deliver again")
    seen = f"{heading(page, 'took the mail')}; the page shows {state(bob.page(), 'CONFIRMING')}"
    yield "His mail is among the undeliverable ones, and is delivered again", f"{seen}, as if he had just written"
    heading(bob.undeliverable(), "None.")

    page = bob.browser.press(bob.page(), "Sign out")
    yield "Bob signs out", heading(page, "You are signed out")

    yield from invitation(ann, Person("cid@example.com", demo))


def invitation(ann: Person, cid: Person) -> Iterator[tuple[str, str]]:
    """Ann, who is a member and has signed in, invites Cid."""
    page = ann.invites()
    page = ann.browser.press(
        page, "Look at them", addresses=f"{cid.address}\r\nsomebody at example.com\r\n{ann.address}"
    )
    seen = f"{heading(page, 'Instead of “somebody at example.com”')}; {heading(page, 'is a member already')}"
    yield "Ann invites Cid, somebody without an address, and herself", f"conflicts: {seen}"

    ann.browser.press(page, "Save for later")
    heading(ann.browser.press(ann.page(), "Sign out"), "You are signed out")
    ann.signs_in()
    page = ann.invites()
    yield "Ann leaves it for later, signs out, and signs in again", heading(page, "You have an unfinished invitation")

    page = ann.browser.press(ann.invites("/review"), "Save and go on")
    page = ann.browser.press(page, "Send 1 mail")
    yield "Ann has it sent", f"{heading(page, '1 mail has gone out.')} Cid gets {cid.mail('confirm').subject!r}"

    heading(ann.invites("/review", status=404), "There is no invitation any more")
    page = cid.confirms_by_click()
    yield "Cid opens the link in it and presses the button", heading(page, f"{cid.address} is now a member")


def records(demo: Demo) -> str:
    """All records, as they are stored, indented."""
    with open_store(f"127.0.0.1:{demo.ports['store']}") as store:
        stored = {key: store.get(key) for key in sorted(store.keys())}
    lines = (
        f"{key.decode()}\n{json.dumps(json.loads(value), indent=2, ensure_ascii=False)}"
        for key, value in stored.items()
        if value is not None
    )
    return "\n".join(lines)


def link_in(mail: KeptMail) -> str:
    """The one web address in a mail."""
    found = re.search(r"http\S+", mail.text)
    if found is None:
        raise UnexpectedError(f"no link in {mail.text!r}")
    return found.group()


def expect(seen: T, condition: Callable[[T], bool]) -> T:
    """``seen``, of which ``condition`` has to be true."""
    if not condition(seen):
        raise UnexpectedError(f"seen instead: {seen}")
    return seen


def says(answer: str, code: str) -> str:
    """The answer of a mail server, which has to begin with ``code``."""
    return expect(answer, lambda answer: answer.startswith(code))


def state(page: Page, name: str) -> str:
    """The state that the page shows, which has to be ``name``."""
    return expect(page, lambda page: page.state == name).state


def heading(page: Page, words: str) -> str:
    """``words``, which have to be on the page."""
    expect(page, lambda page: words in page.text)
    return words
