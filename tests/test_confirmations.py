"""Confirmations: Salmon's interface, over a store that all processes share, and of two clicks one wins."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import string
import subprocess
import sys
import threading
import time
from email.utils import parseaddr
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from salmon import confirm, mail, view

from beaker_statestore.confirmations import Claim, Confirmations, ConfirmationStorage, canonical, engine
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError, StoreUnavailable
from beaker_statestore.mailqueue import MailQueue
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore, ServerProcess

_numbers = itertools.count(1)

ODD = [
    "zed@example.com",
    "josé@exämple.com",
    "",
    "%",
    "a:b%3Ac/d",
    "a",
    "a/b",
    "b/a",
    "a%2Fb",
    "nul\x00 and newline\n",
    "lone \udcff surrogate",
    "_expires",
    "x" * 70_000,
]
#: Of targets, which the application names.
ODD_TARGETS = ODD[:-1]


@pytest.fixture(params=["memory", "tyrant", "lmdb"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "lmdb":
        return {"url": f"lmdb://{tmp_path}/confirmations.lmdb"}
    url = "memory:" if request.param == "memory" else request.getfixturevalue("tyrant_server").url
    return {"url": url, "prefix": f"confirm{next(_numbers)}."}


def _storage(options: dict[str, Any], **arguments: Any) -> ConfirmationStorage:
    options = dict(options)
    return ConfirmationStorage(options.pop("url"), **arguments, **options)


@pytest.fixture
def storage(options: dict[str, Any]) -> ConfirmationStorage:
    return _storage(options)


@pytest.fixture
def confirmations(storage: ConfirmationStorage) -> Confirmations:
    return Confirmations(storage)


@pytest.fixture
def pending(options: dict[str, Any]) -> MailQueue:
    options = dict(options)
    return MailQueue(options.pop("url"), "pending", event=None, **options)


@pytest.fixture
def salmons(storage: ConfirmationStorage, pending: MailQueue) -> Any:
    return engine(storage, pending)


def received(sender: str = "zed@example.com", subject: str = "subscribe") -> Any:
    return mail.MailRequest("localhost", sender, "news@localhost", f"Subject: {subject}\n\nplease\n".encode())


# What salmon.confirm.ConfirmationStorage does


def test_it_does_the_same_as_salmons_storage(storage: ConfirmationStorage) -> None:
    theirs = confirm.ConfirmationStorage({})
    texts = ["a@b", "b@a", "a:b", "b:a"]
    for number, (target, address, _) in enumerate(itertools.product(texts, texts[:2], range(3))):
        for each in (theirs, storage):
            if number % 4 == 3:
                each.delete(target, address)
            else:
                each.store(target, address, f"secret{number}", f"id{number}")
        for known, whom in itertools.product(texts, texts[:2]):
            assert storage.get(known, whom) == theirs.get(known, whom)
    storage.clear()
    theirs.clear()
    assert storage.get("a@b", "a@b") == theirs.get("a@b", "a@b") == (None, None)


def test_targets_and_addresses_may_be_any_text(storage: ConfirmationStorage) -> None:
    for number, (target, address) in enumerate(itertools.product(ODD_TARGETS, ODD)):
        storage.store(target, address, f"secret{number}", str(number))
    for number, (target, address) in enumerate(itertools.product(ODD_TARGETS, ODD)):
        assert storage.get(target, address) == (f"secret{number}", str(number))


@settings(deadline=None, max_examples=30)
@given(st.text(), st.text(), st.text(), st.text())
def test_different_ones_are_kept_apart(target: str, address: str, other: str, another: str) -> None:
    storage = ConfirmationStorage("memory:", name="apart")
    storage.store(target, address, "ours", None)
    storage.delete(other, another)
    same = (target, canonical(address) or address) == (other, canonical(another) or another)
    assert storage.get(target, address)[0] == (None if same else "ours")
    storage.delete(target, address)


@pytest.mark.parametrize(
    ("stored", "looked_up"),
    [
        ("zed@example.com", "Zed <ZED@Example.COM>"),
        ("josé@exämple.com", "José@exäMPLE.com"),
        ("Mailer Daemon <MAILER-DAEMON@mx.Example>", "mailer-daemon@mx.example"),
        (None, ""),
    ],
)
def test_what_salmon_registers_and_verifies_meet(storage: ConfirmationStorage, stored: str, looked_up: str) -> None:
    storage.store("subscribe", stored, "secret", "id")
    assert storage.get("subscribe", looked_up) == ("secret", "id")
    assert storage.get("subscribe", parseaddr(looked_up)[1]) == ("secret", "id")


def test_a_later_one_replaces_the_former(storage: ConfirmationStorage) -> None:
    storage.store("subscribe", "zed@example.com", "former", "1")
    assert storage.use("subscribe", "zed@example.com", "former", "somebody") is not None
    former = storage.store("subscribe", "zed@example.com", "later", "2")
    assert former == ("former", "1", "somebody")
    assert storage.get("subscribe", "zed@example.com") == ("later", "2")


def test_they_expire(storage: ConfirmationStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.store("subscribe", "zed@example.com", "secret", "id")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + storage.lifetime - 1)
    assert storage.get("subscribe", "zed@example.com") == ("secret", "id")
    monkeypatch.setattr(time, "time", lambda: now + storage.lifetime + 1)
    assert storage.get("subscribe", "zed@example.com") == (None, None)
    assert storage.use("subscribe", "zed@example.com", "secret", "somebody") is None


def test_clear_touches_only_its_own(storage: ConfirmationStorage, options: dict[str, Any]) -> None:
    prefix = options.get("prefix", "")
    neighbours = [_storage(options, name="x"), _storage({**options, "prefix": f"{prefix}x."})]
    for each in (storage, *neighbours):
        each.store("subscribe", "zed@example.com", "secret", "id")
    storage.clear()
    assert storage.get("subscribe", "zed@example.com") == (None, None)
    assert [each.get("subscribe", "zed@example.com")[0] for each in neighbours] == ["secret", "secret"]


def test_damage_is_told(storage: ConfirmationStorage, options: dict[str, Any]) -> None:
    record = f"{options.get('prefix', '')}confirm:confirmations:subscribe/zed@example.com".encode()
    open_store(options["url"]).put(record, b'{"pending": 3}')
    with pytest.raises(DocumentDamagedError):
        storage.get("subscribe", "zed@example.com")


@pytest.mark.parametrize("lifetime", [0, -1, None, "3600", float("nan")])
def test_a_lifetime_is_a_length_of_time(lifetime: Any) -> None:
    with pytest.raises(ConfigurationError, match="lifetime"):
        ConfirmationStorage("memory:", lifetime)


def test_nobody_replaces_himself() -> None:
    """Or his own mail would be thrown away when the answer of the store was lost."""
    faulty = FaultyStore(open_store(f"memory:confirm-faults-{next(_numbers)}"))
    confirmations = Confirmations(ConfirmationStorage(faulty))
    confirmations.ask("subscribe", "zed@example.com", "former")
    faulty.fail(2, executed=True)  # the swap
    assert confirmations.ask("subscribe", "zed@example.com", "later").replaced == "former"
    assert faulty.has_failed


# The small interface for the web


@pytest.mark.parametrize(
    "address",
    [
        "victim@example.com,attacker@example.org",
        "attacker@example.org (\r\nBcc: victim@example.com)",
        "attacker@example.org\r\nBcc: victim@example.com",
        "victim@example.com <attacker@example.org>",
        "(" * 3000,
        "a" * 70_000 + "@example.com",
        "",
        None,
    ],
    ids=lambda address: repr(address)[:30],
)
def test_what_is_not_one_address_cannot_be_asked_and_confirms_nothing(
    confirmations: Confirmations, address: Any
) -> None:
    with pytest.raises(ValueError, match="not one mail address"):
        confirmations.ask("subscribe", address)
    for known in ("attacker@example.org", "victim@example.com"):
        secret = confirmations.ask("subscribe", known).secret
        assert confirmations.look("subscribe", address, secret) is None
        assert confirmations.claim("subscribe", address, secret) is None
        assert confirmations.cancel("subscribe", address, secret) is None


def test_the_address_handed_back_is_the_one_that_was_mailed_to(confirmations: Confirmations) -> None:
    asked = confirmations.ask("subscribe", "Zed <Zed@Example.com>")
    assert asked.address == "zed@example.com"
    claim = confirmations.claim("subscribe", '"Z" <ZED@example.COM>', asked.secret)
    assert claim is not None
    assert claim.address == asked.address
    assert asked.secret not in repr(asked)
    # The Kelvin sign in lower case is a k; so it would be somebody else's address.
    kelvin = confirmations.ask("subscribe", "mi\u212ae@example.com")
    assert confirmations.claim("subscribe", "mike@example.com", kelvin.secret) is None


def test_looking_does_not_use_it_and_claiming_does(confirmations: Confirmations) -> None:
    secret = confirmations.ask("subscribe", "Zed@example.com", "kept").secret
    claim = Claim("subscribe", "zed@example.com", "kept")
    for _ in range(2):
        assert confirmations.look("subscribe", "zed@example.com", secret) == claim
    assert confirmations.claim("subscribe", "zed@example.com", secret.upper()) == claim
    assert confirmations.claim("subscribe", "zed@example.com", secret) is None
    assert confirmations.look("subscribe", "zed@example.com", secret) is None


@pytest.mark.parametrize("wrong", ["", "0" * 32, "é", "\ud800"])
def test_a_wrong_secret_gets_nothing_and_uses_nothing(confirmations: Confirmations, wrong: str) -> None:
    secret = confirmations.ask("subscribe", "zed@example.com").secret
    assert confirmations.look("subscribe", "zed@example.com", wrong) is None
    assert confirmations.claim("subscribe", "zed@example.com", wrong) is None
    assert confirmations.claim("leave", "zed@example.com", secret) is None
    assert confirmations.claim("subscribe", "ann@example.com", secret) is None
    assert confirmations.claim("subscribe", "zed@example.com", secret) is not None


def test_only_hashes_are_stored(confirmations: Confirmations, store_text: Any) -> None:
    secret = confirmations.ask("subscribe", "zed@example.com").secret
    confirmations.claim("subscribe", "zed@example.com", secret, by="a form's value")
    assert "zed@example.com" in store_text()
    assert secret not in store_text()
    assert "a form's value" not in store_text()
    # What is read in the store confirms nothing.
    (stored,) = [json.loads(line)["secret"] for line in store_text().splitlines() if line.startswith("{")]
    assert confirmations.look("subscribe", "zed@example.com", stored) is None


@pytest.fixture
def store_text(options: dict[str, Any]) -> Any:
    def text() -> str:
        store: Store = open_store(options["url"])
        keys = list(store.keys(options.get("prefix", "").encode() + b"confirm:"))
        return "\n".join(f"{key.decode()}\n{(store.get(key) or b'').decode()}" for key in keys)

    return text


def test_who_has_it_gets_it_again_and_nobody_else(confirmations: Confirmations) -> None:
    secret = confirmations.ask("subscribe", "zed@example.com").secret
    first = confirmations.claim("subscribe", "zed@example.com", secret, by="first")
    assert first == confirmations.claim("subscribe", "zed@example.com", secret, by="first")
    assert first == confirmations.look("subscribe", "zed@example.com", secret, by="first")
    assert confirmations.claim("subscribe", "zed@example.com", secret, by="second") is None
    assert confirmations.cancel("subscribe", "zed@example.com", secret) is None


def test_what_was_called_off_cannot_be_claimed(confirmations: Confirmations) -> None:
    secret = confirmations.ask("subscribe", "zed@example.com", "kept").secret
    for _ in range(2):
        assert confirmations.cancel("subscribe", "zed@example.com", secret) == Claim(
            "subscribe", "zed@example.com", "kept"
        )
    assert confirmations.claim("subscribe", "zed@example.com", secret, by="cancelled") is None


def test_of_many_clicks_at_once_one_wins(options: dict[str, Any]) -> None:
    for _ in range(5):
        secret = Confirmations(_storage(options)).ask("subscribe", "zed@example.com").secret
        start = threading.Barrier(8)
        won: list[bool] = []

        def click(secret: str = secret, start: threading.Barrier = start, won: list[bool] = won) -> None:
            mine = Confirmations(_storage(options))
            start.wait(20)
            won.append(mine.claim("subscribe", "zed@example.com", secret) is not None)

        threads = [threading.Thread(target=click) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(won) == [False] * 7 + [True]


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("for_good", [False, True])
def test_a_click_that_an_outage_meets_can_be_tried_again(executed: bool, for_good: bool) -> None:
    faulty = FaultyStore(open_store(f"memory:confirm-faults-{next(_numbers)}"))
    confirmations = Confirmations(ConfirmationStorage(faulty))
    for nth in range(1, 20):
        secret = confirmations.ask("subscribe", "zed@example.com").secret
        faulty.fail(nth, executed=executed, for_good=for_good)
        try:
            claimed = confirmations.claim("subscribe", "zed@example.com", secret, by="the form") is not None
        except StoreUnavailable:
            claimed = False
        else:
            assert claimed
        met = faulty.has_failed
        faulty.heal()
        assert confirmations.claim("subscribe", "zed@example.com", secret, by="the form") is not None
        assert confirmations.claim("subscribe", "zed@example.com", secret, by="another") is None
        if not met:
            return
    raise AssertionError("the number of store calls of one claim seems to have no end")


def test_a_lost_answer_alone_costs_a_click_nothing() -> None:
    faulty = FaultyStore(open_store(f"memory:confirm-faults-{next(_numbers)}"))
    confirmations = Confirmations(ConfirmationStorage(faulty))
    secret = confirmations.ask("subscribe", "zed@example.com").secret
    faulty.fail(2, executed=True)  # the swap
    assert confirmations.claim("subscribe", "zed@example.com", secret) is not None
    assert faulty.has_failed


# Salmon's engine


def test_it_is_salmons_engine(salmons: Any) -> None:
    assert isinstance(salmons, confirm.ConfirmationEngine)


def test_register_verify_and_never_again(salmons: Any, pending: MailQueue) -> None:
    address = salmons.register("subscribe", received())
    target, secret = address.split("-confirm-")
    assert target == "subscribe"
    assert salmons.verify("subscribe", "zed@example.com", "wrong") is None
    assert salmons.verify("subscribe", "zed@example.com", None) is None
    assert salmons.verify("subscribe", "ann@example.com", secret) is None
    original = salmons.verify("subscribe", "Zed <zed@Example.com>", secret)
    assert (original["subject"], original.From, original.To) == ("subscribe", "zed@example.com", "news@localhost")
    assert salmons.verify("subscribe", "zed@example.com", secret) is None
    assert salmons.storage.get("subscribe", "zed@example.com") == (None, None)
    # As with Salmon's own, the mail stays until it is removed.
    (key,) = pending.keys()
    salmons.delete_pending(key)
    assert len(pending) == 0


def test_cancel(salmons: Any, pending: MailQueue) -> None:
    secret = salmons.register("subscribe", received()).split("-")[-1]
    salmons.cancel("subscribe", "zed@example.com", "wrong")
    assert len(pending) == 1
    salmons.cancel("subscribe", "zed@example.com", secret)
    salmons.cancel("subscribe", "zed@example.com", secret)
    assert len(pending) == 0
    assert salmons.verify("subscribe", "zed@example.com", secret) is None


def test_who_asks_again_gets_a_new_secret_and_one_mail_waits(salmons: Any, pending: MailQueue) -> None:
    former = salmons.register("subscribe", received(subject="one")).split("-")[-1]
    later = salmons.register("subscribe", received(subject="two")).split("-")[-1]
    assert len(pending) == 1
    assert salmons.verify("subscribe", "zed@example.com", former) is None
    assert salmons.verify("subscribe", "zed@example.com", later)["subject"] == "two"


def test_of_many_who_ask_at_once_one_mail_waits(salmons: Any, pending: MailQueue) -> None:
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait(20)
        salmons.register("subscribe", received())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(pending) == 1


def test_what_began_on_the_web_is_confirmed_by_mail_too(salmons: Any) -> None:
    asked = salmons.confirmations.ask("subscribe", "web@example.com")
    assert salmons.verify("subscribe", "web@example.com", asked.secret) is None
    assert salmons.claim("subscribe", "web@example.com", asked.secret, by="<1@x>").address == "web@example.com"
    assert salmons.claim("subscribe", "web@example.com", asked.secret, by="<2@x>") is None


def test_clear(salmons: Any, pending: MailQueue) -> None:
    secret = salmons.register("subscribe", received()).split("-")[-1]
    salmons.clear()
    assert len(pending) == 0
    assert salmons.verify("subscribe", "zed@example.com", secret) is None


def test_a_mail_must_not_be_gone_before_its_secret(storage: ConfirmationStorage, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="at least as long"):
        engine(storage, MailQueue(options["url"], "pending", lifetime=storage.lifetime - 1))


def test_salmons_own_engine_works_over_the_storage(storage: ConfirmationStorage, pending: MailQueue) -> None:
    stock = confirm.ConfirmationEngine.__new__(confirm.ConfirmationEngine)
    stock.storage, stock.pending = storage, pending
    secret = stock.register("subscribe", received()).split("-")[-1]
    assert stock.verify("subscribe", "zed@example.com", secret)["subject"] == "subscribe"
    assert stock.verify("subscribe", "zed@example.com", secret) is None


class Relay:
    """Instead of salmon.server.Relay: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def deliver(self, message: Any) -> None:
        self.sent.append(message)


class Loader:
    """Instead of Jinja's: a template with nothing to fill in."""

    def get_template(self, _name: str) -> Any:
        return self

    def render(self, _variables: Any) -> str:
        return "Do you want to subscribe?"


@pytest.mark.parametrize("sender", ["victim@example.com", "%s%d%@example.com"])
def test_the_secret_goes_to_the_address_that_it_confirms(
    salmons: Any, monkeypatch: pytest.MonkeyPatch, sender: str
) -> None:
    """Anybody can write anything into a From header."""
    monkeypatch.setattr(view, "LOADER", Loader())
    relay = Relay()
    forged = mail.MailRequest("p", sender, "news@localhost", b"From: attacker@example.org\n\n")
    assert salmons.send(relay, "subscribe", forged, "confirm.txt", {"host": "localhost"})
    (sent,) = relay.sent
    assert sent["To"] == sender
    assert "attacker" not in str(sent)
    secret = sent["Reply-To"].removesuffix("@localhost").split("-")[-1]
    assert salmons.claim("subscribe", sender, secret).address == sender


@pytest.mark.parametrize(
    ("sender", "headers"),
    [
        ("", b"From: Mailer Daemon, victim@example.com"),
        ("", b"From: mailer-daemon@example.com"),
        ("", b"Subject: from nobody"),
        ("zed@example.com", b"From: zed@example.com\nAuto-Submitted: auto-replied"),
    ],
)
def test_programs_are_not_asked(salmons: Any, pending: MailQueue, sender: str, headers: bytes) -> None:
    relay = Relay()
    request = mail.MailRequest("p", sender, "news@localhost", headers + b"\n\n")
    assert not salmons.send(relay, "subscribe", request, "confirm.txt", {"host": "localhost"})
    assert relay.sent == []
    assert len(pending) == 0


CLICK = string.Template("""
from beaker_statestore.confirmations import Confirmations, ConfirmationStorage
claim = Confirmations(ConfirmationStorage("$url", prefix="$prefix")).claim("subscribe", "$address", "$secret")
import sys
from beaker_statestore.mailqueue import MailQueue
assert "salmon" not in sys.modules
print(MailQueue("$url", "pending", prefix="$prefix").read(claim.pending).subject)
""")


def test_a_click_in_another_process_confirms_what_a_mail_began(
    tyrant_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"url": tyrant_server.url, "prefix": f"confirm{next(_numbers)}."}
    pending = MailQueue(options["url"], "pending", prefix=options["prefix"])
    salmons, relay = engine(_storage(options), pending), Relay()
    monkeypatch.setattr(view, "LOADER", Loader())
    salmons.send(relay, "subscribe", received(), "confirm.txt", {"host": "localhost"})
    (sent,) = relay.sent
    assert sent["To"] == "zed@example.com"
    secret = sent["Reply-To"].removesuffix("@localhost").split("-")[-1]
    code = CLICK.substitute(options, address="zed@example.com", secret=secret)
    clicked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ)
    )
    assert clicked.stdout == "subscribe\n"
    assert salmons.verify("subscribe", "zed@example.com", secret) is None


@pytest.mark.parametrize("executed", [False, True])
def test_a_mail_that_an_outage_meets_can_be_delivered_again(executed: bool) -> None:
    """As the sending server does after 451, until the same mail has confirmed."""
    faulty = FaultyStore(open_store(f"memory:confirm-faults-{next(_numbers)}"))
    pending = MailQueue(faulty, "pending")
    salmons = engine(ConfirmationStorage(faulty), pending)
    for nth in range(1, 20):
        secret = salmons.register("subscribe", received()).split("-")[-1]
        faulty.fail(nth, executed=executed, for_good=True)
        with contextlib.suppress(StoreUnavailable):
            salmons.verify("subscribe", "zed@example.com", secret, by="<message@id>")
        met = faulty.has_failed
        faulty.heal()
        assert salmons.verify("subscribe", "zed@example.com", secret, by="<message@id>")["subject"] == "subscribe"
        assert salmons.verify("subscribe", "zed@example.com", secret, by="<another@id>") is None
        if not met:
            assert nth > 3
            return
    raise AssertionError("the number of store calls of verify seems to have no end")


def test_by_an_ini_file(tmp_path: Path, options: dict[str, Any]) -> None:
    ini = tmp_path / "app.ini"
    lines = [f"beaker.session.{name} = {value}" for name, value in options.items()]
    ini.write_text("\n".join(["[app:main]", *lines, ""]))
    ConfirmationStorage.from_settings(str(ini), lifetime=60).store("subscribe", "zed@example.com", "secret", "id")
    assert _storage(options).get("subscribe", "zed@example.com") == ("secret", "id")
