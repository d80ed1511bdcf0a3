"""A writer with known fsync points, and a check of what must be there after the power went.

A store is 16 slots of one size: of a block device 16 places, in a folder 16 files. Record n goes to
one slot, 8 bytes over and over that say n and the slot; once it is synced, n is acknowledged. Files
are overwritten in place, or replaced by rename. Some records more are written without a sync.

After a cut, each word of a slot must be of a record that is not older than the last acknowledged
one of this slot: newer ones may be there or not, and may be torn in place.

In: a block device or folder, which are acknowledged. Out: calls of ``acknowledge(n)``, in order;
an AssertionError. What record n is like depends on n and the seed alone, so that a check in another
process, after another boot, knows it.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

NR_SLOTS = 16
SLOT_BYTES = 32 * 1024


class Records:
    """A store at ``place``; ``seed`` decides what each record is like."""

    def __init__(self, place: Path, seed: int, slot_bytes: int = SLOT_BYTES) -> None:
        self._place = place
        self._seed = seed
        self._slot_bytes = slot_bytes
        self._is_folder = place.is_dir()

    def write(self, begin: int, end: int, acknowledge: Callable[[int], None]) -> None:
        """Write records ``begin`` up to ``end``, which is left out."""
        for n in range(begin, end):
            rng = self._rng(n)
            self._write_one(n, rng)
            acknowledge(n)

    def check(self, acknowledged: Iterable[int], nr_begun: int) -> None:
        """Those ``acknowledged``, in order, must be there; none from ``nr_begun`` on may be."""
        oldest = [-1] * NR_SLOTS
        for n in acknowledged:
            oldest[self._slot(self._rng(n))] = n
        for slot in range(NR_SLOTS):
            found = self._found(slot)
            assert found or oldest[slot] < 0, f"slot {slot} is gone: record {oldest[slot]} is lost"
            good = all(oldest[slot] <= n < nr_begun for n in found)
            assert good, (
                f"slot {slot} holds records {sorted(found)}, must hold {oldest[slot]} or later,"
                f" and none from {nr_begun} on"
            )

    def _rng(self, n: int) -> random.Random:
        return random.Random(f"{self._seed} {n}")

    def _slot(self, rng: random.Random) -> int:
        return rng.randrange(NR_SLOTS)

    def _write_one(self, n: int, rng: random.Random) -> None:
        slot = self._slot(rng)
        data = self._data(n, slot)
        if not self._is_folder:
            self._write_at(self._place, slot * self._slot_bytes, data, rng)
        elif rng.random() < 0.5 and self._file(slot).exists():
            self._write_at(self._file(slot), 0, data, rng)
        else:
            self._replace(slot, data)
        if self._is_folder and rng.random() < 0.3:  # without a sync: may be there or not
            (self._place / f"noise{rng.randrange(4)}").write_bytes(data)

    def _write_at(self, path: Path, offset: int, data: bytes, rng: random.Random) -> None:
        # Half of them by O_DSYNC: FUA, where the file system allows.
        durable = rng.random() < 0.5
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_DSYNC if durable else 0))
        try:
            assert os.pwrite(fd, data, offset) == len(data)
            if not durable:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def _replace(self, slot: int, data: bytes) -> None:
        fresh = self._place / "fresh"
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._file(slot))
        fd = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
        os.close(fd)

    def _file(self, slot: int) -> Path:
        return self._place / f"slot{slot}"

    def _data(self, n: int, slot: int) -> bytes:
        return struct.pack("=II", n + 1, slot) * (self._slot_bytes // 8)

    def _found(self, slot: int) -> set[int]:
        """The records that a slot holds something of; nothing but zeroes is record -1."""
        if not self._is_folder:
            with self._place.open("rb") as file:
                file.seek(slot * self._slot_bytes)
                data = file.read(self._slot_bytes)
        elif self._file(slot).exists():
            data = self._file(slot).read_bytes()
            assert len(data) == self._slot_bytes, f"{self._file(slot)} has {len(data)} bytes"
        else:
            return set()
        words = set(struct.iter_unpack("=II", data))
        assert all(word == (0, 0) or word[1] == slot for word in words), f"slot {slot}: {words}"
        return {n - 1 for n, _ in words}
