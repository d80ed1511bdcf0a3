"""A device's scheduler, of which the kernel takes one write at a time, and may take none."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ublk_loop import cli, scheduler, server, state
from ublk_loop.process import ServerProcess, fork


@pytest.fixture
def sysfs_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the scheduler of device 3 stands."""
    monkeypatch.setattr(scheduler, "_PATH", f"{tmp_path}/ublkb{{}}")
    return tmp_path / "ublkb3"


def test_scheduler_is_set_once_the_kernel_is_no_longer_busy(
    sysfs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nr_tries = 0
    write_text = Path.write_text

    def be_busy_at_first(path: Path, text: str) -> int:
        nonlocal nr_tries
        nr_tries += 1
        if nr_tries < 3:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return write_text(path, text)

    sysfs_file.write_text("none [mq-deadline]\n")
    monkeypatch.setattr(Path, "write_text", be_busy_at_first)
    scheduler.Apart().set(3)
    assert sysfs_file.read_text() == "none"


def test_scheduler_is_left_alone_if_there_is_no_device(sysfs_file: Path) -> None:
    sysfs_file.write_text("none [mq-deadline]\n")
    apart = scheduler.Apart()
    apart.close()
    apart.close()
    assert not os.path.exists(f"/proc/{apart.process.pid}")
    assert sysfs_file.read_text() == "none [mq-deadline]\n"


def test_scheduler_that_is_set_is_not_written(sysfs_file: Path) -> None:
    sysfs_file.write_text("[none] mq-deadline\n")
    scheduler.Apart().set(3)
    assert sysfs_file.read_text() == "[none] mq-deadline\n"


def test_scheduler_of_a_device_that_is_gone_is_given_up_at_once(sysfs_file: Path) -> None:
    apart = scheduler.Apart()
    apart.set(3)
    assert not os.path.exists(f"/proc/{apart.process.pid}")


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

    def fork_and_note(child: Callable[[], int], keep: list[int]) -> ServerProcess:
        helpers.append(fork(child, keep))
        return helpers[-1]

    monkeypatch.setattr(scheduler, "fork", fork_and_note)
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
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0):  # the server is a child of ours too
                pass
