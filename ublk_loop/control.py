"""/dev/ublk-control: every command that makes, starts, describes, stops or deletes a device.

In: a device's id and the command's argument. Out: its answer, or a DriverError that names command,
device and errno. A command runs on the calling thread, which sleeps in C in short slices so that
Python's signal handlers run; any thread may call. Each command has a deadline of its own: when it
is over, or when a signal handler raises, the kernel is asked to interrupt the command, and one
that does not end even then is left behind with its ring. Nothing here serves a request: never send
START_DEV from the only thread that does.

Every opcode is ioctl-encoded, which Linux accepts since v6.4.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from . import uapi
from ._uring import ffi, lib
from .errors import DriverError, check
from .params import PAGE_BYTES, Params

if TYPE_CHECKING:
    from ._uring import Array, ul_control, ul_control_cmd

DEFAULT_TIMEOUT_S = 10.0
SLOW_TIMEOUT_S = 30.0  # of commands that wait for a server, for requests or for openers
CANCEL_TIMEOUT_S = 1.0  # from asking a command to end until it is left behind
SIGNAL_LATENCY_S = 0.25  # a signal just before the wait is seen this much later
BUSY_POLL_S = 0.02

NO_DEV = 0xFFFFFFFF
NO_QUEUE = 0xFFFF
AFFINITY_BYTES = 4096  # 32768 CPUs; the driver wants at least the possible ones

_OPEN_HINTS = {
    errno.ENOENT: "load the driver: modprobe ublk_drv",
    errno.ENODEV: "load the driver: modprobe ublk_drv",
    errno.ENXIO: "load the driver: modprobe ublk_drv",
    errno.EACCES: "run as root",
    errno.EPERM: "run as root",
}
_RING_HINTS = {
    errno.EPERM: "io_uring is off: see sysctl kernel.io_uring_disabled",
    errno.ENOSYS: "this kernel or container has no io_uring",
    errno.EINVAL: "this kernel's io_uring is too old",
    errno.EMFILE: "raise the limit of open files",
    errno.ENOMEM: "raise the limit of locked memory",
}
_ANY = "*"
_NOT_OFFERED = "this kernel's driver does not offer it: see ublk features"
_STALE_SERVER = "the process that opened the character device is another, or is gone"
_HINTS = {
    (_ANY, errno.ENODEV): "ublk list shows the devices",
    (_ANY, errno.EPERM): "run as root",
    (_ANY, errno.EACCES): "run as root, or as the owner of an unprivileged device",
    (_ANY, errno.EOPNOTSUPP): _NOT_OFFERED,
    ("ADD_DEV", errno.ENODEV): "the driver is too old: Linux 6.4 or newer is needed",
    ("ADD_DEV", errno.EOPNOTSUPP): "the driver is too old: Linux 6.4 or newer is needed",
    ("ADD_DEV", errno.EEXIST): "the id is taken: choose another, or leave it to the driver",
    ("ADD_DEV", errno.ENOSPC): "every id is taken: delete a device first",
    ("ADD_DEV", errno.EINVAL): "this kernel refuses the combination of features",
    ("ADD_DEV", errno.EPERM): "run as root, or add it with --unprivileged",
    ("ADD_DEV", errno.EACCES): "too many unprivileged devices: see ublks_max of module ublk_drv",
    ("SET_PARAMS", errno.EACCES): "the device was started already",
    ("SET_PARAMS", errno.EINVAL): "the driver refuses a parameter",
    ("START_DEV", errno.EEXIST): "the device was started already",
    ("START_DEV", errno.EBUSY): "the device was stopped: delete it and add it again",
    ("START_DEV", errno.EINVAL): _STALE_SERVER + ", or parameters were not set",
    ("START_DEV", errno.ETIMEDOUT): "the server has not fetched every tag",
    ("STOP_DEV", errno.ETIMEDOUT): "requests are still being served",
    ("TRY_STOP_DEV", errno.EBUSY): "the block device is in use: unmount or close it first",
    ("TRY_STOP_DEV", errno.ENODEV): "no such device, or it is not started",
    ("DEL_DEV", errno.ETIMEDOUT): "a process still has the character device open",
    ("DEL_DEV_ASYNC", errno.EINVAL): "not possible for an unprivileged device",
    ("START_USER_RECOVERY", errno.EBUSY): "the device has a server, or its old one still ends",
    ("START_USER_RECOVERY", errno.EINVAL): "it was not added with user recovery",
    ("END_USER_RECOVERY", errno.EINVAL): _STALE_SERVER,
    ("END_USER_RECOVERY", errno.EBUSY): "the device does not wait for a server",
    ("END_USER_RECOVERY", errno.ETIMEDOUT): "the server has not fetched every tag",
    ("QUIESCE_DEV", errno.EBUSY): "requests did not end in time: recover the device",
    ("QUIESCE_DEV", errno.EOPNOTSUPP): "the device was not added with quiesce, or " + _NOT_OFFERED,
    ("UPDATE_SIZE", errno.ENODEV): "no such device, or it is not started",
}


def _hint(command: str, number: int) -> str:
    return _HINTS.get((command, number)) or _HINTS.get((_ANY, number), "")


@dataclasses.dataclass(frozen=True)
class DevInfo:
    """struct ublksrv_ctrl_dev_info: a device as ADD_DEV asks for it and as the driver describes it.

    ``nr_hw_queues`` 1 to 4096, ``queue_depth`` 1 to 4096, ``max_io_buf_bytes`` a page to 32 MiB;
    the driver lowers the queues to the CPUs, rounds the buffer down to pages and drops the flags
    that it does not know. ``dev_id`` -1 leaves the id to the driver.
    """

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=HHHHIIiIQQIIQQ")

    nr_hw_queues: int = 1
    queue_depth: int = 128
    state: int = uapi.UBLK_S_DEV_DEAD
    max_io_buf_bytes: int = 512 << 10
    dev_id: int = -1
    ublksrv_pid: int = -1
    flags: int = 0
    ublksrv_flags: int = 0
    owner_uid: int = 0
    owner_gid: int = 0
    io_desc_size: int = 0  # bytes, with UBLK_F_IO_DESC_SIZE; 0 from drivers that do not know it

    STATES: ClassVar[dict[int, str]] = {
        uapi.UBLK_S_DEV_DEAD: "DEAD",
        uapi.UBLK_S_DEV_LIVE: "LIVE",
        uapi.UBLK_S_DEV_QUIESCED: "QUIESCED",
        uapi.UBLK_S_DEV_FAIL_IO: "FAIL_IO",
    }

    @property
    def state_name(self) -> str:
        """``state`` in the words of ``ublk list``."""
        return self.STATES.get(self.state, "UNKNOWN")

    def pack(self) -> bytes:
        """Return the 64 bytes that cross.

        :raises ValueError: a field does not fit its width.
        """
        try:
            return self.FORMAT.pack(
                self.nr_hw_queues,
                self.queue_depth,
                self.state,
                self.io_desc_size,
                self.max_io_buf_bytes,
                self.dev_id & NO_DEV,
                self.ublksrv_pid,
                0,
                self.flags,
                self.ublksrv_flags,
                self.owner_uid,
                self.owner_gid,
                0,
                0,
            )
        except struct.error as error:
            raise ValueError(f"DevInfo: {error}") from None

    @classmethod
    def unpack(cls, data: bytes) -> DevInfo:
        """Return what 64 bytes from the driver say."""
        fields = cls.FORMAT.unpack(data)
        return cls(
            nr_hw_queues=fields[0],
            queue_depth=fields[1],
            state=fields[2],
            io_desc_size=fields[3],
            max_io_buf_bytes=fields[4],
            dev_id=-1 if fields[5] == NO_DEV else fields[5],
            ublksrv_pid=fields[6],
            flags=fields[8],
            ublksrv_flags=fields[9],
            owner_uid=fields[10],
            owner_gid=fields[11],
        )

    def validate(self) -> None:
        """Check the ranges that ADD_DEV has, and name what is wrong.

        :raises ValueError: the driver would refuse, with -EINVAL, or take a nonsensical value.
        """
        _check_range("nr_hw_queues", self.nr_hw_queues, 1, uapi.UBLK_MAX_NR_QUEUES)
        _check_range("queue_depth", self.queue_depth, 1, uapi.UBLK_MAX_QUEUE_DEPTH)
        _check_range(
            "max_io_buf_bytes", self.max_io_buf_bytes, PAGE_BYTES, uapi.UBLK_MAX_IO_BUF_BYTES
        )
        _check_range("dev_id", self.dev_id, -1, uapi.UBLK_MINORS - 1)


def _check_range(name: str, value: int, lowest: int, highest: int) -> int:
    if not lowest <= value <= highest:
        raise ValueError(f"{name} {value} is not from {lowest} to {highest}")
    return value


def char_path(dev_id: int) -> str:
    """Return the path of a device's character device, which its server opens."""
    return f"/dev/ublkc{dev_id}"


def block_path(dev_id: int) -> str:
    """Return the path of a device's block device, which everybody else opens."""
    return f"/dev/ublkb{dev_id}"


def list_dev_ids() -> list[int]:
    """Return the ids of the devices that exist, in order; empty without the driver.

    They are read from sysfs, or from the nodes in /dev where sysfs is not mounted.
    """
    names: Iterable[str]
    try:
        names = os.listdir(uapi.CHAR_CLASS_PATH)
    except FileNotFoundError:
        names = (path.name for path in Path("/dev").glob("ublkc*"))
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"ublkc\d+", name))


class _Ring:
    """One handle of csrc/control.c: a ring, and the command that runs on it."""

    def __init__(self, control_fd: int, keep_rights: bool = False) -> None:
        out = ffi.new("struct ul_control **")
        result = lib.ul_control_create(control_fd, keep_rights, out)
        check(result, "io_uring_setup for a control command", _RING_HINTS.get(-result, ""))
        self._control: ul_control = out[0]
        self._result = ffi.new("int32_t *")
        self.is_busy = False  # a command has not ended, or could not be sent: not to be used again

    def run(self, cmd: ul_control_cmd, payload: bytes, deadline: float) -> tuple[int, bytes]:
        """Return the command's result and its payload afterwards.

        The result is -ETIMEDOUT if the deadline came first; ``is_busy`` then tells whether the
        command could be interrupted.
        """
        self.is_busy = True
        check(
            lib.ul_control_submit(self._control, cmd, payload),
            "io_uring_enter for a control command",
        )
        reply = ffi.new("uint8_t[]", len(payload) + 1)
        try:
            result = self._wait(reply, deadline)
        except BaseException:
            # A signal handler wants us to leave: not with the command still running.
            self._cancel(reply)
            raise
        if result is None:
            result = self._cancel(reply)
            if result in (None, -errno.EINTR, -errno.ECANCELED):
                return -errno.ETIMEDOUT, b""
        return result, bytes(ffi.buffer(reply, len(payload)))

    def _wait(self, reply: Array[int], deadline: float) -> int | None:
        """Return the command's result, or None if it has not ended by the deadline."""
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            slice_ns = int(min(left_s, SIGNAL_LATENCY_S) * 1e9)
            status = lib.ul_control_wait(self._control, slice_ns, reply, self._result)
            if status == 0:
                self.is_busy = False
                return self._result[0]
            if status not in (-errno.ETIME, -errno.EINTR):
                raise DriverError(-status, "io_uring_enter for a control command")
            if left_s == 0:
                return None

    def _cancel(self, reply: Array[int]) -> int | None:
        lib.ul_control_cancel(self._control)
        return self._wait(reply, time.monotonic() + CANCEL_TIMEOUT_S)

    def close(self) -> None:
        """Destroy the handle; once."""
        lib.ul_control_destroy(self._control)


class Control:
    """An open /dev/ublk-control; a context manager.

    Any thread may send commands, several at a time: each command in flight has a ring of its own.
    Each method takes ``timeout_s``, the command's deadline from now, and raises DriverError:
    ETIMEDOUT at the deadline, ENODEV if there is no such device, EPERM without the right to it,
    and what the method lists. After close(), and for arguments out of range, it raises ValueError.

    A command that times out was interrupted, so its device is as it was before; only if its thread
    in the kernel could not be interrupted (STOP_DEV of a device whose requests hang) may it still
    take effect later.

    :raises DriverError: ENOENT without the driver, EACCES without the right, or what io_uring said.
    """

    def __init__(self, path: str = uapi.CONTROL_PATH) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or errno.EIO
            raise DriverError(number, f"open {path}", _OPEN_HINTS.get(number, "")) from None
        self._is_closed = False
        self._idle: deque[_Ring] = deque()
        self._stuck: deque[_Ring] = deque()
        try:
            self._idle.append(_Ring(self._fd))  # so that a refusal shows here, not in ADD_DEV
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def keep_rights(self) -> None:
        """Send later commands with the rights that the calling thread has now.

        A thread may give up CAP_SYS_ADMIN then, and still stop its device. No command may be
        running, and only one can run at a time from now on where no more rings can be made.

        :raises DriverError: what io_uring said; all is as before.
        """
        ring = _Ring(self._fd, keep_rights=True)
        while self._idle:
            self._idle.pop().close()
        self._idle.append(ring)

    def close(self) -> None:
        """Release the rings and the file; idempotent. No command may be running."""
        if self._is_closed:
            return
        self._is_closed = True
        for rings in (self._idle, self._stuck):
            while rings:
                rings.pop().close()
        os.close(self._fd)

    # ---- a device's life ----

    def add_dev(self, info: DevInfo, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> DevInfo:
        """ADD_DEV: make the character device, and return what the driver granted.

        Compare ``flags`` of the answer: the driver drops what it does not offer and adds what it
        always does. With -1 for ``info.dev_id`` the driver chooses the id.

        :raises ValueError: a field of ``info`` is out of range.
        :raises DriverError: EEXIST if the id is taken, EINVAL for flags that exclude each other.
        Source: ublk_ctrl_add_dev() in drivers/block/ublk_drv.c.
        """
        info.validate()
        what = "ADD_DEV" if info.dev_id < 0 else f"ADD_DEV dev {info.dev_id}"
        result, payload = self._command(
            uapi.UBLK_U_CMD_ADD_DEV, info.dev_id & NO_DEV, payload=info.pack(), timeout_s=timeout_s
        )
        check(result, what, _hint("ADD_DEV", -result))
        return DevInfo.unpack(payload)

    def start_dev(self, dev_id: int, server_pid: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """START_DEV: make the block device, once every tag has been fetched.

        :param server_pid: of the process (not the thread) that opened the character device.
        :raises DriverError: EINVAL if that process is another or parameters were not set, EEXIST if
            started already, EBUSY if stopped before (since v7.3), ETIMEDOUT while tags are missing.
        Source: ublk_ctrl_start_dev() in drivers/block/ublk_drv.c.
        """
        _check_range("server_pid", server_pid, 1, (1 << 31) - 1)
        self._dev_command(
            "START_DEV",
            uapi.UBLK_U_CMD_START_DEV,
            dev_id,
            data=server_pid,
            timeout_s=timeout_s,
        )

    def stop_dev(self, dev_id: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """STOP_DEV: remove the block device and abort every idle tag; fine if not started.

        It waits for requests in flight, and no signal interrupts that.
        """
        self._dev_command("STOP_DEV", uapi.UBLK_U_CMD_STOP_DEV, dev_id, timeout_s=timeout_s)

    def try_stop_dev(self, dev_id: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """TRY_STOP_DEV: stop the device unless somebody has its block device open (v7.0).

        :raises DriverError: EBUSY if it is open, EOPNOTSUPP where the driver does not offer it.
        """
        self._dev_command("TRY_STOP_DEV", uapi.UBLK_U_CMD_TRY_STOP_DEV, dev_id, timeout_s=timeout_s)

    def del_dev(self, dev_id: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """DEL_DEV: stop the device, remove it, and wait until its id is free.

        After ETIMEDOUT the device is gone for everybody but those who still have the character
        device open or mapped; the id is free when the last one leaves.
        Source: ublk_ctrl_del_dev() in drivers/block/ublk_drv.c.
        """
        self._dev_command(
            "DEL_DEV",
            uapi.UBLK_U_CMD_DEL_DEV,
            dev_id,
            done_after_eintr=errno.ENODEV,
            timeout_s=timeout_s,
        )

    def del_dev_async(self, dev_id: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """DEL_DEV_ASYNC: as DEL_DEV, without the wait for the id (v6.9).

        :raises DriverError: EINVAL for an unprivileged device.
        """
        self._dev_command(
            "DEL_DEV_ASYNC", uapi.UBLK_U_CMD_DEL_DEV_ASYNC, dev_id, timeout_s=timeout_s
        )

    # ---- parameters ----

    def set_params(
        self, dev_id: int, params: Params, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """SET_PARAMS: replace all parameters of a device that was never started.

        A section that the driver does not know is dropped without an error: get_params() tells.

        :raises DriverError: EACCES if the device was started, EINVAL for a parameter that
            Params.validate() would have named.
        """
        self._dev_command(
            "SET_PARAMS",
            uapi.UBLK_U_CMD_SET_PARAMS,
            dev_id,
            payload=params.pack(),
            timeout_s=timeout_s,
        )

    def get_params(self, dev_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Params:
        """GET_PARAMS: the sections that were set and are known, and the device numbers."""
        _, payload = self._dev_command(
            "GET_PARAMS",
            uapi.UBLK_U_CMD_GET_PARAMS,
            dev_id,
            payload=Params().pack(),
            timeout_s=timeout_s,
        )
        return Params.unpack(payload)

    def update_size(
        self, dev_id: int, nr_sectors: int, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """UPDATE_SIZE: change a started device's size (UBLK_F_UPDATE_SIZE, v6.16).

        :param nr_sectors: the new size; 512-byte sectors whatever the block size.
        :raises DriverError: EOPNOTSUPP where the driver does not offer it, ENODEV if not started.
        """
        _check_range("nr_sectors", nr_sectors, 1, (1 << 54) - 1)
        self._dev_command(
            "UPDATE_SIZE",
            uapi.UBLK_U_CMD_UPDATE_SIZE,
            dev_id,
            data=nr_sectors,
            timeout_s=timeout_s,
        )

    # ---- questions ----

    def get_features(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """GET_FEATURES: UBLK_F_* that the driver offers; 0 before v6.5, which cannot be asked.

        With 0 nothing is known: ask for a feature in ADD_DEV and compare the flags it grants.
        """
        result, payload = self._command(
            uapi.UBLK_U_CMD_GET_FEATURES,
            NO_DEV,
            payload=bytes(uapi.UBLK_FEATURES_LEN),
            timeout_s=timeout_s,
        )
        if result in (-errno.EOPNOTSUPP, -errno.ENODEV, -errno.EINVAL):
            return 0
        check(result, "GET_FEATURES", _hint("GET_FEATURES", -result))
        return int.from_bytes(payload, sys.byteorder)

    def get_dev_info(self, dev_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> DevInfo:
        """GET_DEV_INFO2, or GET_DEV_INFO where the former does not do.

        The former also works for unprivileged devices, but needs the character device's node in
        /dev, and v6.3. ``ublksrv_pid`` is -1 unless the device is served.
        """
        _check_range("dev_id", dev_id, 0, uapi.UBLK_MINORS - 1)
        result, payload = self._get_dev_info2(dev_id, timeout_s)
        if result < 0 and result not in (-errno.ENODEV, -errno.ETIMEDOUT, -errno.EACCES):
            result, payload = self._command(
                uapi.UBLK_U_CMD_GET_DEV_INFO,
                dev_id,
                payload=bytes(uapi.DEV_INFO_BYTES),
                timeout_s=timeout_s,
            )
        check(result, f"GET_DEV_INFO dev {dev_id}", _hint("GET_DEV_INFO", -result))
        return DevInfo.unpack(payload)

    def get_queue_affinity(
        self, dev_id: int, q_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> frozenset[int]:
        """GET_QUEUE_AFFINITY: the CPUs whose requests go to this queue.

        :param q_id: below the device's nr_hw_queues.
        :raises DriverError: EINVAL if there is no such queue.
        """
        _check_range("q_id", q_id, 0, uapi.UBLK_MAX_NR_QUEUES - 1)
        _, payload = self._dev_command(
            "GET_QUEUE_AFFINITY",
            uapi.UBLK_U_CMD_GET_QUEUE_AFFINITY,
            dev_id,
            data=q_id,
            payload=bytes(AFFINITY_BYTES),
            timeout_s=timeout_s,
        )
        return _cpus(payload)

    # ---- recovery ----

    def start_user_recovery(self, dev_id: int, *, timeout_s: float = SLOW_TIMEOUT_S) -> None:
        """START_USER_RECOVERY: let a new server open the device; waits for the old one's end.

        :raises DriverError: EBUSY if it has a server at the deadline, EINVAL if the device was not
            added with UBLK_F_USER_RECOVERY.
        """
        self._dev_command(
            "START_USER_RECOVERY",
            uapi.UBLK_U_CMD_START_USER_RECOVERY,
            dev_id,
            retry_while=errno.EBUSY,
            timeout_s=timeout_s,
        )

    def end_user_recovery(
        self, dev_id: int, server_pid: int, *, timeout_s: float = SLOW_TIMEOUT_S
    ) -> None:
        """END_USER_RECOVERY: go live again, once the new server has fetched every tag.

        :param server_pid: of the process that opened the character device.
        :raises DriverError: EINVAL if that process is another, EBUSY if the device is not waiting.
        """
        _check_range("server_pid", server_pid, 1, (1 << 31) - 1)
        self._dev_command(
            "END_USER_RECOVERY",
            uapi.UBLK_U_CMD_END_USER_RECOVERY,
            dev_id,
            data=server_pid,
            timeout_s=timeout_s,
        )

    def quiesce_dev(self, dev_id: int, timeout_ms: int, *, timeout_s: float | None = None) -> None:
        """QUIESCE_DEV: take the device from its server, to give it to another (v6.16).

        :param timeout_ms: how long the driver waits for an idle tag in each queue; 0: for ever.
        :param timeout_s: by default, ``timeout_ms`` and as much as other commands have.
        :raises DriverError: EBUSY if a queue had no idle tag in time: the device stays cancelling,
            recover it. EOPNOTSUPP without UBLK_F_QUIESCE.
        """
        _check_range("timeout_ms", timeout_ms, 0, (1 << 32) - 1)
        self._dev_command(
            "QUIESCE_DEV",
            uapi.UBLK_U_CMD_QUIESCE_DEV,
            dev_id,
            data=timeout_ms,
            timeout_s=timeout_ms / 1000 + DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        )

    # ---- shared memory ----

    def reg_buf(
        self,
        dev_id: int,
        address: int,
        nr_bytes: int,
        *,
        read_only: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> int:
        """REG_BUF: pin shared memory for zero copy and return its buffer index (v7.1).

        :param address: of the caller's own mapping, page-aligned.
        :param nr_bytes: a multiple of the page size, at most 4 GiB.
        :param read_only: the server only reads it; then only WRITE requests use it.
        :raises DriverError: EOPNOTSUPP without UBLK_F_SHMEM_ZC.
        """
        flags = uapi.UBLK_SHMEM_BUF_READ_ONLY if read_only else 0
        index, _ = self._dev_command(
            "REG_BUF",
            uapi.UBLK_U_CMD_REG_BUF,
            dev_id,
            payload=struct.pack("=QQII", address, nr_bytes, flags, 0),
            timeout_s=timeout_s,
        )
        return index

    def unreg_buf(self, dev_id: int, index: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """UNREG_BUF: unpin what reg_buf() returned ``index`` for (v7.1).

        :raises DriverError: ENOENT if there is no such buffer.
        """
        _check_range("index", index, 0, 0xFFFF)
        self._dev_command(
            "UNREG_BUF", uapi.UBLK_U_CMD_UNREG_BUF, dev_id, data=index, timeout_s=timeout_s
        )

    # ---- how a command is sent ----

    def _dev_command(
        self,
        name: str,
        opcode: int,
        dev_id: int,
        *,
        data: int = 0,
        payload: bytes = b"",
        retry_while: int = errno.EINTR,
        done_after_eintr: int = 0,
        timeout_s: float,
    ) -> tuple[int, bytes]:
        """Send a command to a device and return its result, never negative, and its payload."""
        _check_range("dev_id", dev_id, 0, uapi.UBLK_MINORS - 1)
        result, reply = self._command(
            opcode,
            dev_id,
            data=data,
            payload=payload,
            path=self._path_if_unprivileged(dev_id, timeout_s),
            retry_while=retry_while,
            done_after_eintr=done_after_eintr,
            timeout_s=timeout_s,
        )
        check(result, f"{name} dev {dev_id}", _hint(name, -result))
        return result, reply

    def _get_dev_info2(self, dev_id: int, timeout_s: float) -> tuple[int, bytes]:
        return self._command(
            uapi.UBLK_U_CMD_GET_DEV_INFO2,
            dev_id,
            payload=bytes(uapi.DEV_INFO_BYTES),
            path=os.fsencode(char_path(dev_id)) + b"\0",
            timeout_s=timeout_s,
        )

    def _path_if_unprivileged(self, dev_id: int, timeout_s: float) -> bytes:
        """Return what must open the payload of commands to this device.

        The driver wants the path of an unprivileged device, takes no path for another, and only
        GET_DEV_INFO2 tells them apart. If that fails, the command proper will say why; with EACCES
        it was about the path, so the device is another user's.
        """
        result, payload = self._get_dev_info2(dev_id, timeout_s)
        if result == -errno.EACCES:
            return os.fsencode(char_path(dev_id)) + b"\0"
        if result < 0 or not DevInfo.unpack(payload).flags & uapi.UBLK_F_UNPRIVILEGED_DEV:
            return b""
        return os.fsencode(char_path(dev_id)) + b"\0"

    def _command(
        self,
        opcode: int,
        dev_id: int,
        *,
        data: int = 0,
        payload: bytes = b"",
        path: bytes = b"",
        retry_while: int = errno.EINTR,
        done_after_eintr: int = 0,
        timeout_s: float,
    ) -> tuple[int, bytes]:
        """Send a command, again while it says EINTR or ``retry_while``, and return its last result.

        :param done_after_eintr: an errno that means success once the command was interrupted.
        """
        deadline = time.monotonic() + timeout_s
        fields = {
            "opcode": opcode,
            "dev_id": dev_id,
            "queue_id": NO_QUEUE,
            "dev_path_len": len(path),
            "nr_bytes": len(path) + len(payload),
            "data": data,
        }
        cmd = ffi.new("struct ul_control_cmd *", fields)
        was_interrupted = False
        refusal = -errno.ETIMEDOUT
        while True:
            result, reply = self._run(cmd, path + payload, deadline)
            if result == -errno.ETIMEDOUT:
                return refusal, b""
            if was_interrupted and result == -done_after_eintr:
                result = 0
            if result not in (-errno.EINTR, -retry_while):
                return result, reply[len(path) :]
            if result == -errno.EINTR:
                was_interrupted = True
            else:
                # What there is to say if the deadline finds the command under way once more.
                refusal = result
            if time.monotonic() >= deadline:
                return refusal, b""
            time.sleep(BUSY_POLL_S)

    def _run(self, cmd: ul_control_cmd, payload: bytes, deadline: float) -> tuple[int, bytes]:
        """Run a command once, on an idle ring or a new one."""
        if self._is_closed:
            raise ValueError("the control device is closed")
        try:
            ring = self._idle.pop()
        except IndexError:
            ring = _Ring(self._fd)
        try:
            return ring.run(cmd, payload, deadline)
        finally:
            # A deque's calls are atomic; a lock would not do, as a signal's handler, which may
            # send commands too, could find it held by its own thread.
            (self._stuck if ring.is_busy else self._idle).append(ring)


def _cpus(mask: bytes) -> frozenset[int]:
    # The kernel's cpumask is an array of unsigned long.
    words = struct.unpack(f"={len(mask) // 8}Q", mask)
    return frozenset(
        64 * index + bit
        for index, word in enumerate(words)
        for bit in range(word.bit_length())
        if word >> bit & 1
    )


__all__ = ["Control", "DevInfo", "block_path", "char_path", "list_dev_ids"]
