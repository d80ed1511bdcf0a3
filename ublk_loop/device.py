"""One ublk device served by this process: control + target + one hctx a hardware queue.

Owns the device's life on the server's side, and the only place that knows its order:

    add:     ADD_DEV, SET_PARAMS        recover: START_USER_RECOVERY
    prepare: open ublkcN, workqueue, native target, hctx threads, each has fetched all its tags
    start:   START_DEV                           END_USER_RECOVERY    -> LIVE
    stop:    STOP_DEV, or somebody else's: the driver aborts the tags, the hctx threads end
    close:   hctxs, native target, workqueue, ublkcN: every reference that DEL_DEV waits for
    delete:  DEL_DEV

Runs on the thread of whoever calls it (the server's main thread); never on the path of a request.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from . import state, uapi
from .control import Control, DevInfo
from .errors import DriverError
from .hctx import HardwareContext
from .iothread import IoThread
from .params import Params, params_for
from .scheduler import set_scheduler
from .shmem import MAX_FILES, SharedMemory
from .state import DATA_FLAGS, data_mode
from .target import LoopTarget, NativeTarget, NullTarget, Target, check_methods, check_policy
from .workqueue import Workqueue

if TYPE_CHECKING:
    from .sandbox import Sandbox

# What the data plane can do; any other mode is refused.
SUPPORTED_FLAGS = (
    uapi.UBLK_F_NEED_GET_DATA
    | uapi.UBLK_F_USER_RECOVERY
    | uapi.UBLK_F_USER_RECOVERY_REISSUE
    | uapi.UBLK_F_USER_RECOVERY_FAIL_IO
    | uapi.UBLK_F_UNPRIVILEGED_DEV
    | uapi.UBLK_F_CMD_IOCTL_ENCODE
    | uapi.UBLK_F_USER_COPY
    | uapi.UBLK_F_SUPPORT_ZERO_COPY
    | uapi.UBLK_F_AUTO_BUF_REG
    | uapi.UBLK_F_BATCH_IO
    | uapi.UBLK_F_SHMEM_ZC
    | uapi.UBLK_F_QUIESCE
    | uapi.UBLK_F_NO_AUTO_PART_SCAN
    | uapi.UBLK_F_IO_DESC_SIZE
    | uapi.UBLK_F_INTEGRITY
    | uapi.UBLK_F_URING_CMD_COMP_IN_TASK  # without effect: the driver does so by itself
)
RECOVERY_FLAGS = (
    uapi.UBLK_F_USER_RECOVERY
    | uapi.UBLK_F_USER_RECOVERY_REISSUE
    | uapi.UBLK_F_USER_RECOVERY_FAIL_IO
)
# How long an hctx spins at most, where it may: long enough for a client that waits for one small
# request, is woken in a virtual machine, and sends the next. Usually it spins for less.
POLL_US = 1000
# So many of the 128 inotify instances that a user has by default may be ours.
NR_WATCHES = 32
# A device's cap on concurrent reads. On a disk that seeks it is the one that the kernel's loop gave
# itself in 2015, when such a disk drowned in readers: Linux kernel commit 4d4e41aef942 ("block:
# loop: avoiding too many pending per work I/O"). Others serve many at once.
MAX_ACTIVE = 64
MAX_ACTIVE_ROTATIONAL = 16
ANY_DEV_ID = -1

_log = logging.getLogger(__name__)

_Started = TypeVar("_Started")


class Device:
    """A device that this process serves. Use :meth:`add` or :meth:`recover`.

    These take ``target`` over, and ``shared``: they are closed with the device, or by a failure.
    """

    def __init__(
        self,
        control: Control,
        target: Target,
        shared: Sequence[SharedMemory | None],
        info: DevInfo,
        policy: str,
        poll_us: int | None,
        nr_threads: int | None,
        sandbox: Sandbox | None,
    ) -> None:
        self.info = info
        self.target = target
        self.hctxs: list[HardwareContext] = []
        self.threads: list[IoThread] = []
        self._control = control
        self._policy = policy
        self._poll_us = poll_us
        self.nr_threads = nr_threads
        self._sandbox = sandbox
        self._resources = contextlib.ExitStack()
        self._resources.callback(target.close)
        self._shared = [memory and self._resources.enter_context(memory) for memory in shared]
        # What to tell whoever adds it; empty: nothing.
        self.warning = ""
        self._recovering = False
        self._ended = threading.Event()
        self._nr_ended = 0
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []

    @classmethod
    def add(
        cls,
        control: Control,
        target: Target,
        *,
        dev_id: int = ANY_DEV_ID,
        nr_hw_queues: int | None = 1,
        queue_depth: int = 128,
        max_io_buf_bytes: int = 512 * 1024,
        io_desc_bytes: int | None = None,
        flags: int = 0,
        batch: bool | None = None,
        data: str = "auto",
        policy: str = "auto",
        poll_us: int | None = None,
        nr_threads: int | None = None,
        shared: Sequence[SharedMemory | None] = (),
        timeout_s: float = 30,
        sandbox: Sandbox | None = None,
    ) -> Device:
        """Add a device and prepare to serve it; :meth:`start` makes it live.

        :param dev_id: 0.., or -1 for the first free one.
        :param nr_hw_queues: 1..4096; the driver caps it to the number of CPUs. None: two that one
            thread serves, as far as ``nr_threads`` is not given and there is BATCH_IO; else 1.
        :param queue_depth: 1..4096 tags a queue.
        :param max_io_buf_bytes: the largest request, 4 KiB..32 MiB, a multiple of the page size.
        :param io_desc_bytes: the size of a request's descriptor, 24..256, a multiple of 8; what is
            behind its 24 bytes is for later drivers. Default: the driver's.
        :param flags: UBLK_F_*, out of SUPPORTED_FLAGS.
        :param batch: whether to fetch and commit in batches (UBLK_F_BATCH_IO); default: where the
            driver has it and ``flags`` allow it.
        :param data: one of DATA_FLAGS, or ``auto``: the fastest for this target and driver.
        :param poll_us: the longest spin of an hctx before it sleeps; 0: none; default: POLL_US. An
            hctx that has one CPU to run on never spins.
        :param nr_threads: threads that share the queues; default: one a queue. Of more than queues
            each has some tags of every queue, where the driver can (UBLK_F_PER_IO_DAEMON) and
            ``batch`` is not True; else there is one a queue.
        :param shared: memory of clients, taken over as ``target`` is; implies UBLK_F_SHMEM_ZC, and
            user copy for the rest.
        :param sandbox: takes from the I/O threads what they need not; default: they inherit what
            the calling thread may do.
        :raises ValueError: before anything changed.
        :raises DriverError: EEXIST (id taken), EOPNOTSUPP (a flag was not granted), ETIMEDOUT, ...;
            the device is deleted again.
        """
        with _closed_on_error(target, shared):
            check_policy(policy)
            check_methods(target)
            features = control.get_features()
            flags |= _data_flags(data, target, policy, flags, features)
            flags |= _shmem_flags(len(shared), data, target)
            flags |= _integrity_flags(data, flags, target)
            flags |= 0 if io_desc_bytes is None else uapi.UBLK_F_IO_DESC_SIZE
            flags |= _quiesce_flag(batch, flags, features)
            shares_queues = nr_threads is not None and nr_threads > (nr_hw_queues or 1)
            if batch is None and shares_queues and features & uapi.UBLK_F_PER_IO_DAEMON:
                batch = False
            flags |= _batch_flag(batch, flags, queue_depth, features)
            if nr_hw_queues is None:
                nr_hw_queues, nr_threads = _queues_and_threads(flags, nr_threads)
            copied = flags & (uapi.UBLK_F_USER_COPY | uapi.UBLK_F_AUTO_BUF_REG)
            supported = SUPPORTED_FLAGS & ~(0 if copied else uapi.UBLK_F_SUPPORT_ZERO_COPY)
            if flags & ~supported:
                raise ValueError(f"flags {flags & ~supported:#x} are not supported")
            params = _params(target, max_io_buf_bytes, data_mode(flags) == "zerocopy")
            info = control.add_dev(
                DevInfo(
                    nr_hw_queues=nr_hw_queues,
                    queue_depth=queue_depth,
                    max_io_buf_bytes=max_io_buf_bytes,
                    dev_id=dev_id,
                    flags=flags,
                    io_desc_size=io_desc_bytes or 0,
                    ublksrv_pid=os.getpid(),
                )
            )
        device = cls(control, target, shared, info, policy, poll_us, nr_threads, sandbox)
        try:
            missing = flags & ~info.flags & ~uapi.UBLK_F_UNPRIVILEGED_DEV
            if missing:
                raise DriverError(
                    errno.EOPNOTSUPP,
                    f"ADD_DEV dev {info.dev_id}",
                    f"this kernel's driver lacks feature flags {missing:#x} (see ublk features)",
                )
            if info.flags & uapi.UBLK_F_UNPRIVILEGED_DEV:
                _wait_until_ours(device.char_path, timeout_s)
            device.warning = target.mark(info.dev_id)
            control.set_params(info.dev_id, params)
            device._prepare(timeout_s)
        except BaseException:
            device.delete_quietly()
            raise
        return device

    @classmethod
    def recover(
        cls,
        control: Control,
        target: Target,
        dev_id: int,
        *,
        policy: str = "auto",
        poll_us: int | None = None,
        nr_threads: int | None = None,
        shared: Sequence[SharedMemory | None] = (),
        timeout_s: float = 30,
        sandbox: Sandbox | None = None,
    ) -> Device:
        """Take over a device whose server is gone; :meth:`start` makes it live again.

        The options are as in :meth:`add`; of ``shared`` those are None that are gone, whose
        requests are copied.

        :raises DriverError: EBUSY (the old server is not gone), EINVAL (not added with recovery, or
            not waiting for one), ENOTRECOVERABLE (the driver lets nobody take it over any more),
            ENODEV. The device is left as it was found.
        """
        with _closed_on_error(target, shared):
            check_policy(policy)
            check_methods(target)
            target.mark(dev_id)
            _start_recovery(control, dev_id, timeout_s)
            info = control.get_dev_info(dev_id)
        device = cls(control, target, shared, info, policy, poll_us, nr_threads, sandbox)
        device._recovering = True
        try:
            device._prepare(timeout_s)
        except BaseException:
            device.close()
            raise
        return device

    @classmethod
    def serve(
        cls,
        target: Target,
        *,
        ready: Callable[[Device], None] = lambda device: None,
        **options: Any,
    ) -> None:
        """Serve a device until it is stopped, as by ``ublk del``; SIGTERM and Ctrl-C delete it.

        For the main thread of a program that does nothing else; no device is left at its end.

        :param ready: called once the device is live.
        :param options: those of :meth:`add`.
        :raises ValueError, DriverError: as :meth:`add`, or what ended an hctx before its time.
        """
        # They wait while the device comes to be: an end in between would leave half of it.
        ends = {signal.SIGINT, signal.SIGTERM}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with Control() as control:
                device = cls.add(control, target, **options)
                try:
                    device.start()
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                    ready(device)
                    device.wait()
                except KeyboardInterrupt:
                    device.delete()
                except BaseException:
                    device.delete_quietly()
                    raise
                errors = device.errors()
                device.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            signal.signal(signal.SIGTERM, before)
        if errors:
            raise errors[0]

    @property
    def dev_id(self) -> int:
        """The device's number."""
        return self.info.dev_id

    @property
    def block_path(self) -> str:
        """Where the block device appears."""
        return f"/dev/ublkb{self.dev_id}"

    @property
    def char_path(self) -> str:
        """Where the server's side of the device is."""
        return f"/dev/ublkc{self.dev_id}"

    def start(self, timeout_s: float = 30, *, scheduler: str | None = "none") -> None:
        """Make the device live.

        :param scheduler: what it gets; None: what the kernel gives it.
        :raises DriverError: what the driver said; the caller deletes the device.
        """
        if self._recovering:
            self._control.end_user_recovery(self.dev_id, os.getpid(), timeout_s=timeout_s)
        else:
            self._control.start_dev(self.dev_id, os.getpid(), timeout_s=timeout_s)
        self.info = self._control.get_dev_info(self.dev_id)
        if scheduler is not None:
            set_scheduler(self.dev_id, scheduler)

    def on_end(self, watcher: Callable[[], None]) -> None:
        """Have ``watcher`` called, on any thread, once :meth:`wait` would return."""
        with self._lock:
            if not self._ended.is_set():
                self._watchers.append(watcher)
                return
        watcher()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every hctx has ended (the device was stopped), or one has failed.

        False on time-out. :meth:`errors` tells which it was.
        """
        return self._ended.wait(timeout_s)

    def stop(self, timeout_s: float = 30) -> None:
        """Stop the device; requests in flight fail with EIO. Idempotent.

        :raises DriverError: ETIMEDOUT, when a request in flight does not end.
        """
        if all(thread.join(0) for thread in self.threads):
            return
        deadline = time.monotonic() + timeout_s
        self._control.stop_dev(self.dev_id, timeout_s=timeout_s)
        self._join(deadline)

    def errors(self) -> list[DriverError]:
        """What ended hctxs before their time; empty when they were stopped."""
        return [thread.error for thread in self.threads if thread.error]

    def drain(self, timeout_s: float = 30) -> None:
        """Finish what is in flight, and begin nothing that another server may do.

        The process must end then: until its end nobody serves the device.

        :raises DriverError: ETIMEDOUT, when a request in flight does not end.
        """
        for thread in self.threads:
            thread.stop()
        self._join(time.monotonic() + timeout_s)

    def close(self, timeout_s: float = 30) -> None:
        """Let go of the device without deleting it. Idempotent.

        :raises DriverError: ETIMEDOUT, when a request in flight does not end.
        """
        self.drain(timeout_s)
        self.hctxs.clear()
        self.threads.clear()
        self._resources.close()

    def delete(self, timeout_s: float = 30) -> None:
        """Stop, close and delete the device.

        :raises DriverError: ETIMEDOUT, when somebody holds the device.
        """
        self.stop(timeout_s)
        self.close(timeout_s)
        self._control.del_dev(self.dev_id, timeout_s=timeout_s)

    def delete_quietly(self) -> None:
        """Delete as far as it goes: for the way out of an error, which is the one to report."""
        for step in (self.stop, self.close):
            with contextlib.suppress(OSError):
                step()
        with contextlib.suppress(OSError):
            self._control.del_dev(self.dev_id)

    def _prepare(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        cdev_fd = _open_char_device(self.char_path, deadline)
        self._resources.callback(os.close, cdev_fd)
        workqueue = self._confined(self._make_workqueue)
        native = NativeTarget(self.target, self._policy)
        self._resources.callback(native.close)
        self._share(native)
        for q_ids, tags in self._q_ids_and_tags_of_threads():
            self._make_thread(cdev_fd, q_ids, tags, native, workqueue)
        # First of all at close: a worker hands a request back before it is done with the hctx and
        # the native target.
        self._resources.callback(workqueue.flush)
        self._confined(self._start_threads, fetching=True)
        for thread in self.threads:
            thread.wait_prepared(max(0.0, deadline - time.monotonic()))

    def _confined(self, start: Callable[[], _Started], *, fetching: bool = False) -> _Started:
        # Threads inherit the rights of the one that starts them.
        if self._sandbox is None:
            return start()
        return self._sandbox.run_confined(start, fetching=fetching)

    def _make_workqueue(self) -> Workqueue:
        workqueue = Workqueue(
            f"ublk{self.dev_id}",
            highpri=True,
            mem_reclaim=True,
            max_active=MAX_ACTIVE_ROTATIONAL if self.target.rotational else MAX_ACTIVE,
        )
        self._resources.callback(workqueue.close)
        return workqueue

    def _start_threads(self) -> None:
        for thread in self.threads:
            thread.start()

    def _q_ids_and_tags_of_threads(self) -> list[tuple[range, range]]:
        nr_queues, nr_tags = self.info.nr_hw_queues, self.info.queue_depth
        nr_threads = self.nr_threads or nr_queues
        if nr_threads > nr_queues and _may_share_queues(self.info.flags):
            # Each has some of every queue, so that all help the client of any.
            return [(range(nr_queues), tags) for tags in _split(nr_tags, min(nr_threads, nr_tags))]
        # Neighbouring queues share a thread: the driver maps neighbouring CPUs to them.
        return [(q_ids, range(nr_tags)) for q_ids in _split(nr_queues, min(nr_threads, nr_queues))]

    def _make_thread(
        self,
        cdev_fd: int,
        q_ids: range,
        tags: range,
        native: NativeTarget,
        workqueue: Workqueue,
    ) -> None:
        affinity = self._affinity(q_ids)
        thread = IoThread(
            cdev_fd,
            f"ublk-q{q_ids[0]}" + (f"-{tags[0]}" if tags[0] else ""),
            target=native.handle,
            poll_us=self._choose_poll_us(affinity),
            watches=not self.threads and self.dev_id < NR_WATCHES,
            affinity=affinity,
            on_prepared=self._sandbox.leave_fetching if self._sandbox else None,
            on_end=self._one_ended,
        )
        self._resources.callback(thread.close)
        self.threads.append(thread)
        for q_id in q_ids:
            hctx = HardwareContext(
                thread,
                q_id,
                queue_depth=self.info.queue_depth,
                tags=tags,
                max_io_buf_bytes=self.info.max_io_buf_bytes,
                dev_flags=self.info.flags,
                # Drivers that do not know the field leave it 0.
                io_desc_bytes=self.info.io_desc_size or state.IO_DESC_BYTES,
                target=native.handle,
                workqueue=workqueue.handle,
            )
            self._resources.callback(hctx.close)
            self.hctxs.append(hctx)

    def _share(self, native: NativeTarget) -> None:
        for index, memory in enumerate(self._shared):
            if memory is None:
                continue
            if not self._recovering and memory.register(self._control, self.dev_id) != index:
                raise DriverError(errno.EPROTO, f"REG_BUF dev {self.dev_id}")
            native.share(index, memory.address, memory.nr_bytes)

    def _join(self, deadline: float) -> None:
        for thread in self.threads:
            if not thread.join(max(0.0, deadline - time.monotonic())):
                raise DriverError(errno.ETIMEDOUT, f"{thread.name} of dev {self.dev_id}")

    def _affinity(self, q_ids: range) -> frozenset[int]:
        # With a queue a CPU, bound to it, the thread would take turns with the very client it
        # serves while other CPUs idle: twice as slow for one client (4k, depth 64, two CPUs).
        allowed = frozenset(os.sched_getaffinity(0))
        cpus = (self._control.get_queue_affinity(self.dev_id, q_id) for q_id in q_ids)
        own = frozenset().union(*cpus) & allowed
        return own if len(own) > 1 else allowed

    def _choose_poll_us(self, affinity: frozenset[int]) -> int:
        # On a single CPU a spin only keeps the client from running.
        if len(affinity) < 2:
            return 0
        return POLL_US if self._poll_us is None else self._poll_us

    def _one_ended(self) -> None:
        with self._lock:
            self._nr_ended += 1
            if self._nr_ended < len(self.threads) and not self.errors():
                return
            self._ended.set()
            watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher()


def _start_recovery(control: Control, dev_id: int, timeout_s: float) -> None:
    # Linux 6.12 refuses a device of which no queue is served, which is so from one recovery's begin
    # until it has fetched a queue: for ever, if its server ended there.
    try:
        control.start_user_recovery(dev_id, timeout_s=timeout_s)
    except DriverError as error:
        if error.errno != errno.EINVAL or not _waits_for_server(control.get_dev_info(dev_id)):
            raise
        hint = (
            "another server takes it over; or one ended in the midst of that, and this kernel lets "
            f"no other: ublk del -n {dev_id}, and add it again"
        )
        raise DriverError(errno.ENOTRECOVERABLE, error.what, hint) from None


def _waits_for_server(info: DevInfo) -> bool:
    waits = info.state in (uapi.UBLK_S_DEV_QUIESCED, uapi.UBLK_S_DEV_FAIL_IO)
    return waits and bool(info.flags & uapi.UBLK_F_USER_RECOVERY)


@contextlib.contextmanager
def _closed_on_error(target: Target, shared: Sequence[SharedMemory | None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for memory in filter(None, shared):
            memory.close()
        target.close()
        raise


def _data_flags(data: str, target: Target, policy: str, flags: int, features: int) -> int:
    # ``auto`` is the best for the target, as far as the driver's features allow.
    if data in DATA_FLAGS:
        return DATA_FLAGS[data]
    if data != "auto":
        raise ValueError(f"data mode {data!r} is none of auto, {', '.join(DATA_FLAGS)}")
    # The driver refuses all but copy to a plain user, and drops NEED_GET_DATA for it. With a mode
    # in ``flags`` there is nothing to choose.
    denied = uapi.UBLK_F_UNPRIVILEGED_DEV | uapi.UBLK_F_NEED_GET_DATA | DATA_FLAGS["zerocopy"]
    best = target.best_data if policy == "auto" else "copy"
    wanted = DATA_FLAGS[best]
    if flags & denied or wanted & ~features:
        return 0
    if best != "usercopy":
        return wanted
    # The client's pages are registered for what needs them: large writes, and reads of a disk.
    by_pages = uapi.UBLK_F_SUPPORT_ZERO_COPY
    if target.reads_past_cache:
        by_pages |= uapi.UBLK_F_AUTO_BUF_REG
    return wanted | features & by_pages


def _shmem_flags(nr_shared: int, data: str, target: Target) -> int:
    # What the driver finds in shared memory it does not copy itself; what it does not find, or is
    # not mapped here, is for user copy.
    if not nr_shared:
        return 0
    can_share = isinstance(target, LoopTarget | NullTarget)
    if data == "copy" or not can_share or nr_shared > MAX_FILES:
        raise ValueError(
            f"up to {MAX_FILES} files can be shared with a loop or null target,"
            " and not with data mode copy"
        )
    return uapi.UBLK_F_SHMEM_ZC | uapi.UBLK_F_USER_COPY


def _integrity_flags(data: str, flags: int, target: Target) -> int:
    # The driver hands metadata out by user copy only, and that not to a plain user.
    if target.integrity is None:
        return 0
    if data in ("copy", "zerocopy") or flags & uapi.UBLK_F_UNPRIVILEGED_DEV:
        raise ValueError("blocks with metadata need --data usercopy, which only root has")
    return uapi.UBLK_F_INTEGRITY | uapi.UBLK_F_USER_COPY


def _queues_and_threads(flags: int, nr_threads: int | None) -> tuple[int, int | None]:
    # Two queues have no scheduler to begin with, while a single one is given mq-deadline; to change
    # that takes longer than all else of a start.
    if nr_threads is None and flags & uapi.UBLK_F_BATCH_IO:
        return 2, 1
    return 1, nr_threads


def _quiesce_flag(batch: bool | None, flags: int, features: int) -> int:
    # Where the driver may not issue requests again, a server can leave the device to another only
    # if the driver keeps new ones back first. Not with BATCH_IO: QUIESCE_DEV of such a device sets
    # force_abort, and the driver fails what comes until the next server is there with EIO (v7.3).
    recovery = flags & RECOVERY_FLAGS
    if batch or recovery != uapi.UBLK_F_USER_RECOVERY:
        return 0
    return features & uapi.UBLK_F_QUIESCE


def _may_share_queues(flags: int) -> bool:
    # With BATCH_IO there is one fetch for all tags of a queue.
    return bool(flags & uapi.UBLK_F_PER_IO_DAEMON) and not flags & uapi.UBLK_F_BATCH_IO


def _split(nr: int, nr_parts: int) -> list[range]:
    bounds = [index * nr // nr_parts for index in range(nr_parts + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def _batch_flag(batch: bool | None, flags: int, queue_depth: int, features: int) -> int:
    # One multishot fetch is faster than a command a tag. The driver refuses it with NEED_GET_DATA,
    # and for a single tag (its kfifo wants two).
    if batch is None:
        fits = queue_depth > 1 and not flags & (uapi.UBLK_F_NEED_GET_DATA | uapi.UBLK_F_QUIESCE)
        batch = fits and bool(features & uapi.UBLK_F_BATCH_IO)
    return uapi.UBLK_F_BATCH_IO if batch else 0


def _params(target: Target, max_io_buf_bytes: int, zero_copy: bool) -> Params:
    return params_for(
        dev_nr_bytes=target.size,
        max_io_buf_bytes=max_io_buf_bytes,
        logical_bs=target.logical_bs,
        physical_bs=target.physical_bs,
        read_only=target.read_only,
        rotational=target.rotational,
        volatile_cache=target.has_volatile_cache,
        fua=target.has_fua,
        discard=target.can_discard,
        discard_granularity=target.discard_granularity,
        write_zeroes=target.can_write_zeroes,
        # To a copy any memory of a client will do; direct I/O from and to it asks for more.
        dma_alignment=target.page_alignment if zero_copy else 4,
        seg=target.page_segments if zero_copy else None,
        integrity=target.integrity,
    )


def _wait_until_ours(path: str, timeout_s: float) -> None:
    # The driver takes commands of who may open the node, which udev gives to its owner.
    deadline = time.monotonic() + timeout_s
    while not os.access(path, os.R_OK | os.W_OK):
        if time.monotonic() >= deadline:
            hint = "no udev rule gives it to its owner: see contrib/udev/60-ublk.rules"
            raise DriverError(errno.EACCES, f"open {path}", hint)
        time.sleep(0.01)


def _open_char_device(path: str, deadline: float) -> int:
    # devtmpfs makes the node; udev may hold it open for a moment, and it opens for one at a time.
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            code = error.errno or errno.EIO
            transient = code in (errno.EBUSY, errno.ENOENT, errno.EACCES)
            if not transient or time.monotonic() >= deadline:
                raise DriverError(code, f"open {path}") from None
        time.sleep(0.005)


__all__ = ["ANY_DEV_ID", "SUPPORTED_FLAGS", "Device"]
