"""Where a process without a terminal writes its log: the journal, or a file beside the state.

In: what goes to ``logging``, stdout and stderr. Runs on the main thread of servers and daemon. It
never waits for the journal, which may be written to a device that the caller serves.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys

JOURNAL_PATH = "/run/systemd/journal/stdout"


def to_stderr(level: int = logging.INFO) -> None:
    """Have ``logging``, stdout and stderr write to fd 2, line by line."""
    stream = io.FileIO(2, "w", closefd=False)
    sys.stdout = sys.stderr = io.TextIOWrapper(
        stream, errors="backslashreplace", line_buffering=True, write_through=True
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    # Not basicConfig(force=True), which would close the caller's handlers: their files are gone.
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)


def switch(identifier: str, path: str, *, keep_early: bool = True) -> None:
    """Send stdout and stderr to the journal as ``identifier``, or to the file ``path``.

    :param keep_early: begin with what fd 2, a memfd, got so far.
    """
    import faulthandler

    log_fd = _open_journal(identifier)
    if log_fd is not None:
        say_priorities()
    else:
        log_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    early = os.pread(2, 1 << 16, 0) if keep_early else b""
    if early:
        with contextlib.suppress(OSError):
            os.write(log_fd, early)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    faulthandler.enable(2)


def say_priorities() -> None:
    """Begin each line with its syslog priority: stderr goes to the journal."""
    logging.root.handlers[0].setFormatter(_JournalFormatter())


def says_priorities() -> bool:
    """Whether each line begins with its priority."""
    return isinstance(logging.root.handlers[0].formatter, _JournalFormatter)


class _JournalFormatter(logging.Formatter):
    """Begins a line with its syslog priority, as the journal takes it."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4
        if record.levelno < logging.WARNING:
            priority = 6
        return f"<{priority}>{super().format(record)}"


def _open_journal(identifier: str) -> int | None:
    # The header of a journal stream: identifier, unit, priority (6: info), 1: lines may begin with
    # <priority>, and no forwarding, three times. Source: sd_journal_stream_fd(3). Non-blocking: a
    # full journal must not stop a server to whose device the journal may be written.
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(JOURNAL_PATH)
            stream.sendall(f"{identifier}\n\n6\n1\n0\n0\n0\n".encode())
            stream.setblocking(False)
            return stream.detach()
    except OSError:
        return None
