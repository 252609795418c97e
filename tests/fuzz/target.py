"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz.target tests/fuzz/corpus -max_total_time=600``.

Arguments are libFuzzer's. The first directory named gets what is found to reach new code; see script/fuzz.
"""

from __future__ import annotations

import random
import sys

import atheris

with atheris.instrument_imports(include=["beaker_statestore.tyrant", "beaker_statestore.stores.memory"]):
    from tests.fuzz import inputs

#: Of so many inputs one is mutated by libFuzzer's own means.
OWN = 2


def mutate(data: bytes, most: int, seed: int) -> bytes:
    draw = random.Random(seed)
    if draw.randrange(OWN) == 0:
        return bytes(atheris.Mutate(data, most))
    return inputs.mutated(data, draw)[:most]


def main() -> None:
    atheris.Setup(sys.argv, inputs.check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
