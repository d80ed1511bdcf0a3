"""The thread that serves one or more hctxs of a device: over csrc/iothread.c, which has its ring.

In: the hctxs, made before it starts. Out: when it is prepared, and how it ended. The thread is
Python's, but sits in C with the GIL released from the first fetch to the last commit, and never
touches a request in Python.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ._uring import ffi, lib
from .errors import DriverError, check

if TYPE_CHECKING:
    from ._uring import ul_iothread, ul_target


class IoThread:
    """A thread of the device behind ``cdev_fd``; hctxs join it by naming its ``handle``.

    :param cdev_fd: /dev/ublkcN, borrowed.
    :param name: of the thread.
    :param poll_us: the longest spin before it sleeps; 0: none. Vain spins stop it for a while.
    :param watches: take an inotify instance to hear of the backing file's size.
    :param affinity: CPUs it may run on; empty: where the scheduler wants.
    :param on_prepared: called on the thread once every tag is fetched.
    :param on_end: called on the thread as its last act.
    :raises DriverError: ENOMEM, EMFILE.
    """

    def __init__(
        self,
        cdev_fd: int,
        name: str,
        *,
        target: ul_target,
        poll_us: int = 0,
        watches: bool = False,
        affinity: Iterable[int] = (),
        on_prepared: Callable[[], None] | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.affinity = frozenset(affinity)
        self.error: DriverError | None = None
        self._on_prepared = on_prepared
        self._on_end = on_end
        self._prepared = threading.Event()
        config = ffi.new("struct ul_iothread_config *")
        config.cdev_fd = cdev_fd
        config.poll_us = poll_us
        config.watches = watches
        handle = ffi.new("struct ul_iothread **")
        check(lib.ul_iothread_create(config, target, handle), name)
        self._handle: ul_iothread | None = handle[0]
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    @property
    def handle(self) -> ul_iothread:
        """The ``struct ul_iothread *``. :raises ValueError: after close."""
        if self._handle is None:
            raise ValueError(f"{self.name} is closed")
        return self._handle

    @property
    def tid(self) -> int:
        """The thread's id in the kernel; 0 before it runs."""
        return self._thread.native_id or 0

    def start(self) -> None:
        """Start the thread; :meth:`wait_prepared` tells how that went."""
        self._thread.start()

    def wait_prepared(self, timeout_s: float) -> None:
        """Wait until every tag of its hctxs is fetched.

        :raises DriverError: what io_uring or the driver said; ETIMEDOUT.
        """
        if not self._prepared.wait(timeout_s):
            raise DriverError(errno.ETIMEDOUT, f"{self.name}: fetch")
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Ask the thread to end once nothing is in flight, without the driver's word."""
        lib.ul_iothread_stop(self.handle)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread to end; False if it still runs then."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Free the handle; the thread must have ended, and its hctxs be closed. Idempotent."""
        if self._handle is None:
            return
        if self._thread.is_alive():
            raise ValueError(f"{self.name} still runs")
        lib.ul_iothread_destroy(self._handle)
        self._handle = None

    def _serve(self) -> None:
        handle = self.handle
        try:
            if self.affinity:
                os.sched_setaffinity(0, self.affinity)
            # A wake-up then does not preempt the client, which submits more before we run.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            check(lib.ul_iothread_prepare(handle), f"{self.name}: fetch")
            if self._on_prepared is not None:
                self._on_prepared()
            self._prepared.set()
            check(lib.ul_iothread_run(handle), self.name)
        except DriverError as error:
            self.error = error
        except OSError as error:
            self.error = DriverError(error.errno or 0, f"{self.name}: scheduling")
        finally:
            self._prepared.set()
            self._on_end()


__all__ = ["IoThread"]
