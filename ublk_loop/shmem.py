"""Memory that clients share with a device: what lies in it needs no copy (UBLK_F_SHMEM_ZC, v7.1).

In: the path of a file in memory (tmpfs, hugetlbfs, /proc/PID/fd/N of a memfd) which a client maps
too and does direct I/O from. Out: our mapping of it, registered with the driver, which recognizes
the pages of such requests and says where in the file they are. Runs on the server's main thread,
before the device is live; what serves requests is csrc/target.c.

The driver pins the pages and keeps the registration as long as the device, across recoveries: a new
server maps the file again. If there is another file at the path by then it is left alone, and the
requests in question are copied.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import replace

from ._uring import ffi, lib
from .control import Control
from .errors import BackingFileError, DriverError
from .params import PAGE_BYTES
from .state import SharedFile

MAX_NR_BYTES = 1 << 32
MAX_FILES: int = lib.UL_SHMEM_MAX


class SharedMemory:
    """Our mapping of a shared file.

    :raises BackingFileError: ENOENT, EACCES, ...; EINVAL if its size is not one of whole pages up
        to 4 GiB; ESTALE if it is another file than ``file`` says.
    """

    def __init__(self, file: SharedFile) -> None:
        mode = os.O_RDONLY if file.read_only else os.O_RDWR
        protection = mmap.PROT_READ | (0 if file.read_only else mmap.PROT_WRITE)
        try:
            fd = os.open(file.path, mode | os.O_CLOEXEC)
        except OSError as error:
            raise BackingFileError(error.errno or errno.EIO, file.path) from None
        try:
            found = os.fstat(fd)
            if file.ino and (file.dev, file.ino) != (found.st_dev, found.st_ino):
                raise BackingFileError(errno.ESTALE, file.path, "it is another file than before")
            if not 0 < found.st_size <= MAX_NR_BYTES or found.st_size % PAGE_BYTES:
                raise BackingFileError(
                    errno.EINVAL, file.path, f"its {found.st_size} bytes are not 1 page to 4 GiB"
                )
            self._memory = mmap.mmap(fd, found.st_size, prot=protection)
        finally:
            os.close(fd)
        self.file = replace(file, dev=found.st_dev, ino=found.st_ino)
        self.nr_bytes = found.st_size
        self._view = ffi.from_buffer(self._memory)
        #: where it is mapped
        self.address = int(ffi.cast("uintptr_t", self._view))

    def register(self, control: Control, dev_id: int) -> int:
        """Have the driver recognize its pages; return the buffer's index.

        :raises DriverError: EOPNOTSUPP without UBLK_F_SHMEM_ZC; EFAULT if it is not in memory.
        """
        try:
            return control.reg_buf(
                dev_id, self.address, self.nr_bytes, read_only=self.file.read_only
            )
        except DriverError as error:
            if error.errno == errno.EFAULT:
                hint = f"{self.file.path} is not in memory: use a file of tmpfs or hugetlbfs"
                raise DriverError(errno.EFAULT, error.what, hint) from None
            raise

    def close(self) -> None:
        """Unmap it; the native target must be closed before."""
        ffi.release(self._view)  # or the mapping counts as in use
        self._memory.close()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["MAX_FILES", "SharedMemory"]
