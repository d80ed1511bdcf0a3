"""Clients that read and write the same sectors at once, and a judge of what each read returned.

Every write fills its sectors with a stamp of its own, 8 bytes over and over, and :class:`History`
knows when each began and ended. A read is right if each stamp in it is of a write (or of a
discard: zeroes) that was not certainly overwritten before the read began and had begun before the
read ended: what is called a regular register. Sectors may be torn between such writes, 8 bytes may
not. Anything else is stale, lost or foreign data.

In: a device's path and how to open it. Out: an AssertionError that names the sector, or silence.
Runs on threads of its own, one a client. It never looks at the server.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

SECTOR_BYTES = 512
WORDS = SECTOR_BYTES // 8
ZEROES = 0
LENGTHS = [1, 1, 2, 3, 7, 8, 8, 9, 16, 64, 127, 128]
KINDS = ["read"] * 8 + ["write"] * 8 + ["durable", "discard", "zero_out", "flush"]


@dataclass
class Write:
    """One write of a range; ``end`` is infinite until it has ended, and for ever if it failed."""

    stamp: int
    begin: int
    end: float = math.inf


class History:
    """What each sector may hold."""

    def __init__(self, nr_sectors: int) -> None:
        self._writes = [[Write(ZEROES, 0, 0)] for _ in range(nr_sectors)]
        self._clock = itertools.count(1)
        self._stamps = itertools.count(1)
        self._lock = threading.Lock()

    def now(self) -> int:
        return next(self._clock)

    def begin(self, start: int, nr_sectors: int, *, zeroes: bool = False) -> Write:
        """A write of these sectors begins; the caller fills them with its stamp."""
        with self._lock:
            write = Write(ZEROES if zeroes else next(self._stamps), self.now())
            for writes in self._writes[start : start + nr_sectors]:
                writes.append(write)
            return write

    def end(self, write: Write) -> None:
        with self._lock:
            write.end = self.now()

    def allowed(self, sector: int, begin: int, end: int) -> set[int]:
        """The stamps that a read from ``begin`` to ``end`` may find."""
        writes = self._writes[sector]
        last = max((w.begin for w in writes if w.end < begin), default=0)
        return {w.stamp for w in writes if w.end >= last and w.begin < end}

    def judge(self, start: int, data: bytes, begin: int, end: int) -> None:
        """:raises AssertionError: the data cannot be what a read of then returns."""
        with self._lock:
            for index in range(len(data) // SECTOR_BYTES):
                place = data[index * SECTOR_BYTES :][:SECTOR_BYTES]
                found = set(struct.unpack(f"={WORDS}Q", place))
                allowed = self.allowed(start + index, begin, end)
                assert found <= allowed, (
                    f"sector {start + index}, read from {begin} to {end}: holds {found - allowed},"
                    f" may hold {allowed}; writes {self._writes[start + index][-8:]}"
                )


def fill(stamp: int, nr_sectors: int) -> bytes:
    """The data of a write."""
    return struct.pack("=Q", stamp) * (WORDS * nr_sectors)


class Clients:
    """Threads that operate on one range of a device by chance.

    :param open_client: gives a client with read, write, flush, discard and zero_out.
    :param first_sector: where the range begins on the device.
    """

    def __init__(
        self,
        open_client: Callable[[], AbstractContextManager[Any]],
        nr_sectors: int,
        seed: object,
        first_sector: int = 0,
    ) -> None:
        self.history = History(nr_sectors)
        self._open_client = open_client
        self._nr_sectors = nr_sectors
        self._seed = seed
        self._first_byte = first_sector * SECTOR_BYTES

    def run(self, nr_clients: int, nr_operations: int) -> None:
        """Run this many clients at once, then read everything once more."""
        with ThreadPoolExecutor(nr_clients) as pool:
            for done in [pool.submit(self._run_one, n, nr_operations) for n in range(nr_clients)]:
                done.result()
        self.check()

    def check(self) -> None:
        """Read and judge every sector."""
        with self._open_client() as client:
            for start in range(0, self._nr_sectors, 256):
                self._read(client, start, min(256, self._nr_sectors - start))

    def _run_one(self, number: int, nr_operations: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        with self._open_client() as client:
            for _ in range(nr_operations):
                self.operate(client, rng)

    def operate(self, client: Any, rng: random.Random) -> None:
        """Do one thing."""
        kind = rng.choice(KINDS)
        start = rng.randrange(self._nr_sectors)
        nr_sectors = min(rng.choice(LENGTHS), self._nr_sectors - start)
        if kind == "flush":
            client.flush()
        elif kind == "read":
            self._read(client, start, nr_sectors)
        else:
            self._write(client, kind, start, nr_sectors)

    def _read(self, client: Any, start: int, nr_sectors: int) -> None:
        begin = self.history.now()
        nr_bytes = nr_sectors * SECTOR_BYTES
        data = client.read(self._first_byte + start * SECTOR_BYTES, nr_bytes)
        assert len(data) == nr_bytes
        self.history.judge(start, data, begin, self.history.now())

    def _write(self, client: Any, kind: str, start: int, nr_sectors: int) -> None:
        offset = self._first_byte + start * SECTOR_BYTES
        nr_bytes = nr_sectors * SECTOR_BYTES
        clears = kind in ("discard", "zero_out")
        write = self.history.begin(start, nr_sectors, zeroes=clears)
        if clears:
            getattr(client, kind)(offset, nr_bytes)
        else:
            flags = os.RWF_DSYNC if kind == "durable" else 0
            assert client.write(offset, fill(write.stamp, nr_sectors), flags=flags) == nr_bytes
        self.history.end(write)
