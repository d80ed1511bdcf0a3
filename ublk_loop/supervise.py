"""One device under the eyes of the daemon: its server, the deaths of that, and the new ones.

    SERVED      its server runs, watched by pidfd
    WAITING     its server died; the next attempt to replace it is due
    RECOVERING  a new server is on its way
    UPGRADING   so it is, and it takes the device from the one that still serves it
    ENDING      the deadline has passed, or the driver lets nobody take the device over any more: a
                process of its own stops and deletes it

In: the pidfd, reports and timers of the daemon's loop, and the state file, which says what is
served and by whom. Out: servers, forked from the daemon, and the log. A server that ends in good
order has removed its state file first. Runs on the daemon's thread and never waits: what has to
wait, for the driver above all, is done by a forked process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import listing, server, state
from .errors import DaemonError
from .events import Loop, Timer
from .launch import Launch, forget_device
from .process import ServerProcess, fork

STABLE_S = 2.0  # a new server that lives that long has ended the trouble
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
# So many attempts in turn have to find that nobody can take the device over: somebody else, who
# begins to, looks the same for a moment.
NR_REFUSALS = 6
BY_HAND_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)

Done = Callable[[Any, Exception | None], None]


@dataclass
class Trouble:
    """The time without a lasting server: since when, and how often it was tried to end it."""

    since: float
    nr_attempts: int = 0
    nr_refusals: int = 0

    def next_delay_s(self) -> float:
        """Return how long to wait before the next attempt: none, then twice as long each time."""
        self.nr_attempts += 1
        if self.nr_attempts == 1:
            return 0.0
        return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(self.nr_attempts - 2, 16)))


class Supervised:
    """A device that the daemon keeps served.

    :param serve: given a dev_id and how to print, returns what a forked server runs to take the
        device over.
    :param forget: called with the dev_id when there is nothing left to watch.
    """

    def __init__(
        self,
        loop: Loop,
        dev_id: int,
        serve: Callable[..., Any],
        forget: Callable[[int], None],
    ) -> None:
        self.dev_id = dev_id
        self.phase = "WAITING"
        self.nr_recoveries = 0
        self._loop = loop
        self._serve = serve
        self._forget = forget
        self._process: ServerProcess | None = None
        self._launch: Launch | None = None
        self._trouble: Trouble | None = None
        self._timer: Timer | None = None
        self._waiting: list[Done] = []

    @property
    def server_pid(self) -> int | None:
        """The server's pid, while there is one."""
        return self._process.pid if self._process else None

    def take(self, process: ServerProcess) -> None:
        """Take over the server of a device just added; an earlier one of its number is gone."""
        if self._launch is None:
            self._cancel_timer()
        self._trouble = None
        self.nr_recoveries = 0
        self.watch(process)

    def watch(self, process: ServerProcess) -> None:
        """Take over a server that serves the device; the pidfd becomes ours."""
        if self._process is not None:
            self._watch_no_more(self._process, process.pid)
        self._process = process
        self.phase = "SERVED"
        self._loop.watch(process.fileno(), self._server_ended)

    def _watch_no_more(self, old: ServerProcess, new_pid: int) -> None:
        # Numbers are used again at once: the last server's end may not have been seen yet. Or it
        # was, and look() has found the new one by its state file before it reported.
        if old.pid == new_pid:
            self._loop.unwatch(old.fileno())
            old.close()
        else:
            self._loop.watch(old.fileno(), lambda: let_go(self._loop, old))

    def look(self) -> None:
        """Read the state file, and do what it calls for: watch, recover, or forget."""
        known = self._read_state()
        if known is None:
            self._end()
            return
        self.nr_recoveries = known.nr_recoveries
        process = ServerProcess.find(known.server_pid, known.server_start_ticks)
        if process is not None:
            self.watch(process)
            if self._trouble is not None:  # of somebody else's making, say by ublk recover
                self._timer = self._loop.call_later(STABLE_S, self._end_trouble)
        elif listing.sysfs_ino(self.dev_id) != known.sysfs_ino:
            state.remove(self.dev_id)
            self._end()
        elif known.options.recovery_deadline_s is None:
            _log.warning("dev %d: its server (pid %d) died", self.dev_id, known.server_pid)
            self._end()
        else:
            self._try_later(known)

    def recover(self, done: Done, **how: Any) -> None:
        """Start a new server at once, for somebody who waits for it; or wait for one under way."""
        text = {
            "SERVED": f"its server (pid {self.server_pid}) is alive",
            "ENDING": "it cannot be recovered, or not in time: it is being deleted",
            "UPGRADING": "it is being upgraded",
        }.get(self.phase)
        if text is not None:
            done(None, DaemonError(errno.EBUSY, f"recover dev {self.dev_id}", text))
            return
        self._waiting.append(done)
        if self.phase == "RECOVERING":
            return
        self._cancel_timer()
        self._attempt(time.monotonic() + BY_HAND_TIMEOUT_S, **how)

    def upgrade(self, done: Done, serve: server.Serve) -> None:
        """Replace the living server by one that runs ``serve``, which takes the device from it."""
        what = f"upgrade dev {self.dev_id}"
        if self._process is None:
            done(None, DaemonError(errno.EBUSY, what, "it has no server now: try again"))
            return
        self._waiting.append(done)
        # Its end is the new server's doing. If it is alive after a failure, look() finds it.
        old, self._process = self._process, None
        self._loop.watch(old.fileno(), lambda: let_go(self._loop, old))
        self._cancel_timer()
        self.phase = "UPGRADING"
        self._start(time.monotonic() + BY_HAND_TIMEOUT_S, what, serve)

    # ---- a server ends ----

    def _server_ended(self) -> None:
        assert self._process is not None
        self._loop.unwatch(self._process.fileno())
        _reap(self._process.pid)
        self._process.close()
        self._process = None
        self._cancel_timer()
        self.look()

    def _read_state(self) -> state.DeviceState | None:
        try:
            return state.read(self.dev_id)
        except DaemonError as error:
            _log.error("%s", error)
            return None

    # ---- a new one ----

    def _try_later(self, known: state.DeviceState) -> None:
        assert known.options.recovery_deadline_s is not None
        now = time.monotonic()
        if self._trouble is None:
            self._trouble = Trouble(now)
            text = "dev %d: its server (pid %d) died; a new one takes over"
            _log.warning(text, self.dev_id, known.server_pid)
        if self._trouble.nr_refusals >= NR_REFUSALS:
            self._delete("the driver lets no server take it over any more")
            return
        deadline = self._trouble.since + known.options.recovery_deadline_s
        delay_s = self._trouble.next_delay_s()
        self.phase = "WAITING"
        if now + delay_s >= deadline:
            self._timer = self._loop.call_later(max(0.0, deadline - now), self._too_late)
        else:
            self._timer = self._loop.call_later(delay_s, lambda: self._attempt(deadline))

    def _attempt(self, deadline: float, **how: Any) -> None:
        self.phase = "RECOVERING"
        self._start(deadline, f"recover dev {self.dev_id}", self._serve(self.dev_id, **how))

    def _start(self, deadline: float, what: str, serve: server.Serve) -> None:
        self._launch = Launch.fork(what, serve, is_recovery=True)
        self._loop.watch(self._launch.report_fd, self._reported)
        self._timer = self._loop.call_later(deadline - time.monotonic(), self._attempt_timed_out)

    def _reported(self) -> None:
        launch = self._launch
        assert launch is not None
        try:
            is_live = launch.hear()
        except (OSError, ValueError) as error:
            self._attempt_failed(error)
            return
        if not is_live:
            return
        self._end_launch()
        if self.phase == "UPGRADING":
            _log.info("dev %d: upgraded, pid %d serves it", self.dev_id, launch.process.pid)
        else:
            self._count_recovery(launch.process.pid)
        self._timer = self._loop.call_later(STABLE_S, self._end_trouble)
        self.watch(launch.process)
        self._answer(launch.live, None)

    def _count_recovery(self, pid: int) -> None:
        self.nr_recoveries += 1
        since = self._trouble.since if self._trouble else time.monotonic()
        waited_ms = (time.monotonic() - since) * 1000
        text = "dev %d: pid %d serves it now, %.0f ms after its server died"
        _log.warning(text, self.dev_id, pid, waited_ms)

    def _attempt_timed_out(self) -> None:
        assert self._launch is not None
        self._attempt_failed(self._launch.timed_out())

    def _attempt_failed(self, error: Exception) -> None:
        launch = self._launch
        assert launch is not None
        _log.error("%s", error)
        if self._trouble is not None:
            is_refusal = getattr(error, "errno", None) == errno.ENOTRECOVERABLE
            self._trouble.nr_refusals = self._trouble.nr_refusals + 1 if is_refusal else 0
        self._end_launch()
        # It has reported its error or its time is over; the device is not its any more. It may be
        # a while until the kernel has ended it, which the next attempt waits for.
        launch.process.send(signal.SIGKILL)
        process = launch.process
        self._loop.watch(process.fileno(), lambda: let_go(self._loop, process))
        self._answer(None, error)
        self.look()

    def _end_launch(self) -> None:
        assert self._launch is not None
        self._cancel_timer()
        self._loop.unwatch(self._launch.report_fd)
        self._launch.close_pipes()
        self._launch = None

    def _end_trouble(self) -> None:
        self._timer = self._trouble = None

    # ---- none in time, or none at all ----

    def _too_late(self) -> None:
        self._delete("not recovered in time")

    def _delete(self, reason: str) -> None:
        self.phase = "ENDING"
        _log.error("dev %d: %s; it is deleted, its requests fail", self.dev_id, reason)
        process = fork(lambda: _delete_device(self.dev_id))

        def ended() -> None:
            let_go(self._loop, process)
            if self.phase == "ENDING":  # else a new device has the number
                self._end()

        self._loop.watch(process.fileno(), ended)

    # ---- small change ----

    def _answer(self, live: Any, error: Exception | None) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(live, error)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._cancel_timer()
        self._forget(self.dev_id)


def let_go(loop: Loop, process: ServerProcess) -> None:
    """Reap a child whose pidfd says that it has ended, and close that."""
    loop.unwatch(process.fileno())
    _reap(process.pid)
    process.close()


def _reap(pid: int) -> None:
    # It has ended, as its pidfd said. A server of an earlier daemon, or of a CLI, is no child.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _delete_device(dev_id: int) -> int:
    forget_device(dev_id, listing.sysfs_ino(dev_id))
    return 0
