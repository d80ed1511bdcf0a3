"""Control commands through a real ring to a file that knows none: no driver is needed."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from ublk_loop.control import Control, DevInfo
from ublk_loop.errors import DriverError
from ublk_loop.params import Params


@pytest.fixture
def control():
    with Control("/dev/zero") as control:
        yield control


def test_a_refused_command_raises_its_errno_and_names_command_and_device(control) -> None:
    with pytest.raises(DriverError) as caught:
        control.stop_dev(3)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.what == "STOP_DEV dev 3"


def test_get_features_is_zero_when_the_driver_cannot_be_asked(control) -> None:
    assert control.get_features() == 0


def test_refused_commands_leave_nothing_behind(control) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(200):
        with pytest.raises(DriverError):
            control.get_dev_info(0)
    assert os.listdir("/proc/self/fd") == before


def test_threads_send_commands_at_the_same_time(control) -> None:
    errnos = []

    def send() -> None:
        for _ in range(100):
            try:
                control.del_dev(1)
            except DriverError as error:
                errnos.append(error.errno)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errnos == [errno.EOPNOTSUPP] * 400


def test_close_releases_every_file_and_may_be_repeated() -> None:
    before = os.listdir("/proc/self/fd")
    control = Control("/dev/zero")
    assert control.get_features() == 0
    control.close()
    control.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_command_after_close_is_a_value_error() -> None:
    control = Control("/dev/zero")
    control.close()
    with pytest.raises(ValueError, match="closed"):
        control.get_features()


@pytest.mark.parametrize(
    "command",
    [
        lambda c: c.add_dev(DevInfo(queue_depth=0)),
        lambda c: c.start_dev(0, 0),
        lambda c: c.start_dev(-1, 1),
        lambda c: c.end_user_recovery(0, -1),
        lambda c: c.get_dev_info(-1),
        lambda c: c.get_queue_affinity(0, -1),
        lambda c: c.set_params(1 << 20, Params()),
        lambda c: c.update_size(0, 0),
        lambda c: c.quiesce_dev(0, -1),
        lambda c: c.unreg_buf(0, 1 << 16),
    ],
)
def test_arguments_out_of_range_are_value_errors_and_nothing_is_sent(control, command) -> None:
    with pytest.raises(ValueError):
        command(control)


def test_add_dev_on_something_else_than_the_driver_says_that_it_is_too_old(control) -> None:
    with pytest.raises(DriverError) as caught:
        control.add_dev(DevInfo())
    assert caught.value.errno == errno.EOPNOTSUPP
    assert "6.4" in caught.value.hint
