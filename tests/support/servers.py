"""A device whose server is a process of its own, as `ublk add` starts it: to be killed and stopped.

A process must not use the device that it serves, and pages of a mapped file come through whoever
maps it. So what mounts a device, or kills its server, has the server elsewhere.

In: what to serve. Out: a live device; after :meth:`Apart.delete` nothing. It forks, so no other
thread of the test may run then.
"""

from __future__ import annotations

import contextlib
import os
import signal

from ublk_loop import handover, manage
from ublk_loop.control import Control
from ublk_loop.launch import launch
from ublk_loop.server import Request
from ublk_loop.state import DeviceOptions, TargetSpec
from ublk_loop.uapi import UBLK_F_USER_RECOVERY, UBLK_F_USER_RECOVERY_REISSUE

REISSUE = UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE


class Apart:
    """One device, served by one child process after another."""

    def __init__(self, spec: TargetSpec, options: DeviceOptions) -> None:
        self._spec = spec
        self._options = options
        self.dev_id, self.pid = self._launch(-1, recover=False)

    @property
    def recovers(self) -> bool:
        """Whether the device waits for another server when its server dies."""
        return bool(self._options.flags & UBLK_F_USER_RECOVERY)

    @property
    def block_path(self) -> str:
        return f"/dev/ublkb{self.dev_id}"

    @property
    def char_path(self) -> str:
        return f"/dev/ublkc{self.dev_id}"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the server, and wait until there is none."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def hand_over(self) -> bool:
        """Have the server leave the device, as ``ublk upgrade`` does; False: it was killed.

        :raises DaemonError: EOPNOTSUPP (requests would fail): it serves on.
        """
        left = handover.take_from_server(handover.upgradable(self.dev_id))
        os.waitpid(self.pid, 0)
        return left

    def state(self) -> int:
        """The device's UBLK_S_DEV_*."""
        with Control() as control:
            return control.get_dev_info(self.dev_id).state

    def recover(self) -> None:
        """Give the device a new server."""
        known = manage.recoverable(self.dev_id)
        self._spec, self._options = known.spec, known.options
        self.dev_id, self.pid = self._launch(self.dev_id, recover=True)

    def delete(self) -> None:
        """Delete the device, whatever became of its server."""
        if os.path.exists(self.char_path):
            manage.delete(self.dev_id, force=True)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _launch(self, dev_id: int, *, recover: bool) -> tuple[int, int]:
        request = Request(self._options, self._spec, dev_id, recover=recover)
        dev_id, pid = launch(request, lambda info, _, known: [info.dev_id, known.server_pid])
        return dev_id, pid


def reap_children() -> None:
    """Take leave of every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
