"""Control commands against the real driver: what it grants, refuses and lets one wait for.

Nothing serves a device here, except where a test is about live devices or recovery.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ublk_loop import uapi
from ublk_loop.control import Control, DevInfo, char_path, list_dev_ids
from ublk_loop.device import Device
from ublk_loop.errors import DriverError
from ublk_loop.params import (
    BasicParams,
    DevtParams,
    DiscardParams,
    DmaAlignParams,
    ZonedParams,
    params_for,
)
from ublk_loop.target import NullTarget, Target

BUF_BYTES = 512 << 10
NOBODY = 65534
GOOD = params_for(
    dev_nr_bytes=64 << 20,
    max_io_buf_bytes=BUF_BYTES,
    logical_bs=512,
    physical_bs=4096,
    volatile_cache=True,
    fua=True,
    discard=True,
    discard_granularity=4096,
    write_zeroes=True,
)


@pytest.fixture
def add(control):
    """``add(**fields of DevInfo)`` adds a device, which is deleted after the test."""
    dev_ids = []

    def add(**fields) -> DevInfo:
        info = control.add_dev(DevInfo(**{"max_io_buf_bytes": BUF_BYTES, **fields}))
        dev_ids.append(info.dev_id)
        return info

    yield add
    for dev_id in set(dev_ids) & set(list_dev_ids()):
        control.del_dev(dev_id)


@pytest.fixture
def opened():
    """``opened(dev_id)`` opens the character device, as a server does; closed after the test."""
    fds = []

    def opened(dev_id: int) -> int:
        fds.append(os.open(char_path(dev_id), os.O_RDWR | os.O_CLOEXEC))
        return fds[-1]

    yield opened
    for fd in fds:
        os.close(fd)


def refusal(command, *arguments, **options) -> int:
    """Return the errno that a command is refused with."""
    with pytest.raises(DriverError) as caught:
        command(*arguments, **options)
    return caught.value.errno


def free_dev_id() -> int:
    return max(list_dev_ids(), default=-1) + 17


# ---- features and life ----


def test_get_features_names_the_encoding_that_every_opcode_here_has(control) -> None:
    assert control.get_features() & uapi.UBLK_F_CMD_IOCTL_ENCODE


def test_add_dev_hands_back_what_get_dev_info_says_then(control, add) -> None:
    granted = add(nr_hw_queues=2, queue_depth=64)
    assert granted.dev_id in list_dev_ids()
    assert Path(char_path(granted.dev_id)).is_char_device()
    info = control.get_dev_info(granted.dev_id)
    assert info == granted
    assert (info.nr_hw_queues, info.queue_depth) == (min(2, os.cpu_count()), 64)
    assert (info.state, info.ublksrv_pid) == (uapi.UBLK_S_DEV_DEAD, -1)
    assert (info.owner_uid, info.owner_gid) == (0, 0)


def test_add_dev_lowers_queues_to_the_cpus_and_drops_flags_it_does_not_know(add) -> None:
    unknown = 1 << 62
    info = add(nr_hw_queues=uapi.UBLK_MAX_NR_QUEUES, queue_depth=1, flags=unknown)
    assert info.nr_hw_queues == os.cpu_count()
    assert not info.flags & unknown
    assert info.flags & uapi.UBLK_F_CMD_IOCTL_ENCODE


def test_add_dev_takes_the_id_it_is_given_and_refuses_it_a_second_time(control, add) -> None:
    dev_id = free_dev_id()
    assert add(dev_id=dev_id).dev_id == dev_id
    assert refusal(control.add_dev, DevInfo(dev_id=dev_id)) == errno.EEXIST


def test_add_dev_refuses_a_zoned_device_whose_data_it_would_copy(control) -> None:
    assert refusal(control.add_dev, DevInfo(flags=uapi.UBLK_F_ZONED)) == errno.EINVAL


def test_del_dev_frees_the_id_at_once(control, add) -> None:
    dev_id = add().dev_id
    control.del_dev(dev_id)
    assert dev_id not in list_dev_ids()
    assert add(dev_id=dev_id).dev_id == dev_id


def test_stop_dev_of_a_device_that_was_never_started_changes_nothing(control, add) -> None:
    granted = add()
    control.stop_dev(granted.dev_id)
    assert control.get_dev_info(granted.dev_id) == granted


@pytest.mark.parametrize(
    "command",
    [
        lambda c, dev_id: c.get_dev_info(dev_id),
        lambda c, dev_id: c.get_params(dev_id),
        lambda c, dev_id: c.set_params(dev_id, GOOD),
        lambda c, dev_id: c.get_queue_affinity(dev_id, 0),
        lambda c, dev_id: c.start_dev(dev_id, os.getpid()),
        lambda c, dev_id: c.stop_dev(dev_id),
        lambda c, dev_id: c.try_stop_dev(dev_id),
        lambda c, dev_id: c.del_dev(dev_id),
        lambda c, dev_id: c.del_dev_async(dev_id),
        lambda c, dev_id: c.start_user_recovery(dev_id),
        lambda c, dev_id: c.end_user_recovery(dev_id, os.getpid()),
        lambda c, dev_id: c.update_size(dev_id, 8),
        lambda c, dev_id: c.quiesce_dev(dev_id, 100),
        lambda c, dev_id: c.reg_buf(dev_id, 0, 4096),
        lambda c, dev_id: c.unreg_buf(dev_id, 0),
    ],
)
def test_every_command_says_enodev_when_there_is_no_such_device(control, command) -> None:
    assert refusal(command, control, free_dev_id()) == errno.ENODEV


# ---- parameters ----


def test_get_params_returns_what_was_set_and_the_device_numbers(control, add) -> None:
    dev_id = add().dev_id
    control.set_params(dev_id, GOOD)
    params = control.get_params(dev_id)
    assert (params.basic, params.discard) == (GOOD.basic, GOOD.discard)
    # A driver drops a section that it does not know.
    assert params.dma in (GOOD.dma, None)
    char = os.stat(char_path(dev_id)).st_rdev
    assert params.devt == DevtParams(os.major(char), os.minor(char), 0, 0)


def test_get_params_has_no_basic_section_before_set_params(control, add) -> None:
    assert control.get_params(add().dev_id).basic is None


def test_set_params_takes_new_ones_until_the_device_was_started(control, add) -> None:
    dev_id = add().dev_id
    control.set_params(dev_id, GOOD)
    assert control.get_params(dev_id).dev_nr_bytes == 64 << 20
    larger = params_for(dev_nr_bytes=128 << 20, max_io_buf_bytes=BUF_BYTES)
    control.set_params(dev_id, larger)
    assert control.get_params(dev_id).dev_nr_bytes == 128 << 20
    assert control.get_params(dev_id).discard is None


@pytest.mark.parametrize(
    "section",
    [
        BasicParams(logical_bs_shift=8, max_sectors=8, dev_sectors=8),
        BasicParams(logical_bs_shift=13, physical_bs_shift=13, max_sectors=16, dev_sectors=16),
        BasicParams(logical_bs_shift=12, physical_bs_shift=9, max_sectors=8, dev_sectors=8),
        BasicParams(max_sectors=7, dev_sectors=8),
        BasicParams(max_sectors=(BUF_BYTES >> 9) + 1, dev_sectors=8),
        DiscardParams(max_discard_sectors=8, max_discard_segments=2),
        DiscardParams(discard_granularity=0),
        DevtParams(1, 2, 3, 4),
        ZonedParams(max_zone_append_sectors=8),
    ],
)
def test_set_params_is_refused_with_einval_where_validate_names_what_is_wrong(
    control, add, section
) -> None:
    info = add()
    names = {BasicParams: "basic", DiscardParams: "discard", DevtParams: "devt"}
    name = names.get(type(section), "zoned")
    params = dataclasses.replace(GOOD, **{name: section})
    with pytest.raises(ValueError):
        params.validate(max_io_buf_bytes=info.max_io_buf_bytes, flags=info.flags)
    assert refusal(control.set_params, info.dev_id, params) in (errno.EINVAL, errno.EOPNOTSUPP)


@pytest.mark.parametrize("mask", [2, 4096])
def test_set_params_refuses_a_dma_mask_that_validate_refuses_if_it_knows_the_section(
    control, add, mask
) -> None:
    info = add()
    params = dataclasses.replace(GOOD, dma=DmaAlignParams(mask))
    with pytest.raises(ValueError):
        params.validate(max_io_buf_bytes=BUF_BYTES)
    control.set_params(info.dev_id, GOOD)
    if control.get_params(info.dev_id).dma is None:
        control.set_params(info.dev_id, params)
        assert control.get_params(info.dev_id).dma is None
    else:
        assert refusal(control.set_params, info.dev_id, params) == errno.EINVAL


@pytest.mark.parametrize("logical_bs", [512, 1024, 2048, 4096])
def test_params_for_makes_what_the_driver_takes(control, add, logical_bs) -> None:
    for buf_bytes, discard in itertools.product((4096, 65536, 32 << 20), (False, True)):
        info = add(max_io_buf_bytes=buf_bytes, queue_depth=1)
        params = params_for(
            dev_nr_bytes=logical_bs * 100,
            max_io_buf_bytes=info.max_io_buf_bytes,
            logical_bs=logical_bs,
            discard=discard,
            read_only=True,
        )
        control.set_params(info.dev_id, params)
        assert control.get_params(info.dev_id).basic == params.basic


# ---- affinity ----


def test_queue_affinities_share_out_the_cpus(control, add) -> None:
    info = add(nr_hw_queues=2)
    queues = [control.get_queue_affinity(info.dev_id, q_id) for q_id in range(info.nr_hw_queues)]
    assert all(queues)
    assert sum(map(len, queues)) == len(frozenset().union(*queues))
    assert frozenset().union(*queues) >= os.sched_getaffinity(0)


def test_get_queue_affinity_is_refused_beyond_the_last_queue(control, add) -> None:
    info = add(nr_hw_queues=1)
    assert refusal(control.get_queue_affinity, info.dev_id, 1) == errno.EINVAL


# ---- deadlines and signals ----


@pytest.fixture
def unserved(control, add, opened) -> int:
    """A device whose START_DEV waits for ever: opened, with parameters, and nothing fetches."""
    dev_id = add().dev_id
    control.set_params(dev_id, GOOD)
    opened(dev_id)
    return dev_id


def test_start_dev_ends_at_its_deadline_when_nobody_fetches(control, unserved) -> None:
    begin = time.monotonic()
    assert refusal(control.start_dev, unserved, os.getpid(), timeout_s=0.3) == errno.ETIMEDOUT
    assert 0.3 <= time.monotonic() - begin < 5
    # The kernel let go of it: the device can be asked, started again and, by the fixture, deleted.
    assert control.get_dev_info(unserved).state == uapi.UBLK_S_DEV_DEAD
    assert refusal(control.start_dev, unserved, os.getpid(), timeout_s=0.1) == errno.ETIMEDOUT


def test_start_dev_is_left_at_once_when_a_signal_handler_raises(control, unserved) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            control.start_dev(unserved, os.getpid(), timeout_s=60)
        assert time.monotonic() - begin < 10
    finally:
        signal.signal(signal.SIGALRM, before)
    assert control.get_dev_info(unserved).state == uapi.UBLK_S_DEV_DEAD


def test_start_dev_goes_on_when_a_signal_handler_returns(control, unserved) -> None:
    seen_at = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen_at.append(time.monotonic()))
    try:
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        errno_seen = refusal(control.start_dev, unserved, os.getpid(), timeout_s=2)
        end = time.monotonic()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert errno_seen == errno.ETIMEDOUT
    assert len(seen_at) == 1
    assert seen_at[0] < end - 1
    assert end - begin >= 2


def test_a_command_is_not_held_up_by_a_start_dev_that_waits(control, unserved, wait_until) -> None:
    errnos = []
    thread = threading.Thread(
        target=lambda: errnos.append(refusal(control.start_dev, unserved, os.getpid(), timeout_s=2))
    )
    thread.start()
    begin = time.monotonic()
    while thread.is_alive() and time.monotonic() - begin < 1:
        control.get_params(unserved)
    assert thread.is_alive()
    thread.join()
    assert errnos == [errno.ETIMEDOUT]


def test_del_dev_ends_at_its_deadline_while_the_character_device_is_open(
    control, add, wait_until
) -> None:
    dev_id = add().dev_id
    fd = os.open(char_path(dev_id), os.O_RDWR | os.O_CLOEXEC)
    try:
        assert refusal(control.del_dev, dev_id, timeout_s=0.3) == errno.ETIMEDOUT
        assert refusal(control.add_dev, DevInfo(dev_id=dev_id)) == errno.EEXIST
    finally:
        os.close(fd)
    # The id is free once the last reference is gone.
    wait_until(lambda: _can_add(control, dev_id))


def _can_add(control: Control, dev_id: int) -> bool:
    try:
        control.add_dev(DevInfo(dev_id=dev_id))
    except DriverError as error:
        assert error.errno == errno.EEXIST
        return False
    control.del_dev(dev_id)
    return True


def test_del_dev_async_returns_while_the_character_device_is_open(control, add, wait_until) -> None:
    dev_id = add().dev_id
    fd = os.open(char_path(dev_id), os.O_RDWR | os.O_CLOEXEC)
    try:
        control.del_dev_async(dev_id, timeout_s=5)
        assert dev_id not in list_dev_ids()
    finally:
        os.close(fd)
    wait_until(lambda: _can_add(control, dev_id))


def test_a_command_that_timed_out_leaves_no_file_behind_after_close(unserved) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Control() as control:
        assert refusal(control.start_dev, unserved, os.getpid(), timeout_s=0.1) == errno.ETIMEDOUT
    assert set(os.listdir("/proc/self/fd")) == before


# ---- refusals of start and recovery ----


def test_start_dev_is_refused_without_parameters(control, add, opened) -> None:
    dev_id = add().dev_id
    opened(dev_id)
    assert refusal(control.start_dev, dev_id, os.getpid(), timeout_s=5) == errno.EINVAL


def test_recovery_is_refused_when_the_device_was_not_added_for_it(control, add) -> None:
    assert refusal(control.start_user_recovery, add().dev_id) == errno.EINVAL


# ---- live devices ----


def test_a_live_device_refuses_new_parameters_and_a_second_start(control, device) -> None:
    dev = device(NullTarget(64 << 20))
    dev_id = dev.info.dev_id
    info = control.get_dev_info(dev_id)
    assert (info.state, info.ublksrv_pid) == (uapi.UBLK_S_DEV_LIVE, os.getpid())
    assert refusal(control.set_params, dev_id, GOOD) == errno.EACCES
    assert refusal(control.start_dev, dev_id, os.getpid()) == errno.EEXIST
    disk = os.stat(dev.block_path).st_rdev
    devt = control.get_params(dev_id).devt
    assert (devt.disk_major, devt.disk_minor) == (os.major(disk), os.minor(disk))


def test_update_size_changes_a_live_device_where_the_driver_offers_it(control, device) -> None:
    dev = device(NullTarget(64 << 20))
    dev_id = dev.info.dev_id
    if not control.get_features() & uapi.UBLK_F_UPDATE_SIZE:
        assert refusal(control.update_size, dev_id, 1 << 18) == errno.EOPNOTSUPP
        return
    control.update_size(dev_id, 1 << 18)
    assert int(Path(f"/sys/block/ublkb{dev_id}/size").read_text()) == 1 << 18


def test_try_stop_dev_spares_an_open_device_where_the_driver_offers_it(control, device) -> None:
    dev = device(NullTarget(64 << 20))
    dev_id = dev.info.dev_id
    if not control.get_features() & uapi.UBLK_F_SAFE_STOP_DEV:
        assert refusal(control.try_stop_dev, dev_id) == errno.EOPNOTSUPP
        return
    # The driver does not count openers that may stop the device anyway, and here that is us.
    control.try_stop_dev(dev_id)
    assert control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_DEAD


class GatedTarget(Target):
    """Reads as zeroes, but only while the gate is open."""

    size = 1 << 20

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.nr_waiting = 0

    def read(self, offset: int, buffer: memoryview) -> None:
        self.nr_waiting += 1
        self.gate.wait(60)
        self.nr_waiting -= 1
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.EROFS, "write")


def test_stop_dev_that_cannot_be_interrupted_is_left_behind_and_takes_effect_later(
    control, device, open_block, wait_until
) -> None:
    target = GatedTarget()
    dev = device(target)
    dev_id = dev.info.dev_id
    with open_block(dev.block_path, read_only=True) as client:
        assert client.read(0, 4096) == bytes(4096)
        wait_until(lambda: not target.nr_waiting)
        target.gate.clear()
        reader = threading.Thread(target=client.read, args=(512 << 10, 4096))
        reader.start()
        try:
            wait_until(lambda: target.nr_waiting)
            with Control() as leaving:
                begin = time.monotonic()
                assert refusal(leaving.stop_dev, dev_id, timeout_s=0.3) == errno.ETIMEDOUT
                assert time.monotonic() - begin < 10
                # Another ring does what need not wait for the first command.
                assert leaving.get_dev_info(dev_id).dev_id == dev_id
        finally:
            target.gate.set()
            reader.join()
    wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_DEAD, timeout_s=30)
    assert dev.wait(30)


# ---- recovery ----


def test_recovery_is_refused_at_the_deadline_while_the_device_has_a_server(control, device) -> None:
    dev_id = device(NullTarget(64 << 20), flags=uapi.UBLK_F_USER_RECOVERY).info.dev_id
    begin = time.monotonic()
    assert refusal(control.start_user_recovery, dev_id, timeout_s=0.3) == errno.EBUSY
    assert time.monotonic() - begin >= 0.3
    assert control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_LIVE


@pytest.fixture
def served_elsewhere():
    """(pid, dev_id) of a child that serves a recoverable device."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Control() as control:
                device = Device.add(control, NullTarget(64 << 20), flags=uapi.UBLK_F_USER_RECOVERY)
                device.start()
                os.write(writer, b"%d" % device.info.dev_id)
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    dev_id = int(os.read(reader, 16))
    os.close(reader)
    yield pid, dev_id
    with Control() as control:
        control.del_dev(dev_id)


def test_recovery_waits_for_the_old_server_and_then_for_the_new_ones_tags(
    control, served_elsewhere
) -> None:
    pid, dev_id = served_elsewhere
    os.kill(pid, signal.SIGKILL)
    control.start_user_recovery(dev_id)  # retried while the child's files are being closed
    os.waitpid(pid, 0)
    assert control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_QUIESCED
    fd = os.open(char_path(dev_id), os.O_RDWR | os.O_CLOEXEC)
    try:
        ended = refusal(control.end_user_recovery, dev_id, os.getpid(), timeout_s=0.3)
        assert ended == errno.ETIMEDOUT
    finally:
        os.close(fd)


# ---- unprivileged devices ----


@pytest.fixture
def unprivileged_dev_id(control):
    """A device that an ordinary user added and owns."""
    control_mode = os.stat(uapi.CONTROL_PATH).st_mode & 0o777
    os.chmod(uapi.CONTROL_PATH, 0o666)
    try:
        dev_id = as_nobody(_add_unprivileged)
        os.chown(char_path(dev_id), NOBODY, NOBODY)  # what udev does elsewhere
        yield dev_id
        if dev_id in list_dev_ids():
            control.del_dev(dev_id)
    finally:
        os.chmod(uapi.CONTROL_PATH, control_mode)


def as_nobody(function, *arguments) -> int:
    """Return what a function, an int from 0 to 255, returns in a child without privileges."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(function(*arguments))
        except OSError as error:
            os._exit(128 + min(error.errno or 0, 120))
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _add_unprivileged() -> int:
    with Control() as control:
        return control.add_dev(DevInfo(flags=uapi.UBLK_F_UNPRIVILEGED_DEV)).dev_id


def _add_privileged() -> int:
    with Control() as control:
        return refusal(control.add_dev, DevInfo())


def _use_and_delete(dev_id: int) -> int:
    with Control() as control:
        info = control.get_dev_info(dev_id)
        assert info.flags & uapi.UBLK_F_UNPRIVILEGED_DEV
        assert (info.owner_uid, info.owner_gid) == (NOBODY, NOBODY)
        control.set_params(dev_id, GOOD)
        assert control.get_params(dev_id).basic == GOOD.basic
        assert control.get_queue_affinity(dev_id, 0)
        assert refusal(control.del_dev_async, dev_id) == errno.EINVAL
        control.del_dev(dev_id)
    return 0


def _del_dev_refusal(dev_id: int) -> int:
    with Control() as control:
        return refusal(control.del_dev, dev_id)


def test_an_unprivileged_device_obeys_its_owner(unprivileged_dev_id) -> None:
    assert as_nobody(_use_and_delete, unprivileged_dev_id) == 0


def test_an_unprivileged_device_obeys_root(control, unprivileged_dev_id) -> None:
    dev_id = unprivileged_dev_id
    assert control.get_dev_info(dev_id).owner_uid == NOBODY
    control.set_params(dev_id, GOOD)
    assert control.get_params(dev_id).discard == GOOD.discard
    assert control.get_queue_affinity(dev_id, 0)
    control.del_dev(dev_id)
    assert dev_id not in list_dev_ids()


def test_a_user_may_neither_add_a_privileged_device_nor_delete_one(
    control, add, unprivileged_dev_id
) -> None:
    dev_id = add().dev_id
    assert as_nobody(_add_privileged) == errno.EPERM
    assert as_nobody(_del_dev_refusal, dev_id) == errno.EPERM
    assert dev_id in list_dev_ids()


def test_control_is_refused_with_eacces_to_a_user_without_the_right() -> None:
    assert os.stat(uapi.CONTROL_PATH).st_mode & 0o077 == 0
    assert as_nobody(lambda: refusal(Control)) == errno.EACCES
