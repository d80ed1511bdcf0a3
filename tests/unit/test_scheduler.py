"""A device's scheduler, of which the kernel takes one write at a time."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ublk_loop import device


class _Scheduler:
    """The file in sysfs; the first writes fail."""

    def __init__(self, *errnos: int) -> None:
        self.text = "none [mq-deadline]"
        self._errnos = list(errnos)

    def read_text(self) -> str:
        return self.text

    def write_text(self, name: str) -> None:
        if self._errnos:
            raise OSError(self._errnos.pop(0), "write")
        self.text = f"[{name}] mq-deadline"


def _set(monkeypatch: pytest.MonkeyPatch, *errnos: int) -> str:
    file = _Scheduler(*errnos)

    def open_path(path: str) -> Any:
        assert path == "/sys/block/ublkb3/queue/scheduler"
        return file

    monkeypatch.setattr(device, "Path", open_path)
    device.set_scheduler(3)
    return file.text


def test_scheduler_is_set_once_the_kernel_is_no_longer_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _set(monkeypatch, errno.EBUSY, errno.EBUSY) == "[none] mq-deadline"


def test_scheduler_is_left_alone_when_we_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _set(monkeypatch, errno.EACCES) == "none [mq-deadline]"
