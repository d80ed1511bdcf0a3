"""The kernel's unbound workqueue: alloc_workqueue's flags and calls, over csrc/workqueue.c.

Owns the native pools and workqueues, and lends them their threads: each worker, rescuer and pool
manager is a Python thread that sits in C with the GIL released. In come items: native ones, which C
code queues by a workqueue's ``handle``, and Python callables (:class:`Work`). A worker comes back
to Python only for an item that asks for it, and runs the handler that its cookie names.

Calls may come from any thread; callables run on worker threads. Nothing is made at import, and a
forked child starts without workqueues. A native item never enters Python here.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._uring import ffi, lib
from .errors import UblkLoopError

if TYPE_CHECKING:
    from ._uring import ul_pool, ul_work, ul_worker, ul_workqueue

MAX_ACTIVE_DEFAULT = 1024
MAX_ACTIVE_LIMIT = 2048
HIGHPRI_NICE = -20

_NAME_BYTES = 15
_NSEC_PER_SEC = 1_000_000_000

_log = logging.getLogger(__name__)


class WQ(enum.IntFlag):
    """Flags of alloc_workqueue, as include/linux/workqueue.h numbers them."""

    UNBOUND = 1 << 1
    FREEZABLE = 1 << 2
    MEM_RECLAIM = 1 << 3
    HIGHPRI = 1 << 4
    CPU_INTENSIVE = 1 << 5
    SYSFS = 1 << 6


# ---- who attends to items that need Python ----

# What a handler returns is kept until the item has ended in C.
_handlers: dict[int, Callable[[ul_work], object]] = {}
_cookies = itertools.count(1)


def register_handler(handler: Callable[[ul_work], object]) -> int:
    """Have ``handler(work)`` called, on a worker thread, for native items that return to Python.

    :returns: the cookie to give such items. An exception of the handler is logged; the item goes on
        as if it had returned.
    """
    cookie = next(_cookies)
    _handlers[cookie] = handler
    return cookie


def unregister_handler(cookie: int) -> None:
    """Forget a handler; no item with its cookie may be pending or running. Idempotent."""
    _handlers.pop(cookie, None)


def _attend(work: ul_work, cookie: int) -> object:
    handler = _handlers.get(cookie)
    if handler is None:
        _log.error("a work item names no handler: cookie %d", cookie)
        return None
    try:
        return handler(work)
    except BaseException:
        # Whatever it is, it must not end the worker.
        _log.exception("the handler of a work item failed")
        return None


def _check(result: int, what: str, hint: str = "") -> int:
    if result < 0:
        raise UblkLoopError(-result, what, hint)
    return result


def _wait(call: Callable[[], int]) -> int:
    # Between two rounds Python runs its signal handlers, and one may raise.
    while (result := call()) == -errno.EINTR:
        pass
    return result


def _nanoseconds(seconds: float, what: str) -> int:
    if not 0 <= seconds < 1 << 32:
        raise ValueError(f"{what}: {seconds} s is not in 0..2**32")
    return round(seconds * _NSEC_PER_SEC)


# ---- pools ----


@dataclass(frozen=True)
class PoolStats:
    """Counters of one pool; a snapshot. Rescuers are not counted as its workers."""

    nr_created: int
    nr_culled: int
    nr_create_failures: int
    nr_workers: int
    nr_idle: int
    nr_waiting: int
    is_io_flusher: bool
    """Whether the kernel granted PR_SET_IO_FLUSHER (CAP_SYS_RESOURCE)."""
    nice_errno: int
    """Why a worker did not get its nice or CPUs (EPERM without CAP_SYS_NICE); 0: it did."""


class Pool:
    """The threads that serve workqueues of one nice and one set of CPUs.

    Workqueues share pools by themselves; make one only to choose its timing.

    :param nice: of the workers, -20..19; 0 leaves them as they are.
    :param cpus: where the workers may run; empty: where the scheduler wants.
    :param idle_timeout_s: when an idle worker may leave; two always stay.
    :param create_cooldown_s: pause after a thread could not be made.
    :param mayday_initial_s: how long a thread may be missing before the rescuers are called.
    :param mayday_interval_s: time between two calls.
    :param spin_s: how long a worker polls before it sleeps; never on a single CPU.
    :param start_thread: makes the worker threads; what it raises is a failed creation.
    :raises UblkLoopError: ENOMEM, EAGAIN (no thread for the manager).
    """

    def __init__(
        self,
        *,
        nice: int = 0,
        cpus: Iterable[int] = (),
        idle_timeout_s: float = 300,
        create_cooldown_s: float = 1,
        mayday_initial_s: float = 0.01,
        mayday_interval_s: float = 0.1,
        spin_s: float = 0,
        start_thread: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        if not -20 <= nice <= 19:
            raise ValueError(f"nice {nice} is not in -20..19")
        self.nice = nice
        self.cpus = frozenset(cpus)
        self._nice_errno = 0
        self._start_thread = start_thread
        self._threads: set[threading.Thread] = set()
        self.nr_users = 0
        config = ffi.new("struct ul_pool_config *")
        config.idle_timeout_ns = _nanoseconds(idle_timeout_s, "idle_timeout_s")
        config.create_cooldown_ns = _nanoseconds(create_cooldown_s, "create_cooldown_s")
        config.mayday_initial_ns = _nanoseconds(mayday_initial_s, "mayday_initial_s")
        config.mayday_interval_ns = _nanoseconds(mayday_interval_s, "mayday_interval_s")
        config.spin_ns = _nanoseconds(spin_s, "spin_s")
        handle = ffi.new("struct ul_pool **")
        _check(lib.ul_pool_create(config, handle), "pool")
        self._handle: ul_pool | None = handle[0]
        self._manager = threading.Thread(target=self._manage, name="ul-manager", daemon=True)
        try:
            self._manager.start()
        except RuntimeError:
            lib.ul_pool_stop(handle[0])
            lib.ul_pool_destroy(handle[0])
            raise UblkLoopError(errno.EAGAIN, "thread of a pool's manager") from None

    @property
    def handle(self) -> ul_pool:
        """The ``struct ul_pool *``. :raises ValueError: after close."""
        if self._handle is None:
            raise ValueError("the pool is closed")
        return self._handle

    def stats(self) -> PoolStats:
        """Return the counters. :raises ValueError: after close."""
        raw = ffi.new("struct ul_pool_stats *")
        lib.ul_pool_get_stats(self.handle, raw)
        return PoolStats(
            nr_created=raw.nr_created,
            nr_culled=raw.nr_culled,
            nr_create_failures=raw.nr_create_failures,
            nr_workers=raw.nr_workers,
            nr_idle=raw.nr_idle,
            nr_waiting=raw.nr_waiting,
            is_io_flusher=bool(raw.is_io_flusher),
            nice_errno=self._nice_errno,
        )

    def close(self, timeout_s: float = 30) -> None:
        """End the threads; every workqueue on the pool must be closed before. Idempotent.

        :raises ValueError: a workqueue still uses it.
        :raises UblkLoopError: ETIMEDOUT, when a thread does not end.
        """
        if self._handle is None:
            return
        if self.nr_users:
            raise ValueError(f"{self.nr_users} workqueues still use the pool")
        lib.ul_pool_stop(self._handle)
        deadline = time.monotonic() + timeout_s
        # The manager first: then no thread is added to the set.
        _join(self._manager, deadline)
        for thread in list(self._threads):
            _join(thread, deadline)
        _check(lib.ul_pool_destroy(self._handle), "pool")
        self._handle = None

    def serve(self, worker: ul_worker) -> None:
        """Be this worker or rescuer until it is told to leave: the body of its thread."""
        try:
            self._take_attributes()
            work = ffi.new("struct ul_work **")
            cookie = ffi.new("uint64_t *")
        except BaseException:
            lib.ul_worker_not_started(worker)
            raise
        kept: object = None
        while lib.ul_worker_run(worker, work, cookie):
            kept = _attend(work[0], cookie[0])
        del kept
        self._threads.discard(threading.current_thread())

    def _take_attributes(self) -> None:
        try:
            if self.nice:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.nice)
            if self.cpus:
                os.sched_setaffinity(0, self.cpus)
        except OSError as error:
            self._nice_errno = error.errno or errno.EPERM

    def _manage(self) -> None:
        worker = ffi.new("struct ul_worker **")
        while lib.ul_pool_manager_wait(self.handle, worker):
            try:
                thread = threading.Thread(
                    target=self.serve, args=(worker[0],), name="ul-worker", daemon=True
                )
                self._threads.add(thread)
                self._start_thread(thread)
            except Exception as error:
                self._threads.discard(thread)
                lib.ul_worker_not_started(worker[0])
                _log.warning("no thread for a worker: %s", error)


def _join(thread: threading.Thread, deadline: float) -> None:
    if thread.ident is None:
        return
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise UblkLoopError(errno.ETIMEDOUT, f"thread {thread.name}")


_shared: dict[tuple[int, frozenset[int]], Pool] = {}
_shared_lock = threading.Lock()


def _get_pool(nice: int, cpus: frozenset[int]) -> Pool:
    with _shared_lock:
        pool = _shared.get((nice, cpus))
        if pool is None:
            pool = _shared[nice, cpus] = Pool(nice=nice, cpus=cpus)
        pool.nr_users += 1
        return pool


def _put_pool(pool: Pool) -> None:
    with _shared_lock:
        pool.nr_users -= 1
        key = (pool.nice, pool.cpus)
        if pool.nr_users or _shared.get(key) is not pool:
            return
        del _shared[key]
    pool.close()


# ---- workqueues ----


@dataclass(frozen=True)
class WorkqueueStats:
    """Counters of one workqueue since it was made; a snapshot.

    Their sense is that of the kernel's tools/workqueue/wq_monitor.py. CPU time includes what its
    workers spend between two of its items.
    """

    nr_started: int
    nr_completed: int
    cpu_time_ns: int
    nr_cpu_hogs: int
    nr_wakeups: int
    nr_maydays: int
    nr_rescued: int
    nr_active: int
    nr_inactive: int

    @property
    def nr_inflight(self) -> int:
        """Items that run now."""
        return self.nr_started - self.nr_completed


class Workqueue:
    """A workqueue; :func:`alloc_workqueue` takes the kernel's flags instead.

    :param name: at least one character; the rescuer's thread shows the first 15 bytes.
    :param max_active: how many items may run at once, 0 (default, 1024) to 2048.
    :param highpri: served by a pool of its own, at nice -20.
    :param mem_reclaim: has a rescuer, made now, that goes on when no thread can be made.
    :param ordered: one item at a time, in the order of queueing; max_active must be 0 or 1.
    :param nice: of the workers instead of highpri's; -20..19.
    :param cpus: where the workers may run; empty: anywhere.
    :param pool: serve it by this pool, not by the shared one of its attributes.
    :raises ValueError: bad arguments.
    :raises UblkLoopError: ENOMEM, EAGAIN (no thread for the rescuer).
    """

    def __init__(
        self,
        name: str,
        max_active: int = 0,
        *,
        highpri: bool = False,
        mem_reclaim: bool = False,
        ordered: bool = False,
        nice: int | None = None,
        cpus: Iterable[int] = (),
        pool: Pool | None = None,
    ) -> None:
        if not name or "\0" in name:
            raise ValueError(f"workqueue name {name!r}")
        if ordered and max_active not in (0, 1):
            raise ValueError(f"max_active {max_active} of an ordered workqueue")
        self.name = name
        self.is_ordered = ordered
        self._max_active = 1 if ordered else _check_max_active(max_active)
        self._changed = threading.Condition()
        self._nr_calls = 0
        self._close_lock = threading.Lock()
        self._works: set[Work] = set()
        self._handle: ul_workqueue | None = None
        self._is_open = False
        if nice is None:
            nice = HIGHPRI_NICE if highpri else 0
        self._pool = _get_pool(nice, frozenset(cpus)) if pool is None else pool
        if pool is not None:
            pool.nr_users += 1
        try:
            self._create(mem_reclaim)
        except BaseException:
            _put_pool(self._pool)
            raise
        self._is_open = True
        _open_workqueues.add(self)

    def _create(self, mem_reclaim: bool) -> None:
        config = ffi.new(
            "struct ul_workqueue_config *",
            {
                "name": self.name.encode(errors="replace")[:_NAME_BYTES],
                "flags": lib.UL_WQ_RESCUER if mem_reclaim else 0,
                "max_active": self._max_active,
            },
        )
        handle = ffi.new("struct ul_workqueue **")
        rescuer = ffi.new("struct ul_worker **")
        _check(
            lib.ul_workqueue_create(self._pool.handle, config, handle, rescuer),
            f"workqueue {self.name}",
        )
        self._rescuer: threading.Thread | None = None
        if mem_reclaim:
            thread = threading.Thread(
                target=self._pool.serve, args=(rescuer[0],), name=f"ul-{self.name}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                lib.ul_worker_not_started(rescuer[0])
                lib.ul_workqueue_drain_wait(handle[0], True)
                lib.ul_workqueue_destroy(handle[0])
                raise UblkLoopError(errno.EAGAIN, f"rescuer of workqueue {self.name}") from None
            self._rescuer = thread
        self._handle = handle[0]

    def __enter__(self) -> Workqueue:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def handle(self) -> ul_workqueue:
        """The ``struct ul_workqueue *``, for native users. :raises ValueError: after close."""
        if not self._is_open or self._handle is None:
            raise ValueError(f"workqueue {self.name} is closed")
        return self._handle

    @property
    def pool(self) -> Pool:
        """The pool that serves it."""
        return self._pool

    @property
    def max_active(self) -> int:
        """How many items may run at once; set 1..2048 or 0 for the default.

        :raises ValueError: on setting it for an ordered workqueue, out of range, or after close.
        """
        return self._max_active

    @max_active.setter
    def max_active(self, max_active: int) -> None:
        if self.is_ordered:
            raise ValueError(f"workqueue {self.name} is ordered")
        value = _check_max_active(max_active)
        with self._call() as handle:
            lib.ul_workqueue_set_max_active(handle, value)
            self._max_active = value

    def queue_work(self, work: Work) -> bool:
        """Queue an item; False if it is pending already or disabled.

        :raises ValueError: it is pending or runs on another workqueue; or after close.
        :raises UblkLoopError: ESHUTDOWN, when the workqueue is being drained and the caller is not
            one of its items.
        """
        return self._queue(work, 0, False) == 1

    def queue_delayed_work(self, work: DelayedWork, delay_s: float) -> bool:
        """Queue an item after ``delay_s`` seconds; it is pending from now on. Else as queue_work.

        A delayed item does not count as queued before its time: flush and drain do not wait for it,
        and close cancels it.
        """
        return self._queue(work, _nanoseconds(delay_s, "delay_s"), False) == 1

    def mod_delayed_work(self, work: DelayedWork, delay_s: float) -> bool:
        """Queue an item after ``delay_s`` seconds, pending or not; True if it was pending."""
        return self._queue(work, _nanoseconds(delay_s, "delay_s"), True) == 0

    def flush(self) -> None:
        """Wait until all that was queued before is done.

        :raises UblkLoopError: EDEADLK, from one of its own items.
        :raises ValueError: after close.
        """
        ticket = ffi.new("uint64_t *")
        with self._call() as handle:
            result = _wait(lambda: lib.ul_workqueue_flush_wait(handle, ticket))
        _check(result, f"flush workqueue {self.name}", "one of its own items waits for itself")

    def drain(self) -> None:
        """Wait until it is empty, refusing whatever is not queued by its own items.

        Errors as :meth:`flush`.
        """
        with self._call() as handle:
            result = _wait(lambda: lib.ul_workqueue_drain_wait(handle, False))
        _check(result, f"drain workqueue {self.name}", "one of its own items waits for itself")

    def stats(self) -> WorkqueueStats:
        """Return the counters. :raises ValueError: after close."""
        raw = ffi.new("struct ul_workqueue_stats *")
        with self._call() as handle:
            lib.ul_workqueue_get_stats(handle, raw)
        return WorkqueueStats(*(getattr(raw, name) for name in WorkqueueStats.__dataclass_fields__))

    def close(self, timeout_s: float = 30) -> None:
        """Drain it, then let it go (destroy_workqueue). Idempotent.

        :param timeout_s: for threads to end, once it is empty.
        :raises UblkLoopError: EDEADLK, from one of its own items; ETIMEDOUT.
        """
        with contextlib.suppress(ValueError), self._call() as handle:
            result = _wait(lambda: lib.ul_workqueue_drain_wait(handle, True))
            _check(result, f"close workqueue {self.name}", "one of its own items closes it")
        with self._close_lock:
            with self._changed:
                self._is_open = False
                self._changed.wait_for(lambda: not self._nr_calls)
            if self._handle is None:
                return
            if self._rescuer:
                _join(self._rescuer, time.monotonic() + timeout_s)
            _check(lib.ul_workqueue_destroy(self._handle), f"close workqueue {self.name}")
            self._handle = None
            for work in list(self._works):
                work._forget()
        _put_pool(self._pool)

    @contextlib.contextmanager
    def _call(self) -> Iterator[ul_workqueue]:
        # The handle, which stays until the call is over.
        with self._changed:
            handle = self.handle
            self._nr_calls += 1
        try:
            yield handle
        finally:
            with self._changed:
                self._nr_calls -= 1
                self._changed.notify_all()

    def _queue(self, work: Work, delay_ns: int, modify: bool) -> int:
        # 1: accepted, 0: it was pending, -ECANCELED: disabled.
        with self._call() as handle, work._lock:
            item = work._bind(self)
            # Before the call: the item may run, and look for its handler, before it returns.
            work._expect()
            result = lib.ul_work_queue_delayed(handle, item, delay_ns, modify)
            if result != 1:
                work._unexpect()
        if result == -errno.ESHUTDOWN:
            raise UblkLoopError(errno.ESHUTDOWN, f"workqueue {self.name}", "it is being drained")
        return result


def _check_max_active(max_active: int) -> int:
    if not 0 <= max_active <= MAX_ACTIVE_LIMIT:
        raise ValueError(f"max_active {max_active} is not in 0..{MAX_ACTIVE_LIMIT}")
    return max_active or MAX_ACTIVE_DEFAULT


_open_workqueues: weakref.WeakSet[Workqueue] = weakref.WeakSet()


def _forget_after_fork() -> None:
    # The threads stayed behind, and locks may be held by them for ever.
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()
    for workqueue in list(_open_workqueues):
        workqueue._changed = threading.Condition()
        workqueue._close_lock = threading.Lock()
        workqueue._is_open = False
        workqueue._handle = None


os.register_at_fork(after_in_child=_forget_after_fork)


def alloc_workqueue(name: str, flags: int, max_active: int = 0) -> Workqueue:
    """Make a workqueue from the kernel's flags.

    :param flags: WQ.UNBOUND, which must be there, with WQ.HIGHPRI and WQ.MEM_RECLAIM.
    :raises ValueError: bad arguments; another flag.

    Source: include/linux/workqueue.h.
    """
    _check_flags(flags)
    return Workqueue(
        name,
        max_active,
        highpri=bool(flags & WQ.HIGHPRI),
        mem_reclaim=bool(flags & WQ.MEM_RECLAIM),
    )


def alloc_ordered_workqueue(name: str, flags: int = 0) -> Workqueue:
    """Make a workqueue that runs one item at a time, in the order of queueing.

    :param flags: WQ.HIGHPRI and WQ.MEM_RECLAIM.
    """
    _check_flags(flags | WQ.UNBOUND)
    return Workqueue(
        name,
        ordered=True,
        highpri=bool(flags & WQ.HIGHPRI),
        mem_reclaim=bool(flags & WQ.MEM_RECLAIM),
    )


def _check_flags(flags: int) -> None:
    if not flags & WQ.UNBOUND:
        raise ValueError("only unbound workqueues: WQ.UNBOUND is missing")
    # int: ~ of an IntFlag leaves out the bits that it does not know.
    if flags & ~int(WQ.UNBOUND | WQ.HIGHPRI | WQ.MEM_RECLAIM):
        raise ValueError(f"workqueue flags {flags:#x}: only UNBOUND, HIGHPRI and MEM_RECLAIM")


# ---- Python items ----


class Work:
    """An item that runs ``func(work)`` once each time that a workqueue accepted it.

    It may queue itself again while it runs; it never runs twice at once. It is on one workqueue at
    a time. An exception is logged and kept in :attr:`exception`.
    """

    def __init__(self, func: Callable[[Work], object]) -> None:
        self.exception: BaseException | None = None
        self._func = func
        self._lock = threading.RLock()
        self._cookie = next(_cookies)
        # One native item for each workqueue that it is on in turn: so none of them outlives what
        # it points to.
        self._workqueue: Workqueue | None = None
        self._nr_disables = 0
        self._item = self._make_item()
        # Queueings that were accepted, and neither ran nor were cancelled. While there is one,
        # _handlers and the workqueue keep this object alive.
        self._nr_expected = 0

    @property
    def pending(self) -> bool:
        """Whether it is queued, or waits for its time, and has not begun to run since."""
        return bool(self._busy() & lib.UL_WORK_BUSY_PENDING)

    @property
    def running(self) -> bool:
        """Whether a worker runs it now."""
        return bool(self._busy() & lib.UL_WORK_BUSY_RUNNING)

    def cancel(self) -> bool:
        """Take it off its workqueue; True if it was pending. It may still run."""
        return self._cancel(disable=False)

    def cancel_sync(self) -> bool:
        """Take it off its workqueue and wait: then it is neither pending nor running.

        :returns: whether it was pending.
        :raises UblkLoopError: EDEADLK, from the item itself.
        """
        was_pending = self.disable()
        try:
            self.flush()
        finally:
            self.enable()
        return was_pending

    def disable(self) -> bool:
        """Cancel it and have every queueing refused until as many :meth:`enable`."""
        return self._cancel(disable=True)

    def disable_sync(self) -> bool:
        """As :meth:`disable`, then wait until it does not run. Errors as cancel_sync."""
        was_pending = self.disable()
        self.flush()
        return was_pending

    def enable(self) -> bool:
        """Undo one :meth:`disable`; True if it can be queued now.

        :raises ValueError: it is not disabled.
        """
        with self._lock:
            if not self._nr_disables:
                raise ValueError("the item is not disabled")
            with self._native() as item:
                lib.ul_work_enable(item)
            self._nr_disables -= 1
            return not self._nr_disables

    def flush(self) -> bool:
        """Wait until its last queueing has run; False if there was nothing to wait for.

        A delayed item whose time has not come is queued at once.

        :raises UblkLoopError: EDEADLK, from the item itself.
        """
        with self._native() as item:
            result = _wait(lambda: lib.ul_work_flush_wait(item))
        return _check(result, "flush a work item", "it waits for itself") == 1

    def _cancel(self, disable: bool) -> bool:
        with self._lock:
            with self._native() as item:
                was_pending = lib.ul_work_cancel(item, disable) == 1
            self._nr_disables += disable
            if was_pending:
                self._unexpect()
        return was_pending

    def _busy(self) -> int:
        with self._native() as item:
            return lib.ul_work_busy(item)

    @contextlib.contextmanager
    def _native(self) -> Iterator[ul_work]:
        # The native item; its workqueue, if any, stays until the call is over.
        with contextlib.ExitStack() as stack:
            with self._lock:
                if self._workqueue is not None:
                    try:
                        stack.enter_context(self._workqueue._call())
                    except ValueError:
                        self._bind(None)
                item = self._item
            yield item

    def _bind(self, workqueue: Workqueue | None) -> ul_work:
        if self._workqueue is not workqueue:
            if workqueue is not None and self._busy():
                raise ValueError("the item is pending or runs on another workqueue")
            self._item = self._make_item()
            self._workqueue = workqueue
        return self._item

    def _make_item(self) -> ul_work:
        item = ffi.new("struct ul_work **")
        _check(lib.ul_work_create(self._cookie, item), "work item")
        for _ in range(self._nr_disables):
            lib.ul_work_cancel(item[0], True)
        return ffi.gc(item[0], lib.ul_work_destroy)

    def _expect(self) -> None:
        assert self._workqueue is not None
        self._nr_expected += 1
        _handlers[self._cookie] = self._run
        self._workqueue._works.add(self)

    def _unexpect(self) -> None:
        self._nr_expected -= 1
        if self._nr_expected == 0:
            self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._nr_expected = 0
            unregister_handler(self._cookie)
            if self._workqueue is not None:
                self._workqueue._works.discard(self)

    def _run(self, work: ul_work) -> ul_work:
        # Returns the native item, which must outlive this call: C has yet to end it.
        item = self._item
        try:
            self._func(self)
        except BaseException as error:
            self.exception = error
            _log.exception("a work item failed")
        finally:
            with self._lock:
                self._unexpect()
        return item


class DelayedWork(Work):
    """An item for queue_delayed_work and mod_delayed_work; else as :class:`Work`."""


__all__ = [
    "HIGHPRI_NICE",
    "MAX_ACTIVE_DEFAULT",
    "MAX_ACTIVE_LIMIT",
    "WQ",
    "DelayedWork",
    "Pool",
    "PoolStats",
    "Work",
    "Workqueue",
    "WorkqueueStats",
    "alloc_ordered_workqueue",
    "alloc_workqueue",
    "register_handler",
    "unregister_handler",
]
