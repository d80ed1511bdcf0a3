"""What a forked server does: for a new device, for one whose server died, and for one that lives.

Each function returns what :mod:`launch`, or the daemon, runs in the child that becomes the server.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from . import listing, protocol

if TYPE_CHECKING:
    from .control import DevInfo
    from .params import Params
    from .server import OnAdded, OnLive, Serve
    from .state import DeviceState


def serve_new(*, two_lines: bool) -> Serve:
    """Return what a server runs that the daemon forks for ``ublk add``.

    What to serve comes on its stdin (:func:`.protocol.parse_wish`): the words are read meanwhile.
    """
    from . import server

    as_json = False

    def find_request() -> server.Request:
        nonlocal as_json
        dev_id, options, spec, as_json = protocol.parse_wish(server.read_stdin())
        return server.Request(options, spec, dev_id=dev_id)

    def show(*live: Any) -> str:
        return listing.shown(*live, as_json=as_json, two_lines=two_lines)

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        server.serve(find_request, show, on_added, on_live)

    return serve


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
        began = time.monotonic()
        was_killed = not handover.take_from_server(known)

        def describe(info: DevInfo, _: Params, now: DeviceState) -> dict[str, Any]:
            return {
                "pause_ms": round((time.monotonic() - began) * 1000),
                "was_killed": was_killed,
                "old_server_pid": known.server_pid,
                "server_pid": now.server_pid,
            }

        request = server.Request.recovery(known, from_dead=False)
        server.serve(lambda: request, describe, on_added, on_live)

    return serve
