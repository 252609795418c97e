"""A small announcement list that is joined by mail or by web: two applications, one store.

Start reading at `handlers`, what mail does, and `web`, what the browser sees. Both act through `newsletter`, which
keeps the states of mail senders and the one-time secrets in the store where Beaker keeps the sessions. `script/demo`
runs it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["app_factory", "make_app"]


def make_app(settings: Mapping[str, Any]) -> Any:
    """The web application.

    :param settings: ``beaker.session.*`` and ``demo.*``, as in ``ini/development.ini``.
    :returns: a WSGI application that can be mounted anywhere.
    :raises ConfigurationError: a setting is missing or wrong.
    """
    from wsgi_demo.settings import Settings
    from wsgi_demo.web import Web

    return Web(Settings.from_mapping(settings))


def app_factory(global_conf: Mapping[str, Any], **local_conf: Any) -> Any:
    """`make_app` as PasteDeploy's ``paste.app_factory``: ``use = egg:beaker-statestore#demo``."""
    return make_app({**global_conf, **local_conf})
