"""The CLI's side of the daemon's socket.

    add()   ``ublk add``, done by a running daemon
    ask()   one request, one reply
    start() start the daemon, once however many ask for it at the same time

Every wait has a deadline. Runs in the CLI. Most commands of root's do without: csrc/client.c asks
a running daemon itself.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any

from . import paths

CONNECT_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 240.0  # longer than the daemon gives to anything that it is asked for
START_TIMEOUT_S = 60.0
_NOT_FOR_THE_DAEMON = frozenset(("--foreground", "-h", "--help"))


def is_wanted() -> bool:
    """Whether the daemon may be used: not with UBLK_LOOP_DAEMON=0."""
    return os.environ.get("UBLK_LOOP_DAEMON") != "0"


def add(words: list[str]) -> int | None:
    """Have a running daemon do ``ublk add WORDS``; return the exit code, or None: do it here."""
    if not is_wanted() or not _NOT_FOR_THE_DAEMON.isdisjoint(words):
        return None
    try:
        cwd = os.getcwd()
    except OSError:  # it was removed
        return None
    wish = {"words": add_words(words), "cwd": cwd, "two_lines": two_lines()}
    reply = ask({"command": "add", **wish})
    if reply is None or reply["exit_code"] < 0:
        return None
    sys.stdout.write(reply["out"])
    sys.stderr.write(reply["err"])
    return int(reply["exit_code"])


def two_lines(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ``ublk list`` and the like print flags on a line of their own."""
    # The reference server moved the flags to a line of their own in 2025. Scripts parse either.
    return environment.get("UBLK_LOOP_LIST_STYLE") == "two-lines"


def add_words(words: Iterable[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the words behind ``ublk add``, with what scripts for other servers leave to them."""
    words = tuple(words)
    asked = ("-r", "-i", "-e", "--user_recovery", "--user-recovery", "--recovery")
    # There a device has the recovery that it was asked for: else it is DEAD after its server.
    if environment.get("UBLK_LOOP_DEL_FORCE") != "1" or any(w.startswith(asked) for w in words):
        return words
    # The first word may be the type, as rublk has it.
    nr_first = int(bool(words) and not words[0].startswith("-"))
    return (*words[:nr_first], "--recovery", "none", *words[nr_first:])


def ask(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the daemon's reply; None: none runs.

    :raises OSError: it went away, or gave no answer in time.
    """
    connection = _connect()
    if connection is None:
        return None
    data = bytearray()
    with connection:
        connection.settimeout(REPLY_TIMEOUT_S)
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            while part := connection.recv(65536):
                data += part
        except (BrokenPipeError, ConnectionResetError):
            # It ended without having read the request: net/unix/af_unix.c, unix_release_sock().
            return None
    if not data:
        raise ConnectionError("the daemon went away")
    reply: dict[str, Any] = json.loads(data)
    return reply


def _connect() -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        with paths.short(paths.socket_path()) as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError, PermissionError):
        connection.close()
        return None
    return connection


def start() -> None:
    """Start the daemon in the background, unless it runs; return when it listens.

    :raises DaemonError: what it said.
    """
    import errno
    import subprocess

    from . import state
    from .errors import DaemonError

    state.make_state_dir()
    path = os.path.join(paths.state_dir(), "start.lock")
    deadline = time.monotonic() + START_TIMEOUT_S
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "rb") as lock:
        _lock(lock, deadline)
        if _answers():
            return
        # In "/", as -m looks for modules in the working directory first.
        command = [sys.executable, "-m", "ublk_loop", "daemon", "--detach"]
        try:
            done = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=START_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DaemonError(errno.ETIMEDOUT, "start of the daemon") from None
        # One that was begun otherwise is there already, and will listen.
        while done.returncode and os.strerror(errno.EBUSY) in done.stderr:
            if _answers():
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
    if done.returncode:
        text = done.stderr.strip().removeprefix("ublk: ")
        raise DaemonError(errno.ECHILD, "start of the daemon", text)


def _answers() -> bool:
    # Who connects knows nothing: a child that a killed daemon had just forked has a copy of its
    # socket, until it has closed that.
    try:
        return ask({"command": "status"}) is not None
    except ConnectionError:
        return False


def _lock(file: IO[bytes], deadline: float) -> None:
    import errno
    import fcntl

    from .errors import DaemonError

    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DaemonError(errno.ETIMEDOUT, "start of the daemon") from None
            time.sleep(0.02)
