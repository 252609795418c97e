"""Shared state for Python web and mail applications, as plain JSON in a Tokyo Tyrant key-value server.

Importing the package loads no driver and no framework. What is here:

- ``ext:tcjson`` for Beaker, found through its entry point (`beaker_statestore.namespace`);
- `beaker_statestore.websession.make_filter` for WSGI applications;
- `beaker_statestore.router.install` for Salmon's router;
- `beaker_statestore.stores.open_store` for whoever wants just a store.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
