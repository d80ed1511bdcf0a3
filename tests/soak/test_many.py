"""300 devices in one daemon: what each costs, and that the last one costs no more than the first.

UBLK_LOOP_SOAK_DEVICES is another number. Half of them are null, half loop on small files. Prints
the time of an add, and of what asks for all devices, as their number grows; asserts what does not
depend on the machine's speed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from daemons import Daemon
from proc_files import memory_kib

from ublk_loop.control import list_dev_ids

NR_DEVICES = int(os.environ.get("UBLK_LOOP_SOAK_DEVICES", "300"))
NR_ADDS_A_LINE = 10
MAX_PSS_KIB = 6 << 10  # of an idle device with depth 128
pytestmark = pytest.mark.deadline(120 + 10 * NR_DEVICES)


def _took_ms(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return (time.monotonic() - began) * 1000


class Many:
    """Devices, and the times that it took to add them."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.pids: list[int] = []
        self.add_ms: list[float] = []
        self._daemon = daemon
        self._folder = folder

    def add(self) -> None:
        line: list[Any] = ["-t null -d 128"]
        if len(self.pids) % 2:
            path = self._folder / f"file{len(self.pids)}"
            with path.open("wb") as file:
                file.truncate(1 << 20)
            line = ["-t loop -d 128 -f", path]
        began = time.monotonic()
        self.pids.append(self._daemon.add(*line)["server_pid"])
        self.add_ms.append((time.monotonic() - began) * 1000)


def test_many_devices_in_one_daemon_are_added_listed_and_deleted(
    daemon: Daemon, ublk: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    many = Many(daemon, tmp_path)
    while len(many.pids) < NR_DEVICES:
        many.add()
        if len(many.pids) in (NR_ADDS_A_LINE, 100, NR_DEVICES):
            add_ms = median(many.add_ms[-NR_ADDS_A_LINE:])
            status_ms = _took_ms(daemon.status)
            list_ms = _took_ms(lambda: ublk("list"))
            print(f"{len(many.pids)}: add {add_ms:.0f} ms, status {status_ms:.0f} ms,", end=" ")
            print(f"list {list_ms:.0f} ms", flush=True)
    pss_kib = [memory_kib(pid)["Pss"] for pid in many.pids]
    daemon_kib = memory_kib(daemon.pid)["Pss"]
    mean_kib = (sum(pss_kib) + daemon_kib) / NR_DEVICES
    print(f"PSS {min(pss_kib)} to {max(pss_kib)} KiB, on average {mean_kib:.0f} with the daemon's")
    assert max(pss_kib) <= MAX_PSS_KIB
    assert len(daemon.status()["devices"]) == NR_DEVICES
    began = time.monotonic()
    assert ublk("del", "-a", timeout_s=5 * NR_DEVICES).returncode == 0
    wait_until(lambda: daemon.status()["devices"] == [], timeout_s=60)
    print(f"all deleted in {time.monotonic() - began:.1f} s")
    assert list_dev_ids() == []
