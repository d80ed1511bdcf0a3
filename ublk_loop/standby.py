"""Children of the daemon's, forked before there is anything to do for them.

    Standby         keeps one child ready; ask() hands it a request and returns that Child
    StandbyServer   keeps one server ready; take() tells it where its request comes and returns it

What Python runs it also writes to: a fresh child copies some MiB, a page at a time, which takes
longer than what it was asked for. So one child has rehearsed, and waits on a socket. It does one
request, what it is told after that, and ends: nothing of one command is left for the next. A
server has done what does not depend on the device, and waits the same way. Both end when the
daemon does.

Runs on the daemon's loop; never blocks it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import protocol
from .events import Loop
from .launch import Launch
from .process import fork
from .protocol import Request
from .supervise import let_go

if TYPE_CHECKING:
    from .server import Serve


class Standby:
    """Does requests in children, each in one of its own.

    :param do: what a child does with a request; it returns the answer.
    :param rehearse: what a child runs while it waits for a request.
    :param go_on: what a child runs once it has answered, with the socket by which more may come.
    """

    def __init__(
        self,
        loop: Loop,
        do: Callable[[Request], bytes],
        rehearse: Callable[[], object],
        go_on: Callable[[int], object],
    ) -> None:
        self._loop = loop
        self._do = do
        self._rehearse = rehearse
        self._go_on = go_on
        self._child: Child | None = None

    def refill(self) -> None:
        """Fork a child for the next request, unless one waits."""
        if self._child is None:
            self._child = Child(self._wait)
            self._loop.watch(self._child.process.fileno(), self._lost)

    def ask(self, request: Request) -> Child:
        """Have a child do ``request``; return it, which waits to be told more."""
        line = protocol.pack_request(request)
        # More could block; and one that was killed meanwhile takes nothing.
        if self._child is None or len(line) > select.PIPE_BUF or not self._child.tell(line):
            return Child(lambda *fds: self._serve(request, *fds))
        child, self._child = self._child, None
        self._loop.unwatch(child.process.fileno())
        return child

    def close(self) -> None:
        """Let the child go that waits, and see it end."""
        child = self._lost_child()
        if child is not None and child.process.wait(5):
            let_go(self._loop, child.process)

    def _lost(self) -> None:
        child = self._lost_child()
        assert child is not None
        let_go(self._loop, child.process)

    def _lost_child(self) -> Child | None:
        child, self._child = self._child, None
        if child is not None:
            child.close()
            os.close(child.answer_fd)
        return child

    def _wait(self, request_fd: int, answer_fd: int) -> None:
        self._rehearse()
        line = os.read(request_fd, select.PIPE_BUF)
        if line:  # else the daemon is gone, or has no use for us
            self._serve(protocol.parse_request(line), request_fd, answer_fd)

    def _serve(self, request: Request, request_fd: int, answer_fd: int) -> None:
        _answer(answer_fd, self._do(request))
        self._go_on(request_fd)
        os.close(request_fd)


class StandbyServer:
    """Gives away servers that were forked before they were asked for.

    :param serve: what a server runs; it begins with :func:`.server.receive_request`.
    """

    def __init__(self, loop: Loop, what: str, serve: Serve) -> None:
        self._loop = loop
        self._what = what
        self._serve = serve
        self._waiting: _Waiting | None = None

    def refill(self) -> None:
        """Fork a server for the next request, unless one waits."""
        if self._waiting is None:
            self._waiting = _Waiting(self._what, self._serve)
            self._loop.watch(self._waiting.launch.process.fileno(), self.close)

    def take(self, request_fd: int) -> Launch:
        """Return a server that reads its request from ``request_fd``, which stays the caller's."""
        waiting = self._waiting
        if waiting is not None and waiting.tell(request_fd):
            self._waiting = None
            self._loop.unwatch(waiting.launch.process.fileno())
        else:
            waiting = _Waiting(self._what, self._serve)
            waiting.tell(request_fd)
        waiting.close()
        return waiting.launch

    def close(self) -> None:
        """Let the server go that waits, and see it end."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.close()
            self._loop.unwatch(waiting.launch.process.fileno())
            waiting.launch.reap(5)
            waiting.launch.close()


class _Waiting:
    """A server, and the socket on which it waits."""

    def __init__(self, what: str, serve: Serve) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.launch = Launch.fork(what, serve, stdin_fd=theirs.fileno())

    def tell(self, request_fd: int) -> bool:
        """Have it read its request from ``request_fd``; False: it is gone."""
        with contextlib.suppress(BrokenPipeError):
            return socket.send_fds(self._socket, [b"\0"], [request_fd]) == 1
        return False

    def close(self) -> None:
        self._socket.close()


class Child:
    """A child with a socket to tell it something, and a pipe from it: ``main`` gets its ends.

    Whoever is given one closes both, and sees to the end of ``process``.
    """

    def __init__(self, main: Callable[[int, int], None]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answer_fd, their_answer_fd = os.pipe2(os.O_CLOEXEC)

        def child_main() -> int:
            main(theirs.fileno(), their_answer_fd)
            return 0

        with theirs:
            self.process = fork(child_main, keep=[theirs.fileno(), their_answer_fd])
        os.close(their_answer_fd)

    def fileno(self) -> int:
        """Return what is readable once the child has done all that it was told, or is gone."""
        return self._socket.fileno()

    def tell(self, line: bytes) -> bool:
        """Write ``line``, of at most PIPE_BUF bytes, which it reads at once; False: it is gone."""
        with contextlib.suppress(OSError):
            return self._socket.send(line) == len(line)
        return False

    def hang_up(self) -> None:
        """Tell it no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the socket, which tells it no more either; idempotent."""
        self.hang_up()
        self._socket.close()


def _answer(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
    os.close(fd)  # by itself the kernel does that last, after all memory is given back


__all__ = ["Child", "Standby", "StandbyServer"]
