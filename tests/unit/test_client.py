"""The client of the daemon, when the daemon ends, or begins, meanwhile."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ublk_loop import client, daemon, paths, process


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with paths.short(paths.socket_path()) as address:
        listener.bind(address)
    listener.listen()
    return listener


def test_request_that_an_ending_daemon_never_read_is_as_if_none_ran(
    listener: socket.socket,
) -> None:
    # It failed with ECONNRESET, and so did `ublk add`, which could have started another daemon.
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.ask, {"command": "status"})
        assert select.select([listener], [], [], 10)[0]
        listener.close()
        assert asked.result(10) is None


def test_request_that_a_daemon_took_before_it_ended_is_an_error(listener: socket.socket) -> None:
    with listener, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.ask, {"command": "status"})
        connection, _ = listener.accept()
        assert connection.recv(1000).endswith(b"\n")
        connection.close()
        with pytest.raises(ConnectionError, match="went away"):
            asked.result(10)


def test_add_has_the_recovery_that_scripts_for_other_servers_ask_for() -> None:
    ruthless = {"UBLK_LOOP_DEL_FORCE": "1"}
    plain = ("-t", "null", "--usercopy")
    assert client.add_words(plain, {}) == plain
    assert client.add_words(plain, {"UBLK_LOOP_DEL_FORCE": "0"}) == plain
    assert client.add_words(plain, ruthless) == ("--recovery", "none", *plain)
    assert client.add_words(plain[1:], ruthless) == (plain[1], "--recovery", "none", *plain[2:])
    for words in (("-r", "1"), ("-i1",), ("--user-recovery=1",), ("--recovery", "reissue")):
        assert client.add_words((*plain, *words), ruthless) == (*plain, *words)


def test_start_waits_for_a_daemon_that_was_begun_otherwise_and_does_not_listen_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `ublk daemon & ublk add ...` was refused: "one runs already".
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))
    locked_fd, child_fd = os.pipe()
    refused_fd, tell_fd = os.pipe()
    run = subprocess.run

    def run_and_tell(*words: Any, **options: Any) -> Any:
        done = run(*words, **options)
        os.write(tell_fd, b"\0")
        return done

    def be_slow_daemon() -> int:
        lock_fd = daemon._take_lock()
        os.close(child_fd)
        os.read(refused_fd, 1)
        daemon._run(str(tmp_path / "ublk.toml"), lock_fd)
        return 0

    monkeypatch.setattr(subprocess, "run", run_and_tell)
    slow = process.fork(be_slow_daemon, keep=[child_fd, refused_fd])
    os.close(child_fd)
    with open(locked_fd, "rb") as locked, slow:
        assert locked.read() == b""
        try:
            client.start()
            reply = client.ask({"command": "status"})
        finally:
            slow.send(signal.SIGTERM)
            assert slow.wait(10)
            os.waitpid(slow.pid, 0)
    os.close(refused_fd)
    os.close(tell_fd)
    assert reply is not None
    assert reply["document"]["pid"] == slow.pid
