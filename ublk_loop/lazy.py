"""``ublk del --lazy``: a process that waits until nobody uses a device, and deletes it then.

No event tells of a last close: mounts end in any namespace, and most closes show nowhere. So the
waiter tries, less and less often down to every 5 s, what ``ublk del`` does, which changes nothing
while the device is in use. It lives apart from the server, which may die and be recovered
meanwhile, and knows the device by its inode in sysfs: a later device of the same number is left
alone. One waiter a device: it holds a lock on ``N.lazy`` beside the state file. It ends with the
device, whoever deletes it, and holds no mount.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from typing import NoReturn

from . import listing, manage, process, state
from .errors import BusyError, UblkLoopError

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


def start_waiter(dev_id: int) -> int | None:
    """Start a waiter and return its pid, or None if one waits for the device already.

    The caller must have no other thread, and no ring.

    :raises DaemonError: the state folder cannot be used.
    """
    state.make_state_dir()
    path = os.path.join(state.state_dir(), f"{dev_id}.lazy")
    lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ino = listing.sysfs_ino(dev_id)
        pid = os.fork()
        if pid == 0:
            _waiter_main(dev_id, ino, path, lock_fd)
    except BlockingIOError:
        return None
    finally:
        os.close(lock_fd)
    return pid


def _waiter_main(dev_id: int, ino: int, path: str, lock_fd: int) -> NoReturn:
    status = 1
    try:
        _detach(lock_fd)
        process.protect_from_mounts(keep=[state.state_dir()])
        _wait_and_delete(dev_id, ino)
        status = 0
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os._exit(status)


def _detach(lock_fd: int) -> None:
    os.setsid()
    os.chdir("/")
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null_fd, fd)
    os.closerange(3, lock_fd)
    os.closerange(lock_fd + 1, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _wait_and_delete(dev_id: int, ino: int) -> None:
    pause_s = FIRST_PAUSE_S
    while listing.sysfs_ino(dev_id) == ino:
        try:
            manage.delete(dev_id)
            return
        except BusyError:
            pass
        except UblkLoopError as error:
            if error.errno == errno.ENODEV:
                return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


__all__ = ["start_waiter"]
