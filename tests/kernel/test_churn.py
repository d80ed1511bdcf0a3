"""Devices that come and go while udevd looks at each of them, and programs write to it.

UBLK_LOOP_SOAK_CHURNS is how many, instead of the few that CI does.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from daemons import Daemon
from proc_files import memory_kib
from udev import PROBE_RULES, running_udev

from ublk_loop import manage
from ublk_loop.control import list_dev_ids
from ublk_loop.errors import BusyError

NR_CHURNS = int(os.environ.get("UBLK_LOOP_SOAK_CHURNS", "16"))
SEED = int(os.environ.get("UBLK_LOOP_SOAK_SEED", "1"))
NR_CLIENTS = 2
FILE_BYTES = 4 << 20
DEL_TIMEOUT_S = 60
# One of them uses a new disk while udevd does; udevd looks again at what it wrote, and makes nodes
# of partitions.
USES = (
    ["mkfs.ext4", "-q", "-F", "-O", "^has_journal"],
    ["mkswap"],
    ["dd", "status=none", "conv=notrunc"],  # a partition table
    ["blkid", "-p"],
    ["wipefs", "--all", "--force"],
    ["true"],
)
# Two of Linux's, 1 MiB each, from sectors 2048 and 4096 on.
PARTITION_TABLE = b"".join(
    [
        bytes(446),
        *(struct.pack("<BxxxBxxxII", 0, 0x83, start, 2048) for start in (2048, 4096)),
        bytes(32),
        b"\x55\xaa",
    ]
)


@pytest.fixture
def udev(leaves_nothing: object) -> Iterator[None]:
    with running_udev("60-ublk-probe.rules", PROBE_RULES):
        yield


class Churn:
    """Adds, uses and deletes devices on several threads."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.nr_refused = 0
        self._daemon = daemon
        self._folder = folder
        self._lock = threading.Lock()

    def cycle(self, number: int) -> None:
        rng = random.Random(f"{SEED} {number}")
        path = self._folder / f"file{number}"
        with path.open("wb") as file:
            file.truncate(FILE_BYTES)
        direct = rng.choice([[], ["--direct_io"]])
        added = self._daemon.add("-t loop -f", path, *direct)
        try:
            self._use(added["block_device"], rng.choice(USES))
        finally:
            self._delete(added["dev_id"])
            path.unlink()

    def _use(self, block_path: str, command: list[str]) -> None:
        last = f"of={block_path}" if command[0] == "dd" else block_path
        done = subprocess.run(
            [*command, last], input=PARTITION_TABLE, capture_output=True, timeout=60
        )
        finds_nothing = command[0] == "blkid" and done.returncode == 2
        assert done.returncode == 0 or finds_nothing, (command, done.stderr)

    def _delete(self, dev_id: int) -> None:
        # It waits for a probe, but not for ever: somebody might use the disk.
        deadline = time.monotonic() + DEL_TIMEOUT_S
        while True:
            try:
                assert manage.delete(dev_id) == []
                return
            except BusyError:
                assert time.monotonic() < deadline
                with self._lock:
                    self.nr_refused += 1


def _private_kib(pid: int) -> int:
    return sum(kib for name, kib in memory_kib(pid).items() if name.startswith("Private_"))


def _files(pid: int) -> list[str]:
    """What a process has open: of pipes and sockets the kind only."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0])
    return sorted(links)


@pytest.mark.deadline(200 + 30 * NR_CHURNS)
def test_devices_come_and_go_under_udev_and_nothing_is_left(
    daemon: Daemon, udev: None, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    churn = Churn(daemon, tmp_path)
    churn.cycle(0)
    files_before, kib_before = _files(daemon.pid), _private_kib(daemon.pid)
    began = time.monotonic()
    with ThreadPoolExecutor(NR_CLIENTS) as clients:
        for _ in clients.map(churn.cycle, range(1, NR_CHURNS + 1)):
            pass
    took_s = time.monotonic() - began
    wait_until(lambda: daemon.status()["devices"] == [], timeout_s=30)
    assert list_dev_ids() == []
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)
    left = [path for path in Path("/dev").rglob("*") if "ublkb" in os.path.realpath(path)]
    assert left == []
    kib_after = _private_kib(daemon.pid)
    print(f"{NR_CHURNS} churns in {took_s:.1f} s, {churn.nr_refused} deletions waited for a probe;")
    print(f"daemon's private KiB: {kib_before} -> {kib_after}")
    print(f"daemon's files: {files_before} -> {_files(daemon.pid)}")
    # A server whose device is gone, and whose number another has, may take a moment to end.
    wait_until(lambda: _files(daemon.pid) == files_before, timeout_s=30)
    assert kib_after < kib_before + 1024
