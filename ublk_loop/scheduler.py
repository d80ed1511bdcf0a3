"""A device's scheduler: none, where the kernel would choose another.

    set_scheduler()  sets it, and waits
    set_apart()      has a process of its own set it
    wait_for()       waits for that process, but not for ever

While the kernel changes a scheduler it begins no new request until all in flight are over, among
them those of its search for partitions. If the backing stands still, whoever changes it waits with
them, and cannot even be killed. In: a dev_id. Out: what is in sysfs. No driver, no ring.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from . import process

WAIT_S = 30.0
BUSY_TIMEOUT_S = 5.0


def set_scheduler(dev_id: int, name: str = "none") -> None:
    """Set a device's scheduler, unless it has it; without effect if we may not (unprivileged).

    It waits until nothing is in flight, and for modprobe, which the kernel runs for each write. A
    server that does it, and is killed meanwhile, cannot end before the requests that it should
    have served.
    """
    # A device with one queue would get mq-deadline, which costs two thirds of the IOPS of a backing
    # that sorts for itself.
    path = Path(f"/sys/block/ublkb{dev_id}/queue/scheduler")
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            if f"[{name}]" not in path.read_text():
                path.write_text(name)
            return
        except OSError as error:
            # EBUSY: the kernel only tries for a lock that others hold for a moment.
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return
        time.sleep(0.02)


def set_apart(find_dev_id: Callable[[], int], keep: Collection[int] = ()) -> process.ServerProcess:
    """Fork a process that sets the scheduler of a device to none.

    :param find_dev_id: called in that process.
    :param keep: the files that it needs.

    A server forks it before it has a ring or opens ublkcN, whose mappings it would share: the
    driver ends what a dead server had in flight only once nobody holds ublkcN.
    """

    def child() -> int:
        # Whoever reads our parent's output waits for the parent only.
        os.chdir("/")
        null_fd = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null_fd, fd)
        set_scheduler(find_dev_id())
        return 0

    return process.fork(child, keep)


def wait_for(helper: process.ServerProcess) -> None:
    """Wait until the process of :func:`set_apart` has ended, or for WAIT_S; it goes on then."""
    with helper:
        if helper.wait(WAIT_S):
            os.waitpid(helper.pid, 0)
