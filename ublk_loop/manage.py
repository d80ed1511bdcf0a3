"""What the CLI does to a device that another process serves: delete it, bind its threads, ...

In: a dev_id. Out: the change, or one UblkLoopError. Runs in the CLI. Every wait has a deadline, and
a signal goes only to a process that the state file names by pid and start time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import IO

from . import holders, listing, sharing, state, uapi
from .control import Control, DevInfo, block_path, list_dev_ids
from .errors import BusyError, DaemonError, DriverError
from .holders import Holder
from .process import ServerProcess
from .state import DeviceState

STOP_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 5.0
DEL_TIMEOUT_S = 10.0
QUIESCE_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 2.0


def delete(dev_id: int, *, no_wait: bool = False, force: bool = False) -> list[str]:
    """Stop a device, wait for its server to leave, delete it; return notes for the user.

    A server of ours that does not leave is killed. Requests in flight fail with EIO.

    :param no_wait: do not wait until the driver has let the device go (DEL_DEV_ASYNC).
    :param force: stop it even if it is in use: what was not yet written back is lost.
    :raises BusyError: it is in use, and as it was.
    :raises DriverError: ENODEV; EOPNOTSUPP (``no_wait`` before v6.9); ETIMEDOUT if another process
        holds the device.
    """
    notes = stop(dev_id, force=force, verb="del")
    notes += _remove(dev_id, no_wait=no_wait, force=force)
    return notes


def stop(dev_id: int, *, force: bool = False, verb: str = "stop") -> list[str]:
    """Stop a device and wait for its server to leave, as :func:`delete` does; its number stays.

    :param verb: of the error, should it be in use.

    :raises BusyError: it is in use, and as it was.
    :raises DriverError: ENODEV; ETIMEDOUT.
    """
    with Control() as control:
        info = control.get_dev_info(dev_id)
    notes: list[str] = []
    try:
        known = listing.state_of(info, state.read(dev_id))
    except DaemonError as error:
        notes.append(str(error))
        known = None
    with _Server(info, known) as server:
        # A dead device has nothing more to lose.
        if force or info.state == uapi.UBLK_S_DEV_DEAD:
            _stop(dev_id, server)
        else:
            _stop_unused(f"{verb} dev {dev_id}", info, server)
        if not server.leave():
            notes.append(f"server {server.pid} of dev {dev_id} does not end, and is none of ours")
    state.remove(dev_id)
    return notes


def _remove(dev_id: int, *, no_wait: bool, force: bool) -> list[str]:
    with Control() as control:
        if no_wait:
            control.del_dev_async(dev_id)
            return []
        try:
            control.del_dev(dev_id, timeout_s=DEL_TIMEOUT_S)
        except DriverError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            hint = "it is stopped, but still mounted or open; it goes when that ends"
            if force:
                return [f"dev {dev_id}: {hint}"]
            raise DriverError(errno.ETIMEDOUT, error.what, hint) from error
    return []


def _stop_unused(what: str, info: DevInfo, server: _Server) -> None:
    # A udev probe, or another program that looks at each new disk, has it open for a moment.
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    while (users := _try_stop(info, server)) is not None:
        is_probe = all(user.kind == "open" for user in users)
        if not is_probe or time.monotonic() >= deadline:
            raise BusyError(what, users)
        time.sleep(0.05)


def _try_stop(info: DevInfo, server: _Server) -> list[Holder] | None:
    """Stop the device, or return who uses it."""
    if info.flags & uapi.UBLK_F_SAFE_STOP_DEV:
        try:
            _stop(info.dev_id, server, unless_open=True)
        except DriverError as error:
            if error.errno == errno.EBUSY:
                return holders.find(info.dev_id)
            if error.errno != errno.ENODEV:  # not started: nobody can use it
                raise
        return None
    with _claim(info.dev_id) as claimed:
        users = holders.find(info.dev_id)
        if users or not claimed:
            return users
        _stop(info.dev_id, server)
    return None


@contextlib.contextmanager
def _claim(dev_id: int) -> Iterator[bool]:
    """Keep mounts, swap and devices on top away; False if one of them is there already.

    Without TRY_STOP_DEV (before v7.0) nothing keeps those away that only open the device.
    """
    try:
        fd = os.open(block_path(dev_id), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        # Without a block device there is nothing to use; a plain user cannot claim another's.
        yield error.errno != errno.EBUSY
        return
    try:
        yield True
    finally:
        os.close(fd)


def _stop(dev_id: int, server: _Server, *, unless_open: bool = False) -> None:
    try:
        with Control() as control:
            stop = control.try_stop_dev if unless_open else control.stop_dev
            stop(dev_id, timeout_s=STOP_TIMEOUT_S)
    except DriverError as error:
        if error.errno != errno.ETIMEDOUT or not server.is_alive():
            raise
        # A server that hangs never ends its requests, and STOP_DEV waits for them.
        if not server.kill():
            hint = f"its server (pid {server.pid}) does not end its requests: end that process"
            raise DriverError(errno.ETIMEDOUT, error.what, hint) from error
        with Control() as control:
            control.stop_dev(dev_id, timeout_s=STOP_TIMEOUT_S)


class _Server:
    """The process behind a device, which may be ours, another's, or gone."""

    def __init__(self, info: DevInfo, known: DeviceState | None) -> None:
        self.pid = info.ublksrv_pid
        ticks = None
        if known is not None and self.pid in (known.server_pid, -1, 0):
            self.pid, ticks = known.server_pid, known.server_start_ticks
        self._is_ours = ticks is not None
        self._process = ServerProcess.find(self.pid, ticks)

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and not self._process.wait(0)

    def leave(self) -> bool:
        """Wait for it to end, kill it if it is ours; False if it still runs."""
        if self._process is None or self._process.wait(LEAVE_TIMEOUT_S):
            return True
        return self.kill()

    def kill(self) -> bool:
        """Kill it if it is ours; False if it still runs."""
        if self._process is None or not self._is_ours:
            return False
        self._process.send(signal.SIGKILL)
        return self._process.wait(KILL_TIMEOUT_S)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.close()


def served() -> list[DevInfo]:
    """Return the devices of ours that are live."""
    return [info for info in _infos() if info.state == uapi.UBLK_S_DEV_LIVE and _is_ours(info)]


def waiting() -> tuple[list[int], list[int]]:
    """Return the devices that wait for a new server: ours, and those of other programs."""
    without = (uapi.UBLK_S_DEV_QUIESCED, uapi.UBLK_S_DEV_FAIL_IO)
    infos = [info for info in _infos() if info.state in without]
    ours = [info.dev_id for info in infos if _is_ours(info)]
    return ours, [info.dev_id for info in infos if info.dev_id not in ours]


def _infos() -> Iterator[DevInfo]:
    with Control() as control:
        for dev_id in list_dev_ids():
            # Deleted since, or another user's.
            with contextlib.suppress(DriverError):
                yield control.get_dev_info(dev_id)


def _is_ours(info: DevInfo) -> bool:
    try:
        return listing.state_of(info, state.read(info.dev_id)) is not None
    except DaemonError:
        return True  # whoever goes on with it hears what is wrong with its state file


def served_here(control: Control, what: str, dev_id: int) -> tuple[DevInfo, DeviceState]:
    """Return what the driver and what we know of a device of ours.

    :raises DriverError: ENODEV. :raises DaemonError: ENOENT (not a device of ours).
    """
    info = control.get_dev_info(dev_id)
    known = listing.state_of(info, state.read(dev_id))
    if known is None:
        raise DaemonError(errno.ENOENT, what, "ublk_loop serves no such device")
    return info, known


def recoverable(dev_id: int) -> DeviceState:
    """Return the state of a device of ours that waits for a new server.

    :raises DriverError: ENODEV.
    :raises DaemonError: ENOENT (not a device of ours); EBUSY (its server lives); EINVAL (it was not
        added for recovery, or cannot be recovered).
    """
    what = f"recover dev {dev_id}"
    with Control() as control:
        info = control.get_dev_info(dev_id)
        known = listing.state_of(info, state.read(dev_id))
        if known is None:
            raise DaemonError(errno.ENOENT, what, "ublk_loop has no state of it: serve it anew")
        info = _wait_until_quiesced(control, info, known)
    if info.state == uapi.UBLK_S_DEV_LIVE:
        raise DaemonError(errno.EBUSY, what, f"its server (pid {info.ublksrv_pid}) is alive")
    if info.state == uapi.UBLK_S_DEV_DEAD:
        raise DaemonError(errno.EINVAL, what, "it was not added with -r, -i or -e: delete it")
    return known


def _wait_until_quiesced(control: Control, info: DevInfo, known: DeviceState) -> DevInfo:
    # Between the death of a server and its device's new state there are moments of LIVE.
    deadline = time.monotonic() + QUIESCE_TIMEOUT_S
    while info.state == uapi.UBLK_S_DEV_LIVE and time.monotonic() < deadline:
        with _Server(info, known) as server:
            if server.is_alive():
                break
        time.sleep(0.02)
        info = control.get_dev_info(info.dev_id)
    return info


def set_affinity(dev_id: int, q_id: int, cpus: Collection[int]) -> None:
    """Bind the threads of a queue to ``cpus``, and so those queues that they serve besides.

    :raises DaemonError: ENOENT (not a device of ours); EINVAL (no such queue, or none of the CPUs
        can be used); ESRCH (its server is gone).
    """
    what = f"set_affinity dev {dev_id}"
    known = state.read(dev_id)
    if known is None:
        raise DaemonError(errno.ENOENT, what, "ublk_loop serves no such device")
    if q_id >= len(known.queues):
        raise DaemonError(errno.EINVAL, what, f"it has queues 0 to {len(known.queues) - 1}")
    server = ServerProcess.find(known.server_pid, known.server_start_ticks)
    if server is None:
        raise DaemonError(errno.ESRCH, what, "its server is gone")
    queue = known.queues[q_id]
    tids = (queue.tid, *queue.other_tids)
    with server:
        if not os.path.exists(f"/proc/{server.pid}/task/{queue.tid}"):
            raise DaemonError(errno.ESRCH, what, f"queue {q_id} has ended")
        try:
            for tid in tids:
                os.sched_setaffinity(tid, cpus)
        except OSError as error:
            raise DaemonError(error.errno or errno.EIO, what, "see nproc, /proc/cpuinfo") from error
        bound = tuple(sorted(os.sched_getaffinity(queue.tid)))
        queues = (
            replace(each, affinity=bound) if each.tid in tids else each for each in known.queues
        )
        state.write(replace(known, queues=tuple(queues)))
        if server.wait(0):
            state.remove(dev_id)


def resize(dev_id: int, nr_bytes: int | None = None, *, force: bool = False) -> int:
    """Change the size of a device that may be in use; return the new one, in bytes.

    :param nr_bytes: default: the size that its file has now, as far as its limit allows.
    :param force: make it smaller even if it is in use.
    :raises DaemonError: ENOENT (not a device of ours); EINVAL (a size that its target cannot have);
        ESRCH (its server is gone); EBUSY (in use, and it would become smaller).
    :raises DriverError: EOPNOTSUPP before v6.16.
    """
    what = f"resize dev {dev_id}"
    with Control() as control:
        _, known = served_here(control, what, dev_id)
        spec = known.spec
        if spec.metadata is not None:
            hint = "a device with metadata keeps the size it began with"
            raise DaemonError(errno.EINVAL, what, hint)
        if nr_bytes is None:
            nr_bytes = min(_room(what, known), spec.limit_bytes or sys.maxsize)
        else:
            _check_size(what, known, nr_bytes)
            spec = replace(spec, limit_bytes=nr_bytes)
            is_smaller = nr_bytes < (known.spec.nr_bytes or 0)
            if is_smaller and not force and (users := holders.find(dev_id)):
                hint = f"{users[0]}: what is behind the new end would be lost, unless with --force"
                raise DaemonError(errno.EBUSY, what, hint)
        nr_bytes -= nr_bytes % (spec.logical_bs or uapi.SECTOR_BYTES)
        if not nr_bytes:
            raise DaemonError(errno.EINVAL, what, f"{spec.path} does not hold one block any more")
        control.update_size(dev_id, nr_bytes >> uapi.SECTOR_SHIFT)
    # Its next server takes that size; one that took over meanwhile has written a state of its own.
    now = state.read(dev_id)
    if now is not None:
        target = {**now.target, "dev_size": nr_bytes}
        state.write(replace(now, spec=replace(spec, nr_bytes=nr_bytes), target=target))
    return nr_bytes


def _check_size(what: str, known: DeviceState, nr_bytes: int) -> None:
    logical_bs = known.spec.logical_bs or uapi.SECTOR_BYTES
    if nr_bytes % logical_bs:
        raise DaemonError(errno.EINVAL, what, f"{nr_bytes} is not a multiple of {logical_bs} bytes")
    if known.spec.type == "ram":
        raise DaemonError(errno.EINVAL, what, "a ram device keeps the memory that it began with")
    if known.spec.type == "stripe":
        raise DaemonError(errno.EINVAL, what, "a stripe device keeps the size that it began with")
    if known.spec.type == "loop" and nr_bytes > (room := _room(what, known)):
        hint = f"{known.spec.path} has {room} bytes for it: make it longer first (truncate -s)"
        raise DaemonError(errno.EINVAL, what, hint)


def _room(what: str, known: DeviceState) -> int:
    from .target import file_nr_bytes

    spec = known.spec
    if spec.type != "loop":
        raise DaemonError(errno.EINVAL, what, f"a {spec.type} device has no file: say a size")
    with _backing_file(what, known) as file:
        return max(0, file_nr_bytes(file.fileno()) - spec.offset_bytes)


def _backing_file(what: str, known: DeviceState) -> IO[bytes]:
    # The file that the server has open: there may be another at its path by now.
    for path in sharing.files_of(known.server_pid, known.dev_id):
        with contextlib.suppress(FileNotFoundError):
            return open(path, "rb")
    raise DaemonError(errno.ESRCH, what, "its server is gone")
