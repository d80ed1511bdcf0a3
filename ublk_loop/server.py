"""The process that serves one device.

    server_main()  a forked server: leave the parent's session and files, serve, report to it
    serve()        all of a server, forked or in the foreground:
                   target, hardening, add or recover, state file, live; wait; stop, delete

Its parent, and the reports: launch.py. Until the device is live stderr goes to the parent's memfd,
from then on to the journal, or to a file beside the state. Runs on the server's main thread, waits
in Python and never touches a request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import listing, log, process, protocol, state, uapi
from .errors import BackingFileError, DaemonError, DriverError, UblkLoopError
from .sandbox import CAP_FOWNER, Sandbox
from .state import DeviceOptions, DeviceState, FileIdentity, QueueState, TargetSpec

if TYPE_CHECKING:
    from .control import Control, DevInfo
    from .device import Device
    from .params import Params
    from .shmem import SharedMemory
    from .target import LoopTarget, NullTarget, Target

    Shared = list[SharedMemory | None]
    Describe = Callable[[DevInfo, Params, DeviceState], Any]
    OnAdded = Callable[[int, int, str], None]
    OnLive = Callable[[int, Any], None]
    Serve = Callable[[OnAdded, OnLive], None]

ADD_TIMEOUT_S = 30.0
START_TIMEOUT_S = 30.0
NODE_TIMEOUT_S = 30.0
RELEASE_TIMEOUT_S = 20.0  # of the backing by a dead server, whose I/O may still be under way
REUSE_TIMEOUT_S = 2.0  # of a file by somebody else; udev looks at each new device for a moment
STOP_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 30.0
# Finish what is in flight and go; the device stays, for another server: handover.py.
LEAVE_SIGNAL = signal.SIGUSR1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to serve. ``dev_id`` -1: the first free one; with ``recover`` the device exists.

    ``nr_recoveries``: how many servers took the device over from a dead one, this one included.
    """

    options: DeviceOptions
    spec: TargetSpec
    dev_id: int = -1
    recover: bool = False
    nr_recoveries: int = 0

    @classmethod
    def recovery(cls, known: DeviceState, *, from_dead: bool = True) -> Request:
        """Return the request to serve again what a server before has left."""
        nr_recoveries = known.nr_recoveries + from_dead
        return cls(known.options, known.spec, known.dev_id, True, nr_recoveries)

    @property
    def what(self) -> str:
        """What is attempted, for messages."""
        verb = "recover" if self.recover else "add"
        return f"{verb} dev {self.dev_id}" if self.dev_id >= 0 else verb


def check_flags(flags: int, supported: int, features: int) -> None:
    """Refuse modes that this version or this driver does not offer.

    :param supported: UBLK_F_* that the data plane can do.
    :param features: what GET_FEATURES said; 0: nothing is known.
    :raises DriverError: EOPNOTSUPP, naming the modes.
    """
    absent = flags & ~features if features else 0
    for lacking, who in ((flags & ~supported, "this version"), (absent, "this driver")):
        if lacking:
            names = ", ".join(listing.flag_names(lacking))
            raise DriverError(errno.EOPNOTSUPP, names, f"{who} does not offer it")


def serve(
    find_request: Callable[[], Request],
    describe: Describe,
    on_added: OnAdded,
    on_live: OnLive,
) -> None:
    """Serve a device until it is stopped from outside, or SIGTERM or SIGINT ends and deletes it.

    LEAVE_SIGNAL ends the server, and the device waits for another one. The caller sees to the
    device's scheduler (:mod:`.scheduler`) once it is live.

    :param find_request: returns what to serve; called when all is done that does not depend on it,
        and before the driver is opened: it may take as long as it likes.
    :param on_added: called with the dev_id, the inode in sysfs, and a warning or an empty text,
        once the device exists.
    :param on_live: called with the dev_id and what ``describe`` returned. If it raises, the device
        is deleted.
    :raises UblkLoopError: what went wrong; before the device was live, it has been deleted again.
    """
    from .control import Control

    process.protect_from_reclaim()
    request = find_request()
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(_Events())
        control = stack.enter_context(Control())
        shared = _open_shared(request)
        target = _wait_for_target(request)
        process.protect_from_mounts(keep=[state.state_dir()])
        sandbox = Sandbox(keep=_needed_capabilities(request.spec))
        stack.callback(sandbox.close)
        device, known, params = sandbox.run_apart(
            lambda: _start(control, target, shared, request, sandbox, on_added)
        )
        try:
            if events.stop_requested:
                raise DaemonError(errno.EINTR, request.what)
            on_live(device.dev_id, describe(device.info, params, known))
        except BaseException:
            _give_up(device, request)
            raise
        _log.info("dev %d is live", device.dev_id)
        sandbox.confine_main(control.keep_rights)
        _serve_until_end(control, device, events)


def _wait_for_target(request: Request) -> Target:
    # A server that was killed is gone before its ring is: the kernel's worker lets go of the ring's
    # files, and with them of their locks, once what was in flight has ended.
    timeout_s = RELEASE_TIMEOUT_S if request.recover else REUSE_TIMEOUT_S
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _build_target(request)
        except BackingFileError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(0.02)


def _start(
    control: Control,
    target: Target,
    shared: Shared,
    request: Request,
    sandbox: Sandbox,
    on_added: OnAdded,
) -> tuple[Device, DeviceState, Params]:
    device = _make_device(control, target, shared, request, sandbox)
    try:
        known = _state_of(device, shared, request)
        warnings = [device.warning, "" if request.recover else _make_way(device.block_path)]
        on_added(known.dev_id, known.sysfs_ino, "; ".join(filter(None, warnings)))
        state.write(known)
        device.start(START_TIMEOUT_S, scheduler=None)
        _wait_for_node(device.block_path)
        return device, known, control.get_params(device.dev_id)
    except BaseException:
        _give_up(device, request)
        raise


def _build_target(request: Request) -> Target:
    spec = request.spec
    recovers = request.dev_id if request.recover else None
    if spec.metadata is not None:
        return _build_integrity_target(spec, spec.metadata, recovers)
    if spec.type == "loop":
        return _build_loop_target(spec, recovers)
    if spec.type == "null":
        return _build_null_target(spec)
    from .target import RamTarget, StripeTarget

    if spec.type == "stripe":
        return StripeTarget(
            spec.stripe_paths,
            chunk_bytes=spec.chunk_bytes,
            nr_bytes=spec.nr_bytes,
            direct=spec.direct,
            recovers=recovers,
            known=spec.files,
        )
    return RamTarget(_needed_size(spec))


def _build_loop_target(spec: TargetSpec, recovers: int | None) -> LoopTarget:
    from .target import LoopTarget

    return LoopTarget(
        spec.path,
        offset_bytes=spec.offset_bytes,
        nr_bytes=spec.nr_bytes,
        direct=spec.direct,
        read_only=spec.read_only,
        limit_bytes=spec.limit_bytes,
        logical_bs=spec.logical_bs,
        recovers=recovers,
        known=_known(spec, 0),
    )


def _known(spec: TargetSpec, index: int) -> FileIdentity | None:
    return spec.files[index] if spec.files else None


def _build_null_target(spec: TargetSpec) -> NullTarget:
    from .target import SECTOR_BYTES, NullTarget

    return NullTarget(
        _needed_size(spec),
        delay_us=spec.delay_us,
        logical_bs=spec.logical_bs or SECTOR_BYTES,
        read_only=spec.read_only,
    )


def _needed_size(spec: TargetSpec) -> int:
    if spec.nr_bytes is None:
        raise ValueError(f"a {spec.type} target needs a size")
    return spec.nr_bytes


def _build_integrity_target(
    spec: TargetSpec, metadata: state.Metadata, recovers: int | None
) -> Target:
    from .integrity import IntegrityTarget
    from .target import LoopTarget

    if spec.type == "null":
        return IntegrityTarget(_build_null_target(spec), metadata, None)
    data = _build_loop_target(spec, recovers)
    try:
        file = LoopTarget(
            spec.metadata_path,
            direct=False,
            read_only=spec.read_only,
            recovers=recovers,
            known=_known(spec, 1),
        )
    except BaseException:
        data.close()
        raise
    return IntegrityTarget(data, metadata, file, nr_bytes=spec.nr_bytes)


def _needed_capabilities(spec: TargetSpec) -> list[int]:
    # mincore() tells who may write a file, or acts as its owner, what is in memory; others it tells
    # that all is.
    with contextlib.suppress(OSError):
        if spec.type == "loop" and os.stat(spec.path).st_uid != os.geteuid():
            return [CAP_FOWNER]
    return []


def _open_shared(request: Request) -> Shared:
    # While the paths can be reached: what is mounted below a disk goes with that.
    from .shmem import SharedMemory

    shared: Shared = []
    for file in request.options.shared_files:
        try:
            shared.append(SharedMemory(file))
        except BackingFileError as error:
            if not request.recover:
                raise
            _log.warning("dev %d: %s: its requests are copied", request.dev_id, error)
            shared.append(None)
    return shared


def _make_device(
    control: Control,
    target: Target,
    shared: Shared,
    request: Request,
    sandbox: Sandbox,
) -> Device:
    from .device import SUPPORTED_FLAGS, Device

    options = request.options
    if request.recover:
        return Device.recover(
            control,
            target,
            request.dev_id,
            policy=options.policy,
            poll_us=options.poll_us,
            nr_threads=options.nr_threads,
            shared=shared,
            timeout_s=ADD_TIMEOUT_S,
            sandbox=sandbox,
        )
    flags = options.flags | (uapi.UBLK_F_BATCH_IO if options.batch else 0)
    flags |= state.DATA_FLAGS.get(options.data, 0)
    flags |= uapi.UBLK_F_SHMEM_ZC if options.shared_files else 0
    flags |= 0 if request.spec.metadata is None else uapi.UBLK_F_INTEGRITY
    flags |= 0 if options.io_desc_bytes is None else uapi.UBLK_F_IO_DESC_SIZE
    try:
        check_flags(flags, SUPPORTED_FLAGS, control.get_features())
    except OSError:
        target.close()
        raise
    return Device.add(
        control,
        target,
        dev_id=request.dev_id,
        nr_hw_queues=options.nr_hw_queues,
        queue_depth=options.queue_depth,
        max_io_buf_bytes=options.max_io_buf_bytes,
        io_desc_bytes=options.io_desc_bytes,
        flags=options.flags,
        batch=options.batch,
        data=options.data,
        policy=options.policy,
        poll_us=options.poll_us,
        nr_threads=options.nr_threads,
        shared=shared,
        timeout_s=ADD_TIMEOUT_S,
        sandbox=sandbox,
    )


def _state_of(device: Device, shared: Shared, request: Request) -> DeviceState:
    target = device.target
    files = request.spec.files if request.recover else ()
    spec = replace(request.spec, nr_bytes=target.size, files=files or target.files)
    if spec.type in ("loop", "stripe"):
        # What was found, so that a recovery finds the same geometry or fails.
        spec = replace(spec, direct=bool(target.describe()["direct_io"]))
    if spec.type == "loop":
        spec = replace(spec, logical_bs=target.logical_bs)
    shared_files = zip(request.options.shared_files, shared, strict=True)
    info = device.info
    return DeviceState(
        dev_id=device.dev_id,
        sysfs_ino=listing.sysfs_ino(device.dev_id),
        server_pid=os.getpid(),
        server_start_ticks=process.start_ticks(os.getpid()) or 0,
        options=replace(
            request.options,
            nr_hw_queues=info.nr_hw_queues,
            nr_threads=device.nr_threads,
            queue_depth=info.queue_depth,
            max_io_buf_bytes=info.max_io_buf_bytes,
            flags=info.flags,
            shared_files=tuple(memory.file if memory else file for file, memory in shared_files),
        ),
        spec=spec,
        target=target.describe(),
        nr_recoveries=request.nr_recoveries,
        queues=tuple(_queue_state(device, q_id) for q_id in range(info.nr_hw_queues)),
    )


def _queue_state(device: Device, q_id: int) -> QueueState:
    first, *others = (hctx.thread for hctx in device.hctxs if hctx.q_id == q_id)
    affinity = tuple(sorted(first.affinity))
    return QueueState(q_id, first.tid, affinity, tuple(thread.tid for thread in others))


def _wait_for_node(path: str) -> None:
    # devtmpfs has it at once; without devtmpfs udev makes it, and chowns a plain user's.
    deadline = time.monotonic() + NODE_TIMEOUT_S
    while not os.access(path, os.R_OK):
        if time.monotonic() >= deadline:
            hint = (
                "the device is live, but its node did not appear, or is not its owner's: see udev"
            )
            raise DaemonError(errno.ENOENT, path, hint)
        time.sleep(0.01)


def _make_way(path: str) -> str:
    # Who opens a device that is gone, to write to it, makes a file of that name; no node would come
    # in its place. Returns a warning.
    if not os.path.isfile(path):
        return ""
    aside = f"{path}.file"
    try:
        os.rename(path, aside)
    except OSError as error:
        raise DaemonError(
            error.errno or errno.EIO, path, "a file is in the place of its node"
        ) from None
    return f"{path} was a file, made by who wrote to a device that was gone: it is {aside} now"


def _give_up(device: Device, request: Request) -> None:
    if request.recover:
        with contextlib.suppress(OSError):
            device.close()
        return
    device.delete_quietly()
    state.remove(device.dev_id)


def _serve_until_end(control: Control, device: Device, events: _Events) -> None:
    device.on_end(events.wake)
    while not (events.stop_requested or events.leave_requested or device.wait(0)):
        events.wait()
    if device.errors():
        # As after a crash: the driver fails the device, or keeps it for a recovery.
        raise device.errors()[0]
    if events.stop_requested:
        _log.info("dev %d: asked to stop", device.dev_id)
        device.stop(STOP_TIMEOUT_S)
        # Before ublkcN is closed: after that the dev_id may be somebody else's.
        state.remove(device.dev_id)
        device.delete(STOP_TIMEOUT_S)
    elif events.leave_requested:
        _log.info("dev %d: left to another server", device.dev_id)
        device.drain(LEAVE_TIMEOUT_S)
        os._exit(0)  # as if killed: the kernel closes ublkcN once all threads have ended
    else:
        _log.info("dev %d was stopped", device.dev_id)
        if _was_stopped(control, device.dev_id):
            state.remove(device.dev_id)
        device.close(STOP_TIMEOUT_S)


def _was_stopped(control: Control, dev_id: int) -> bool:
    # By STOP_DEV, which marks the device dead before it aborts the tags; or gone altogether. After
    # QUIESCE_DEV it is LIVE until ublkcN is closed, and somebody is about to recover it.
    try:
        return control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_DEAD
    except UblkLoopError:
        return True


class _Events:
    """What wakes the main thread: signals, the end of the device. No polling, no race."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.leave_requested = False
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        handlers = {
            signal.SIGTERM: self._request_stop,
            signal.SIGINT: self._request_stop,
            LEAVE_SIGNAL: self._request_leave,
        }
        self._old_handlers = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }

    def wake(self) -> None:
        """Wake the main thread; may be called on any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")

    def wait(self) -> None:
        """Wait for a signal or a wake-up; on the main thread."""
        select.select([self._read_fd], [], [])
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_fd, 4096)

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        # The pipe stays open: a late wake() on another thread must not hit a reused fd.

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _request_leave(self, *_: object) -> None:
        self.leave_requested = True


# ---- the server as a daemon ----


def server_main(
    serve: Serve,
    what: str,
    is_recovery: bool,
    report_fd: int,
    words_fd: int,
    stdin_fd: int | None = None,
) -> int:
    """Be the server that was just forked: ``serve``, report to the parent, return the exit code.

    :param report_fd: where the reports go.
    :param words_fd: where stderr goes until the device is live.
    :param stdin_fd: what becomes stdin; None: /dev/null.
    :param is_recovery: go on if the parent is gone: nobody else serves the device.
    """
    report_fd = _detach(report_fd, words_fd, stdin_fd)
    return _serve_and_report(serve, what, is_recovery, report_fd)


def receive_request() -> bytes:
    """Return what comes by the file that a forked server is sent by the socket on its stdin.

    From then on stdin is /dev/null.

    :raises BrokenPipeError: whoever had the other end is gone, and wants no server.
    """
    with socket.socket(fileno=os.dup(0)) as waits:
        _, fds, _, _ = socket.recv_fds(waits, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise BrokenPipeError
    with open(fds[0], "rb") as file, open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
        return file.read()


def _serve_and_report(serve: Serve, what: str, is_recovery: bool, report_fd: int) -> int:
    live = False

    def report(**report: Any) -> None:
        data = protocol.pack_report(**report)
        try:
            while data:
                data = data[os.write(report_fd, data) :]
        except BrokenPipeError:
            if not is_recovery:
                raise

    def on_live(dev_id: int, description: Any) -> None:
        nonlocal live
        log.switch(f"ublk-{dev_id}", state.log_path(dev_id))
        report(live=description)
        os.close(report_fd)
        live = True

    def on_added(dev_id: int, sysfs_ino: int, warning: str) -> None:
        report(added={"dev_id": dev_id, "sysfs_ino": sysfs_ino})
        if warning:
            report(warning=warning)

    try:
        serve(on_added, on_live)
    except BrokenPipeError:
        _log.error("%s: given up, nobody waits for it", what)
    except Exception as error:
        if not live:
            report(error=protocol.pack_error(error))
        if not isinstance(error, UblkLoopError | ValueError):
            raise
        if live:
            _log.error("%s", error)
    else:
        return 0
    return 1


def _detach(report_fd: int, words_fd: int, stdin_fd: int | None) -> int:
    """Leave the caller's session, files and folder; return the report's new fd."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    if stdin_fd is None:
        stdin_fd = os.open(os.devnull, os.O_RDWR)
    # Whatever else the caller had open (locks, pipes) must not live as long as the device. First
    # out of the way: any of these may be 0 to 3 itself.
    ours = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (stdin_fd, words_fd, words_fd, report_fd)]
    for target_fd, fd in enumerate(ours):
        os.dup2(fd, target_fd)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(3, False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.to_stderr()
    return 3
