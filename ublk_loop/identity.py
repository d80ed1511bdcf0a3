"""Whether what is at a path now is the backing file that a device was added with.

In: the descriptor of an open file. Out: its FileIdentity, which the state file keeps, and an error
when a recovery has opened another. Runs on a server's main thread. It would rather miss another
file than refuse the right one: what may change while a file stays the same is not compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from ._uring import lib
from .errors import BackingFileError
from .state import FileIdentity

_FS_IOC_GETVERSION = 0x80087601


def of(fd: int) -> FileIdentity:
    """Return what tells a regular file or block device from others.

    A file has the number of its inode, and the generation that a file system on a disk gives each
    that is made with this number: no other has both, and both stay when it is mounted again, from
    another device or under another number. What has no generation may have numbers that change,
    as FAT, FUSE and network file systems do: unknown. Files in memory keep theirs as long as they
    are there.
    """
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        return FileIdentity(rdev=info.st_rdev, version=_disk_seq(info.st_rdev))
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))  # an int, though it says long
        return FileIdentity(ino=info.st_ino, version=struct.unpack("I4x", answer)[0])
    if lib.ul_target_is_in_memory(fd):
        return FileIdentity(ino=info.st_ino, version=info.st_dev)
    return FileIdentity()


def check(path: str, dev_id: int, known: FileIdentity, found: FileIdentity) -> None:
    """Refuse to recover a device from another file than it was added with.

    :raises BackingFileError: ESTALE.
    """
    if is_another(known, found):
        hint = f"it is not the file that dev {dev_id} was added with"
        way_out = f"put that one back and recover, or ublk del -n {dev_id}"
        raise BackingFileError(errno.ESTALE, path, f"{hint}: {way_out}")


def is_another(known: FileIdentity, found: FileIdentity) -> bool:
    """Whether ``found`` is certainly another file than ``known``."""
    if FileIdentity() in (known, found):
        return False
    if known.rdev and found.rdev:
        # A disk that was plugged in again, or a volume, may have another number. Not while the one
        # that was served is still there under its own.
        is_there = 0 != known.version == _disk_seq(known.rdev)
        return known.rdev != found.rdev and is_there
    return known != found


def _disk_seq(rdev: int) -> int:
    # Of each disk, loop device's file, ... that the kernel has seen another (v5.15); 0: unknown.
    node = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    for disk in (node, node.resolve().parent):  # a partition has its disk's
        with contextlib.suppress(OSError, ValueError):
            return int((disk / "diskseq").read_text())
    return 0


__all__ = ["check", "is_another", "of"]
