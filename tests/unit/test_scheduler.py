"""A device's scheduler, of which the kernel takes one write at a time, and may take none."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ublk_loop import cli, scheduler, server, state
from ublk_loop.process import ServerProcess


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

    monkeypatch.setattr(scheduler, "Path", open_path)
    scheduler.set_scheduler(3)
    return file.text


def test_scheduler_is_set_once_the_kernel_is_no_longer_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _set(monkeypatch, errno.EBUSY, errno.EBUSY) == "[none] mq-deadline"


def test_scheduler_is_left_alone_when_we_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _set(monkeypatch, errno.EACCES) == "none [mq-deadline]"


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """The processes that set a scheduler, which they never get done."""
    forked: list[ServerProcess] = []
    set_apart = scheduler.set_apart

    def set_apart_and_note(*words: Any, **options: Any) -> ServerProcess:
        forked.append(set_apart(*words, **options))
        return forked[-1]

    monkeypatch.setattr(scheduler, "set_apart", set_apart_and_note)
    monkeypatch.setattr(scheduler, "set_scheduler", lambda _: signal.pause())
    monkeypatch.setattr(scheduler, "WAIT_S", 0.0)
    return forked


@pytest.mark.parametrize("options", [[], ["--foreground"]], ids=["server", "foreground"])
def test_add_without_a_daemon_ends_though_the_scheduler_cannot_be_set(
    helpers: list[ServerProcess],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wait_until: Callable[..., None],
    options: list[str],
) -> None:
    """It waited for ever, in the kernel, where a backing stood still under the partitions."""

    def serve(_: object, __: object, on_added: Any, on_live: Any) -> None:
        on_added(3, 0, "")
        on_live(3, "it is live")

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setenv("UBLK_LOOP_DAEMON", "0")
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))
    state.make_state_dir()
    result = CliRunner().invoke(cli.cli, ["add", "-t", "null", *options])
    assert (result.exit_code, result.output) == (0, "it is live")
    [helper] = helpers
    try:
        # It still tries, and nobody who reads what ublk prints waits for it.
        wait_until(lambda: os.readlink(f"/proc/{helper.pid}/fd/1") == os.devnull)
    finally:
        os.kill(helper.pid, signal.SIGKILL)
        while os.waitpid(-1, 0)[0] != helper.pid:  # the server is a child of ours too
            pass
