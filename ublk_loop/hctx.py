"""One ublk queue as a blk-mq hardware context, and the thread that serves it.

Owns the native ``ul_hctx`` and its thread. The thread binds itself to the queue's CPUs, prepares
(ring, descriptors, every tag fetched), reports, then sits in csrc/hctx.c until the driver aborts
every tag. It never executes a request itself: the target and the workqueue do.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._uring import ffi, lib
from .errors import DriverError, check

if TYPE_CHECKING:
    from ._uring import ul_hctx, ul_target, ul_workqueue


@dataclass(frozen=True)
class HctxStats:
    """Counters of one hctx since it was made; a snapshot."""

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
    """Queue ``q_id`` of the device behind ``cdev_fd``.

    :param cdev_fd: /dev/ublkcN, borrowed.
    :param queue_depth: tags, 1..4096.
    :param max_io_buf_bytes: the largest request.
    :param dev_flags: UBLK_F_*, as the driver granted them.
    :param poll_us: the longest spin before the thread sleeps; 0: none. Vain spins stop it for a
        while.
    :param affinity: CPUs the thread may run on; empty: where the scheduler wants.
    :param on_end: called on the hctx's thread as its last act.
    :raises DriverError: ENOMEM, EMFILE.
    """

    def __init__(
        self,
        cdev_fd: int,
        q_id: int,
        *,
        queue_depth: int,
        max_io_buf_bytes: int,
        dev_flags: int,
        poll_us: int = 0,
        target: ul_target,
        workqueue: ul_workqueue,
        affinity: Iterable[int] = (),
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.q_id = q_id
        self.affinity = frozenset(affinity)
        self.error: DriverError | None = None
        self._on_end = on_end
        self._prepared = threading.Event()
        config = ffi.new("struct ul_hctx_config *")
        config.cdev_fd = cdev_fd
        config.q_id = q_id
        config.queue_depth = queue_depth
        config.max_io_buf_bytes = max_io_buf_bytes
        config.poll_us = poll_us
        config.dev_flags = dev_flags
        handle = ffi.new("struct ul_hctx **")
        check(lib.ul_hctx_create(config, target, workqueue, handle), f"queue {q_id}")
        self._handle: ul_hctx | None = handle[0]
        self._thread = threading.Thread(target=self._serve, name=f"ublk-q{q_id}", daemon=True)

    @property
    def tid(self) -> int:
        """The thread's id in the kernel; 0 before it runs."""
        return self._thread.native_id or 0

    def start(self) -> None:
        """Start the thread; :meth:`wait_prepared` tells how that went."""
        self._thread.start()

    def wait_prepared(self, timeout_s: float) -> None:
        """Wait until every tag is fetched.

        :raises DriverError: what io_uring or the driver said; ETIMEDOUT.
        """
        if not self._prepared.wait(timeout_s):
            raise DriverError(errno.ETIMEDOUT, f"queue {self.q_id}: fetch")
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Ask the thread to end once nothing is in flight, without the driver's word."""
        lib.ul_hctx_stop(self._live_handle())

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread to end; False if it still runs then."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stats(self) -> HctxStats:
        """Return the counters. :raises ValueError: after close."""
        raw = ffi.new("struct ul_hctx_stats *")
        lib.ul_hctx_get_stats(self._live_handle(), raw)
        return HctxStats(*(getattr(raw, name) for name in HctxStats.__dataclass_fields__))

    def close(self) -> None:
        """Free the handle; the thread must have ended. Idempotent."""
        if self._handle is None:
            return
        if self._thread.is_alive():
            raise ValueError(f"queue {self.q_id} still runs")
        lib.ul_hctx_destroy(self._handle)
        self._handle = None

    def _live_handle(self) -> ul_hctx:
        if self._handle is None:
            raise ValueError(f"queue {self.q_id} is closed")
        return self._handle

    def _serve(self) -> None:
        handle = self._live_handle()
        try:
            if self.affinity:
                os.sched_setaffinity(0, self.affinity)
            # A wake-up then does not preempt the client, which submits more before we run.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            check(lib.ul_hctx_prepare(handle), f"queue {self.q_id}: fetch")
            self._prepared.set()
            check(lib.ul_hctx_run(handle), f"queue {self.q_id}")
        except DriverError as error:
            self.error = error
        except OSError as error:
            self.error = DriverError(error.errno or 0, f"queue {self.q_id}: scheduling")
        finally:
            self._prepared.set()
            self._on_end()


__all__ = ["HardwareContext", "HctxStats"]
