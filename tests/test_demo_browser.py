"""The demo's pages in a real browser: on a desk and on a phone, in the light and in the dark, without JavaScript.

Debian has the browser and its driver: apt-get install chromium chromium-driver.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from email.utils import parseaddr
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import read_ini
from wsgi_demo.check import NEWS, Person, link_in
from wsgi_demo.processes import INI, Demo, free_ports

#: How long a page may take to come, in seconds.
PATIENCE = 20.0
#: As little as possible of what a browser does by itself.
QUIET = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--hide-scrollbars",
]

DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}

_names = itertools.count(1)


class Chromium:
    """A browser with one window, in which pages run no scripts unless a test wants it."""

    def __init__(self, profile: Path, demo: Demo) -> None:
        driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
        assert driver, "the browser tests need: apt-get install chromium chromium-driver"
        assert browser, "the browser tests need: apt-get install chromium chromium-driver"
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in [*QUIET, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.driver.set_page_load_timeout(PATIENCE)
        self.base_url = demo.base_url

    def becomes(self, screen: dict[str, Any], *, scripts: bool = False) -> Chromium:
        """Start afresh with a screen of this size."""
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        return self

    def open(self, path: str) -> None:
        self.driver.get(self.base_url + path)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def press(self, words: str) -> None:
        """Press the button, or follow the link, that says so, and wait for the page that comes."""
        old = self.find("html")
        self.driver.find_element(By.XPATH, f"//button[.='{words}'] | //a[starts-with(., '{words}')]").click()
        self.wait(lambda _: self.find("html") != old and self.all("footer"))

    def wait(self, condition: Any) -> None:
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05, ignored_exceptions=(Exception,)).until(condition)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def signs_in(self, person: Person) -> None:
        """Ask for a link by the page, and open it."""
        self.open("/")
        self.write("#address", person.address)
        self.press("Mail me a link")
        self.driver.get(link_in(person.mail("sign in")))
        self.press("Sign in")

    def write(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    @property
    def heading(self) -> str:
        return self.find("h1").text

    def judge(self) -> str:
        """What is wrong with how the page looks, in the light and in the dark; nothing, if it is as it should be."""
        return "".join(self._judge(colours) for colours in ("dark", "light"))

    def _judge(self, colours: str) -> str:
        wanted = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        return str(self.driver.execute_script(JUDGE))


#: Runs for the test, not for the page: text that is hard to read (WCAG 2.2, 1.4.3), things to press that are too
#: small (2.5.8), and what leads to scrolling sideways (1.4.10).
JUDGE = """
const wrong = [];
if (document.documentElement.scrollWidth > window.innerWidth)
    wrong.push(`scrolls sideways: ${document.documentElement.scrollWidth} > ${window.innerWidth}`);
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const luminance = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
    for (let e = element; e; e = e.parentElement) {
        const colour = rgb(getComputedStyle(e).backgroundColor);
        if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
};
for (const element of document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect();
    if (box.width <= 1 || box.right <= 0 || !element.checkVisibility()) continue;
    if (box.right > window.innerWidth + 1) wrong.push(`beyond the edge: ${element.outerHTML.slice(0, 80)}`);
    if (element.matches('button, .button, input:not([type=hidden]), textarea, summary')
            && (box.height < 24 || box.width < 24)) wrong.push(`too small: ${element.outerHTML.slice(0, 80)}`);
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const [a, b] = [rgb(getComputedStyle(element).color), behind(element)].map(luminance).sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast}: ${element.outerHTML.slice(0, 80)}`);
}
return wrong.join('\\n');
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo"), free_ports()) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"), demo)
    yield browser
    browser.driver.quit()


@pytest.fixture
def ann(demo: Demo) -> Person:
    return Person(f"ann{next(_names)}@example.com", demo)


@pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
def test_the_whole_story_without_a_script_and_without_a_mail_program(
    demo: Demo, chromium: Chromium, ann: Person, screen: dict[str, Any]
) -> None:
    browser = chromium.becomes(screen)
    judged: dict[str, str] = {}

    def see(heading: str) -> None:
        assert browser.heading == heading
        judged[f"{len(judged)} {heading}"] = browser.judge()

    browser.open("/")
    see("Announcements by mail")
    browser.press("Outbox")
    see("Outbox")
    browser.write("#sender", ann.address)
    browser.press("Send")
    assert "took your mail" in browser.find("[role=status]").text
    assert ann.address in browser.find("details[open]").text
    browser.press("Reply")
    see("Please confirm: do you want to join?")

    browser.open("/")
    browser.write("#address", ann.address)
    browser.press("Mail me a link")
    see("Check your mail")
    browser.press("the mail is in the outbox")
    browser.press("http")
    see("Sign in")
    browser.press("Sign in")
    see("Where you stand")
    assert browser.find("[aria-current]").text == "CONFIRMING"

    browser.press("Outbox")
    browser.all("summary")[1].click()
    browser.press(f"{demo.base_url}/confirm")
    see("Join the list?")
    browser.press("Yes, join")
    see("Where you stand")
    assert browser.find("[aria-current]").text == "MEMBER"

    browser.press("Outbox")
    browser.write("#subject", "crash")
    browser.press("Send")
    browser.open("/")
    see("Where you stand")
    assert browser.find(".state").text == "ERROR"
    browser.press("Start again")
    assert browser.find("[aria-current]").text == "START"
    browser.press("Sign out")
    see("You are signed out")

    browser.open("/nowhere")
    see("There is no such page")
    browser.open("/confirm/" + "0" * 32)
    see("That link is no longer good")
    browser.open("/outbox")
    browser.write("#recipient", "nobody@localhost")
    browser.press("Send")
    see("The mail was not sent")

    assert {page: wrong for page, wrong in judged.items() if wrong} == {}
    assert len(judged) == 13


def test_pages_in_these_tests_run_no_scripts(chromium: Chromium) -> None:
    chromium.becomes(DESK).driver.get("data:text/html,<title>quiet</title><script>document.title = 'ran'</script>")
    assert chromium.driver.title == "quiet"


def test_nothing_on_the_pages_breaks_their_own_rules(chromium: Chromium, ann: Person) -> None:
    """A browser logs what the Content-Security-Policy forbids, and what could not be loaded."""
    browser = chromium.becomes(DESK)
    browser.driver.get_log("browser")  # type: ignore[no-untyped-call]  # Selenium has no hints here
    ann.writes(NEWS)
    for path in ("/", "/check-your-mail", "/outbox"):
        browser.open(path)
    assert browser.driver.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_a_keyboard_is_enough(chromium: Chromium, ann: Person) -> None:
    browser = chromium.becomes(DESK)
    browser.open("/")
    body = browser.find("body")
    body.send_keys(Keys.TAB)
    skip = browser.driver.switch_to.active_element
    assert skip.text == "Skip to the content"
    assert skip.rect["x"] >= 0, "who presses Tab sees the link"
    skip.send_keys(Keys.ENTER)
    for _ in range(9):
        if browser.driver.switch_to.active_element.get_attribute("id") == "address":
            break
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    field = browser.driver.switch_to.active_element
    assert browser.driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", field) == "solid"
    field.send_keys(ann.address, Keys.ENTER)
    browser.wait(lambda _: browser.heading == "Check your mail")
    assert "sign in" in ann.mail("sign in").subject


def test_the_largest_text_still_fits(chromium: Chromium, ann: Person) -> None:
    """Twice as large on a phone is what a page of half the width gets to show (WCAG 2.2, 1.4.4)."""
    browser = chromium.becomes({**PHONE, "width": 240})
    ann.writes(NEWS)
    for path in ("/", "/outbox", "/check-your-mail"):
        browser.open(path)
        assert browser.judge() == ""


# The live page


@pytest.fixture
def live(chromium: Chromium) -> Iterator[Chromium]:
    yield chromium.becomes(DESK, scripts=True)
    # Otherwise the next test would begin with a page that fetches itself.
    chromium.driver.get("about:blank")


def test_an_open_page_changes_by_itself_when_a_mail_arrives(live: Chromium, ann: Person) -> None:
    live.signs_in(ann)
    live.run("window.loaded = 1")
    assert live.find("[aria-current]").text == "START"
    assert ann.writes(NEWS) == "250 OK"
    live.wait(lambda _: live.find("[aria-current]").text == "CONFIRMING")
    assert live.find(".live[role=status]").text.startswith("Changed by itself at")
    live.run("document.querySelector('main button').focus()")
    ann.writes(parseaddr(ann.mail("confirm").message["Reply-To"])[1])
    live.wait(lambda _: live.find("[aria-current]").text == "MEMBER")
    assert live.run("return window.loaded") == 1, "nobody has loaded the page anew"
    assert live.run("return document.activeElement.textContent") == "Leave the list", "the focus stays"
    assert live.judge() == ""


def test_what_is_half_written_stays_while_mails_appear_around_it(live: Chromium, ann: Person) -> None:
    live.open("/outbox")
    live.run("window.loaded = 1")
    live.find("#text").send_keys(" And I have not finished.")
    mails = len(live.all("details.mail"))
    for subject in ("one", "two"):
        ann.writes(NEWS, subject)
    live.wait(lambda _: len(live.all("details.mail")) == mails + 2)
    assert live.run("return [window.loaded, document.activeElement.id]") == [1, "text"]
    assert live.find("#text").get_attribute("value") == "Hello, I am new here. And I have not finished."
    # As if the form were another by now.
    live.run("document.querySelector('#text').title = 'old'")
    ann.writes(NEWS, "three")
    live.wait(lambda _: live.find(".live").text.startswith("Something here has changed"))
    assert live.find("#text").get_attribute("title") == "old"
    live.run("const field = document.activeElement; field.value = field.defaultValue; field.blur()")
    live.wait(lambda _: live.find("#text").get_attribute("title") == "")


def test_who_is_signed_out_from_elsewhere_sees_it(demo: Demo, live: Chromium, ann: Person) -> None:
    live.signs_in(ann)
    live.run("window.loaded = 1")
    settings = {**read_ini(INI), "beaker.session.url": f"127.0.0.1:{demo.ports['store']}"}
    assert Sessions.from_settings(settings).revoke(ann.address) == 1
    live.wait(lambda _: live.heading == "Announcements by mail")
    assert live.run("return window.loaded") == 1
    assert "Sign out" not in live.find("header").text


@pytest.mark.long
def test_an_open_page_says_that_it_is_cut_off_and_recovers(demo: Demo, live: Chromium, ann: Person) -> None:
    live.signs_in(ann)
    live.run("window.loaded = 1")
    store = demo.processes["store"]
    store.kill()
    live.wait(lambda _: live.find(".live").text == "Reconnecting …")
    store.start()
    store.wait_until_up()
    assert ann.writes(NEWS) == "250 OK"
    live.wait(lambda _: live.find("[aria-current]").text == "CONFIRMING")
    assert live.run("return window.loaded") == 1
