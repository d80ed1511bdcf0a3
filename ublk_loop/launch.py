"""The start of a server, as the process sees it that forks it.

    Launch    a forked server on its way to live: its reports, its end, its last words. Never waits:
              the daemon watches it among others
    launch()  fork a server and wait for it: the CLI, where there is no daemon

A server reports through a pipe, see protocol.py. Until its device is live its stderr goes to a
memfd, whose end is quoted if it crashes. Fork before the first thread or ring: both are for
single-threaded callers that have not opened the driver.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import listing, protocol, scheduler, server, state
from .errors import DaemonError
from .process import ServerProcess, fork, hold_signals

LAUNCH_TIMEOUT_S = server.ADD_TIMEOUT_S + server.START_TIMEOUT_S + server.NODE_TIMEOUT_S + 10
LEAVE_TIMEOUT_S = 2 * server.STOP_TIMEOUT_S
NR_LAST_WORDS = 5

_log = logging.getLogger(__name__)


class Launch:
    """A forked server until its device is live.

    :param what: what is attempted, for messages.
    :param is_recovery: the device existed before, and outlives a failure.
    """

    def __init__(
        self, what: str, is_recovery: bool, process: ServerProcess, report_fd: int, words_fd: int
    ) -> None:
        self.what = what
        self.process = process
        self.report_fd = report_fd
        self.live: Any = None
        self.is_live = False
        self.warning = ""
        self._is_recovery = is_recovery
        self._words_fd = words_fd
        self._pending = b""
        self._added: dict[str, int] = {}
        self._status: int | None = None

    @classmethod
    def fork(
        cls,
        what: str,
        serve: server.Serve,
        *,
        is_recovery: bool = False,
        stdin_fd: int | None = None,
    ) -> Launch:
        """Fork a server, which runs ``serve`` and never returns here.

        :param stdin_fd: its stdin, in place of /dev/null.
        """
        report_fd, server_fd = os.pipe2(os.O_CLOEXEC)
        words_fd = os.memfd_create("ublk-log", os.MFD_CLOEXEC)

        def main() -> int:
            return server.server_main(serve, what, is_recovery, server_fd, words_fd, stdin_fd)

        child = fork(main)
        os.close(server_fd)
        return cls(what, is_recovery, child, report_fd, words_fd)

    @property
    def dev_id(self) -> int:
        """The device's number, once it exists; -1 before."""
        return self._added.get("dev_id", -1)

    def hear(self) -> bool:
        """Take what the server has reported, once ``report_fd`` is readable; True: it is live.

        :raises UblkLoopError: what stopped the server; ESRCH if it ended without a word.
        :raises ValueError: arguments that the server found bad, before anything changed.
        """
        data = os.read(self.report_fd, 65536)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            report = json.loads(line)
            if "added" in report:
                self._added = report["added"]
            elif "warning" in report:
                self.warning = report["warning"]
            elif "live" in report:
                self.live, self.is_live = report["live"], True
            elif "error" in report:
                raise protocol.unpack_error(report["error"])
        if not data and not self.is_live:
            raise self._died()
        return self.is_live

    def _died(self) -> DaemonError:
        # What became of a server that ended without a report.
        self.reap(5)
        status = self._status
        if status is None:
            how = "closed its pipe and lives on"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        text = f"the server (pid {self.process.pid}) {how} before the device was live"
        return DaemonError(errno.ESRCH, self.what, text + self._last_words())

    def timed_out(self) -> DaemonError:
        """Return what to say of a server that does not report."""
        text = f"the server (pid {self.process.pid}) did not report{self._last_words()}"
        return DaemonError(errno.ETIMEDOUT, self.what, text)

    def reap(self, timeout_s: float) -> bool:
        """Wait for the server, our child, to end; False if it still runs."""
        if self._status is None:
            if not self.process.wait(timeout_s):
                return False
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.process.pid, 0)[1])
        return True

    def abandon(self) -> None:
        """End the server, and delete what it added, as far as it goes; waits.

        It tears down by itself when asked; if it cannot, it is killed, and we do.
        """
        if self._status is None:
            self.process.send(signal.SIGTERM)
            if not self.process.wait(LEAVE_TIMEOUT_S):
                self.process.send(signal.SIGKILL)
                self.process.wait(5)
        if self._added and not self._is_recovery:
            forget_device(**self._added)

    def close(self) -> None:
        """Let go of the server, which lives on if it is live; idempotent."""
        self.process.close()
        self.close_pipes()

    def close_pipes(self) -> None:
        """Hear no more of the server, but keep :attr:`process`; idempotent."""
        for fd in (self.report_fd, self._words_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.report_fd = self._words_fd = -1

    def _last_words(self) -> str:
        text = os.pread(self._words_fd, 1 << 20, 0).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(f"; {line}" for line in lines[-NR_LAST_WORDS:])


def launch(
    request: server.Request,
    describe: server.Describe,
    timeout_s: float = LAUNCH_TIMEOUT_S,
    *,
    on_warning: Callable[[str], None] = _log.warning,
) -> Any:
    """Fork a server, wait until its device is live and return what ``describe`` said of it.

    ``describe`` runs in the server. Raises what :func:`launch_server` does.
    """

    def serve(on_added: server.OnAdded, on_live: server.OnLive) -> None:
        server.serve(lambda: request, describe, on_added, on_live)

    return launch_server(
        request.what,
        serve,
        is_recovery=request.recover,
        timeout_s=timeout_s,
        on_warning=on_warning,
    )


def launch_server(
    what: str,
    serve: server.Serve,
    *,
    is_recovery: bool,
    timeout_s: float = LAUNCH_TIMEOUT_S,
    on_warning: Callable[[str], None] = _log.warning,
) -> Any:
    """Fork a server that runs ``serve``, wait until its device is live and return what it reported.

    The device has no scheduler then, unless setting it takes longer than :data:`.scheduler.WAIT_S`.
    ``on_warning`` is called with what the server warns of.

    If this raises, no device, process or state file is left (of a
    recovery: the device waits for the next one).

    :raises UblkLoopError: what stopped the server.
    :raises ValueError: arguments that the server found bad, before anything changed.
    :raises DaemonError: ESRCH if the server died, with its last words; ETIMEDOUT.
    """
    # Until somebody waits for the server, an interrupt would leave it behind.
    before = hold_signals()
    try:
        launched = Launch.fork(what, serve, is_recovery=is_recovery)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _wait_live(launched, time.monotonic() + timeout_s)
        scheduler.Apart().set(launched.dev_id)
        if launched.warning:
            on_warning(launched.warning)
        return launched.live
    except BaseException:
        launched.abandon()
        launched.reap(5)
        raise
    finally:
        launched.close()


def _wait_live(launched: Launch, deadline: float) -> None:
    poller = select.poll()
    poller.register(launched.report_fd, select.POLLIN)
    while not launched.is_live:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise launched.timed_out()
        launched.hear()


def forget_device(dev_id: int, sysfs_ino: int) -> None:
    """Stop and delete what a dead server of ours left, as far as it goes."""
    from .control import Control

    if listing.sysfs_ino(dev_id) != sysfs_ino:
        return
    with contextlib.suppress(OSError), Control() as control:
        for step in (control.stop_dev, control.del_dev):
            with contextlib.suppress(OSError):
                step(dev_id)
    state.remove(dev_id)


__all__ = ["LAUNCH_TIMEOUT_S", "Launch", "forget_device", "launch", "launch_server"]
