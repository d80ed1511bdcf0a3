"""A device's scheduler, of which the kernel takes one write at a time, and may take none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ublk_loop import cli, scheduler, server, state
from ublk_loop.process import ServerProcess


@pytest.fixture
def sysfs_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the scheduler of device 3 stands."""
    monkeypatch.setattr(scheduler, "_PATH", f"{tmp_path}/ublkb{{}}")
    return tmp_path / "ublkb3"


def test_scheduler_is_set_once_the_kernel_is_no_longer_busy(sysfs_file: Path) -> None:
    sysfs_file.mkdir()  # what cannot be written

    def end_of_busy() -> None:
        sysfs_file.rmdir()
        sysfs_file.with_name("new").write_text("none [mq-deadline]\n")
        sysfs_file.with_name("new").rename(sysfs_file)

    helper = scheduler.set_apart(3)
    assert not helper.wait(0.1)
    # Replaced under a try it may be missing for a moment, which ends the try.
    os.kill(helper.pid, signal.SIGSTOP)
    os.waitpid(helper.pid, os.WUNTRACED)
    end_of_busy()
    os.kill(helper.pid, signal.SIGCONT)
    assert helper.wait(10)
    os.waitpid(helper.pid, 0)
    helper.close()
    assert sysfs_file.read_text() == "none\n"


def test_scheduler_that_is_set_is_not_written(sysfs_file: Path) -> None:
    sysfs_file.write_text("[none] mq-deadline\n")
    scheduler.set_scheduler(3)
    scheduler.wait_for(scheduler.set_apart(3))
    assert sysfs_file.read_text() == "[none] mq-deadline\n"


def test_scheduler_of_a_device_that_is_gone_is_given_up_at_once(sysfs_file: Path) -> None:
    helper = scheduler.set_apart(3)
    assert helper.wait(2)
    assert os.waitpid(helper.pid, 0)[1] != 0
    helper.close()


@pytest.mark.parametrize("options", [[], ["--foreground"]], ids=["server", "foreground"])
def test_add_without_a_daemon_ends_though_the_scheduler_cannot_be_set(
    sysfs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wait_until: Callable[..., None],
    options: list[str],
) -> None:
    """It waited for ever, in the kernel, where a backing stood still under the partitions."""

    def serve(_: object, __: object, on_added: Any, on_live: Any) -> None:
        on_added(3, 0, "")
        on_live(3, "it is live")

    os.mkfifo(sysfs_file)  # whose reader waits for ever
    helpers: list[ServerProcess] = []
    set_apart = scheduler.set_apart

    def set_apart_and_note(dev_id: int) -> ServerProcess:
        helpers.append(set_apart(dev_id))
        return helpers[-1]

    monkeypatch.setattr(scheduler, "set_apart", set_apart_and_note)
    monkeypatch.setattr(scheduler, "WAIT_S", 0.0)
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
