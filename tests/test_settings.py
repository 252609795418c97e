"""Settings out of INI files, as PasteDeploy users write them."""

from __future__ import annotations

import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
from paste.deploy import loadapp

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.settings import Settings, UnknownOptionWarning, cache_options, read_ini, session_options

INI = """
[DEFAULT]
port = 1978

[app:main]
use = egg:shop
beaker.session.type = ext:tcjson
beaker.session.url = 127.0.0.1:%(port)s
beaker.session.data_dir = %(here)s/data
session.deadline = 3
Case.Sensitive = yes

[filter:session]
beaker.session.url = elsewhere
"""


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    path = tmp_path / "development.ini"
    path.write_text(INI)
    return path


def test_both_doors_read_the_same_lines(ini: Path) -> None:
    options = session_options(read_ini(ini))
    assert options == {
        "type": "ext:tcjson",
        "url": "127.0.0.1:1978",
        "data_dir": f"{ini.parent}/data",
        "deadline": "3",
    }
    settings = Settings.from_options(options)
    assert (settings.url, settings.deadline, settings.prefix) == ("127.0.0.1:1978", 3.0, "")


def test_a_section_can_be_named(ini: Path) -> None:
    assert session_options(read_ini(ini, "filter:session"))["url"] == "elsewhere"


def test_option_names_keep_their_case(ini: Path) -> None:
    assert read_ini(ini)["Case.Sensitive"] == "yes"


def test_the_one_section_with_a_url_is_found(tmp_path: Path) -> None:
    path = tmp_path / "app.ini"
    path.write_text("[app:other]\na = 1\n[filter:session]\nbeaker.session.url = here\n")
    assert read_ini(path)["beaker.session.url"] == "here"


def merging_app_factory(global_conf: dict[str, str], **local_conf: str) -> dict[str, str]:
    """An application factory for PasteDeploy that makes of its arguments what applications make of them."""
    return {**global_conf, **local_conf}


APP = "use = call:tests.test_settings:merging_app_factory\n"
BASE_INI = f"""
[DEFAULT]
kept = by the base
beaker.session.prefix = base:
[app:main]
{APP}
beaker.session.url = base:1
beaker.session.deadline = 7
where = %(here)s
set shared = base's
[app:other]
{APP}
beaker.session.url = other:1
"""


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (f"[app:main]\n{APP}beaker.session.url = B:1\n", "B:1"),
        (f"[DEFAULT]\nbeaker.session.url = A:1\n[app:main]\n{APP}", "A:1"),
        (f"[DEFAULT]\nbeaker.session.url = A:1\n[app:main]\n{APP}beaker.session.url = B:1\n", "A:1"),
        (f"[DEFAULT]\nbeaker.session.url = A:1\n[app:main]\n{APP}set beaker.session.url = B:1\n", "B:1"),
        (f"[app:main]\n{APP}set beaker.session.url = B:1\n", "B:1"),
        (f"[app:main]\n{APP}set beaker.session.url = B:1\nbeaker.session.url = C:1\n", "C:1"),
        (f"[DEFAULT]\nstore = A:1\n[app:main]\n{APP}get beaker.session.url = store\n", "A:1"),
        (f"[app:main]\n{APP}set store = A:1\nget beaker.session.url = store\n", "A:1"),
        (f"[DEFAULT]\nhost = A\n[app:main]\n{APP}host = B\nbeaker.session.url = %(host)s:1\n", "B:1"),
        (f"[DEFAULT]\nhost = A\nbeaker.session.url = %(host)s:1\n[app:main]\n{APP}host = B\n", "A:1"),
        (f"[DEFAULT]\nx = 1\n[app:main]\n{APP}x = 50%\nbeaker.session.url = B:1\n", "B:1"),
        (f"[app:main]\n{APP}beaker.session.url: B:1\n", "B:1"),
        (f"[loggers]\nkeys: root\nx = 50%\n[app:main]\n{APP}beaker.session.url = %(here)s\n", None),
        (f"[app:main]\nuse = shop\nx = 2\n[app:shop]\n{APP}x = 1\nset y = 1\nbeaker.session.url = B:1\n", "B:1"),
        (f"[app:main]\nuse = shop\nset beaker.session.url = B:1\n[app:shop]\n{APP}set beaker.session.url = C:1", "B:1"),
        ("[app:main]\nuse = config:base.ini\n", "base:1"),
        ("[app:main]\nuse = config:base.ini#other\n", "other:1"),
        ("[app:main]\nuse = config:base.ini\nbeaker.session.url = B:1\n", "B:1"),
        ("[app:main]\nuse = config:base.ini\nset beaker.session.url = B:1\nset shared = B's\n", "B:1"),
        ("[DEFAULT]\nkept = here\nbeaker.session.url = A:1\n[app:main]\nuse = config:base.ini\n", "A:1"),
    ],
)
def test_an_application_loaded_by_paste_deploy_gets_the_same(tmp_path: Path, text: str, url: str | None) -> None:
    (tmp_path / "base.ini").write_text(BASE_INI)
    path = tmp_path / "app.ini"
    path.write_text(text)
    application: Any = loadapp(f"config:{path}")
    assert read_ini(path) == application
    assert session_options(application)["url"] == (url or str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[app:main]\nget beaker.session.url = store\n", r"`get beaker\.session\.url = store`, but nothing sets store"),
        ("[app:main]\nuse = main\nbeaker.session.url = y\n", "comes back to where it began"),
        ("[app:main]\nuse = shop\nbeaker.session.url = y\n", r"no section \[app:shop\]; there are \[app:main\]"),
        ("[app:a]\nbeaker.session.url = x\n[app:b]\nbeaker.session.url = y\n", r"\[app:a\], \[app:b\]: say which"),
        ("[app:a]\nb = 1\n", r"add to \[app:main\]"),
        ("no section at all", "not a valid INI file"),
        ("[app:main]\nbeaker.session.url = %(nowhere)s\n", "nowhere"),
        ("[app:main]\nx = 1\nx = 2\nbeaker.session.url = y\n", "already exists"),
        ("[app:main]\nbeaker.session.url = \xff\n", "not a valid INI file"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.ini"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=message) as error:
        read_ini(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_missing_section_are_named(tmp_path: Path, ini: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.ini: No such file"):
        read_ini(tmp_path / "nothing.ini")
    ini.with_name("using.ini").write_text("[app:main]\nuse = config:base.ini\n")
    with pytest.raises(ConfigurationError, match=r"base\.ini: No such file"):
        read_ini(ini.with_name("using.ini"))
    with pytest.raises(ConfigurationError, match=r"no section \[app:x\]; there are \[app:main\], \[filter:session\]"):
        read_ini(ini, "app:x")


def test_an_unknown_option_is_told_once() -> None:
    name = f"dead_line{uuid.uuid4().hex[:2]}"
    with pytest.warns(UnknownOptionWarning, match=f"app.{name} .* did you mean app.deadline"):
        Settings.from_options({"url": "memory:", name: "1"}, origin="app")
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        Settings.from_options({"url": "memory:", name: "1"}, origin="app")
    assert again == []
    with pytest.warns(UnknownOptionWarning, match=f"other.{name}"):
        Settings.from_options({"url": "memory:", name: "1"}, origin="other")


def test_timing_is_what_a_store_is_opened_with() -> None:
    settings = Settings.from_options({"url": "h", "connect_timeout": "1", "deadline": "3", "pool_size": "4"})
    assert settings.timing == {"connect_timeout": 1.0, "timeout": 3.0, "pool_size": 4, "atomic": True}


def test_a_caches_options_are_its_own_and_not_its_regions() -> None:
    application = {
        "cache.url": "a",
        "beaker.cache.url": "b",
        "beaker.cache.regions": "short",
        "beaker.cache.short.url": "c",
        "beaker.session.url": "d",
    }
    assert cache_options(application) == {"url": "b", "regions": "short"}
