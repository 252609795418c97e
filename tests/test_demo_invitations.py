"""Members invite others: pages that wait for as long as somebody thinks, in as many windows as he likes."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from webtest import TestApp

from beaker_statestore import observe, statistics
from beaker_statestore.collection import Collection
from beaker_statestore.slates import Slate, Slates
from beaker_statestore.testing import FaultyStore
from tests import test_demo_web
from tests.test_demo_web import ANN, BOB, HERE, World, form
from wsgi_demo import invitations, make_app
from wsgi_demo.invitations import (
    LARGEST_TEXT,
    MOST_ADDRESSES,
    BusyError,
    ChangedError,
    Finding,
    Invitations,
    OvertakenError,
    parse,
)
from wsgi_demo.newsletter import CONFIRMING, ERROR, MEMBER, NEWS, START, Newsletter
from wsgi_demo.processes import free_ports
from wsgi_demo.relay import RelayError
from wsgi_demo.settings import Settings

#: Beaker warns of the outages that these tests make, before the filter answers them.
pytestmark = pytest.mark.filterwarnings("ignore:Invalidating corrupt session")

# Fixtures.
relay = test_demo_web.relay
store = test_demo_web.store
world = test_demo_web.world

CID = "cid@example.com"
DAN = "dan@example.com"
QUESTION = "Please confirm: do you want to join?"


def member(world: World, address: str = ANN) -> TestApp:
    world.newsletter.move(address, START, MEMBER)
    return world.signed_in(address)


def slate_of(world: World, address: str = ANN) -> Slate:
    return Slates.from_settings(world.settings)[address]


def task_of(world: World) -> Invitations:
    return Invitations(Settings.from_mapping(world.settings), world.newsletter)


def upload(browser: TestApp, *addresses: str) -> Any:
    page = form(browser.get("/invite"), "Look at them")
    page["addresses"] = "\r\n".join(addresses)
    return page.submit(status="*")


def go_on(review: Any) -> Any:
    """The page with the button that sends."""
    return form(review, "Save and go on").submit("then", value="confirm").follow()


def send(page: Any) -> Any:
    return next(f for f in page.forms.values() if "fingerprint" in f.fields).submit(status="*")


def questions(world: World) -> Counter[str]:
    """How many questions each address has got."""
    return Counter(mail.recipient for mail in world.outbox.mails() if mail.subject == QUESTION)


def row_of(world: World, written: str, address: str = ANN) -> str:
    """The id of the row in which ``written`` is now."""
    return next(entry.id for entry in task_of(world).look(slate_of(world, address)).entries if entry.address == written)


# The way


def test_an_invitation_from_the_first_page_to_the_last(world: World) -> None:
    world.newsletter.move(BOB, START, MEMBER)
    ann = member(world)
    review = upload(ann, "Cid <CID@example.com>", "dan at example.com", BOB).follow()
    assert re.search(rf"{BOB} <span>is a member already", review.text)
    decisions = form(review, "Save and go on")
    decisions[f"address-{row_of(world, 'dan at example.com')}"] = "Dan@example.com"
    page = decisions.submit("then", value="confirm").follow()
    assert "Ask 2 people?" in page.text
    assert questions(world) == {}, "nothing goes out before the last button"
    assert "2 mails have gone out." in send(page).follow().text
    assert questions(world) == {CID: 1, DAN: 1}
    assert world.newsletter.state(CID) == CONFIRMING
    assert "invitation" not in slate_of(world)
    form(world.browser().get(world.path_in_mail(CID)), "Yes, join").submit()
    assert world.newsletter.state(CID) == MEMBER


def test_it_waits_for_its_author_in_every_browser(world: World) -> None:
    ann = member(world)
    review = upload(ann, CID, DAN).follow()
    elsewhere = world.signed_in()
    decisions = form(review, "Save for later")
    decisions[f"keep-{row_of(world, DAN)}"] = False
    assert "is kept" in decisions.submit("then", value="later").follow().text
    form(ann.get("/"), "Sign out").submit()
    for browser in (elsewhere, world.signed_in()):
        assert "It has 2 addresses" in browser.get("/invite").text
        assert "Ask 1 person?" in browser.get("/invite/confirm").text


def test_it_can_be_thrown_away(world: World) -> None:
    ann = member(world)
    upload(ann, CID)
    page = ann.get("/invite")
    assert "thrown away" in form(page, "Throw the invitation away").submit().follow().text
    assert "was no invitation" in form(page, "Throw the invitation away").submit().follow().text
    assert ann.get("/invite/review", status=404)
    assert "unfinished" not in ann.get("/invite").text


def test_addresses_can_be_added_later_and_nothing_is_there_twice(world: World) -> None:
    ann = member(world)
    upload(ann, CID)
    review = upload(ann, CID, DAN, DAN).follow()
    assert "2 people will be asked" in review.text
    assert "more than once" in review.text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a@b.c\n\n D@E.F \r\n", ["a@b.c", "d@e.f"]),
        ("a@b.c, d@e.f;g@h.i", ["a@b.c", "d@e.f", "g@h.i"]),
        ('"Lee, Ann",ann@b.c,1997\nBob,bob@b.c,1998', ["ann@b.c", "bob@b.c"]),
        ("Ann Lee <ann@b.c>, Bob <bob@b.c>", ["ann@b.c", "bob@b.c"]),
        ("Ann\tann@b.c", ["ann@b.c"]),
        ("ann at b.c,\nbob@", ["ann at b.c", "bob@"]),
        ("x" * 300, ["x" * 254]),
        (" \n,;\n", []),
        ("", []),
    ],
)
def test_lists_and_tables_are_read(text: str, found: list[str]) -> None:
    assert list(parse(text)) == found


# What there is to say


def test_every_conflict_is_found_and_only_some_can_be_kept(world: World) -> None:
    states = {"eva@x.y": MEMBER, "fay@x.y": ERROR, "gus@x.y": CONFIRMING}
    for address, state in states.items():
        world.newsletter.states.set(NEWS, address, state)
    task, bob = task_of(world), slate_of(world, BOB)
    for author, address in ((BOB, "hal@x.y"), (ANN, "ida@x.y")):
        slate = slate_of(world, author)
        task.add(slate, address)
        task.send(slate, task.look(slate).fingerprint)
    everybody = ["cid@x.y", "dan@x.y", "dan@x.y", *states, "hal@x.y", "ida@x.y", "jo@", "jö@x.y"]
    task.add(bob, "\n".join(everybody))
    task.decide(bob, {(row := row_of(world, "jo@", BOB)): _shown(task, bob, row)}, {row: "cid@x.y"})
    found = {(entry.address, entry.finding): (entry.keep, entry.is_open) for entry in task.look(bob).entries}
    assert found.pop(("cid@x.y", Finding.REPEATED)) == (False, False)
    assert found == {
        ("cid@x.y", Finding.FINE): (True, True),
        ("dan@x.y", Finding.TWICE): (True, True),
        ("eva@x.y", Finding.MEMBER): (False, False),
        ("fay@x.y", Finding.ERROR): (False, False),
        ("gus@x.y", Finding.CONFIRMING): (False, True),
        ("hal@x.y", Finding.AGAIN): (False, True),
        ("ida@x.y", Finding.INVITED): (False, True),
        ("jö@x.y", Finding.NO_ADDRESS): (False, False),
    }


def _shown(task: Invitations, slate: Slate, row: str) -> str:
    return next(entry.shown for entry in task.look(slate).entries if entry.id == row)


def test_whoever_was_asked_already_is_asked_again_only_on_request(world: World) -> None:
    world.asked(CID)
    ann = member(world)
    review = upload(ann, CID).follow()
    assert "Nobody in the list is to be asked" in go_on(review).text
    decisions = form(ann.get("/invite/review"), "Save and go on")
    decisions[f"keep-{row_of(world, CID)}"] = True
    send(decisions.submit("then", value="confirm").follow())
    assert questions(world) == {CID: 2}


def test_who_joins_while_the_author_thinks_gets_no_mail(world: World) -> None:
    ann = member(world)
    page = go_on(upload(ann, CID, DAN).follow())
    world.newsletter.move(CID, START, MEMBER)
    answer = send(page)
    assert answer.status_int == 409
    assert "no mail was sent" in answer.text
    send(go_on(answer))
    assert questions(world) == {DAN: 1}
    assert "invitation" not in slate_of(world)


def test_more_than_an_invitation_takes_is_refused_and_stays_in_the_field(world: World) -> None:
    ann = member(world)
    most = [f"a{n}@x.y" for n in range(MOST_ADDRESSES)]
    assert "1,001 addresses; an invitation takes 1,000" in upload(ann, *most, CID).text
    answer = upload(ann, "x" * LARGEST_TEXT + "ü")
    assert answer.status_int == 400
    assert form(answer, "Look at them")["addresses"].value.endswith("ü")
    assert "write at least one" in upload(ann, " ").text
    assert "invitation" not in slate_of(world)
    review = upload(ann, *most).follow()
    assert "1,000 people will be asked" in review.text
    assert "Ask 1,000 people?" in go_on(review).text


def test_no_form_of_ours_is_more_than_we_take(world: World) -> None:
    ann = member(world)
    wrong = [f"{n} at {'x' * 54}" for n in range(MOST_ADDRESSES)]
    review = upload(ann, *wrong).follow()
    assert "900 more are none" in review.text
    assert form(review, "Save and go on").submit("then", value="later").status_int == 303


# Several windows


def test_windows_that_work_on_different_addresses_do_not_disturb_each_other(world: World) -> None:
    ann = member(world)
    first = form(upload(ann, CID, DAN, "eve at x.y").follow(), "Save and go on")
    second = form(ann.get("/invite/review"), "Save and go on")
    first[f"keep-{row_of(world, CID)}"] = False
    second[f"address-{row_of(world, 'eve at x.y')}"] = "eve@x.y"
    assert upload(world.signed_in(), "fay@x.y").status_int == 303
    assert first.submit("then", value="confirm").status_int == 303
    assert second.submit("then", value="confirm").status_int == 303
    chosen = {entry.address for entry in task_of(world).look(slate_of(world)).chosen}
    assert chosen == {DAN, "eve@x.y", "fay@x.y"}


def test_windows_that_change_the_same_address_are_told_and_lose_nothing_else(world: World) -> None:
    ann = member(world)
    first = form(upload(ann, CID, DAN, "eve at x.y").follow(), "Save and go on")
    second = form(ann.get("/invite/review"), "Save and go on")
    eve = row_of(world, "eve at x.y")
    first[f"address-{eve}"] = "eve@x.y"
    second[f"address-{eve}"] = "eva@x.y"
    second[f"keep-{row_of(world, CID)}"] = False
    first.submit("then", value="confirm")
    answer = second.submit("then", value="confirm", status=409)
    assert "changed an address to “eve@x.y”, and you to “eva@x.y”" in answer.text
    assert "All else that you did is saved" in answer.text
    assert {entry.address for entry in task_of(world).look(slate_of(world)).chosen} == {DAN, "eve@x.y"}
    assert form(answer, "Save and go on").submit("then", value="confirm").status_int == 303


def test_a_decision_on_what_is_gone_is_told_too(world: World) -> None:
    ann = member(world)
    old = form(upload(ann, CID).follow(), "Save and go on")
    row = row_of(world, CID)
    task_of(world).discard(slate_of(world))
    assert old.submit("then", value="confirm").status_int == 303, "it had changed nothing"
    old[f"keep-{row}"] = False
    assert old.submit("then", value="confirm").status_int == 303, "it is not asked, as he wanted"
    upload(ann, DAN)
    with pytest.raises(OvertakenError, match="no longer in the list"):
        task_of(world).decide(slate_of(world), {row: "0"}, {row: True})


def test_many_windows_that_write_at_once_lose_nothing(world: World, options: dict[str, Any]) -> None:
    """In one process and over a server."""
    settings = {f"beaker.session.{name}": value for name, value in options.items()}
    task = Invitations(Settings.from_mapping({**world.settings, **settings}), world.newsletter)
    slate = Slates.from_settings(settings)[ANN]
    slate.pop("invitation", None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: task.add(slate, f"a{n}@x.y"), range(40)))
        rows = {entry.id: "1" for entry in task.look(slate).entries}
        list(pool.map(lambda row: task.decide(slate, {row: "1"}, {row: False}), list(rows)[::2]))
    review = task.look(slate)
    assert len(review.entries) == 40
    assert len(review.chosen) == 20


def test_what_another_window_adds_is_not_sent_unseen(world: World) -> None:
    ann = member(world)
    page = go_on(upload(ann, CID).follow())
    upload(world.signed_in(), DAN)
    answer = send(page)
    assert answer.status_int == 409
    assert DAN in answer.text
    assert questions(world) == {}
    send(go_on(answer))
    assert questions(world) == {CID: 1, DAN: 1}


def test_of_many_windows_that_send_at_once_one_sends(world: World) -> None:
    task, slate = task_of(world), slate_of(world)
    everybody = [f"a{n}@x.y" for n in range(12)]
    task.add(slate, "\n".join(everybody))
    fingerprint = task.look(slate).fingerprint

    def press(_: int) -> int:
        try:
            return task.send(slate, fingerprint).sent
        except (BusyError, ChangedError):
            return 0

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(press, range(6))) == [0, 0, 0, 0, 0, 12]
    assert questions(world) == dict.fromkeys(everybody, 1)


def test_a_second_press_of_the_button_is_told_that_all_is_done(world: World) -> None:
    page = go_on(upload(member(world), CID).follow())
    send(page)
    assert "sent or thrown away" in send(page).text
    assert questions(world) == {CID: 1}


def test_while_one_window_sends_another_is_told_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = member(world)
    page = go_on(upload(ann, CID).follow())
    answers = []

    def invite(_: Newsletter, __: str) -> bool:
        with ThreadPoolExecutor(1) as pool:
            answers.append(pool.submit(send, page).result())
        return True

    monkeypatch.setattr(Newsletter, "invite", invite)
    assert send(page).status_int == 303
    assert [answer.status_int for answer in answers] == [409]
    assert "is sending this invitation just now" in answers[0].text


def test_what_another_window_adds_while_one_sends_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    page = go_on(upload(member(world), CID).follow())
    monkeypatch.setattr(Newsletter, "invite", lambda *_: bool(task_of(world).add(slate_of(world), DAN)))
    send(page)
    assert [entry.address for entry in task_of(world).look(slate_of(world)).entries] == [DAN]


def test_what_another_window_decides_while_one_sends_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    review = form(upload(member(world), CID, DAN).follow(), "Save and go on")
    dan = row_of(world, DAN)
    review[f"keep-{dan}"] = False
    page = review.submit("then", value="confirm").follow()

    def invite(_: Newsletter, __: str) -> bool:
        task_of(world).decide(slate_of(world), {dan: "0"}, {dan: True})
        return True

    monkeypatch.setattr(Newsletter, "invite", invite)
    send(page)
    assert [entry.address for entry in task_of(world).look(slate_of(world)).chosen] == [DAN]


def test_what_another_window_throws_away_while_one_sends_is_not_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = go_on(upload(member(world), CID, DAN, "eve@x.y").follow())
    asked = []

    def invite(_: Newsletter, address: str) -> bool:
        asked.append(address)
        return task_of(world).discard(slate_of(world))

    monkeypatch.setattr(Newsletter, "invite", invite)
    send(page)
    assert asked == [CID]


# What breaks off


@pytest.mark.parametrize(
    "executed",
    [
        pytest.param(None, id="in turn"),
        pytest.param(False, id="before", marks=pytest.mark.long),
        pytest.param(True, id="after", marks=pytest.mark.long),
    ],
)
def test_whatever_call_of_the_store_fails_while_mails_go_out_each_is_asked(
    world: World, store: FaultyStore, executed: bool | None
) -> None:
    everybody = {CID, DAN}
    task, slate = task_of(world), slate_of(world)
    ann = member(world)
    for n in itertools.count(1):
        world.outbox.clear()
        for address in everybody:
            world.newsletter.states.set(NEWS, address, START)
        for kind in (b"confirm:", b"lock:"):
            store.delete_many([key for page in store.pages(kind) for key in page])
        task.add(slate, "\n".join(everybody))
        page = ann.get("/invite/confirm")
        store.fail(n, executed=n % 2 == 0 if executed is None else executed, for_good=True)
        answer = send(page)
        failed = store.has_failed
        store.heal()
        assert answer.status_int in (303, 503)
        if "invitation" in slate:
            invitations_held_by_nobody(store)
            assert send(ann.get("/invite/confirm")).status_int == 303
        asked = questions(world)
        assert asked.keys() == everybody
        assert sum(asked.values()) <= len(everybody) + 1, "only the one whose mail was just going out"
        assert "invitation" not in slate
        if not failed:
            break
    assert n > 20


def test_who_was_asked_just_before_an_outage_is_not_asked_again(
    world: World, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = member(world)
    page = go_on(upload(ann, CID, DAN).follow())
    note = Collection.put

    def noted(collection: Collection, key: str, document: dict[str, Any]) -> None:
        note(collection, key, document)
        if document.get("by") == ANN:
            store.fail(1, for_good=True)

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "put", noted)
        assert send(page).status_int == 503
    store.heal()
    invitations_held_by_nobody(store)
    assert questions(world) == {CID: 1}
    assert "2 mails have gone out." in send(ann.get("/invite/confirm")).follow().text
    assert questions(world) == {CID: 1, DAN: 1}


def invitations_held_by_nobody(store: FaultyStore) -> None:
    """What happens by itself a minute after a lock could not be released."""
    store.delete_many([key for page in store.pages(b"lock:") for key in page])


def test_a_mail_server_that_is_away_costs_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"127.0.0.1:{free_ports()['outbox']}"
    member(world)
    ann = TestApp(make_app({**world.settings, "demo.relay": nobody}), extra_environ=HERE)
    for name, value in world.signed_in().cookies.items():
        ann.set_cookie(name, value)
    assert send(go_on(upload(ann, CID, DAN).follow())).status_int == 503
    send(member(world).get("/invite/confirm"))
    assert questions(world) == {CID: 1, DAN: 1}


def test_an_address_that_the_mail_server_refuses_is_shown_and_does_not_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = Newsletter.invite

    def refused(newsletter: Newsletter, address: str) -> bool:
        if address == CID:
            raise RelayError("550 5.1.1 there is no such user")
        return invite(newsletter, address)

    monkeypatch.setattr(Newsletter, "invite", refused)
    ann = member(world)
    answer = send(go_on(upload(ann, CID, DAN).follow())).follow()
    assert "1 mail has gone out. The mail server refused 1" in answer.text
    assert questions(world) == {DAN: 1}
    assert re.search(rf"{CID} <span>was refused", ann.get("/invite/review").text)
    assert "Nobody" in ann.get("/invite/confirm").text


def test_who_has_got_enough_mail_is_counted_and_not_asked(world: World) -> None:
    for _ in range(6):
        world.asked(CID)
    world.newsletter.leave(CID)
    ann = member(world)
    assert "0 mails have gone out. 1 got none" in send(go_on(upload(ann, CID).follow())).follow().text
    assert "invitation" not in slate_of(world)


def test_many_mails_go_out_in_rounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invitations, "MOST_AT_ONCE", 3)
    everybody = [f"a{n}@x.y" for n in range(7)]
    answer = send(go_on(upload(member(world), *everybody, "not one").follow())).follow()
    assert "3 mails have gone out." in answer.text
    assert "Ask 4 people?" in answer.text
    answer = send(send(answer).follow()).follow()
    assert "1 mail has gone out." in answer.text
    assert questions(world) == dict.fromkeys(everybody, 1)
    assert "invitation" not in slate_of(world)


# Who may


PATHS = ["/invite", "/invite/review", "/invite/confirm"]
POSTS = [*PATHS, "/invite/discard"]


def test_only_members_who_have_signed_in_invite(world: World) -> None:
    stranger, bob = world.browser(), world.signed_in(BOB)
    tokens = [form(stranger.get("/"), "Mail me a link"), form(bob.get("/"), "Sign out")]
    for path in PATHS:
        assert "sign in" in stranger.get(path, status=403).text
        assert "is no member" in bob.get(path, status=403).text
    for path in POSTS:
        for browser, page in zip((stranger, bob), tokens, strict=True):
            browser.post(path, {"csrf_token": page["csrf_token"].value, "addresses": CID}, status=403)
    assert "invitation" not in slate_of(world, BOB)


def test_every_form_needs_the_token_of_its_session(world: World) -> None:
    ann = member(world)
    upload(ann, CID)
    before = dict(slate_of(world)["invitation"])
    for path in POSTS:
        ann.post(path, {"addresses": DAN, "fingerprint": task_of(world).look(slate_of(world)).fingerprint}, status=403)
    assert slate_of(world)["invitation"] == before
    assert questions(world) == {}


def test_each_works_on_his_own(world: World) -> None:
    upload(member(world), CID)
    bob = member(world, BOB)
    assert "unfinished" not in bob.get("/invite").text
    assert CID not in upload(bob, DAN).follow().text


def test_two_cookies_that_contradict_each_other_sign_nobody_in(world: World) -> None:
    ann, bob = member(world), member(world, BOB)
    for of_session, of_slate in ((ann, bob), (bob, ann)):
        browser = world.browser()
        browser.set_cookie("demo_session", of_session.cookies["demo_session"])
        browser.set_cookie("demo_slate", of_slate.cookies["demo_slate"])
        assert "signed in" not in browser.get("/").text
        assert browser.get("/invite", status=403)


@pytest.mark.parametrize("kept", ["demo_session", "demo_slate"])
def test_one_cookie_alone_signs_nobody_in(world: World, kept: str) -> None:
    ann, browser = member(world), world.browser()
    browser.set_cookie(kept, ann.cookies[kept])
    assert "signed in" not in browser.get("/").text


def test_signing_out_ends_the_login_token_too(world: World) -> None:
    ann = member(world)
    token = ann.cookies["demo_slate"]
    auth = Slates.from_settings(world.settings).auth
    assert auth.check(token) == ANN
    form(ann.get("/"), "Sign out").submit()
    assert auth.check(token) is None
    assert "demo_slate" not in ann.cookies


def test_the_login_cookie_goes_nowhere_else(world: World) -> None:
    app = make_app({**world.settings, "demo.base_url": "https://lists.example.com/news"})
    browser = TestApp(test_demo_web.mounted(app, "/news"), extra_environ={**HERE, "wsgi.url_scheme": "https"})
    page = form(browser.get("/news/"), "Mail me a link")
    page["address"] = ANN
    page.submit()
    secret = re.search(r"/sign-in/(\w+)", world.outbox.mails(ANN)[0].text)
    assert secret
    answer = form(browser.get(f"/news{secret[0]}"), "Sign in").submit()
    cookie = next(c for c in answer.headers.getall("Set-Cookie") if c.startswith("demo_slate="))
    assert {"httponly", "samesite=lax", "secure", "path=/news"} <= set(cookie.lower().split("; "))
    assert answer.headers.getall("Cache-Control") == ["no-store"]
    assert ANN in answer.follow().text


# The slate beside it


def test_pages_outside_the_workflow_do_not_read_its_document(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = member(world)
    upload(ann, CID)
    read: list[str] = []
    get = Slate.get

    def noted(slate: Slate, name: str, default: Any = None) -> Any:
        read.append(name)
        return get(slate, name, default)

    monkeypatch.setattr(Slate, "get", noted)
    ann.get("/")
    assert set(read) == {"user"}
    ann.get("/invite")
    assert set(read) == {"user", "invitation"}


def test_every_page_says_when_its_owner_was_here_before(world: World) -> None:
    assert "here for the first time" in member(world).get("/").text
    slate_of(world)["user"] = {"here": 1_000_000_000.5}
    assert "last here 09 Sep 2001, 01:46 UTC" in member(world).get("/invite").text


def test_the_pages_look_like_pages_while_the_store_is_away(world: World, store: FaultyStore) -> None:
    ann = member(world)
    store.fail(1, for_good=True)
    assert "Nothing is lost" in ann.get("/invite", status=503).text
    assert ann.get("/static/style.css").status_int == 200


# Statistics


def test_developers_see_what_is_counted_also_while_the_store_is_away(
    world: World, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the process does when it starts; undone after the test.
    monkeypatch.setattr(observe, "listener", observe.listener)
    monkeypatch.setattr(logging, "statistics", {}, raising=False)
    statistics.install()
    world.settings["demo.development"] = "true"
    browser = world.browser()
    assert 'href="/statistics/"' in browser.get("/").text
    assert browser.get("/statistics", status=308).headers["Location"] == "statistics/"
    store.fail(1, for_good=True)
    page = browser.get("/statistics/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "beaker_statestore" in browser.get("/statistics/data").text
    assert browser.get("/statistics/metrics").content_type == "text/plain"


@pytest.mark.parametrize(
    ("development", "environ"),
    [("false", HERE), ("true", {"REMOTE_ADDR": "192.0.2.1"}), ("true", {**HERE, "HTTP_HOST": "rebound.example:8080"})],
    ids=["production", "elsewhere", "rebound name"],
)
def test_nobody_else_sees_them(world: World, development: str, environ: dict[str, str]) -> None:
    browser = TestApp(make_app({**world.settings, "demo.development": development}), extra_environ=environ)
    for path in ("", "/", "/data", "/metrics"):
        assert browser.get(f"/statistics{path}", status=404)
    assert "tatistics" not in browser.get("/").text


# Every page, for everybody


def test_every_page_can_be_read_without_eyes_and_without_scripts(world: World) -> None:
    world.newsletter.move(BOB, START, MEMBER)
    ann = member(world)
    pages = [upload(ann, " "), world.browser().get("/invite", status=403), ann.get("/invite/review", status=404)]
    pages.append(upload(ann, CID, "dan at x.y", BOB, DAN, DAN).follow())
    pages += [ann.get("/invite"), go_on(pages[-1])]
    upload(ann, "eve@x.y")
    pages.append(send(pages[-1]))
    assert pages[-1].status_int == 409
    for page in pages:
        test_demo_web.assert_readable(page)
