"""Too little memory for a test: cgroups, and a program that wants more.

A hog fills memory with a pattern of its own and then finds all of it again, or dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PAGE_BYTES = 4096
HOG = """
import mmap, struct, sys
nr_pages = int(sys.argv[1])
memory = mmap.mmap(-1, nr_pages * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for number in range(nr_pages):
    struct.pack_into("=QQ", memory, number * 4096 + 64, number, ~number & (1 << 64) - 1)
for number in range(nr_pages):
    found = struct.unpack_from("=QQ", memory, number * 4096 + 64)
    if found != (number, ~number & (1 << 64) - 1):
        sys.exit(f"page {number} holds {found}")
print("right", flush=True)
"""


class Cgroup:
    """A cgroup (v2) of the test's, with its limits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, pid: int) -> None:
        """Move a process into it, with all its threads."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def set(self, **limits: object) -> None:
        """``set(memory_max=...)`` writes memory.max."""
        for name, value in limits.items():
            (self.path / name.replace("_", ".")).write_text(str(value))

    def nr_events(self, name: str) -> int:
        """How often memory.events says that something happened."""
        lines = (self.path / "memory.events").read_text().splitlines()
        return int(dict(line.split() for line in lines)[name])


@contextlib.contextmanager
def cgroup(name: str, **limits: object) -> Iterator[Cgroup]:
    """A cgroup that is gone at the end; what still runs in it is moved to the root."""
    (ROOT / "cgroup.subtree_control").write_text("+memory +pids")
    made = Cgroup(ROOT / name)
    made.path.mkdir()
    try:
        made.set(**limits)
        yield made
    finally:
        for pid in (made.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (ROOT / "cgroup.procs").write_text(pid)
        _remove(made.path)


def _remove(path: Path) -> None:
    # A process that has just been killed is in it until it is reaped.
    deadline = time.monotonic() + 20
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.02)


class Hog:
    """A process that dirties ``nr_bytes``, and then looks whether they hold what they should."""

    def __init__(self, nr_bytes: int, where: Cgroup) -> None:
        command = [sys.executable, "-S", "-c", HOG, str(nr_bytes // PAGE_BYTES)]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: where.take(os.getpid()),
        )

    def end(self, timeout_s: float) -> tuple[int, bool]:
        """Wait for its end; return its exit code, and whether all was right."""
        output = self._process.communicate(timeout=timeout_s)[0]
        return self._process.returncode, output == "right\n"

    def __enter__(self) -> Hog:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
