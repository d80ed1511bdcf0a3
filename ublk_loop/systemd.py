"""What a service tells systemd, and gets from it; without systemd, nothing.

In: the environment that systemd sets. Out: datagrams to its notification socket. The few lines of
libsystemd that a service needs are simpler than a dependency. Never blocks, never fails.
Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket

FIRST_FD = 3


def notify(*fields: str) -> None:
    """Send fields such as ``READY=1`` to whoever started this service."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    address = "\0" + path[1:] if path[0] == "@" else path
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
    ):
        sender.sendto("\n".join(fields).encode(), address)


def watchdog_s() -> float | None:
    """Return within which time systemd wants to hear ``WATCHDOG=1``; None: it does not."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6


def listen_fd() -> int | None:
    """Return the socket that systemd listens on for this process; None: there is none.

    :raises ValueError: there are several.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise ValueError(f"LISTEN_FDS is {count!r}, where one socket is expected")
    os.set_inheritable(FIRST_FD, False)
    return FIRST_FD
