"""ext:tcjson as Beaker's caches and its own users see it."""

from __future__ import annotations

import json
import threading
import time
import uuid
import warnings
from typing import Any

import pytest
from beaker import cache as beaker_cache
from beaker.cache import Cache, CacheManager
from beaker.middleware import SessionMiddleware
from beaker.util import parse_cache_config_options
from webtest import TestApp

from beaker_statestore import namespace, settings
from beaker_statestore.exceptions import ConfigurationError, DocumentRefusedError
from beaker_statestore.namespace import DocumentManager, TCJSONContainer, TCJSONNamespaceManager, register
from beaker_statestore.settings import UnknownOptionWarning
from beaker_statestore.stores.base import Store


@pytest.fixture
def cache(options: dict[str, Any]) -> Cache:
    return Cache("app/views.py|front page", type="ext:tcjson", **options)


@pytest.fixture
def confirm(options: dict[str, Any]) -> DocumentManager:
    return DocumentManager("signin", kind="confirm", **options)


def records(store: Store, options: dict[str, Any]) -> dict[bytes, Any]:
    start = options["prefix"].encode()
    return {key.removeprefix(start): json.loads(store.get(key) or b"null") for key in store.keys(start)}


def test_the_two_lines_of_the_readme_suffice(options: dict[str, Any]) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        session = environ["beaker.session"]
        session["n"] = session.get("n", 0) + 1
        session.save()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(session["n"]).encode()]

    settings = {"beaker.session.type": "ext:tcjson", "beaker.session.url": options["url"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        browser = TestApp(SessionMiddleware(application, settings))
        assert [browser.get("/").text for _ in range(3)] == ["1", "2", "3"]


def test_beaker_finds_the_entry_point_by_itself(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    fresh = type(beaker_cache.clsmap)({})
    monkeypatch.setattr(beaker_cache, "clsmap", fresh)
    assert isinstance(Cache("ns", type="ext:tcjson", **options).namespace, TCJSONNamespaceManager)


def test_registering_by_hand_comes_to_the_same(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    for entry_points_are_found in (True, False):
        fresh = type(beaker_cache.clsmap)({})
        fresh.initialized = not entry_points_are_found
        monkeypatch.setattr(beaker_cache, "clsmap", fresh)
        monkeypatch.setattr(namespace, "clsmap", fresh)
        register()
        assert isinstance(Cache("ns", type="ext:tcjson", **options).namespace, TCJSONNamespaceManager)
        with pytest.raises(TypeError, match="Unknown cache"):
            Cache("ns", type="ext:nothing", **options)


def test_a_cached_value_comes_back(cache: Cache) -> None:
    cache.put("kéy", {"a": [1, None]})
    assert cache.get("kéy") == {"a": [1, None]}
    assert "kéy" in cache
    assert "other" not in cache
    with pytest.raises(KeyError):
        cache.get("other")


def test_none_is_a_value(cache: Cache) -> None:
    cache.put("key", None)
    assert "key" in cache
    assert cache.get("key") is None


def test_a_value_is_created_once(cache: Cache) -> None:
    made: list[int] = []

    def create() -> dict[str, Any]:
        made.append(1)
        return {"n": 1}

    threads = [threading.Thread(target=cache.get, args=("key",), kwargs={"createfunc": create}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert cache.get("key", createfunc=create) == {"n": 1}
    assert made == [1]


def test_removing_and_clearing(cache: Cache, options: dict[str, Any], store: Store) -> None:
    neighbours = [
        Cache("app/views.py|front page 2", type="ext:tcjson", **options),
        Cache("app/views.py|front page:", type="ext:tcjson", **options),
        Cache("app/views.py|front page", type="ext:tcjson", **{**options, "prefix": options["prefix"] + "x"}),
    ]
    for one in (cache, *neighbours):
        one.put("a", 1)
        one.put("b", 2)
    cache.remove_value("a")
    assert "a" not in cache
    assert cache.get("b") == 2
    cache.clear()
    assert "b" not in cache
    assert [one.get("a") for one in neighbours] == [1, 1, 1]


def test_keys_are_those_of_its_own_namespace(options: dict[str, Any]) -> None:
    one, other = (TCJSONNamespaceManager(name, **options) for name in ("one", "one:two"))
    one["a"], one["b:%"], other["c"] = (1.0, None, "A"), (1.0, None, "B"), (1.0, None, "C")
    assert set(one.keys()) == {"a", "b:%"}
    assert other.keys() == ["c"]


def test_a_cache_entry_at_rest(cache: Cache, options: dict[str, Any], store: Store) -> None:
    timed = Cache("ns", type="ext:tcjson", expire=60, **options)
    timed.put("k:1", "value")
    ((key, record),) = records(store, options).items()
    assert key == b"cache:ns:k%3A1"
    assert record["stored"] == pytest.approx(time.time(), abs=5)
    assert record == {
        "stored": record["stored"],
        "expire": 60,
        "value": "value",
        "_expires": pytest.approx(record["stored"] + 60 + 120),
    }


def test_a_stale_value_is_served_while_a_new_one_is_made(options: dict[str, Any]) -> None:
    cache = Cache("ns", type="ext:tcjson", expire=1, **options)
    manager = cache.namespace
    manager.set_value("key", (time.time() - 2, 1, "stale"), expiretime=1)
    started, finish = threading.Event(), threading.Event()

    def create() -> str:
        started.set()
        assert finish.wait(10)
        return "fresh"

    maker = threading.Thread(target=cache.get, args=("key",), kwargs={"createfunc": create})
    maker.start()
    assert started.wait(10)
    assert cache.get("key", createfunc=lambda: "not called") == "stale"
    finish.set()
    maker.join(10)
    assert cache.get("key") == "fresh"


def test_a_region_of_an_ini_file(options: dict[str, Any]) -> None:
    settings = {
        "beaker.cache.regions": "short",
        "beaker.cache.short.type": "ext:tcjson",
        "beaker.cache.short.expire": "60",
        **{f"beaker.cache.short.{name}": value for name, value in options.items()},
    }
    manager = CacheManager(**parse_cache_config_options(settings))
    calls = []

    @manager.region("short", "square")
    def square(n: int) -> int:
        calls.append(n)
        return n * n

    assert [square(3), square(3), square(4)] == [9, 9, 16]
    assert calls == [3, 4]


def test_a_cached_value_that_json_cannot_hold_is_refused_by_its_path(cache: Cache) -> None:
    with pytest.raises(DocumentRefusedError, match=r"cache\['key'\]\['value'\]\['when'\] is a set"):
        cache.put("key", {"when": {1}})
    assert "key" not in cache


def test_a_cache_is_no_session_whatever_its_options(options: dict[str, Any], store: Store) -> None:
    cache = Cache("ns", type="ext:tcjson", digest_filenames="true", **options)
    cache.put("session", 1)
    assert cache.get("session") == 1
    assert list(records(store, options)) == [b"cache:ns:session"]


def test_a_tuple_of_the_applications_own_is_a_value(options: dict[str, Any]) -> None:
    manager = TCJSONNamespaceManager("ns", **options)
    manager.set_value("key", ("a", "b", "c"), expiretime=5)
    assert manager["key"] == ["a", "b", "c"]


def test_a_region_without_a_url_of_its_own_is_told_so(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"a region needs its own, beaker\.cache\.<region>\.url"):
        Cache("ns", type="ext:tcjson")


def test_the_old_container_interface(options: dict[str, Any]) -> None:
    value = TCJSONContainer("key", {}, "ns", createfunc=lambda: "made", **options)
    assert value.get_value() == "made"


def test_an_unknown_option_is_warned_about_with_a_suggestion(options: dict[str, Any]) -> None:
    settings._warn_unknown.cache_clear()  # it warns once for each name
    with pytest.warns(UnknownOptionWarning, match=r"beaker\.cache\.pool_sise .* did you mean beaker\.cache\.pool_size"):
        TCJSONNamespaceManager("ns", pool_sise=3, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"url": ""}, r"beaker\.session\.url is not set"),
        ({"deadline": "soon"}, r"beaker\.session\.deadline is 'soon': give a number of seconds"),
        ({"pool_size": "0"}, "whole number above 0"),
        ({"encrypted": "perhaps"}, "true or false"),
        ({"serializer": "yaml"}, "pickle or json"),
        ({"prefix": "session:"}, "session:"),
        ({"url": "tyrand://localhost"}, "tyrant"),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(
    options: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TCJSONNamespaceManager(uuid.uuid4().hex, data_dir=None, digest_filenames=False, **{**options, **changed})


# Documents of other kinds


def test_a_document_is_changed_by_a_function(confirm: DocumentManager) -> None:
    assert confirm.modify("k", lambda document: {**(document or {}), "a": 1}) == {"a": 1}
    assert confirm.modify("k", lambda document: {**(document or {}), "b": 2}) == {"a": 1, "b": 2}
    assert confirm.read("k") == {"a": 1, "b": 2}
    assert confirm.modify("k", lambda _: {}) is None
    assert confirm.read("k") is None


def test_changes_from_many_threads_are_all_made(confirm: DocumentManager) -> None:
    def increment() -> None:
        for _ in range(20):
            confirm.modify("n", lambda document: {"n": (document or {"n": 0})["n"] + 1})

    threads = [threading.Thread(target=increment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert confirm.read("n") == {"n": 80}


def test_an_expired_document_is_absent(confirm: DocumentManager, options: dict[str, Any], store: Store) -> None:
    confirm["k"] = {"a": 1, "_expires": time.time() - 1}
    assert confirm.read("k") is None
    assert "k" not in confirm
    assert confirm.keys() == []
    assert records(store, options) != {}
    confirm["k"] = {"a": 1, "_expires": time.time() + 60}
    assert "k" in confirm


def test_keys_of_every_kind_come_back(confirm: DocumentManager) -> None:
    odd = ["", ":", "%", "%3A", "ünï", "nul\x00", "lone \udcff", None]
    for key in odd:
        confirm[key] = {"a": 1}
    assert sorted(confirm.keys(), key=repr) == sorted(odd, key=repr)


def test_deleting_what_is_not_there_is_a_key_error(confirm: DocumentManager) -> None:
    with pytest.raises(KeyError):
        del confirm["nothing"]
