"""Two web and two mail processes on one server: whatever one of them does, all of them see."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from email.utils import parseaddr
from pathlib import Path

import pytest

from beaker_statestore.testing import free_port
from wsgi_demo.check import NEWS, Person, says, state
from wsgi_demo.processes import HOST, Demo, Process, free_ports


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Demo, Demo]]:
    """The demo, and the same demo as seen through another web and another mail process."""
    directory = Path(tmp_path_factory.mktemp("many"))
    with Demo(directory, free_ports()) as first, ExitStack() as stack:
        second = copy.copy(first)
        second.ports = {**first.ports, "web": free_port(), "mail": free_port()}
        second.base_url = f"http://{HOST}:{second.ports['web']}"
        for name, option in (("web", "demo.web"), ("mail", "demo.smtp")):
            port = second.ports[name]
            arguments = [*first.processes[name].arguments, "--set", f"{option}={HOST}:{port}"]
            process = Process(f"second {name}", arguments, port, directory / f"second-{name}.log")
            process.start()
            stack.callback(process.stop)
            process.wait_until_up()
        yield first, second


def test_all_see_each_others_states(sites: tuple[Demo, Demo]) -> None:
    here, there = (Person("ann@example.com", site) for site in sites)
    says(here.writes(NEWS), "250")
    confirmation = here.mail("confirm")
    here.signs_in()
    there.browser = here.browser  # whose cookie is good for both web processes
    assert state(here.page(), "CONFIRMING") == state(there.page(), "CONFIRMING")

    says(there.writes(parseaddr(confirmation.message["Reply-To"])[1]), "250")
    assert state(here.page(), "MEMBER") == state(there.page(), "MEMBER")

    state(there.browser.press(there.page(), "Leave the list"), "START")
    state(here.page(), "START")
    says(here.writes(NEWS), "250")
    assert state(here.page(), "CONFIRMING") == state(there.page(), "CONFIRMING")


def test_signing_in_and_out_at_one_web_process_counts_at_the_other(sites: tuple[Demo, Demo]) -> None:
    here, there = (Person("bob@example.com", site) for site in sites)
    here.signs_in()
    there.browser = here.browser
    assert "bob@example.com" in there.page().text
    there.browser.press(there.page(), "Sign out")
    assert "bob@example.com" not in here.page().text
