"""The whole way of an invitation in a real browser, in two windows at once, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.test_demo_browser import DESK, PHONE, Chromium
from wsgi_demo.check import NEWS, Person, link_in
from wsgi_demo.processes import Demo, free_ports

#: The narrowest that is still sold.
SMALL = {**PHONE, "width": 360}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo"), free_ports()) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"), demo)
    yield browser
    browser.driver.quit()


def test_an_invitation_without_a_script(demo: Demo, chromium: Chromium) -> None:
    ann, cid = Person("ann@example.com", demo), Person("cid@example.com", demo)
    ann.writes(NEWS)
    ann.confirms_by_click()
    browser = chromium.becomes(DESK)
    judged: dict[str, str] = {}

    def see(heading: str) -> None:
        assert browser.heading == heading
        for screen in (SMALL, DESK):
            browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            judged[f"{len(judged)} {heading}"] = browser.judge()

    def sign_in() -> None:
        browser.open("/")
        browser.write("#address", ann.address)
        browser.press("Mail me a link")
        browser.driver.get(link_in(ann.mail("sign in")))
        browser.press("Sign in")

    browser.open("/invite")
    see("Members invite others")
    sign_in()
    browser.press("Invite")
    see("Invite others")
    browser.write("#addresses", f"{cid.address}\ndan at example.com\n{ann.address}\neve@example.com, eve@example.com\n")
    browser.press("Look at them")
    see("Look at the addresses")
    browser.driver.find_element("xpath", "//label[starts-with(., 'eve@example.com')]").click()

    # Another window corrects an address meanwhile, and this one does not notice before it saves.
    window = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("window")
    browser.open("/invite/review")
    browser.write("input[name^=address-]", "dan@example.com")
    browser.press("Save for later")
    browser.driver.close()
    browser.driver.switch_to.window(window)
    browser.write("input[name^=address-]", "dana@example.com")
    browser.press("Save and go on")
    see("Look at the addresses")
    assert "dan@example.com" in browser.find("[role=alert]").text
    browser.press("Save for later")

    browser.press("Sign out")
    sign_in()
    browser.press("invite others")
    see("Invite others")
    assert "It has 4 addresses" in browser.find("main").text
    browser.press("Go on with it")
    browser.press("Save and go on")
    see("Ask 2 people?")
    browser.press("Send 2 mails")
    assert browser.find("[role=status]").text == "2 mails have gone out."
    assert "last here" in browser.find(".who").text
    assert "join" in cid.mail("confirm").text
    browser.open("/invite/confirm")
    see("There is no invitation any more")

    assert {page: wrong for page, wrong in judged.items() if wrong} == {}
    assert len(judged) == 14


def test_the_statistics_obey_their_own_rules(chromium: Chromium) -> None:
    """Their page has a Content-Security-Policy of its own; a browser logs what that forbids."""
    browser = chromium.becomes(DESK)
    browser.open("/")
    browser.driver.get_log("browser")  # type: ignore[no-untyped-call]  # Selenium has no hints here
    browser.driver.find_element("link text", "Statistics").click()
    browser.wait(lambda _: browser.heading == "Statistics")
    for button in ("Pause", "Resume"):
        old = browser.find("html")
        browser.driver.find_element("xpath", f"//button[.='{button}']").click()
        browser.wait(lambda _, old=old: browser.find("html") != old)
    browser.wait(lambda _: browser.find("button").text == "Pause")
    assert browser.driver.get_log("browser") == []  # type: ignore[no-untyped-call]
