"""Which devices serve one backing file.

Each server marks the files that it serves by a lock of one byte, far behind the end of any file:
the byte's place says which device it is, the lock's kind whether that may write. The lock is the
open file description's (F_OFD_SETLK), so it goes when the last operation on the descriptor has
ended, be its process dead or not. Whoever can open the file can ask for the marks.

In: descriptors of a backing file. Out: dev_ids, or an error that names who uses them. Runs where a
target is opened; where the files of a server are looked for, in the CLI. Never waits, and never
talks to the driver.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from . import holders, listing, state
from .errors import BackingFileError, DaemonError

_MARKS = 1 << 62
_NR_MARKS = state.MAX_DEV_ID + 1
_FLOCK = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid
_PAGE_BYTES = 4096  # of the page cache, which two devices share at least


def mark(fd: int, path: str, dev_id: int, *, read_only: bool) -> None:
    """Say that ``dev_id`` serves the file of ``fd``, until the descriptor is closed.

    :raises BackingFileError: EBUSY (a server of the device before has not ended yet), or what the
        file system said.
    """
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, _MARKS + dev_id, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise BackingFileError(error.errno or errno.EIO, path, "it cannot be locked") from None
        raise BackingFileError(errno.EBUSY, path, _not_ended(dev_id)) from None


def others(fd: int, first_byte: int, nr_bytes: int, *, read_only: bool) -> list[int]:
    """Return the devices that share a part of the file with one that has ``nr_bytes`` of it.

    Two that only read do not count, nor do marks of ``fd`` itself.
    """
    wanted = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    found = sorted(_conflicts(fd, wanted, _MARKS, _MARKS + _NR_MARKS))
    return [dev_id for dev_id in found if _overlaps(dev_id, first_byte, nr_bytes)]


def files_of(server_pid: int, dev_id: int) -> Iterator[str]:
    """Yield the files that a server has marked as ``dev_id``'s, as ``/proc/PID/fd/N``.

    They may have other names than they were opened by, or none. Nothing, if the server is gone or
    is another user's.
    """
    folder, place = f"/proc/{server_pid}", str(_MARKS + dev_id)
    with contextlib.suppress(OSError):
        for fd in sorted(map(int, os.listdir(f"{folder}/fd"))):
            with contextlib.suppress(OSError), open(f"{folder}/fdinfo/{fd}") as info:
                # lock: 1: OFDLCK ADVISORY WRITE -1 MAJOR:MINOR:INODE FIRST_BYTE LAST_BYTE
                if any(line.startswith("lock:") and line.split()[-1] == place for line in info):
                    yield f"{folder}/fd/{fd}"


def check_unused(path: str, dev_ids: list[int]) -> None:
    """Refuse a file that another device serves which is in use, or about to vanish.

    :raises BackingFileError: EBUSY, naming the device and who uses it.
    """
    for dev_id in dev_ids:
        if not listing.sysfs_ino(dev_id):
            raise BackingFileError(errno.EBUSY, path, _not_ended(dev_id))
        users = holders.find(dev_id)
        if users:
            more = f", and {len(users) - 1} more" if len(users) > 1 else ""
            hint = f"dev {dev_id} serves it too, and is in use: {users[0]}{more}"
            raise BackingFileError(errno.EBUSY, path, hint)


def warning(path: str, dev_id: int, dev_ids: list[int], *, read_only: bool) -> str:
    """Return what to say of a device beside ``dev_ids`` on one file; empty if there are none."""
    if not dev_ids:
        return ""
    theirs = ", ".join(f"dev {each}" for each in dev_ids)
    both = (
        f"dev {dev_id} reads the same file as {theirs} writes"
        if read_only
        else f"dev {dev_id} writes the same file as {theirs}"
    )
    return f"{both}, {path}: use one of them at a time, or data will be lost"


def _not_ended(dev_id: int) -> str:
    return f"a server of dev {dev_id} has not ended yet"


def _conflicts(fd: int, wanted: int, start: int, end: int) -> Iterator[int]:
    # The kernel tells one lock in the way; those before and behind it are asked for in turn.
    if start >= end:
        return
    asked = _FLOCK.pack(wanted, 0, start, end - start, 0)
    kind, _, at, _, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return
    yield at - _MARKS
    yield from _conflicts(fd, wanted, start, at)
    yield from _conflicts(fd, wanted, at + 1, end)


def _overlaps(dev_id: int, first_byte: int, nr_bytes: int) -> bool:
    try:
        known = state.read(dev_id)
    except DaemonError:
        known = None
    if known is None or known.sysfs_ino != listing.sysfs_ino(dev_id):
        return True  # another user's, or not written yet
    spec = known.spec
    if spec.type != "loop" or spec.nr_bytes is None:
        return True
    ours, theirs = _pages(first_byte, nr_bytes), _pages(spec.offset_bytes, spec.nr_bytes)
    return ours.start < theirs.stop and theirs.start < ours.stop


def _pages(first_byte: int, nr_bytes: int) -> range:
    return range(first_byte // _PAGE_BYTES, -(-(first_byte + nr_bytes) // _PAGE_BYTES))


__all__ = ["check_unused", "files_of", "mark", "others", "warning"]
