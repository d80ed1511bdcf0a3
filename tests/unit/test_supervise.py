"""The daemon's eyes on one device: the pauses between attempts, and numbers that are used again."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublk_loop import process, state, supervise
from ublk_loop.errors import DriverError
from ublk_loop.events import Loop
from ublk_loop.process import ServerProcess, fork
from ublk_loop.state import DeviceOptions, DeviceState, QueueState, TargetSpec
from ublk_loop.supervise import MAX_DELAY_S, Supervised, Trouble

DEV_ID = 7
QUEUES = (QueueState(0, 1, (0,)),)


def test_first_attempt_comes_at_once_and_the_others_ever_later_up_to_a_limit() -> None:
    trouble = Trouble(since=0)
    delays = [trouble.next_delay_s() for _ in range(40)]
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY_S


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))  # which holds no state of any device
    loop = Loop()
    yield loop
    loop.close()


def _server() -> ServerProcess:
    return fork(_pause)


def _pause() -> int:
    signal.alarm(60)  # not for ever, if its test fails
    signal.pause()
    return 0


def _run_until_forgotten(loop: Loop, device: Supervised) -> None:
    assert device.server_pid is not None
    os.kill(device.server_pid, signal.SIGKILL)
    loop.call_later(20, lambda: pytest.fail("the server's end was not seen"))
    loop.run()


def _open_pidfds() -> int:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum("pidfd" in os.readlink(link) for link in links if os.path.lexists(link))


def test_server_found_by_its_state_before_it_reports_is_watched_once(loop: Loop) -> None:
    # Its end was seen twice, and the daemon ended by an AssertionError.
    device = Supervised(loop, DEV_ID, lambda *_: None, lambda _: loop.stop())
    server = _server()
    found = ServerProcess.find(server.pid)
    assert found is not None
    device.watch(found)
    device.take(server)
    _run_until_forgotten(loop, device)
    assert device.server_pid is None
    assert _open_pidfds() == 0


def test_server_whose_number_is_used_again_before_its_end_was_seen_is_reaped(loop: Loop) -> None:
    # The daemon would have waited for the new server's end instead, and done nothing else.
    device = Supervised(loop, DEV_ID, lambda *_: None, lambda _: loop.stop())
    old, new = _server(), _server()
    device.watch(old)
    os.kill(old.pid, signal.SIGKILL)
    os.waitid(os.P_PID, old.pid, os.WEXITED | os.WNOWAIT)
    device.take(new)
    assert device.server_pid == new.pid
    _run_until_forgotten(loop, device)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    assert _open_pidfds() == 0


def _state_of(pid: int, deadline_s: int) -> DeviceState:
    options = DeviceOptions(recovery_deadline_s=deadline_s)
    ticks = process.start_ticks(pid) or 0
    spec = TargetSpec("null", nr_bytes=4096)
    return DeviceState(DEV_ID, 0, pid, ticks, options, spec, {"name": "null"}, QUEUES)


def test_device_that_nobody_can_take_over_any_more_is_tried_a_few_times(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried until its deadline."""
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.001)
    tries = tmp_path / "tries"

    def attempt(*_: object) -> None:
        with tries.open("a") as file:
            file.write(".")
        raise DriverError(errno.ENOTRECOVERABLE, "START_USER_RECOVERY")

    server = _server()
    state.write(_state_of(server.pid, 3600))
    device = Supervised(loop, DEV_ID, lambda *_: attempt, lambda _: loop.stop())
    device.watch(server)
    _run_until_forgotten(loop, device)
    assert tries.read_text() == "." * 6


def test_trouble_is_over_when_somebody_else_has_begun_a_server(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next death's deadline was counted from the first, and the device deleted at once."""
    monkeypatch.setattr(supervise, "STABLE_S", 0.01)
    deadline_s = 1
    old, other = _server(), _server()
    attempts = []

    def serve(*_: object) -> object:
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            state.write(_state_of(other.pid, deadline_s))
            loop.call_later(deadline_s, lambda: os.kill(other.pid, signal.SIGKILL))
        else:
            state.remove(DEV_ID)

        def attempt(*_: object) -> None:
            raise DriverError(errno.EIO, "START_USER_RECOVERY")

        return attempt

    state.write(_state_of(old.pid, deadline_s))
    device = Supervised(loop, DEV_ID, serve, lambda _: loop.stop())
    device.watch(old)
    _run_until_forgotten(loop, device)
    assert len(attempts) == 2
    other.close()
