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
