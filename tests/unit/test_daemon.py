"""A connection of the daemon's, without a daemon."""

from __future__ import annotations

import contextlib
import os
import socket
from types import SimpleNamespace
from typing import Any

from ublk_loop import events, protocol
from ublk_loop.daemon import _Session


def test_client_sees_the_end_though_a_child_has_a_copy_of_its_connection() -> None:
    ours, theirs = socket.socketpair()
    loop = events.Loop()
    daemon: Any = SimpleNamespace(loop=loop)
    with contextlib.closing(loop), ours:
        session = _Session(daemon, theirs, lambda session: None)
        copy_fd = os.dup(theirs.fileno())  # as a command has that was forked meanwhile
        ours.settimeout(5)
        session.reply(protocol.Reply(out="text"))
        data = b""
        while part := ours.recv(1000):
            data += part
        assert protocol.parse_reply(data).out == "text"
        os.close(copy_fd)
