"""``python -m beaker_statestore`` is the ``statestore`` command."""

from __future__ import annotations

from beaker_statestore.cli import main

if __name__ == "__main__":
    main(prog_name="statestore")
