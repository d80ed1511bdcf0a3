"""Every error is an OSError with an errno, and says what was attempted and what helps."""

from __future__ import annotations

import errno
import pickle

import pytest

from ublk_loop.errors import BackingFileError, DaemonError, DriverError, UblkLoopError, check


@pytest.mark.parametrize("kind", [DriverError, BackingFileError, DaemonError])
def test_error_says_what_errno_and_hint_in_one_line(kind: type[UblkLoopError]) -> None:
    error = kind(errno.EBUSY, "START_DEV dev 3", "wait for it")
    assert isinstance(error, OSError)
    assert error.errno == errno.EBUSY
    assert str(error) == "START_DEV dev 3: Device or resource busy: wait for it"
    assert str(kind(errno.EBUSY, "START_DEV dev 3")) == "START_DEV dev 3: Device or resource busy"


def test_error_is_one_line_when_a_file_has_two_in_its_name() -> None:
    error = BackingFileError(errno.ENOENT, "/srv/a\nb.img", "\tnone\x7f")
    assert str(error) == r"/srv/a\x0ab.img: No such file or directory: \x09none\x7f"


def test_error_survives_pickling() -> None:
    error = DriverError(errno.ENODEV, "STOP_DEV dev 1", "ublk list shows the devices")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DriverError
    assert (copy.errno, str(copy)) == (error.errno, str(error))


def test_check_returns_a_result_that_is_no_error() -> None:
    assert check(0, "x") == 0
    assert check(7, "x") == 7


def test_check_raises_a_negative_result_as_its_errno() -> None:
    with pytest.raises(DriverError) as caught:
        check(-errno.EPERM, "ADD_DEV", "run as root")
    assert (caught.value.errno, caught.value.hint) == (errno.EPERM, "run as root")
