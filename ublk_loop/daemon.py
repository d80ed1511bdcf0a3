"""``ublk daemon``: forks the servers, and keeps their devices served.

    Daemon    the socket, the devices, boot, and the end
    _Session  one connection: one request, one reply

One single-threaded process that opens neither the driver nor a ring: what needs them, or waits, is
done by forked children, whose modules are loaded here once, and whose memory is shared until they
write to it. A child reports through a pipe; its end shows by pidfd. Servers do not depend on the
daemon: it may end or be killed at any time, and the next one finds them by their state files.

In: requests on /run/ublk/daemon.sock, from root or the daemon's own user. Out: replies, servers,
the log. Idle, it sleeps until something happens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

from . import (
    __version__,
    boot,
    cli,
    cli_add,
    client,
    events,
    listing,
    log,
    paths,
    process,
    protocol,
    scheduler,
    state,
    systemd,
)
from .errors import DaemonError, UblkLoopError, one_line
from .launch import LAUNCH_TIMEOUT_S, Launch
from .protocol import EXIT_DO_IT_YOURSELF, Reply
from .serve import serve_new, serve_recovery, serve_upgrade
from .standby import Standby, StandbyServer
from .supervise import Supervised, let_go

MAX_SESSIONS = 512
REQUEST_TIMEOUT_S = 10.0
NR_FILES = 65536  # as LimitNOFILE in contrib/systemd/ublk.service

_log = logging.getLogger(__name__)


class Daemon:
    """Serves requests on ``listener`` until it is stopped; the devices live on.

    :param config_path: the devices to add first.
    :param boots: whether to add them.
    """

    def __init__(self, listener: socket.socket, config_path: str, boots: bool) -> None:
        self.loop = events.Loop()
        self.standby = Standby(self.loop, _do_apart, _rehearse, scheduler.set_when_told)
        self.servers = StandbyServer(self.loop, "add", serve_new)
        self._listener = listener
        self._config_path = config_path
        self._boots = boots
        self._devices: dict[int, Supervised] = {}
        self._sessions: set[_Session] = set()
        self._nr_booting = 0
        self.nr_under_way = 0

    def run(self) -> None:
        """Find the devices, add those of the configuration, and serve requests until stopped."""
        self._listener.setblocking(False)
        self.loop.watch(self._listener.fileno(), self._accept)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.on_signal(number, self.stop)
        self._start_watchdog()
        self._find_devices()
        self._boot()
        self._refill()
        self.loop.run()
        systemd.notify("STOPPING=1")
        self._let_standbys_go()
        self.loop.close()

    def stop(self) -> None:
        """End the daemon. What is being added gives up by itself; devices are served on."""
        _log.info("daemon ends; %d devices are served on", len(self._devices))
        self.loop.stop()

    # ---- what to serve ----

    def _find_devices(self) -> None:
        for dev_id in _known_dev_ids():
            self._supervised(dev_id).look()

    def _supervised(self, dev_id: int) -> Supervised:
        if dev_id not in self._devices:
            self._devices[dev_id] = Supervised(self.loop, dev_id, serve_recovery, self._forget)
        return self._devices[dev_id]

    def _forget(self, dev_id: int) -> None:
        self._devices.pop(dev_id, None)

    def _boot(self) -> None:
        try:
            devices = boot.read(self._config_path) if self._boots else {}
        except UblkLoopError as error:
            _log.error("%s", error)
            devices = {}
        for dev_id, words in devices.items():
            if listing.sysfs_ino(dev_id) or dev_id in self._devices:
                continue
            self._nr_booting += 1
            Adding(self, protocol.Add(words), self._booted)
        if not self._nr_booting:
            systemd.notify("READY=1")

    def _booted(self, reply: Reply) -> None:
        if reply.exit_code:
            _log.error("%s: %s", self._config_path, reply.err.strip())
        self._nr_booting -= 1
        if not self._nr_booting:
            systemd.notify("READY=1")

    def _start_watchdog(self) -> None:
        within_s = systemd.watchdog_s()
        if within_s is not None:
            systemd.notify("WATCHDOG=1")
            self.loop.call_later(within_s / 2, self._start_watchdog)

    # ---- requests ----

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            if len(self._sessions) >= MAX_SESSIONS:
                connection.close()
                return
            self._sessions.add(_Session(self, connection, self._sessions.discard))

    def handle(self, request: protocol.Request, session: _Session) -> None:
        """Do what a client asks for, and have the session reply."""
        if isinstance(request, protocol.Run):
            running = Running(self, request, session.reply)
            session.on_hang_up = running.abandon
        elif isinstance(request, protocol.Add):
            adding = Adding(self, request, session.reply)
            session.on_hang_up = adding.abandon
        elif isinstance(request, protocol.Recover):
            self._recover(request, session)
        elif isinstance(request, protocol.Upgrade):
            self._upgrade(request, session)
        elif isinstance(request, protocol.Reload):
            self._reload(request, session)
        elif isinstance(request, protocol.Status):
            session.reply(Reply(document=self._status()))
        else:
            session.reply(Reply())
            self.stop()

    def _recover(self, request: protocol.Recover, session: _Session) -> None:
        def done(live: Any, error: Exception | None) -> None:
            session.reply(Reply(out=live) if error is None else _refusal(error))

        how = {"as_json": request.as_json, "two_lines": request.two_lines}
        self._supervised(request.dev_id).recover(done, **how)

    def _upgrade(self, request: protocol.Upgrade, session: _Session) -> None:
        def done(live: Any, error: Exception | None) -> None:
            session.reply(Reply(document=live) if error is None else _refusal(error))

        device = self._devices.get(request.dev_id)
        if device is None:
            what = f"upgrade dev {request.dev_id}"
            done(None, DaemonError(errno.ENOENT, what, "the daemon serves no such device"))
            return
        device.upgrade(done, serve_upgrade(request.dev_id))

    def _reload(self, request: protocol.Reload, session: _Session) -> None:
        if not os.access(request.executable, os.X_OK):
            hint = f"{request.executable} is no program that it could execute"
            session.reply(_refusal(DaemonError(errno.ENOEXEC, "daemon", hint)))
            return
        is_busy = any(device.phase != "SERVED" for device in self._devices.values())
        reloads = not is_busy and not self.nr_under_way
        session.reply(Reply(document={"reloads": reloads}))
        if reloads:
            self._execute(request.executable)

    def _execute(self, executable: str) -> None:
        # The same process, so the servers remain its children, and systemd sees nothing. Clients
        # that come meanwhile wait in the socket's queue.
        _log.info("daemon executes %s", executable)
        self._let_standbys_go()
        environment = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        if log.says_priorities():
            environment["JOURNAL_STREAM"] = "1"
        words = ["-m", "ublk_loop", "daemon", "--reloaded", "--config", self._config_path]
        os.dup2(self._listener.fileno(), systemd.FIRST_FD)
        os.set_inheritable(systemd.FIRST_FD, True)  # which dup2() does not, if it is that already
        os.execve(executable, [executable, *words], environment)

    def added(self, dev_id: int, server: process.ServerProcess) -> None:
        """Take over a server that was just started."""
        self._supervised(dev_id).take(server)

    def ended(self) -> None:
        """Count out what was under way and is answered, and have a child wait for the next."""
        self.nr_under_way -= 1
        self._refill()

    def _refill(self) -> None:
        self.standby.refill()
        self.servers.refill()

    def _let_standbys_go(self) -> None:
        self.standby.close()
        self.servers.close()

    def _status(self) -> dict[str, Any]:
        devices = [
            {
                "dev_id": dev_id,
                "phase": device.phase,
                "server_pid": device.server_pid,
                "nr_recoveries": device.nr_recoveries,
            }
            for dev_id, device in sorted(self._devices.items())
        ]
        orphans = sorted(set(_dev_ids()) - set(self._devices))
        return {"pid": os.getpid(), "devices": devices, "orphans": orphans}


class Adding:
    """A device on its way: its server until it is live, then its scheduler, then a reply.

    :param done: called once with the reply.
    """

    def __init__(
        self, daemon: Daemon, request: protocol.Add, done: Callable[[Reply], None]
    ) -> None:
        self._daemon = daemon
        self._daemon.nr_under_way += 1
        self._loop = daemon.loop
        self._reply = done
        self._is_answered = False
        self._reader = daemon.standby.ask(request)
        self._launch = daemon.servers.take(self._reader.answer_fd)
        os.close(self._reader.answer_fd)
        reader = self._reader.process
        self._loop.watch(reader.fileno(), lambda: let_go(self._loop, reader))
        self._loop.watch(self._reader.fileno(), self._reader_done)
        self._loop.watch(self._launch.report_fd, self._reported)
        self._timer = self._loop.call_later(LAUNCH_TIMEOUT_S, self._timed_out)

    def abandon(self) -> None:
        """Take the device back: nobody waits for it any more."""
        self._fail(DaemonError(errno.EINTR, "add"))

    def _done(self, reply: Reply) -> None:
        self._reply(reply)
        self._daemon.ended()

    def _reported(self) -> None:
        launch = self._launch
        try:
            is_live = launch.hear()
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        if is_live:
            self._close()
            self._daemon.added(launch.dev_id, launch.process)
            _log.info("dev %d: pid %d serves it", launch.dev_id, launch.process.pid)
            self._set_scheduler()

    def _set_scheduler(self) -> None:
        # Before the reply: while the kernel changes it, new requests wait until all in flight are
        # over, and a client's may be held up by the backing.
        is_there = self._reader.tell(b"%d" % self._launch.dev_id)
        self._timer = self._loop.call_later(scheduler.WAIT_S if is_there else 0, self._answer)

    def _reader_done(self) -> None:
        self._loop.unwatch(self._reader.fileno())
        self._reader.close()
        if self._launch.is_live:
            self._answer()

    def _answer(self) -> None:
        if self._is_answered:
            return
        self._is_answered = True
        self._timer.cancel()
        launch = self._launch
        warning = f"ublk: warning: {one_line(launch.warning)}\n" if launch.warning else ""
        self._done(Reply(out=launch.live, err=warning))

    def _timed_out(self) -> None:
        self._fail(self._launch.timed_out())

    def _fail(self, error: Exception) -> None:
        launch = self._launch
        if launch.report_fd < 0:
            return
        self._close()
        self._reader.hang_up()
        # Waits for the server's end; the reply says that nothing is left, so it comes after that.
        helper = process.fork(lambda: _take_back(launch), keep=[launch.process.fileno()])

        def ended() -> None:
            let_go(self._loop, helper)
            launch.reap(0)
            launch.close()
            self._done(_refusal(error))

        self._loop.watch(helper.fileno(), ended)

    def _close(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._launch.report_fd)
        self._launch.close_pipes()


class Running:
    """A command in a fork of the daemon: it has loaded all that a command needs.

    :param done: called once with the reply.
    """

    def __init__(
        self, daemon: Daemon, request: protocol.Run, done: Callable[[Reply], None]
    ) -> None:
        self._daemon = daemon
        self._daemon.nr_under_way += 1
        self._loop = daemon.loop
        self._done = done
        self._child = daemon.standby.ask(request)
        self._child.close()
        self._answer = b""
        self._loop.watch(self._child.answer_fd, self._read)

    def abandon(self) -> None:
        """End the command: nobody waits for it any more."""
        self._child.process.send(signal.SIGTERM)

    def _read(self) -> None:
        data = os.read(self._child.answer_fd, 65536)
        self._answer += data
        if data:
            return
        self._loop.unwatch(self._child.answer_fd)
        os.close(self._child.answer_fd)
        self._loop.watch(self._child.process.fileno(), self._ended)

    def _ended(self) -> None:
        let_go(self._loop, self._child.process)
        try:
            reply = protocol.parse_reply(self._answer)
        except ValueError:
            reply = Reply(1, err="ublk: the command died; the daemon's log says more\n")
        self._done(reply)
        self._daemon.ended()


class _Session:
    """A connection: reads one request, waits for its reply, writes that, and closes."""

    def __init__(
        self, daemon: Daemon, connection: socket.socket, forget: Callable[[_Session], None]
    ) -> None:
        self.on_hang_up: Callable[[], None] | None = None
        self._daemon = daemon
        self._loop = daemon.loop
        self._connection = connection
        self._forget = forget
        self._data = b""
        self._is_busy = False
        self._pack = protocol.pack_reply
        connection.setblocking(False)
        self._timer = self._loop.call_later(REQUEST_TIMEOUT_S, self._close)
        self._loop.watch(connection.fileno(), self._read)

    def reply(self, reply: Reply) -> None:
        """Send the reply, as fast as the client takes it; nothing if it has hung up."""
        self.on_hang_up = None
        if self._connection.fileno() < 0:
            return
        self._data = self._pack(reply)
        self._timer.cancel()
        self._timer = self._loop.call_later(REQUEST_TIMEOUT_S, self._close)
        self._write()

    def _read(self) -> None:
        try:
            data = self._connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._is_busy:
            # It has hung up, or says more than the one request of a connection.
            self._close()
            return
        self._data += data
        line, newline, rest = self._data.partition(b"\n")
        if newline or len(self._data) > protocol.MAX_REQUEST_BYTES:
            self._timer.cancel()
            self._is_busy = True
            self._take(line, rest)

    def _take(self, line: bytes, rest: bytes) -> None:
        try:
            if rest:
                raise ValueError("there is more than one line")
            where = self._where()
            if where:
                self.reply(Reply(EXIT_DO_IT_YOURSELF, err=where))
                return
            request = protocol.parse_request(line)
            if isinstance(request, protocol.Run):
                self._pack = protocol.pack_output
                if request.version != __version__:
                    self.reply(Reply(EXIT_DO_IT_YOURSELF))
                    return
                request = _as_add(request)
        except (ValueError, PermissionError) as error:
            self.reply(Reply(1, err=f"ublk: bad request: {_one_line(str(error))}\n"))
            return
        self._daemon.handle(request, self)

    def _where(self) -> str:
        """Return why the client's paths are not the daemon's; empty: they are.

        :raises PermissionError: the client is neither root nor the daemon's user.
        """
        option = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("iII", option)
        if uid not in (0, os.geteuid()):
            raise PermissionError(f"user {uid} may not")
        try:
            theirs = os.readlink(f"/proc/{pid}/ns/mnt"), os.stat(f"/proc/{pid}/root").st_ino
        except OSError:
            return "the client is gone, or in another pid namespace"
        ours = os.readlink("/proc/self/ns/mnt"), os.stat("/proc/self/root").st_ino
        return "" if theirs == ours else "the client is in another mount namespace"

    def _write(self) -> None:
        try:
            self._data = self._data[self._connection.send(self._data) :]
        except BlockingIOError:
            pass
        except OSError:
            self._data = b""
        if self._data:
            self._loop.watch(self._connection.fileno(), self._write, events.WRITE)
        else:
            self._close()

    def _close(self) -> None:
        if self._connection.fileno() < 0:
            return
        self._timer.cancel()
        self._loop.unwatch(self._connection.fileno())
        # The client sees the end now, not once the last child is gone that was forked meanwhile.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._forget(self)
        hang_up, self.on_hang_up = self.on_hang_up, None
        if hang_up is not None:
            hang_up()


def _as_add(request: protocol.Run) -> protocol.Request:
    # What forks a server has to be the daemon itself.
    if request.words[:1] != ("add",):
        return request
    two_lines = client.two_lines(request.environment)
    words = client.add_words(request.words[1:], request.environment)
    return protocol.Add(words, request.cwd, two_lines)


def _do_apart(request: protocol.Request) -> bytes:
    # In a child: what writes to much memory of Python's, none of which a server should inherit.
    if isinstance(request, protocol.Add):
        return _read_words(request)
    assert isinstance(request, protocol.Run)
    return _run_command(request)


def _rehearse() -> None:
    _read_words(protocol.Add(("-t", "null")))
    scheduler.set_scheduler(-1)  # there is none


def _run_command(request: protocol.Run) -> bytes:
    os.environ.update(request.environment)
    try:
        os.chdir(request.cwd)
    except OSError as error:
        return protocol.pack_reply(Reply(1, err=f"ublk: {request.cwd}: {error.strerror}\n"))
    return protocol.pack_reply(cli.run(request.words))


def _read_words(request: protocol.Add) -> bytes:
    try:
        wish, as_json = cli_add.read_words(request)
    except ValueError as error:
        return protocol.pack_report(**protocol.pack_error(error))
    return protocol.pack_wish(
        protocol.Wish(wish.dev_id, wish.options, wish.spec, as_json, request.two_lines)
    )


def _take_back(launch: Launch) -> int:
    launch.abandon()
    return 0


def _refusal(error: Exception) -> Reply:
    if isinstance(error, protocol.UsageRefused):
        return Reply(2, err=str(error))
    return Reply(1, err=f"ublk: {_one_line(str(error))}\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _known_dev_ids() -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(paths.state_dir())
        return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{1,7}\.json", name))
    return []


def _dev_ids() -> list[int]:
    from .control import list_dev_ids

    return list_dev_ids()


# ---- the start of the process ----


def main(config_path: str, *, detach: bool = False, reloaded: bool = False) -> None:
    """Be the daemon, or start it in the background and return once it listens.

    :param reloaded: this process was the daemon before: the devices of its configuration that are
        no more were deleted since.
    :raises DaemonError: EBUSY if one runs; what the folder or the socket said.
    """
    state.make_state_dir()
    if not detach:
        lock_fd = _take_lock()
        log.to_stderr()
        if os.environ.get("JOURNAL_STREAM"):
            log.say_priorities()
        _run(config_path, lock_fd, boots=not reloaded)
        return
    ready_fd, child_fd = os.pipe2(os.O_CLOEXEC)
    child = process.fork(lambda: _detached(config_path, child_fd))
    os.close(child_fd)
    with child, open(ready_fd, "rb") as ready:
        text = ready.read()
    if text != b"ready":
        raise (
            protocol.unpack_error(json.loads(text)) if text else DaemonError(errno.ESRCH, "daemon")
        )


def _detached(config_path: str, ready_fd: int) -> int:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null_fd = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null_fd, fd)
    ready_fd = fcntl.fcntl(ready_fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.dup2(ready_fd, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    log.to_stderr()
    log.switch("ublk-daemon", f"{paths.state_dir()}/daemon.log", keep_early=False)
    try:
        lock_fd = _take_lock()
    except UblkLoopError as error:
        os.write(3, protocol.pack_report(**protocol.pack_error(error)))
        return 1
    _run(config_path, lock_fd, on_listening=lambda: _say_ready(3))
    return 0


def _say_ready(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, b"ready")
    os.close(fd)


def _run(
    config_path: str,
    lock_fd: int,
    *,
    boots: bool = True,
    on_listening: Callable[[], None] = lambda: None,
) -> None:
    os.chdir("/")
    os.umask(0o077)
    listener = _listen()
    on_listening()
    raise_file_limit()
    process.protect_from_reclaim()
    preload()
    _log.info("daemon runs, pid %d", os.getpid())
    Daemon(listener, config_path, boots).run()
    os.close(lock_fd)


def raise_file_limit() -> None:
    """Have room for a pidfd a device, and for what servers open, though who began us may not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < NR_FILES:
        with contextlib.suppress(OSError, ValueError):  # root may
            resource.setrlimit(resource.RLIMIT_NOFILE, (NR_FILES, NR_FILES))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _take_lock() -> int:
    # Held for life: it makes the daemon the only one of its state folder. A lock of POSIX's, which
    # no child has a part in: one just forked would keep the next daemon out.
    path = f"{paths.state_dir()}/daemon.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DaemonError(errno.EBUSY, "daemon", "one runs already") from None
    return fd


def _listen() -> socket.socket:
    try:
        given_fd = systemd.listen_fd()
    except ValueError as error:
        raise DaemonError(errno.EINVAL, "daemon", str(error)) from error
    if given_fd is not None:
        return socket.socket(fileno=given_fd)
    path = paths.socket_path()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with paths.short(path) as address:
        listener.bind(address)
    os.chmod(path, 0o600)
    listener.listen(128)
    return listener


def preload() -> None:
    """Load what a server needs, once, and keep the garbage collector from writing to it."""
    import ctypes
    import faulthandler  # noqa: F401

    from . import control, device, handover, manage, sandbox, target, workqueue  # noqa: F401

    ctypes.CDLL(None)
    process.paths_of_python()
    with contextlib.suppress(OSError):
        sandbox.make_filter()
    gc.collect()
    gc.freeze()
