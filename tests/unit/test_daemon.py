"""A connection of the daemon's, and an add, without a daemon."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ublk_loop import events, protocol, scheduler
from ublk_loop.daemon import NR_FILES, Adding, _Session, raise_file_limit
from ublk_loop.process import fork
from ublk_loop.standby import Child
from ublk_loop.supervise import let_go

CAP_SYS_RESOURCE = 24


def test_client_sees_the_end_though_a_child_has_a_copy_of_its_connection() -> None:
    ours, theirs = socket.socketpair()
    loop = events.Loop()
    owner: Any = SimpleNamespace(loop=loop)
    with contextlib.closing(loop), ours:
        session = _Session(owner, theirs, lambda session: None)
        copy_fd = os.dup(theirs.fileno())  # as a command has that was forked meanwhile
        ours.settimeout(5)
        session.reply(protocol.Reply(out="text"))
        data = b""
        while part := ours.recv(1000):
            data += part
        assert protocol.parse_reply(data).out == "text"
        os.close(copy_fd)


def test_daemon_may_open_files_for_its_devices_though_who_began_it_might_not() -> None:
    """Of 20 files none was left for the second server, which ended without a word."""
    effective = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)
    assert effective is not None
    wanted = NR_FILES if int(effective[1], 16) >> CAP_SYS_RESOURCE & 1 else 20

    def child() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, 20))
        raise_file_limit()
        return int(resource.getrlimit(resource.RLIMIT_NOFILE) != (wanted, wanted))

    process = fork(child)
    assert process.wait(20)
    assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 0
    process.close()


class _Owner:
    """The daemon of one add, whose server is live at once."""

    def __init__(self, loop: events.Loop) -> None:
        self.loop = loop
        self.nr_under_way = 0
        self.standby = self.servers = self
        self.report_fd, server_fd = os.pipe2(os.O_CLOEXEC)
        os.close(server_fd)
        self.launch = SimpleNamespace(
            report_fd=self.report_fd,
            hear=lambda: True,
            is_live=True,
            dev_id=3,
            process=SimpleNamespace(pid=1),
            warning="",
            live="it is live",
            close_pipes=lambda: os.close(self.report_fd),
        )

    def ask(self, _: object) -> Child:
        self.reader = Child(lambda request_fd, _: scheduler.set_when_told(request_fd))
        return self.reader

    def take(self, _: object) -> Any:
        return self.launch

    def added(self, *_: object) -> None:
        pass

    def ended(self) -> None:
        self.loop.stop()


def test_add_answers_though_the_scheduler_cannot_be_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "scheduler")
    monkeypatch.setattr(scheduler, "_PATH", str(tmp_path / "scheduler"))
    monkeypatch.setattr(scheduler, "WAIT_S", 0.0)
    replies: list[protocol.Reply] = []
    loop = events.Loop()
    owner: Any = _Owner(loop)
    request: Any = None
    Adding(owner, request, replies.append)
    loop.run()
    assert [reply.out for reply in replies] == ["it is live"]
    child = owner.reader.process
    assert not child.wait(0)  # it still tries
    child.send(signal.SIGKILL)
    let_go(loop, child)
    loop.close()
