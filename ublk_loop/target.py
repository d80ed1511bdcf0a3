"""Targets: what a device serves.

Owns the backing (its open file, lock and geometry) and, while a device uses it, the native
``ul_target``. A target in C (Loop, Null) is only described here and done in csrc/target.c; a
target in Python subclasses :class:`Target`, and its methods run on the workqueue's worker threads,
one call a request: reads concurrently, all that writes in order. Never talks to the driver.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import identity, sharing
from ._uring import ffi, lib
from .errors import BackingFileError, check
from .params import IntegrityParams, SegmentParams
from .state import CHUNK_BYTES, FileIdentity, is_chunk
from .uapi import (
    UBLK_IO_OP_DISCARD,
    UBLK_IO_OP_FLUSH,
    UBLK_IO_OP_READ,
    UBLK_IO_OP_WRITE,
    UBLK_IO_OP_WRITE_ZEROES,
)
from .workqueue import register_handler, unregister_handler

if TYPE_CHECKING:
    from ._uring import ul_request_info, ul_target, ul_target_config, ul_work

SECTOR_BYTES = 512
PAGE_BYTES = mmap.PAGESIZE
FILL_BYTES = 1 << 20
POLICIES = {
    "auto": lib.UL_POLICY_AUTO,
    "2014": lib.UL_POLICY_2014,
    "base": lib.UL_POLICY_BASE,
}

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKROGET = 0x125E

_log = logging.getLogger(__name__)


class Target:
    """Base class of targets; subclass it to serve a device from Python.

    Set ``size`` (bytes, a multiple of ``logical_bs``) and define :meth:`read` and, unless
    ``read_only``, :meth:`write`; :meth:`flush`, :meth:`discard` and :meth:`write_zeroes` are
    offered to the kernel only where a subclass defines them. Offsets and lengths are bytes,
    multiples of ``logical_bs``. An OSError reaches the writer or reader as its errno, any other
    exception as EIO (and is logged).
    Methods are called on several threads at once: reads at any time, the rest one at a time.
    A buffer belongs to the request: do not keep it.
    """

    name: ClassVar[str] = "python"

    size: int = 0
    logical_bs: int = SECTOR_BYTES
    physical_bs: int = PAGE_BYTES
    discard_granularity: int = PAGE_BYTES
    read_only: bool = False
    rotational: bool = False

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        raise OSError(errno.EOPNOTSUPP, "read")

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data`` at ``offset``."""
        raise OSError(errno.EOPNOTSUPP, "write")

    def flush(self) -> None:
        """Make everything written so far durable."""
        raise OSError(errno.EOPNOTSUPP, "flush")

    def discard(self, offset: int, nr_bytes: int) -> None:
        """Forget a range; what it reads as afterwards is up to the target."""
        raise OSError(errno.EOPNOTSUPP, "discard")

    def write_zeroes(self, offset: int, nr_bytes: int) -> None:
        """Make a range read as zeroes."""
        raise OSError(errno.EOPNOTSUPP, "write_zeroes")

    def mark(self, dev_id: int) -> str:
        """Say of the backing that ``dev_id`` serves it; called once the device exists.

        Returns a warning if it shares it with another device, or an empty text.
        """
        return ""

    def close(self) -> None:
        """Release the backing; idempotent."""

    def describe(self) -> dict[str, Any]:
        """Return what ``ublk list`` and recovery need to know, JSON-serialisable."""
        return {"name": self.name, "dev_size": self.size}

    # What the kernel is told; a native target overrides these.

    @property
    def has_volatile_cache(self) -> bool:
        """Whether a completed write may still need a flush."""
        return self._defines("flush")

    @property
    def has_fua(self) -> bool:
        """Whether a single write can be made durable by itself (UBLK_IO_F_FUA)."""
        return False

    @property
    def can_discard(self) -> bool:
        """Whether DISCARD is offered."""
        return not self.read_only and self._defines("discard")

    @property
    def can_write_zeroes(self) -> bool:
        """Whether WRITE_ZEROES is offered."""
        return not self.read_only and self._defines("write_zeroes")

    @property
    def best_data(self) -> str:
        """How its data is moved fastest: one of DATA_FLAGS of state.py."""
        return "copy"

    @property
    def reads_past_cache(self) -> bool:
        """Whether cold pages of its file are read from a disk to the client's, without a copy."""
        return False

    @property
    def integrity(self) -> IntegrityParams | None:
        """The metadata of its blocks, which need UBLK_F_INTEGRITY; None: they have none."""
        return None

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        """What its backing files are told from others by."""
        return ()

    @property
    def page_alignment(self) -> int:
        """How aligned a client's memory must be where its own pages are used, in bytes."""
        return self.logical_bs

    # What the pieces of it may be there; None: anything.
    page_segments: SegmentParams | None = None

    def _defines(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Target, method)

    @contextlib.contextmanager
    def _native_config(self) -> Iterator[ul_target_config]:
        # What ul_target_create() is given, and what must live as long as the native target.
        cookie = register_handler(self._attend)
        try:
            config = ffi.new("struct ul_target_config *")
            config.kind = lib.UL_TARGET_PYTHON
            config.cookie = cookie
            yield config
        finally:
            unregister_handler(cookie)

    def _attend(self, work: ul_work) -> None:
        info = ffi.new("struct ul_request_info *")
        lib.ul_request_get(work, info)
        try:
            result = self._execute(info)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        except Exception:
            _log.exception("target %s: op %d at %d failed", self.name, info.op, info.offset_bytes)
            result = -errno.EIO
        lib.ul_request_set_result(work, result)

    def _execute(self, info: ul_request_info) -> int:
        offset, nr_bytes = info.offset_bytes, info.nr_bytes
        if info.op in (UBLK_IO_OP_READ, UBLK_IO_OP_WRITE):
            with memoryview(ffi.buffer(info.buffer, nr_bytes)).cast("B") as buffer:
                if info.op == UBLK_IO_OP_READ:
                    self.read(offset, buffer)
                else:
                    with buffer.toreadonly() as data:
                        self.write(offset, data)
            return int(nr_bytes)
        if info.op == UBLK_IO_OP_FLUSH:
            self.flush()
        elif info.op == UBLK_IO_OP_DISCARD:
            self.discard(offset, nr_bytes)
        elif info.op == UBLK_IO_OP_WRITE_ZEROES:
            self.write_zeroes(offset, nr_bytes)
        else:
            return -errno.EOPNOTSUPP
        return 0


def check_methods(target: Target) -> None:
    """Refuse a target in Python that could not do what every device is asked for.

    :raises ValueError: it does not define read or, unless it is read-only, write.
    """
    if type(target)._native_config is not Target._native_config:
        return
    needed = ("read",) if target.read_only else ("read", "write")
    missing = [method for method in needed if not target._defines(method)]
    if missing:
        ways = ", or be read_only" if missing == ["write"] else ""
        text = f"does not define {' and '.join(missing)}: it must{ways}"
        raise ValueError(f"target {type(target).__name__} {text}")


class NativeTarget:
    """A target as the data plane sees it; one a device. Owns the ``ul_target`` handle.

    :param policy: ``2014`` (reads concurrently, writes in order), ``base`` (all in order) or
        ``auto`` (at once what cannot block, else as ``2014``).
    :raises ValueError: an unknown policy.
    """

    def __init__(self, target: Target, policy: str) -> None:
        check_policy(policy)
        self._resources = contextlib.ExitStack()
        config = self._resources.enter_context(target._native_config())
        config.policy = POLICIES[policy]
        config.flags |= lib.UL_TARGET_READ_ONLY if target.read_only else 0
        handle = ffi.new("struct ul_target **")
        try:
            check(lib.ul_target_create(config, handle), f"target {target.name}")
        except OSError:
            self._resources.close()
            raise
        self._handle: ul_target | None = handle[0]

    @property
    def handle(self) -> ul_target:
        """The ``struct ul_target *``. :raises ValueError: after close."""
        if self._handle is None:
            raise ValueError("the target is closed")
        return self._handle

    def share(self, index: int, address: int, nr_bytes: int) -> None:
        """Let requests in a shared buffer use ``nr_bytes`` of our memory at ``address``.

        :param index: what REG_BUF returned for it, 0..UL_SHMEM_MAX - 1.
        """
        memory = ffi.cast("void *", address)
        check(lib.ul_target_set_shmem(self.handle, index, memory, nr_bytes), f"buffer {index}")

    def close(self) -> None:
        """Free the handle; every hctx that uses it must be closed before. Idempotent."""
        if self._handle is not None:
            lib.ul_target_destroy(self._handle)
            self._handle = None
            self._resources.close()


class NullTarget(Target):
    """Completes everything and stores nothing; for measuring the rest.

    :param size: bytes, a positive multiple of 512.
    :param delay_us: how long each request takes; 0: it is completed at once.
    :param logical_bs: 512 to 4096.
    """

    name = "null"

    def __init__(
        self,
        size: int = 250 << 30,
        *,
        delay_us: int = 0,
        logical_bs: int = SECTOR_BYTES,
        read_only: bool = False,
    ) -> None:
        _check_bs(logical_bs)
        _check_size(size, logical_bs)
        if delay_us < 0:
            raise ValueError(f"delay {delay_us} is negative")
        self.size = size
        self.logical_bs = logical_bs
        self.read_only = read_only
        self._delay_us = delay_us

    has_volatile_cache = False

    @property
    def can_discard(self) -> bool:
        return not self.read_only

    @property
    def can_write_zeroes(self) -> bool:
        return not self.read_only

    # With a client's own pages, those of a disk with narrow limits, as kublk's null device has
    # them: what such a disk asks of clients is measured and tested so.
    page_alignment = PAGE_BYTES
    page_segments = SegmentParams(
        seg_boundary_mask=PAGE_BYTES - 1, max_segment_size=32 << 10, max_segments=32
    )

    @contextlib.contextmanager
    def _native_config(self) -> Iterator[ul_target_config]:
        config = ffi.new("struct ul_target_config *")
        config.kind = lib.UL_TARGET_NULL
        config.delay_ns = self._delay_us * 1000
        yield config


class RamTarget(Target):
    """A RAM disk, and the example of a target in Python.

    :param size: bytes, a positive multiple of 512.
    """

    name = "ram"

    def __init__(self, size: int) -> None:
        _check_size(size, self.logical_bs)
        self.size = size
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._memory[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self._memory[offset : offset + len(data)] = data

    def discard(self, offset: int, nr_bytes: int) -> None:
        self.write_zeroes(offset, nr_bytes)

    def write_zeroes(self, offset: int, nr_bytes: int) -> None:
        # MADV_DONTNEED of private memory reads as zeroes, but works on whole pages.
        start = -(-offset // PAGE_BYTES) * PAGE_BYTES
        end = (offset + nr_bytes) // PAGE_BYTES * PAGE_BYTES
        if start >= end:
            self._memory[offset : offset + nr_bytes] = bytes(nr_bytes)
            return
        self._memory[offset:start] = bytes(start - offset)
        self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._memory[end : offset + nr_bytes] = bytes(offset + nr_bytes - end)

    def close(self) -> None:
        self._memory.close()


class LoopTarget(Target):
    """A regular file or block device, served by native code.

    :param path: the backing file. It is locked (flock, shared) for as long as the target is open,
        and marked as the device's once that has a number: sharing.py.
    :param offset_bytes: where the device begins in the file; a multiple of 512.
    :param nr_bytes: the device's length; default: to the end of the file. What does not fill a
        logical block is left out.
    :param direct: O_DIRECT or the page cache; default: the page cache for a regular file, O_DIRECT
        for a block device that takes it.
    :param read_only: open for reading only; the device is read-only too.
    :param limit_bytes: the device has at most so much of the file.
    :param logical_bs: the 512 to 4096; default: the smallest logical block that the file takes.
    :param recovers: the dev_id of a device that was served before, by a server that has to be gone.
    :param known: the file that it was served from.
    :raises BackingFileError: ENOENT, EACCES, EROFS, EISDIR, ..., EBUSY (it is locked; another
        device that serves it is in use; the server before has not ended), EINVAL (too small;
        O_DIRECT or a block size demanded and refused), ESTALE (it is another file than ``known``).
    :raises ValueError: bad numbers.
    """

    name = "loop"
    _rest_warning = ""  # of what the device has no block for

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset_bytes: int = 0,
        nr_bytes: int | None = None,
        direct: bool | None = None,
        read_only: bool = False,
        limit_bytes: int | None = None,
        logical_bs: int | None = None,
        recovers: int | None = None,
        known: FileIdentity | None = None,
    ) -> None:
        if logical_bs is not None:
            _check_bs(logical_bs)
        if offset_bytes < 0 or offset_bytes % SECTOR_BYTES:
            raise ValueError(f"offset {offset_bytes} is not a multiple of {SECTOR_BYTES} bytes")
        self.path = os.path.realpath(path)
        self.offset_bytes = offset_bytes
        self.read_only = read_only
        self._fd = _open_backing(self.path, read_only)
        try:
            self._identity = identity.of(self._fd)
            if recovers is not None and known is not None:
                identity.check(self.path, recovers, known, self._identity)
            self._lock_file()
            self._take_geometry(direct, logical_bs)
            self._take_size(nr_bytes, limit_bytes)
            if recovers is None:
                sharing.check_unused(self.path, self._others())
            else:
                self.mark(recovers)
        except BaseException:
            self.close()
            raise

    def mark(self, dev_id: int) -> str:
        sharing.mark(self._fd, self.path, dev_id, read_only=self.read_only)
        shared = sharing.warning(self.path, dev_id, self._others(), read_only=self.read_only)
        return "; ".join(filter(None, [shared, self._rest_warning]))

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return (self._identity,)

    def _others(self) -> list[int]:
        return sharing.others(self._fd, self.offset_bytes, self.size, read_only=self.read_only)

    @property
    def has_fua(self) -> bool:
        return self.has_volatile_cache

    @property
    def has_volatile_cache(self) -> bool:
        return not self.read_only

    @property
    def can_discard(self) -> bool:
        return not self.read_only and self._can_punch

    @property
    def can_write_zeroes(self) -> bool:
        return not self.read_only

    @property
    def best_data(self) -> str:
        # usercopy: from and to the file's mapping, one copy where the driver's own needs a second.
        return "zerocopy" if self._is_direct_to_disk else "usercopy"

    @property
    def reads_past_cache(self) -> bool:
        return self._is_mapped and not lib.ul_target_is_in_memory(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backing_file": self.path,
            "dev_size": self.size,
            "offset": self.offset_bytes,
            "direct_io": int(self.direct),
            "read_only": self.read_only,
        }

    @contextlib.contextmanager
    def _native_config(self) -> Iterator[ul_target_config]:
        config = ffi.new("struct ul_target_config *")
        config.kind = lib.UL_TARGET_LOOP
        config.fd = self._fd
        config.direct_fd = -1
        config.offset_bytes = self.offset_bytes
        config.dev_nr_bytes = self.size
        if self._is_direct_to_disk:
            config.flags = lib.UL_TARGET_DIRECT
        elif self._is_mapped:
            config.flags = lib.UL_TARGET_MAP
            config.direct_fd = self._open_direct()
        try:
            yield config
        finally:
            if config.direct_fd >= 0:
                os.close(config.direct_fd)

    @property
    def _is_mapped(self) -> bool:
        # What cannot be resident as a whole is not worth its page tables (1/512 of it).
        return not self._is_direct_to_disk and self.size <= os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES

    @property
    def _is_direct_to_disk(self) -> bool:
        # In memory there is only the page cache, direct I/O or not.
        return self.direct and not lib.ul_target_is_in_memory(self._fd)

    def _lock_file(self) -> None:
        # Against other programs: devices of ours are told from each other by their marks.
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackingFileError(
                errno.EBUSY, self.path, "another program holds a lock on it (ublk list, lslocks)"
            ) from None

    def _take_geometry(self, direct: bool | None, logical_bs: int | None) -> None:
        info = os.fstat(self._fd)
        self._is_block = stat.S_ISBLK(info.st_mode)
        file_bs = _ioctl_u32(self._fd, _BLKSSZGET) if self._is_block else SECTOR_BYTES
        use_direct = self._is_block if direct is None else direct
        direct_bs = self._find_direct_bs(file_bs) if use_direct else None
        if direct_bs is None and direct:
            raise BackingFileError(
                errno.EINVAL, self.path, "it does not take direct I/O here: use --buffered_io"
            )
        self.direct = direct_bs is not None
        self.logical_bs = self._choose_bs(direct_bs or file_bs, logical_bs)
        natural = _ioctl_u32(self._fd, _BLKPBSZGET) if self._is_block else info.st_blksize
        self.physical_bs = max(self.logical_bs, min(natural, PAGE_BYTES))
        self.discard_granularity = self.physical_bs
        self.rotational = _is_rotational(info.st_rdev if self._is_block else info.st_dev)
        if self.direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)

    def _choose_bs(self, lowest: int, wanted: int | None) -> int:
        if wanted is None or wanted >= lowest:
            return wanted or lowest
        text = f"a block size of {wanted} is too small for it: {lowest} is the smallest"
        raise BackingFileError(errno.EINVAL, self.path, text)

    def fill_if_empty(self, byte: bytes) -> None:
        """Write ``byte`` all over a regular file that has no block yet.

        :raises BackingFileError: ENOSPC, ...; it has none again then.
        """
        info = os.fstat(self._fd)
        if self._is_block or info.st_blocks:
            return
        offset = 0
        try:
            while offset < info.st_size:
                data = byte * min(FILL_BYTES, info.st_size - offset)
                offset += os.pwrite(self._fd, data, offset)
        except OSError as error:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, info.st_size)
            raise BackingFileError(error.errno or errno.EIO, self.path) from None

    def _open_direct(self) -> int:
        # For reading past the page cache; -1 where that cannot be, or is all there is.
        if self.offset_bytes % self.physical_bs or lib.ul_target_is_in_memory(self._fd):
            return -1
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return -1

    def _find_direct_bs(self, file_bs: int) -> int | None:
        # The smallest block that a direct read takes, by trying: STATX_DIOALIGN (v6.1) says
        # nothing for many file systems. None: no direct I/O on this file at this offset.
        try:
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
                bs = file_bs
                while bs <= PAGE_BYTES:
                    with view[:bs] as buffer, contextlib.suppress(OSError):
                        if self.offset_bytes % bs == 0:
                            os.preadv(fd, [buffer], self.offset_bytes)
                            return bs
                    bs *= 2
            return None
        finally:
            os.close(fd)

    # Asked for when a device is made: a file gets a new mtime, and one that is refused keeps its.
    @functools.cached_property
    def _can_punch(self) -> bool:
        info = os.fstat(self._fd)
        if self._is_block:
            dev = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
            limit = Path(f"/sys/dev/block/{dev}/queue/write_zeroes_max_bytes")
            with contextlib.suppress(OSError, ValueError):
                return int(limit.read_text()) > 0
            return False
        # Past the end with KEEP_SIZE: changes no data, and says whether it could.
        end = -(-info.st_size // PAGE_BYTES) * PAGE_BYTES
        return bool(lib.ul_target_probe_punch(self._fd, end, PAGE_BYTES) == 0)

    def _take_size(self, nr_bytes: int | None, limit_bytes: int | None) -> None:
        file_bytes = file_nr_bytes(self._fd)
        room = file_bytes - self.offset_bytes
        if limit_bytes is not None:
            room = min(room, limit_bytes)
        if nr_bytes is not None and nr_bytes > room:
            raise BackingFileError(
                errno.EINVAL,
                self.path,
                f"{nr_bytes} bytes at offset {self.offset_bytes} do not fit its {file_bytes} bytes",
            )
        size = room if nr_bytes is None else nr_bytes
        self.size = size // self.logical_bs * self.logical_bs
        nr_rest = size - self.size
        if nr_rest and size == file_bytes - self.offset_bytes:
            self._rest_warning = (
                f"the last {nr_rest} bytes of {self.path} do not fill a block of "
                f"{self.logical_bs}: they are left out"
            )
        if self.size <= 0:
            rest = f"{max(size, 0)} bytes"
            if self.offset_bytes:
                rest += f" behind offset {self.offset_bytes}"
            text = f"too small: {rest} do not hold one block of {self.logical_bs}"
            raise BackingFileError(errno.EINVAL, self.path, text)


def mark_parts(parts: Sequence[Target], dev_id: int) -> str:
    """Mark all of a target's parts, and return the first warning."""
    warnings = [part.mark(dev_id) for part in parts]
    return next(filter(None, warnings), "")


class StripeTarget(Target):
    """Several files as one device, chunk by chunk from one to the next (RAID 0).

    Each is opened and locked as :class:`LoopTarget` has it. What does not fill a chunk is left out.

    :param paths: 1 to UL_STRIPE_MAX files or block devices, all of one size.
    :param chunk_bytes: a power of 2 from 4096 to 524288.
    :param nr_bytes: the device's length; default: all that they have.
    :param direct: O_DIRECT or the page cache.
    :param recovers: as LoopTarget.
    :param known: as LoopTarget, one a path, or none.
    :raises BackingFileError: as LoopTarget; EINVAL if they are not of one size, too small, or one
        is there twice.
    :raises ValueError: bad numbers.
    """

    name = "stripe"
    has_fua = True
    has_volatile_cache = True
    can_write_zeroes = True

    def __init__(
        self,
        paths: Sequence[str],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        nr_bytes: int | None = None,
        direct: bool | None = None,
        recovers: int | None = None,
        known: Sequence[FileIdentity] = (),
    ) -> None:
        if not 1 <= len(paths) <= lib.UL_STRIPE_MAX:
            raise ValueError(f"{len(paths)} files are not 1 to {lib.UL_STRIPE_MAX}")
        if not is_chunk(chunk_bytes):
            raise ValueError(f"chunk size {chunk_bytes} is not a power of 2 from 4096 to 524288")
        self._chunk_bytes = chunk_bytes
        self._parts: list[LoopTarget] = []
        files: Sequence[FileIdentity | None] = known or [None] * len(paths)
        try:
            for path, file in zip(paths, files, strict=True):
                part = LoopTarget(path, direct=direct, recovers=recovers, known=file)
                self._parts.append(part)
            self._take_geometry()
            self._take_size(nr_bytes)
        except BaseException:
            self.close()
            raise

    def mark(self, dev_id: int) -> str:
        return mark_parts(self._parts, dev_id)

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return tuple(file for part in self._parts for file in part.files)

    @property
    def can_discard(self) -> bool:
        return all(part.can_discard for part in self._parts)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backing_files": [part.path for part in self._parts],
            "dev_size": self.size,
            "chunk_size": self._chunk_bytes,
            "direct_io": int(all(part.direct for part in self._parts)),
        }

    def _take_geometry(self) -> None:
        parts = self._parts
        self.logical_bs = max(part.logical_bs for part in parts)
        self.physical_bs = max(part.physical_bs for part in parts)
        self.discard_granularity = self.physical_bs
        self.rotational = any(part.rotational for part in parts)

    def _take_size(self, wanted_bytes: int | None) -> None:
        parts = self._parts
        if len({os.fstat(part._fd)[1:3] for part in parts}) < len(parts):
            raise BackingFileError(errno.EINVAL, parts[-1].path, "the same file is there twice")
        part_bytes = {part.path: part.size - part.size % self._chunk_bytes for part in parts}
        first = part_bytes[parts[0].path]
        for path, nr_bytes in part_bytes.items():
            if nr_bytes == 0:
                text = f"too small: it does not hold one chunk of {self._chunk_bytes} bytes"
                raise BackingFileError(errno.EINVAL, path, text)
            if nr_bytes != first:
                text = f"{nr_bytes} bytes of it can be used, and {first} of {parts[0].path}"
                raise BackingFileError(errno.EINVAL, path, f"{text}: they must be of one size")
        self.size = first * len(parts) if wanted_bytes is None else wanted_bytes
        if self.size > first * len(parts):
            text = f"{self.size} bytes do not fit {len(parts)} files of {first} bytes"
            raise BackingFileError(errno.EINVAL, parts[0].path, text)

    @contextlib.contextmanager
    def _native_config(self) -> Iterator[ul_target_config]:
        config = ffi.new("struct ul_target_config *")
        config.kind = lib.UL_TARGET_STRIPE
        config.chunk_bytes = self._chunk_bytes
        config.nr_parts = len(self._parts)
        with contextlib.ExitStack() as stack:
            for index, part in enumerate(self._parts):
                native = stack.enter_context(contextlib.closing(NativeTarget(part, "2014")))
                config.parts[index] = native.handle
            yield config


def file_nr_bytes(fd: int) -> int:
    """Return the size of a regular file or block device. :raises OSError: what the kernel said."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        nr_bytes: int = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        return nr_bytes
    return info.st_size


def check_policy(policy: str) -> None:
    """Raise ValueError if ``policy`` is none of POLICIES."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is none of {', '.join(POLICIES)}")


def _check_bs(logical_bs: int) -> None:
    if logical_bs not in (512, 1024, 2048, 4096):
        raise ValueError(f"block size {logical_bs} is none of 512, 1024, 2048, 4096")


def _check_size(size: int, logical_bs: int) -> None:
    if size <= 0 or size % logical_bs:
        raise ValueError(f"size {size} is not a positive multiple of {logical_bs} bytes")


def _is_rotational(dev: int) -> bool:
    # A partition has its disk's queue. A file system without a disk of its own (tmpfs) has none.
    node = Path(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}")
    for queue in (node / "queue", node.resolve().parent / "queue"):
        with contextlib.suppress(OSError):
            return (queue / "rotational").read_text().strip() == "1"
    return False


def _ioctl_u32(fd: int, request: int) -> int:
    return int(struct.unpack("I", fcntl.ioctl(fd, request, bytes(4)))[0])


def _open_backing(path: str, read_only: bool) -> int:
    mode = os.O_RDONLY if read_only else os.O_RDWR
    try:
        info = os.stat(path)
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
            code = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.EINVAL
            raise BackingFileError(code, path, "a regular file or block device is needed")
        # O_EXCL on a block device: EBUSY while it is mounted or otherwise claimed.
        exclusive = os.O_EXCL if stat.S_ISBLK(info.st_mode) and not read_only else 0
        fd = os.open(path, mode | exclusive | os.O_CLOEXEC | os.O_NONBLOCK)
    except BackingFileError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        # EPERM: chattr +i.
        cannot_write = not read_only and code in (errno.EROFS, errno.EACCES, errno.EPERM)
        hint = "serve it with --read-only" if cannot_write and os.access(path, os.R_OK) else ""
        raise BackingFileError(code, path, hint) from None
    if stat.S_ISBLK(info.st_mode) and not read_only and _ioctl_u32(fd, _BLKROGET):
        os.close(fd)
        raise BackingFileError(errno.EROFS, path, "serve it with --read-only")
    if not read_only:
        _check_writable(fd, path)
    return fd


def _check_writable(fd: int, path: str) -> None:
    # Opened for writing, and yet none: EINVAL of a file system that only maps files (hugetlbfs),
    # ETXTBSY of a file that is swap.
    try:
        os.pwrite(fd, b"", 0)
    except OSError as error:
        os.close(fd)
        hint = "its file system cannot write: serve it with --read-only"
        if error.errno == errno.ETXTBSY:
            hint = "it is in use as swap"
        raise BackingFileError(error.errno or errno.EIO, path, hint) from None


__all__ = [
    "POLICIES",
    "LoopTarget",
    "NativeTarget",
    "NullTarget",
    "RamTarget",
    "StripeTarget",
    "Target",
    "check_methods",
    "check_policy",
    "file_nr_bytes",
]
