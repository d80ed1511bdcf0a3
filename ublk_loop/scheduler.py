"""A device's scheduler: none, where the kernel would choose another.

    set_scheduler()   sets it, and waits
    set_when_told()   the same for the device whose number comes by a pipe, or a socket
    Apart             a process of its own that does that

While the kernel changes a scheduler it begins no new request until all in flight are over, among
them those of its search for partitions. If the backing stands still, whoever changes it waits with
them, and cannot even be killed. So it is no server that changes it, and nobody waits for ever for
the process that does. In: a dev_id. Out: what is in sysfs. No driver, no ring.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from .process import fork

WAIT_S = 30.0
# The kernel only tries for a lock (EBUSY) that others hold for a moment.
BUSY_TIMEOUT_S = 5.0
_PATH = "/sys/block/ublkb{}/queue/scheduler"


def set_scheduler(dev_id: int, name: str = "none") -> None:
    """Set a device's scheduler, unless it has it; without effect if we may not (unprivileged).

    It waits until nothing is in flight, and for modprobe, which the kernel runs for each write. A
    server that does it, and is killed meanwhile, cannot end before the requests that it should
    have served.
    """
    # A device with one queue would get mq-deadline, which costs two thirds of the IOPS of a backing
    # that sorts for itself.
    path = Path(_PATH.format(dev_id))
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            if f"[{name}]" not in path.read_text():
                path.write_text(name)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return
        time.sleep(0.02)


def set_when_told(fd: int) -> None:
    """Set the scheduler of the device whose number comes by ``fd``, if one comes."""
    text = os.read(fd, 32)
    if text:
        set_scheduler(int(text))


class Apart:
    """A process, a child of ours, that sets the scheduler of a device once that is told it.

    It has no file of ours, and no memory of a server's if it is made before that has a ring: a
    server that is killed while the scheduler changes can end.
    """

    def __init__(self) -> None:
        reader, self._fd = os.pipe2(os.O_CLOEXEC)
        self.process = fork(lambda: _wait_apart(reader), keep=[reader])
        os.close(reader)

    def set(self, dev_id: int) -> None:
        """Have the scheduler set, and wait until it is, or for WAIT_S; the process goes on then."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, b"%d" % dev_id)
        self._let_go(WAIT_S)

    def close(self) -> None:
        """Let the process end, if it waits; idempotent."""
        if self._fd >= 0:
            self._let_go(5)

    def _let_go(self, timeout_s: float) -> None:
        os.close(self._fd)
        self._fd = -1
        with self.process:
            if self.process.wait(timeout_s):
                os.waitpid(self.process.pid, 0)


def _wait_apart(fd: int) -> int:
    # Whoever reads our caller's output waits for that only.
    null_fd = os.open(os.devnull, os.O_RDWR)
    for other in range(3):
        os.dup2(null_fd, other)
    set_when_told(fd)
    return 0
