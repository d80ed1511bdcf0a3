"""The event loop of the daemon: file descriptors, timers and signals, on one thread.

In: what to watch, and what to call. Out: the calls, one after another, on the thread of run().
Without anything to do it sleeps in epoll_wait, without a time-out unless a timer is set. A callback
must not block. Forked children never touch their parent's loop.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable
from typing import Any

Callback = Callable[[], None]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """A call to come; :meth:`cancel` takes it back."""

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not call; idempotent, also once it has been called."""
        self.callback = None


class Loop:
    """Watches until stop(); at most one a process, for its signals."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = itertools.count()
        self._handlers: dict[int, Callback] = {}
        self._stopped = False
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.watch(self._read_fd, self._take_signals)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def watch(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call ``callback`` whenever ``fd`` is ready; replaces what was watched before."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Watch ``fd`` no more; before it is closed. Idempotent."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call ``callback`` once, after ``delay_s`` seconds."""
        timer = Timer(callback)
        when = time.monotonic() + delay_s
        heapq.heappush(self._timers, (when, next(self._serial), timer))
        return timer

    def on_signal(self, number: signal.Signals, callback: Callback) -> None:
        """Call ``callback`` for a signal, on the loop."""
        self._handlers[number] = callback
        signal.signal(number, _do_nothing)

    def stop(self) -> None:
        """Have run() return after the present callback."""
        self._stopped = True

    def run(self) -> None:
        """Call what there is to call, until stop()."""
        while not self._stopped:
            for key, _ in self._selector.select(self._timeout_s()):
                # An earlier callback of this round may have let go of it.
                if self._selector.get_map().get(key.fd) == key and not self._stopped:
                    key.data()
            self._call_timers()

    def close(self) -> None:
        """Give the signals back to their defaults, and close what is the loop's own."""
        signal.set_wakeup_fd(-1)
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _timeout_s(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _call_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now and not self._stopped:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _take_signals(self) -> None:
        for number in set(os.read(self._read_fd, 4096)):
            if number in self._handlers:
                self._handlers[number]()


def _do_nothing(*_: Any) -> None:
    # A signal with a handler of Python's writes its number to the wake-up fd.
    pass


__all__ = ["READ", "WRITE", "Loop", "Timer"]
