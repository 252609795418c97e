"""The report of the statistics: as a page, in a real browser too, as JSON and for Prometheus."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from webob import Request
from webtest import TestApp

from beaker_statestore import observe, statistics
from beaker_statestore.exceptions import ConfigurationError, MissingDriverError
from beaker_statestore.report import make_app, prometheus
from beaker_statestore.statistics import Statistics
from tests.test_demo_browser import JUDGE, PATIENCE, QUIET

EVIL = "<script>document.title = 'ran'</script>"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Statistics]:
    """Statistics that have counted a little, beside somebody else's."""
    others = {
        EVIL: {"Enabled": True, "<b>": "&", "Rows": {"<i>": {"<u>": "<s>"}}},
        "Plain": {"Value": 1.5, "Broken": lambda scope: 1 / 0, "List": [{"a": 1}, {"b": None}], "Scalars": [1, 2]},
        "No namespace": 7,
    }
    monkeypatch.setattr(observe, "listener", observe.Listener())
    monkeypatch.setattr(logging, "statistics", others, raising=False)
    own = statistics.install()
    for n in range(30):
        own.operation("127.0.0.1:1978", "get", own.clock() - 10**5 * n, hits=1, sent=20, received=200)
    own.operation("127.0.0.1:1978", "compare_and_swap", own.clock() - 10**9, failed=True)
    observe.count("session.saved", 3)
    observe.count("something.else")
    yield own
    own.namespace["Enabled"] = True


@pytest.fixture
def web(own: Statistics) -> TestApp:
    return TestApp(make_app(title="The <figures>"))


def test_the_page_has_a_heading_for_each_namespace_and_a_table_for_each_collection(web: TestApp) -> None:
    html = web.get("/").text
    for heading in ("The &lt;figures&gt;</h1>", "beaker_statestore</h2>", "Plain</h2>", "No namespace</h2>"):
        assert heading in html
    for caption in ("Operations", "Servers", "Slow Operations", "Rows", "List"):
        assert f"<caption>{caption}" in html
    assert "<dt>Hits</dt><dd>30</dd>" in html
    assert "ZeroDivisionError" in html
    assert '<th scope="row">compare_and_swap</th>' in html


def test_everything_is_escaped(web: TestApp) -> None:
    html = web.get("/").text
    assert "<script" not in html
    assert "&lt;script&gt;document.title = &#x27;ran&#x27;&lt;/script&gt;</h2>" in html
    for text in ("<b>", "<i>", "<u>", "<s>"):
        assert text not in html
    assert "default-src 'none'" in web.get("/").headers["Content-Security-Policy"]


def test_the_data_are_json_sorted_and_without_what_json_lacks(web: TestApp, own: Statistics) -> None:
    logging.statistics["Odd"] = {"nan": float("nan"), "bytes": b"\xff", 1: 2, "half": "\ud800"}  # type: ignore[attr-defined]
    answer = web.get("/data")
    assert answer.content_type == "application/json"
    data = json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
    assert list(data) == sorted(data)
    assert data["beaker_statestore"]["Operations"]["get"]["Hits"] == 30
    assert data["Odd"] == {"1": 2, "bytes": "\\xff", "half": "\ud800", "nan": None}
    web.get("/")


def test_a_namespace_is_paused_and_resumed_by_post(web: TestApp, own: Statistics) -> None:
    answer = web.post("/pause", {"namespace": "beaker_statestore"}, status=303)
    assert answer.headers["Location"] == "./"
    own.operation("127.0.0.1:1978", "get", own.clock())
    assert own.total(kind="get").count == 30
    assert "Resume</button>" in web.get("/").text
    web.post("/resume", {"namespace": "beaker_statestore"}, status=303)
    own.operation("127.0.0.1:1978", "get", own.clock())
    assert own.total(kind="get").count == 31


def test_what_cannot_be_paused_is_not_found(web: TestApp) -> None:
    web.post("/pause", {"namespace": "Plain"}, status=404)
    web.post("/pause", {"namespace": "nobody"}, status=404)
    web.post("/pause", status=404)
    assert "Enabled" not in logging.statistics["Plain"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/pause", "GET", "POST"),
        ("/resume", "PUT", "POST"),
        ("/", "POST", "GET, HEAD"),
        ("/data", "DELETE", "GET, HEAD"),
    ],
)
def test_other_methods_are_told_what_is_allowed(web: TestApp, path: str, method: str, allowed: str) -> None:
    answer = web.request(path, method=method, status=405)
    assert answer.headers["Allow"] == allowed


def test_a_head_is_a_get_without_a_body(web: TestApp) -> None:
    assert web.head("/data").body == b""
    web.get("/nowhere", status=404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 303),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 303),
        ({"Origin": "http://localhost"}, 303),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:81"}, 403),
    ],
)
def test_no_other_site_can_pause_anything(own: Statistics, headers: dict[str, str], status: int) -> None:
    web = TestApp(make_app(), extra_environ={"HTTP_HOST": "localhost"})
    web.post("/pause", {"namespace": "beaker_statestore"}, headers=headers, status=status)
    assert own.namespace["Enabled"] is (status == 403)


@pytest.mark.parametrize(
    "environ",
    [
        {"PATH_INFO": "/\xff"},
        {"SCRIPT_NAME": "/\xff"},
        {"HTTP_HOST": "[::1"},
        {"PATH_INFO": "/pause", "HTTP_ORIGIN": "http://["},
        {"PATH_INFO": "/pause", "CONTENT_TYPE": "multipart/form-data"},
        {"PATH_INFO": "/pause", "CONTENT_TYPE": "application/x-www-form-urlencoded; charset=nonsense"},
    ],
)
def test_a_request_that_cannot_be_read_is_told_so(own: Statistics, environ: dict[str, str]) -> None:
    request = Request.blank("/", method="POST", body=b"namespace=beaker_statestore")
    request.environ.update({"CONTENT_TYPE": "application/x-www-form-urlencoded", **environ})
    assert request.get_response(make_app()).status_int == 400
    assert own.namespace["Enabled"] is True


@pytest.mark.parametrize(
    ("host", "hosts", "status"),
    [
        ("localhost", (), 200),
        ("LOCALHOST:8081", (), 200),
        ("127.0.0.1:8081", (), 200),
        ("[::1]:8081", (), 200),
        ("shop.example", ["Shop.example"], 200),
        ("shop.example:8443", ["shop.example"], 200),
        ("[2001:db8::1]", (), 200),
        ("10.0.0.5:8081", (), 200),
        ("10.0.0.5.evil.example", (), 403),
        ("127.0.0.1", ["shop.example"], 200),
        ("any.example", None, 200),
        ("evil.example", (), 403),
        ("evil.example:8081", ["shop.example"], 403),
        ("localhost.evil.example", (), 403),
        ("localhost@evil.example", (), 403),
        ("", (), 403),
    ],
)
def test_a_name_that_is_not_the_applications_own_is_refused(
    own: Statistics, host: str, hosts: list[str] | None, status: int
) -> None:
    web = TestApp(make_app(hosts=hosts), extra_environ={"HTTP_HOST": host, "REMOTE_ADDR": "127.0.0.1"})
    web.get("/data", status=status)
    web.post("/pause", {"namespace": "beaker_statestore"}, status=status if status == 403 else 303)


def test_hosts_are_a_list(own: Statistics) -> None:
    with pytest.raises(ConfigurationError, match=r"\['shop.example'\]"):
        make_app(hosts="shop.example")


def test_a_table_of_many_columns_is_cut(own: Statistics) -> None:
    own.namespace["Odd"] = {str(row): {f"{row}.{column}": 1 for column in range(100)} for row in range(100)}
    page = TestApp(make_app()).get("/")
    assert "9,950 more columns" in page.text
    assert len(page.body) < 1_000_000


def test_what_says_no_host_is_no_browser(own: Statistics) -> None:
    request = Request.blank("/data")
    del request.environ["HTTP_HOST"]
    assert request.get_response(make_app()).status_int == 200


def test_it_can_be_mounted_anywhere(own: Statistics) -> None:
    request = Request.blank("/", environ={"SCRIPT_NAME": "/admin/the statistics", "PATH_INFO": ""})
    answer = request.get_response(make_app())
    assert (answer.status_int, answer.headers["Location"]) == (308, "the%20statistics/")
    request = Request.blank("/", environ={"SCRIPT_NAME": "/statistics/", "PATH_INFO": ""})
    assert request.get_response(make_app()).status_int == 200
    html = TestApp(make_app()).get("/").text
    assert 'href="/' not in html
    assert 'action="/' not in html


def test_the_page_is_there_when_nobody_keeps_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(logging, "statistics", raising=False)
    web = TestApp(make_app())
    assert "Nobody keeps statistics" in web.get("/").text
    assert web.get("/data").json == {}


# -- Prometheus


@pytest.mark.parametrize(
    ("accept", "parse"),
    [
        ("", text_string_to_metric_families),
        ("application/openmetrics-text", openmetrics.text_string_to_metric_families),
    ],
)
def test_prometheus_reads_all_that_is_ours(web: TestApp, accept: str, parse: Callable[[str], Any]) -> None:
    answer = web.get("/metrics", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith(accept or "text/plain; version=0.0.4")
    families = {family.name: family for family in parse(answer.body.decode())}
    assert all(name.startswith("beaker_statestore_") and family.documentation for name, family in families.items())
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    kind, server = ("kind", "get"), ("server", "127.0.0.1:1978")
    assert samples[("beaker_statestore_operation_seconds_count", kind, server)] == 30
    assert samples[("beaker_statestore_operation_seconds_bucket", kind, ("le", "+Inf"), server)] == 30
    assert samples[("beaker_statestore_hits_total", kind, server)] == 30
    assert samples[("beaker_statestore_received_bytes_total", kind, server)] == 6000
    assert samples[("beaker_statestore_session_saved_total",)] == 3
    assert samples[("beaker_statestore_events_total", ("event", "something.else"))] == 1
    assert samples[("beaker_statestore_errors_total", ("kind", "compare_and_swap"), server)] == 1
    buckets = [v for (name, *labels), v in samples.items() if name.endswith("_bucket") and kind in labels]
    assert buckets == sorted(buckets)
    assert buckets[0] < buckets[5] < 30


def test_names_that_are_no_text_come_to_prometheus_all_the_same(web: TestApp, own: Statistics) -> None:
    own.operation("/srv/\udcff.lmdb", "\ud800", own.clock())
    observe.count("\udfff")
    text = web.get("/metrics").body.decode()
    labels = [sample.labels for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {"server": "/srv/\\udcff.lmdb", "kind": "\\ud800"} in labels
    assert {"event": "\\udfff"} in labels


def test_whatever_prometheus_says_that_it_prefers_it_is_answered(web: TestApp) -> None:
    web.get("/metrics", headers={"Accept": "application/openmetrics-text;version=x"}, status=200)


def test_without_prometheus_client_there_is_the_line_to_type(web: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDriverError, match=r'pip install "beaker-statestore\[metrics\]"'):
        prometheus()
    assert "pip install" in web.get("/metrics", status=501).text


# -- a browser


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mounted(own: Statistics) -> Iterator[str]:
    """Where the report is mounted in a web server."""
    app = make_app()

    def outer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = "/stats", environ["PATH_INFO"].removeprefix("/stats")
        return app(environ, start_response)

    with make_server("127.0.0.1", 0, outer, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/stats"
        server.shutdown()
        thread.join(PATIENCE)


def test_a_browser_shows_pauses_and_resumes(own: Statistics, mounted: str, tmp_path: Path) -> None:
    driver_path, browser = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver_path, "the browser tests need: apt-get install chromium chromium-driver"
    assert browser, "the browser tests need: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in [*QUIET, f"--user-data-dir={tmp_path}"]:
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        driver.set_page_load_timeout(PATIENCE)

        def gets() -> str:
            return driver.find_element(By.XPATH, "//tr[th='get']/td[1]").text

        def press(label: str, then: str) -> None:
            section = "//section[.//h2='beaker_statestore']"
            driver.find_element(By.XPATH, f"{section}//button[.='{label}']").click()
            WebDriverWait(driver, PATIENCE, 0.02, (Exception,)).until(
                lambda _: driver.find_element(By.XPATH, f"{section}//button[.='{then}']")
            )

        driver.get(mounted)
        assert driver.current_url == mounted + "/"
        assert gets() == "30"
        assert driver.title == "Statistics"
        assert EVIL in [heading.text for heading in driver.find_elements(By.TAG_NAME, "h2")]
        for screen in ({"width": 1280, "height": 900}, {"width": 390, "height": 844}):
            size = {**screen, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            for colours in ("dark", "light"):
                media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                wrong = str(driver.execute_script(JUDGE)).splitlines()
                # A table may go beyond the edge, since it scrolls within its own frame; the page does not.
                assert [line for line in wrong if line.startswith(("scrolls", "too small", "contrast"))] == []

        press("Pause", then="Resume")
        own.operation("127.0.0.1:1978", "get", own.clock())
        driver.refresh()
        assert gets() == "30"
        press("Resume", then="Pause")
        own.operation("127.0.0.1:1978", "get", own.clock())
        driver.refresh()
        assert gets() == "31"
        quiet = [line for line in driver.get_log("browser") if "favicon" not in str(line)]  # type: ignore[no-untyped-call]
        assert quiet == []
    finally:
        driver.quit()
