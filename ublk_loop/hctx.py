"""One ublk queue as a blk-mq hardware context: over csrc/hctx.c.

Owns the native ``ul_hctx``: tags, buffers, counters. The thread that serves it is iothread.py's. It
never executes a request itself: the target and the workqueue do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._uring import ffi, lib
from .errors import check
from .iothread import IoThread

if TYPE_CHECKING:
    from ._uring import ul_hctx, ul_target, ul_workqueue


@dataclass(frozen=True)
class HctxStats:
    """Counters of one hctx since it was made; a snapshot. Batches and sleeps are its thread's."""

    nr_reads: int
    nr_writes: int
    nr_flushes: int
    nr_discards: int
    nr_errors: int
    nr_batches: int
    nr_sleeps: int
    nr_inline: int
    nr_async: int
    nr_shared: int
    read_bytes: int
    write_bytes: int
    nr_inflight: int


class HardwareContext:
    """Queue ``q_id`` of the device that ``thread`` serves; to be made before the thread starts.

    :param queue_depth: tags of the queue, 1..4096.
    :param tags: those that it serves; all of them with UBLK_F_BATCH_IO.
    :param max_io_buf_bytes: the largest request.
    :param dev_flags: UBLK_F_*, as the driver granted them.
    :param io_desc_bytes: the size of a request's descriptor.
    :raises DriverError: ENOMEM.
    """

    def __init__(
        self,
        thread: IoThread,
        q_id: int,
        *,
        queue_depth: int,
        tags: range,
        max_io_buf_bytes: int,
        dev_flags: int,
        io_desc_bytes: int,
        target: ul_target,
        workqueue: ul_workqueue,
    ) -> None:
        self.q_id = q_id
        self.thread = thread
        config = ffi.new("struct ul_hctx_config *")
        config.q_id = q_id
        config.queue_depth = queue_depth
        config.first_tag, config.nr_tags = tags.start, len(tags)
        config.max_io_buf_bytes = max_io_buf_bytes
        config.dev_flags = dev_flags
        config.io_desc_bytes = io_desc_bytes
        handle = ffi.new("struct ul_hctx **")
        code = lib.ul_hctx_create(config, thread.handle, target, workqueue, handle)
        check(code, f"queue {q_id}")
        self._handle: ul_hctx | None = handle[0]

    def stats(self) -> HctxStats:
        """Return the counters. :raises ValueError: after close."""
        if self._handle is None:
            raise ValueError(f"queue {self.q_id} is closed")
        raw = ffi.new("struct ul_hctx_stats *")
        lib.ul_hctx_get_stats(self._handle, raw)
        return HctxStats(*(getattr(raw, name) for name in HctxStats.__dataclass_fields__))

    def close(self) -> None:
        """Free the handle; its thread must have ended. Idempotent."""
        if self._handle is None:
            return
        if not self.thread.join(0):
            raise ValueError(f"queue {self.q_id} is still served")
        lib.ul_hctx_destroy(self._handle)
        self._handle = None


__all__ = ["HardwareContext", "HctxStats"]
