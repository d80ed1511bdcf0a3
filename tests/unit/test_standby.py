"""The child, and the server, that a daemon keeps ready."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublk_loop import events, protocol, server
from ublk_loop.standby import Standby, StandbyServer

REHEARSED = b"rehearsed "


class _Parent:
    """A loop with a Standby, whose answers name the child and say whether it has rehearsed."""

    def __init__(self) -> None:
        self.loop = events.Loop()
        self.standby = Standby(self.loop, self._do, self._rehearse, self._go_on)
        self._said = b""

    def _rehearse(self) -> None:
        self._said = REHEARSED

    def _do(self, request: protocol.Request) -> bytes:
        assert isinstance(request, protocol.Run)
        return self._said + f"{os.getpid()} {request.words[0]}".encode()

    def _go_on(self, fd: int) -> None:
        os._exit(len(os.read(fd, 100)))

    def ask(self, word: str, then: bytes = b"") -> tuple[int, bytes]:
        """Return the child's pid and its answer; it exits with the length of ``then``."""
        child = self.standby.ask(protocol.Run("1", (word,), "/", {}))
        with open(child.answer_fd, "rb") as answer, child.process:
            data = answer.read()
            assert child.tell(then)
            child.hang_up()
            select.select([child], [], [], 10)
            assert child.tell(b"late") is False
            child.close()
            assert os.waitstatus_to_exitcode(os.waitpid(child.process.pid, 0)[1]) == len(then)
            return child.process.pid, data

    def turn(self) -> None:
        """Let the loop do what is due."""
        self.loop.call_later(0.2, self.loop.stop)
        self.loop.run()


@pytest.fixture
def parent() -> Iterator[_Parent]:
    parent = _Parent()
    yield parent
    parent.standby.close()
    parent.loop.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_child_that_waits_does_one_request_and_the_next_child_does_the_next(
    parent: _Parent,
) -> None:
    parent.standby.refill()
    parent.standby.refill()
    [waiting] = _children()
    assert parent.ask("first") == (waiting, REHEARSED + f"{waiting} first".encode())
    parent.standby.refill()
    [waiting] = _children()
    assert parent.ask("second") == (waiting, REHEARSED + f"{waiting} second".encode())


def test_request_is_done_though_no_child_waits_or_it_is_too_large_for_a_pipe(
    parent: _Parent,
) -> None:
    pid, answer = parent.ask("none")
    assert answer == f"{pid} none".encode()
    parent.standby.refill()
    [waiting] = _children()
    pid, answer = parent.ask("x" * select.PIPE_BUF)
    assert pid != waiting
    assert answer.startswith(f"{pid} x".encode())
    assert _children() == [waiting]


@pytest.mark.parametrize("waits", [True, False])
def test_child_that_has_answered_goes_on_with_what_it_is_told(parent: _Parent, waits: bool) -> None:
    if waits:
        parent.standby.refill()
    parent.ask("word", then=b"more")


@pytest.mark.parametrize("seen", [True, False])
def test_request_is_done_though_the_child_that_waited_was_killed(
    parent: _Parent, seen: bool
) -> None:
    parent.standby.refill()
    [waiting] = _children()
    os.kill(waiting, signal.SIGKILL)
    os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
    if seen:
        parent.turn()
        assert _children() == []
    pid, answer = parent.ask("word")
    assert pid != waiting
    assert answer == f"{pid} word".encode()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(waiting, 0)


def test_child_that_waits_ends_with_its_parent(parent: _Parent) -> None:
    parent.standby.refill()
    [waiting] = _children()
    parent.standby.close()
    assert _children() == []
    assert not os.path.exists(f"/proc/{waiting}")


# ---- a server ----


def _serve(on_added: server.OnAdded, on_live: server.OnLive) -> None:
    on_live(7, server.receive_request().decode())


@pytest.fixture
def servers() -> Iterator[StandbyServer]:
    loop = events.Loop()
    servers = StandbyServer(loop, "add", _serve)
    yield servers
    servers.close()
    loop.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)


def _told(servers: StandbyServer, text: bytes) -> tuple[int, str]:
    """Return the pid of the server that was told ``text``, and what it has read."""
    request_fd, our_fd = os.pipe()
    launch = servers.take(request_fd)
    os.close(request_fd)
    os.write(our_fd, text)
    os.close(our_fd)
    while not launch.hear():
        pass
    assert launch.reap(10)
    launch.close()
    return launch.process.pid, launch.live


@pytest.fixture(autouse=True)
def _state_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))


def test_server_that_waits_reads_one_request_and_the_next_server_the_next(
    servers: StandbyServer,
) -> None:
    servers.refill()
    servers.refill()
    [waiting] = _children()
    assert _told(servers, b"first") == (waiting, "first")
    assert _told(servers, b"second")[1] == "second"


def test_request_is_read_though_the_server_that_waited_was_killed(servers: StandbyServer) -> None:
    servers.refill()
    [waiting] = _children()
    os.kill(waiting, signal.SIGKILL)
    os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOWAIT)
    pid, text = _told(servers, b"words")
    assert (pid != waiting, text) == (True, "words")


def test_server_that_waits_ends_with_its_parent_and_reports_nothing(
    servers: StandbyServer,
) -> None:
    servers.refill()
    [waiting] = _children()
    servers.close()
    assert not os.path.exists(f"/proc/{waiting}")
