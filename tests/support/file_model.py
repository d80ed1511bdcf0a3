"""A file and what it must hold: random operations of every kind that a file has, as fsx does.

In: a path on the file system under test. Out: an AssertionError with the last operations, or
silence. Runs on the caller's thread. It never knows what the file system lies on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
from collections import deque
from pathlib import Path

PAGE_BYTES = 4096
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 0x01, 0x02, 0x08, 0x10, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, nr_bytes: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(nr_bytes)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class FileModel:
    """One file of at most ``max_bytes``, its model, and a source of chance."""

    def __init__(self, path: Path, max_bytes: int, rng: random.Random) -> None:
        self.path = path
        self.model = bytearray()
        self._max_bytes = max_bytes
        self._rng = rng
        self._log: deque[str] = deque(maxlen=20)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._operations = [
            *(self.pread, self.pwrite) * 4,
            *(self.mapped_read, self.mapped_write) * 2,
            *(self.direct_read, self.append, self.truncate, self.punch, self.zero, self.allocate),
            *(self.collapse, self.insert, self.copy_range, self.fsync, self.reopen, self.forget),
        ]

    def close(self) -> None:
        os.close(self._fd)

    def run(self, nr_operations: int) -> None:
        """Operate, then compare all of it."""
        for _ in range(nr_operations):
            self._rng.choice(self._operations)()
        self.check()

    def check(self) -> None:
        """Compare all of the file, as it is now, with the model."""
        self._same(0, self.path.read_bytes(), bytes(self.model), "the whole file")

    # ---- operations ----

    def pread(self) -> None:
        offset, nr_bytes = self._range()
        self._note("pread", offset, nr_bytes)
        self._same(offset, os.pread(self._fd, nr_bytes, offset), self._slice(offset, nr_bytes))

    def pwrite(self) -> None:
        offset = self._rng.randrange(self._max_bytes)
        data = self._data(min(self._length(), self._max_bytes - offset))
        self._note("pwrite", offset, len(data))
        self._grow(offset)
        assert os.pwrite(self._fd, data, offset) == len(data)
        self.model[offset : offset + len(data)] = data

    def append(self) -> None:
        data = self._data(min(self._length(), self._max_bytes - len(self.model)))
        self._note("append", len(self.model), len(data))
        assert os.pwrite(self._fd, data, len(self.model)) == len(data)
        self.model += data

    def mapped_read(self) -> None:
        offset, nr_bytes = self._range()
        self._note("mapped read", offset, nr_bytes)
        if nr_bytes:
            with mmap.mmap(self._fd, 0, prot=mmap.PROT_READ) as memory:
                found = memory[offset : offset + nr_bytes]
            self._same(offset, found, self._slice(offset, nr_bytes))

    def mapped_write(self) -> None:
        offset, nr_bytes = self._range()
        self._note("mapped write", offset, nr_bytes)
        if nr_bytes:
            data = self._data(nr_bytes)
            with mmap.mmap(self._fd, 0) as memory:
                memory[offset : offset + nr_bytes] = data
                if self._rng.random() < 0.5:
                    memory.flush()
            self.model[offset : offset + nr_bytes] = data

    def direct_read(self) -> None:
        nr_pages = len(self.model) // PAGE_BYTES
        if not nr_pages:
            return
        offset = self._rng.randrange(nr_pages) * PAGE_BYTES
        nr_bytes = min(self._rng.randint(1, 16) * PAGE_BYTES, nr_pages * PAGE_BYTES - offset)
        self._note("direct read", offset, nr_bytes)
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, nr_bytes) as buffer:
                assert os.preadv(fd, [buffer], offset) == nr_bytes
                self._same(offset, buffer[:], self._slice(offset, nr_bytes))
        finally:
            os.close(fd)

    def truncate(self) -> None:
        nr_bytes = self._rng.randint(0, self._max_bytes)
        self._note("truncate", nr_bytes, 0)
        os.ftruncate(self._fd, nr_bytes)
        del self.model[nr_bytes:]
        self._grow(nr_bytes)

    def punch(self) -> None:
        offset, nr_bytes = self._range()
        self._note("punch", offset, nr_bytes)
        if nr_bytes:
            _fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, nr_bytes)
            self.model[offset : offset + nr_bytes] = bytes(nr_bytes)

    def zero(self) -> None:
        offset, nr_bytes = self._range()
        self._note("zero", offset, nr_bytes)
        if nr_bytes:
            _fallocate(self._fd, ZERO | KEEP_SIZE, offset, nr_bytes)
            self.model[offset : offset + nr_bytes] = bytes(nr_bytes)

    def allocate(self) -> None:
        offset = self._rng.randrange(self._max_bytes)
        nr_bytes = min(self._length(), self._max_bytes - offset)
        self._note("allocate", offset, nr_bytes)
        _fallocate(self._fd, 0, offset, nr_bytes)
        self._grow(offset + nr_bytes)

    def collapse(self) -> None:
        nr_blocks = len(self.model) // PAGE_BYTES
        if nr_blocks < 2:
            return
        offset = self._rng.randrange(nr_blocks - 1) * PAGE_BYTES
        self._note("collapse", offset, PAGE_BYTES)
        with self._tolerating(errno.EINVAL):
            _fallocate(self._fd, COLLAPSE, offset, PAGE_BYTES)
            del self.model[offset : offset + PAGE_BYTES]

    def insert(self) -> None:
        nr_blocks = len(self.model) // PAGE_BYTES
        if not nr_blocks or len(self.model) + PAGE_BYTES > self._max_bytes:
            return
        offset = self._rng.randrange(nr_blocks) * PAGE_BYTES
        self._note("insert", offset, PAGE_BYTES)
        with self._tolerating(errno.EINVAL):
            _fallocate(self._fd, INSERT, offset, PAGE_BYTES)
            self.model[offset:offset] = bytes(PAGE_BYTES)

    def copy_range(self) -> None:
        offset, nr_bytes = self._range()
        to = self._rng.randrange(self._max_bytes)
        nr_bytes = min(nr_bytes, self._max_bytes - to, abs(to - offset))
        self._note(f"copy to {to}", offset, nr_bytes)
        if nr_bytes:
            data = self._slice(offset, nr_bytes)
            nr_bytes = os.copy_file_range(self._fd, self._fd, nr_bytes, offset, to)
            self._grow(to)
            self.model[to : to + nr_bytes] = data[:nr_bytes]

    def fsync(self) -> None:
        self._note("fsync", 0, 0)
        self._rng.choice([os.fsync, os.fdatasync])(self._fd)

    def reopen(self) -> None:
        self._note("reopen", 0, 0)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def forget(self) -> None:
        """Write back and drop the cache, so that the next read comes from the device."""
        self._note("forget", 0, 0)
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    # ---- what they need ----

    def _length(self) -> int:
        return self._rng.choice([1, 100, 512, 4095, 4096, 4097, 20000, 65536])

    def _range(self) -> tuple[int, int]:
        """An existing range; empty if the file is."""
        offset = self._rng.randrange(len(self.model) or 1)
        return offset, min(self._length(), len(self.model) - offset)

    def _data(self, nr_bytes: int) -> bytes:
        return self._rng.randbytes(nr_bytes)

    def _slice(self, offset: int, nr_bytes: int) -> bytes:
        return bytes(self.model[offset : offset + nr_bytes])

    def _grow(self, nr_bytes: int) -> None:
        self.model += bytes(max(0, nr_bytes - len(self.model)))

    def _note(self, what: str, offset: int, nr_bytes: int) -> None:
        self._log.append(f"{what} {offset:#x}+{nr_bytes:#x}")

    @contextlib.contextmanager
    def _tolerating(self, code: int):
        # The file system's blocks may be larger than ours.
        try:
            yield
        except OSError as error:
            if error.errno != code:
                raise

    def _same(self, offset: int, found: bytes, wanted: bytes, what: str = "") -> None:
        if found != wanted:
            pairs = enumerate(zip(found, wanted, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), -1)
            raise AssertionError(
                f"{self.path} {what}: {len(found)} bytes for {len(wanted)}, the first wrong one at"
                f" {offset + place:#x}; the last operations: {'; '.join(self._log)}"
            )
