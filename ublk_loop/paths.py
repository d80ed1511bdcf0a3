"""Where the state of the running devices is kept, and what lies beside it.

Pure, apart from the environment. Imports as little as can be: the quick way of ``ublk add`` begins
here.
"""

from __future__ import annotations

import os

SOCKET_NAME = "daemon.sock"


def state_dir() -> str:
    """Return the folder of the state files: UBLK_LOOP_STATE_DIR, /run/ublk, or the user's own."""
    chosen = os.environ.get("UBLK_LOOP_STATE_DIR")
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/run/ublk"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}", "ublk")


def socket_path() -> str:
    """Return the path of the daemon's socket."""
    return os.path.join(state_dir(), SOCKET_NAME)


class short:
    """``with short(path) as address``: the path in a form that fits a socket's 107 bytes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= 107:
            return self._path
        folder, name = os.path.split(self._path)
        self._fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{name}"

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
