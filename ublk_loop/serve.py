"""What a forked server does: for a new device, for one whose server died, and for one that lives.

Each function is, or returns, what :mod:`launch`, or the daemon, runs in the child that becomes the
server.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from . import listing, protocol, uapi
from .state import DeviceOptions, TargetSpec

if TYPE_CHECKING:
    from .control import DevInfo
    from .params import Params
    from .server import OnAdded, OnLive, Serve
    from .state import DeviceState


# Read before there is one to read, by a server that waits: standby.py says why.
_REHEARSED = protocol.Wish(
    -1, DeviceOptions(), TargetSpec("loop", path="/"), as_json=False, two_lines=False
)


def serve_new(on_added: OnAdded, on_live: OnLive) -> None:
    """Be a server that the daemon forks for ``ublk add``, before or after it is asked for one.

    What to serve comes by the socket on its stdin (:func:`.protocol.parse_wish`).
    """
    from . import server

    as_json = two_lines = False

    def find_request() -> server.Request:
        nonlocal as_json, two_lines
        protocol.parse_wish(protocol.pack_wish(_REHEARSED))
        wish = protocol.parse_wish(server.receive_request())
        as_json, two_lines = wish.as_json, wish.two_lines
        return server.Request(wish.options, wish.spec, dev_id=wish.dev_id)

    def show(*live: Any) -> str:
        return listing.shown(*live, as_json=as_json, two_lines=two_lines)

    server.serve(find_request, show, on_added, on_live)


def serve_recovery(dev_id: int, *, as_json: bool = False, two_lines: bool = False) -> Serve:
    """Return what a server runs that the daemon forks to take a device over."""
    from . import manage, server

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        request = server.Request.recovery(manage.recoverable(dev_id))
        show = partial(listing.shown, as_json=as_json, two_lines=two_lines)
        server.serve(lambda: request, show, on_added, on_live)

    return serve


def serve_upgrade(dev_id: int) -> Serve:
    """Return what a server runs that the daemon forks to replace a living one."""
    from . import handover, server

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        known = handover.upgradable(dev_id)
        held = handover.open_files(known)  # until we have them open ourselves
        began = time.monotonic()
        was_killed = not handover.take_from_server(known)

        def describe(info: DevInfo, _: Params, now: DeviceState) -> dict[str, Any]:
            while held:
                os.close(held.pop())
            return {
                "pause_ms": round((time.monotonic() - began) * 1000),
                "was_killed": was_killed,
                "old_server_pid": known.server_pid,
                "server_pid": now.server_pid,
            }

        request = server.Request.recovery(known, from_dead=False)
        server.serve(lambda: request, describe, on_added, on_live)

    return serve


def die_in_recovery(dev_id: int) -> None:
    """Begin to serve a null device again, and be killed when the first tag is fetched.

    What the kernel's own test server is asked for, to see what the driver makes of it. With
    BATCH_IO all tags of the first queue are fetched: there is one command for them.
    """
    from .control import Control
    from .device import Device
    from .target import NullTarget

    class OfFirstTag(Device):
        def _q_ids_and_tags_of_threads(self) -> list[tuple[range, range]]:
            is_batch = self.info.flags & uapi.UBLK_F_BATCH_IO
            return [(range(1), range(self.info.queue_depth if is_batch else 1))]

    with Control() as control:
        OfFirstTag.recover(control, NullTarget(), dev_id)
        os.kill(os.getpid(), signal.SIGKILL)
