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
from pathlib import Path

from .process import ServerProcess

WAIT_S = 30.0
# The kernel only tries for a lock (EBUSY) that others hold for a moment.
BUSY_TIMEOUT_S = 5.0
_PATH = "/sys/block/ublkb{}/queue/scheduler"
# set_scheduler() for a shell, which takes a fifth of the time of a fork of ours.
_SCRIPT = """
cd /
tries=250
until read -r now <"$1" && case $now in *"[none]"*) ;; *) echo none >"$1" ;; esac; do
    tries=$((tries - 1))
    [ -w "$1" ] && [ $tries -gt 0 ] || exit 1
    sleep 0.02
done
"""


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


def set_apart(dev_id: int) -> ServerProcess:
    """Start a process, a child of ours, that sets the scheduler of a device to none.

    It has no file or memory of ours: a server that is killed meanwhile can end. Not for a process
    whose other Python threads serve files: they stand still until the shell runs, which closes its
    copies of those files first.
    """
    words = ["sh", "-c", _SCRIPT, "sh", _PATH.format(dev_id)]
    # Whoever reads our output waits for us only.
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    pid = os.posix_spawn("/bin/sh", words, os.environ, file_actions=null, setsigmask=[])
    return ServerProcess(pid, os.pidfd_open(pid))


def wait_for(helper: ServerProcess) -> None:
    """Wait until the process of :func:`set_apart` has ended, or for WAIT_S; it goes on then."""
    with helper:
        if helper.wait(WAIT_S):
            os.waitpid(helper.pid, 0)
