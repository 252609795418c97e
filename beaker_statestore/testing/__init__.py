"""For tests: of stores, and of what is built on them. Nothing else in the package imports this.

- `StoreConformance`, and with it `LocalStoreConformance`, `AtomicityConformance` and `ProcessConformance`: what every
  store must pass, as test classes to inherit from;
- `FaultyStore`: a store that fails at exactly the n-th call;
- `ServerProcess`: a real server in a process of its own.

Needs pytest.
"""

from __future__ import annotations

import pytest

# Before the suite is imported, so that its assertions explain themselves in other projects too.
pytest.register_assert_rewrite("beaker_statestore.testing.conformance")

from beaker_statestore.testing.conformance import (  # noqa: E402 - see above
    AtomicityConformance,
    LocalStoreConformance,
    ProcessConformance,
    StoreConformance,
)
from beaker_statestore.testing.faults import FaultyStore  # noqa: E402
from beaker_statestore.testing.processes import ServerProcess, fork, free_port  # noqa: E402

__all__ = [
    "AtomicityConformance",
    "FaultyStore",
    "LocalStoreConformance",
    "ProcessConformance",
    "ServerProcess",
    "StoreConformance",
    "fork",
    "free_port",
]
