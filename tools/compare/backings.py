"""Where backing files lie: tmpfs, a file system on a RAM disk, ext4 on a disk with latency.

In: a name and a number of files. Out: a mounted directory, gone again at the end. Root only.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CompareError, run

WORK = Path("/run/ublk-compare")
NONE = "none"
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
ROOM_OF_FS = 300 << 20  # the least that xfs is made with, and more than its log


@dataclass(frozen=True)
class Backing:
    """``tmpfs``, ``ext4``, ``xfs`` or ``btrfs`` (on brd), ``null_blk:USEC`` (under ext4), ``none``
    (for null targets)."""

    name: str
    nr_bytes: int = 128 << 20

    def check(self) -> None:
        """Check the name. :raises ValueError: if it names no backing."""
        kind, _, usec = self.name.partition(":")
        known = self.name in ("tmpfs", *MKFS, NONE) or (kind == "null_blk" and usec.isdigit())
        if not known:
            names = ", ".join(("tmpfs", *MKFS, "null_blk:USEC", NONE))
            raise ValueError(f"backing {self.name!r} is none of {names}")

    @property
    def is_cold(self) -> bool:
        """Whether the page cache is dropped before each run: a disk whose latency is the point."""
        return self.name.startswith("null_blk")

    @contextlib.contextmanager
    def directory(self, nr_files: int) -> Iterator[Path]:
        """Mount it with room for ``nr_files`` files."""
        root = WORK / self.name.replace(":", "-")
        root.mkdir(parents=True, exist_ok=True)
        room = nr_files * self.nr_bytes + (64 << 20)
        with contextlib.ExitStack() as stack:
            if self.name == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(root))
                stack.callback(run, "umount", str(root))
            elif self.name != NONE:
                disk = stack.enter_context(self._disk(room + room // 8 + ROOM_OF_FS))
                run(*MKFS.get(self.name, MKFS["ext4"]), disk)
                run("mount", disk, str(root))
                stack.callback(run, "umount", str(root))
            yield root

    @contextlib.contextmanager
    def _disk(self, room: int) -> Iterator[str]:
        if self.name in MKFS:
            run("modprobe", "brd", "rd_nr=1", f"rd_size={room >> 10}")
            try:
                yield "/dev/ram0"
            finally:
                run("modprobe", "-r", "brd")
            return
        run("modprobe", "null_blk", "nr_devices=0")
        node = Path("/sys/kernel/config/nullb/compare")
        node.mkdir()
        settings = {
            "irqmode": 2,
            "completion_nsec": int(self.name.partition(":")[2]) * 1000,
            "memory_backed": 1,
            "size": room >> 20,
            "hw_queue_depth": 256,
            "power": 1,
        }
        for name, value in settings.items():
            (node / name).write_text(str(value))
        try:
            yield "/dev/nullb0" if Path("/dev/nullb0").exists() else "/dev/compare"
        finally:
            node.rmdir()
            run("modprobe", "-r", "null_blk")


def fill(path: Path, nr_bytes: int, leave_dirty: bool) -> None:
    """Write a backing file: real data, as a hole would be served from the zero page.

    :param leave_dirty: every page cached and dirty, its block allocated: a write then costs the
        same wherever it goes.
    """
    block = random.Random(0).randbytes(1 << 20)
    try:
        with path.open("wb") as file:
            for sync in (True, False) if leave_dirty else (True,):
                file.seek(0)
                for _ in range(nr_bytes >> 20):
                    file.write(block)
                if sync:
                    os.fsync(file.fileno())
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def no_writeback() -> Iterator[None]:
    """Keep dirty pages: writing them back at some moment would count in whatever runs then."""
    wanted = {"dirty_writeback_centisecs": 0, "dirty_background_ratio": 80, "dirty_ratio": 90}
    files = {Path("/proc/sys/vm") / name: value for name, value in wanted.items()}
    before = {path: path.read_text() for path in files}
    try:
        for path, value in files.items():
            path.write_text(str(value))
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


def drop_caches() -> None:
    """Write back and forget all clean pages."""
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3")
