"""Settings out of INI files, as PasteDeploy users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.settings import Settings, read_ini, session_options

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
    with pytest.raises(ConfigurationError, match=r"no section \[app:x\]; there are \[app:main\], \[filter:session\]"):
        read_ini(ini, "app:x")
