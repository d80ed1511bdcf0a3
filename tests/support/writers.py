"""A client of a file system that must not notice what becomes of the server below.

In: a folder on the device. Out: files, each synced, one after another until the end, and whether
they are as they were written. It runs on a thread of the test's; the server is another process.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

NR_FILES = 8
FILE_BYTES = 256 << 10


class SyncedWriter:
    """Writes files into ``folder`` until the end of the ``with``; ``errors`` says what failed."""

    def __init__(self, folder: Path) -> None:
        self.errors: list[OSError] = []
        self.nr_written = 0
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SyncedWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def goes_on(self, nr_written: int) -> bool:
        """Whether more files than ``nr_written`` are there, or will never be."""
        return self.nr_written > nr_written or bool(self.errors)

    def check(self, folder: Path) -> None:
        """The last files must be in ``folder``, whole."""
        for number in range(max(0, self.nr_written - NR_FILES), self.nr_written):
            assert _path(folder, number).read_bytes() == _data(number)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with _path(self._folder, self.nr_written).open("wb") as file:
                    file.write(_data(self.nr_written))
                    file.flush()
                    os.fsync(file.fileno())
                self.nr_written += 1
        except OSError as error:
            self.errors.append(error)


def _path(folder: Path, number: int) -> Path:
    return folder / f"file{number % NR_FILES}"


def _data(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)
