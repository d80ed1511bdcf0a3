"""The daemon's eyes on one device: the pauses between attempts, and numbers that are used again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublk_loop.events import Loop
from ublk_loop.process import ServerProcess, fork
from ublk_loop.supervise import MAX_DELAY_S, Supervised, Trouble

DEV_ID = 7


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
    return fork(lambda: signal.pause() or 0)  # type: ignore[func-returns-value]


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
