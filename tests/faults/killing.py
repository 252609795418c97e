"""Kills a server while clients write to it, starts it again, and counts what of the acknowledged is not there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import MGET, PUT, SUCCESS
from beaker_statestore.tyrant.wire import encode_request
from tests.faults.servers import PATIENCE, eventually
from tests.serving import RawClient

__all__ = ["Tally", "Writer", "found", "kill_under_load"]

#: A writer has so many keys, and begins anew with the first behind the last.
KEYS = 5000
#: How many keys are asked for in one request.
PAGE = 500


class Write(NamedTuple):
    """An acknowledged one."""

    key: bytes
    #: Of all writes of all writers to this key, each has a higher one.
    serial: int
    #: When the acknowledgement came, on the monotonic clock.
    at: float


@dataclass
class Tally:
    """What a row of kills has come to."""

    kills: int = 0
    acknowledged: int = 0
    #: Acknowledged writes whose value, and any later one, is not there.
    lost: int = 0
    #: Values that nobody has written under their key.
    wrong: int = 0
    #: How long before the kill the oldest lost write had been acknowledged, in seconds.
    oldest_lost: float = 0.0
    #: From the start of the new process until it accepts connections, in seconds; Python's own start is part of it.
    slowest_start: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether all is there that was acknowledged."""
        return self.acknowledged > 0 and not self.lost and not self.wrong


class Writer(threading.Thread):
    """Writes one record after the other, each when the last is acknowledged, until the server is gone."""

    def __init__(self, address: Address, number: int, first: int, size: int) -> None:
        super().__init__(name=f"writer {number}")
        self.acknowledged: list[Write] = []
        #: What has been sent, acknowledged or not.
        self.serial = first
        self._address, self._number, self._size = address, number, size
        self.start()

    def run(self) -> None:
        try:
            with RawClient(self._address) as client:
                while True:
                    self.serial += 1
                    key = b"%d:%d" % (self._number, self.serial % KEYS)
                    client.send(encode_request(PUT(key, _value(key, self.serial, self._size))))
                    if client.receive(1) != b"\0":
                        return  # a failure, and told
                    self.acknowledged.append(Write(key, self.serial, time.monotonic()))
        except (AssertionError, OSError):
            return


def _value(key: bytes, serial: int, size: int) -> bytes:
    head = b"%d %s " % (serial, key)
    return head + b"%d" % (serial % 10) * (size - len(head))


def _serial(key: bytes, value: bytes | None, size: int) -> int | None:
    """Which write ``value`` is of, 0 for none; ``None`` if it is of no write to this key."""
    if value is None:
        return 0
    serial = int(head) if (head := value.partition(b" ")[0]).isdigit() else 0
    return serial if value == _value(key, serial, size) else None


def found(address: Address, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes | None]]:
    """Each of ``keys`` with what the server has there."""
    with RawClient(address) as client:
        for start in range(0, len(keys), PAGE):
            page = keys[start : start + PAGE]
            ((status, records),) = client.ask(MGET(page))
            assert status == SUCCESS
            there = dict(records)
            yield from ((key, there.get(key)) for key in page)


def kill_under_load(
    server: ServerProcess,
    kills: int,
    *,
    writers: int = 4,
    after: tuple[float, float] = (0.02, 0.4),
    size: int = 100,
    seed: int = 1,
) -> Tally:
    """Kill the running ``server`` so often, each time amid writes, and look after each start what is there.

    :param after: how long it is written to before a kill, in seconds: some time in this range.
    :param size: of each value, in bytes.
    """
    tally, pause, address = Tally(), random.Random(seed), Address.parse(server.url)
    last = [0] * writers
    newest: dict[bytes, int] = {}
    for _ in range(kills):
        at_work = [Writer(address, number, last[number], size) for number in range(writers)]
        eventually(lambda working=at_work: all(writer.acknowledged for writer in working), "a first acknowledgement")  # type: ignore[misc]
        time.sleep(pause.uniform(*after))
        killed_at = time.monotonic()
        server.kill()
        for writer in at_work:
            writer.join(PATIENCE)
            assert not writer.is_alive()
        began = time.monotonic()
        server.start()
        tally.slowest_start = max(tally.slowest_start, time.monotonic() - began)
        tally.kills += 1
        last = [writer.serial for writer in at_work]
        writes = [write for writer in at_work for write in writer.acknowledged]
        tally.acknowledged += len(writes)
        there = _there(tally, address, sorted({write.key for write in writes}), last, size)
        lost = [write for write in writes if there.get(write.key, write.serial) < write.serial]
        tally.lost += len(lost)
        tally.oldest_lost = max([tally.oldest_lost, *(killed_at - write.at for write in lost)])
        newest |= there
    # What one round has left, a later one may not have taken.
    at_the_end = _there(tally, address, sorted(newest), last, size)
    tally.lost += sum(at_the_end.get(key, serial) < serial for key, serial in newest.items())
    return tally


def _there(tally: Tally, address: Address, keys: list[bytes], last: list[int], size: int) -> dict[bytes, int]:
    """The serial number of what is there under each key. What is wrong goes into the tally instead."""
    serials = {}
    for key, value in found(address, keys):
        serial = _serial(key, value, size)
        if serial is None or serial > last[int(key.partition(b":")[0])]:
            tally.wrong += 1
        else:
            serials[key] = serial
    return serials
