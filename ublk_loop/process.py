"""A server process: from outside (does it live, make it end), and from inside (make it robust).

In: pids, from the driver or a state file. Out: waits, signals, and the settings of a process that
memory reclaim may wait for. ServerProcess runs in the CLI, the ``protect_`` functions on a server's
main thread before it makes another thread. Nothing here talks to the driver.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NoReturn

_CLONE_NEWNS = 0x00020000
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57

# Mounts of these types pin no disk, and the server still needs some of them.
_VIRTUAL_FS = frozenset(
    (
        *("autofs", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
        *("efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs"),
        *("securityfs", "sysfs", "tmpfs", "tracefs"),
    )
)

_log = logging.getLogger(__name__)


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is none.

    With the pid it names a process for good: pids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


class ServerProcess:
    """One process, held by pidfd, so that a signal never reaches a later process of the same pid.

    Source: pidfd_open(2), pidfd_send_signal(2).
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    @classmethod
    def find(cls, pid: int, ticks: int | None = None) -> ServerProcess | None:
        """Return process ``pid`` if it lives and, where ``ticks`` is given, started then."""
        if pid <= 0:
            return None
        try:
            found = cls(pid, os.pidfd_open(pid))
        except OSError:
            return None
        # Only after the pidfd is open: from here on it cannot become another process.
        if ticks is not None and start_ticks(pid) != ticks:
            found.close()
            return None
        return found

    def fileno(self) -> int:
        """Return the pidfd, which is readable once the process has ended."""
        return self._pidfd

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end; False if it still runs then."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(max(0, int(timeout_s * 1000))))

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Let go of the process; idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold_signals() -> set[signal.Signals]:
    """Block SIGTERM and SIGINT; return the mask that pthread_sigmask() sets again."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    return {signal.Signals(number) for number in held}


def fork(child: Callable[[], int], keep: Collection[int] | None = None) -> ServerProcess:
    """Fork a process that runs ``child`` and exits with what it returns; 1 if it raises.

    :param keep: the files that it keeps, besides stdin, stdout and stderr; None: all. With a copy
        of the daemon's socket or lock it would stand in for a daemon that was killed meanwhile.

    The child never returns into the caller's code, whose atexit handlers and buffers are not its
    own, and a signal meant for it never runs a handler of its parent's.
    """
    before = hold_signals()
    try:
        pid = os.fork()
        if pid == 0:
            _run_child(child, keep)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ServerProcess(pid, os.pidfd_open(pid))


def _run_child(child: Callable[[], int], keep: Collection[int] | None) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        if keep is not None:
            _close_all_but(keep)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        status = child()
    except BaseException:
        _log.exception("process failed")
    finally:
        os._exit(status)


def _close_all_but(keep: Collection[int]) -> None:
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def protect_from_reclaim() -> None:
    """Keep memory reclaim from waiting for itself: lock our memory, be an IO_FLUSHER, survive OOM.

    What a plain user may not do is logged and left out.
    """
    libc = _Libc()
    with _tolerated("oom_score_adj"), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    # 1: both reference servers passed 0 until 2026, which clears the flag.
    with _tolerated("PR_SET_IO_FLUSHER"):
        libc.call("prctl", _PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with _tolerated("mlockall"):
        # Under a limit MCL_FUTURE makes later allocations fail, which is worse than paging.
        if os.geteuid() != 0:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            if limit != resource.RLIM_INFINITY:
                raise OSError(errno.EPERM, f"RLIMIT_MEMLOCK is {limit}")
        libc.call("mlockall", _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def protect_from_mounts(keep: Iterable[str] = ()) -> None:
    """Move into a mount namespace of our own, in which no disk is mounted that we do not run from.

    :param keep: paths that stay reachable.

    The last task of a namespace unmounts what is mounted there when it exits: with its own device
    among that, it waits for itself. Private, so that later mounts do not come in; and what was
    mounted before is detached, or it would stay busy after everyone else has unmounted it.
    """
    libc = _Libc()
    with _tolerated("mount namespace"):
        libc.call("unshare", _CLONE_NEWNS)
        libc.call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        for point in reversed(_unneeded_mounts(keep)):
            with contextlib.suppress(OSError):
                libc.call("umount2", point, _MNT_DETACH)


def _unneeded_mounts(keep: Iterable[str]) -> list[bytes]:
    needed = [*paths_of_python(), *(os.fsencode(os.path.realpath(path)) for path in keep)]
    points = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, source = line.partition(b" - ")
            point = _unescape(fields.split()[4])
            fs_type = os.fsdecode(source.split()[0])
            inside = point.rstrip(b"/") + b"/"
            if fs_type not in _VIRTUAL_FS and not any(
                (path + b"/").startswith(inside) for path in needed
            ):
                points.append(point)
    return points


@functools.cache
def paths_of_python() -> list[bytes]:
    """Return where modules and libraries are loaded from; looked for once."""
    paths = [path for path in (*sys.path, sys.prefix, "/usr") if path]
    return [os.fsencode(os.path.realpath(path)) for path in paths]


def _unescape(field: bytes) -> bytes:
    # mountinfo writes space, tab, newline and backslash as \ooo.
    for char in b" \t\n\\":
        field = field.replace(b"\\%03o" % char, bytes([char]))
    return field


class _Libc:
    """Calls into the C library that the os module has not, in Python 3.10."""

    def __init__(self) -> None:
        import ctypes

        self._library = ctypes.CDLL(None, use_errno=True)
        self._get_errno = ctypes.get_errno

    def call(self, name: str, *arguments: int | bytes | None) -> None:
        if getattr(self._library, name)(*arguments) != 0:
            code = self._get_errno()
            raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _tolerated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.warning("%s: %s", what, error.strerror)
