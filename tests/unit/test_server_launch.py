"""The start of a server: what its launcher hears, and what it inherits. Needs no driver."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublk_loop import launch as launching
from ublk_loop import log, process, protocol, server, state
from ublk_loop.errors import BackingFileError, DaemonError
from ublk_loop.server import Request
from ublk_loop.state import DeviceOptions, TargetSpec

REQUEST = Request(DeviceOptions(), TargetSpec("null", nr_bytes=1 << 20))
Serve = Callable[..., None]


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(log, "JOURNAL_PATH", str(tmp_path / "no-journal"))
    state.make_state_dir()
    return tmp_path / "state"


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Serve], Any]:
    """Launch a server whose serve() is the given function."""

    def run(serve: Serve, timeout_s: float = 10, **options: Any) -> Any:
        monkeypatch.setattr(server, "serve", serve)
        return launching.launch(REQUEST, lambda *_: None, timeout_s, **options)

    return run


def _no_child_is_left() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_launch_returns_what_the_server_says_once_it_is_live(launch: Callable[..., Any]) -> None:
    def serve(find_request: Any, describe: object, on_added: Any, on_live: Any) -> None:
        on_added(5, 0, "")
        on_live(5, {"pid": os.getpid(), "request": find_request().spec.type})

    live = launch(serve)
    assert live["request"] == "null"
    assert os.waitpid(live["pid"], 0)[1] == 0


def test_launch_raises_the_servers_error(launch: Callable[..., Any]) -> None:
    def serve(*_: object) -> None:
        raise BackingFileError(errno.EACCES, "/srv/d.img", "be root")

    with pytest.raises(BackingFileError) as caught:
        launch(serve)
    assert str(caught.value) == "/srv/d.img: Permission denied: be root"
    assert _no_child_is_left()


def test_launch_raises_value_error_when_the_server_does(launch: Callable[..., Any]) -> None:
    def serve(*_: object) -> None:
        raise ValueError("size 3 is odd")

    with pytest.raises(ValueError, match="size 3 is odd"):
        launch(serve)


def test_launch_tells_the_signal_and_the_last_words_when_the_server_crashes(
    launch: Callable[..., Any],
) -> None:
    def serve(*_: object) -> None:
        os.write(2, b"an assertion failed\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DaemonError) as caught:
        launch(serve)
    assert caught.value.errno == errno.ESRCH
    assert "SIGKILL" in str(caught.value)
    assert "an assertion failed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _no_child_is_left()


def test_launch_quotes_the_exception_when_the_server_has_a_bug(launch: Callable[..., Any]) -> None:
    def serve(*_: object) -> None:
        raise KeyError("what is this")

    with pytest.raises(DaemonError, match="KeyError: 'what is this'"):
        launch(serve)
    assert _no_child_is_left()


def test_launch_ends_the_server_when_it_does_not_report_in_time(
    launch: Callable[..., Any], state_dir: Path
) -> None:
    def serve(*_: object) -> None:
        (state_dir / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    with pytest.raises(DaemonError) as caught:
        launch(serve, timeout_s=0.5)
    assert caught.value.errno == errno.ETIMEDOUT
    assert _no_child_is_left()


def test_launch_ends_the_server_when_its_caller_is_interrupted(
    launch: Callable[..., Any],
) -> None:
    launcher = os.getpid()

    def serve(*_: object) -> None:
        os.kill(launcher, signal.SIGINT)
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt):
        launch(serve)
    assert _no_child_is_left()


def test_server_gives_up_when_nobody_waits_for_it() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)

    def serve(on_added: Any, on_live: Any) -> None:
        on_added(1, 0, "")

    assert server._serve_and_report(serve, "add", False, write_fd) == 1
    os.close(write_fd)


def test_launch_passes_on_what_the_server_warns_of(
    launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(request: object, describe: object, on_added: Any, on_live: Any) -> None:
        on_added(5, 0, "two devices")
        on_live(5, os.getpid())

    warnings: list[str] = []
    os.waitpid(launch(serve, on_warning=warnings.append), 0)
    assert warnings == ["two devices"]


def test_server_is_detached_from_session_folder_and_files(launch: Callable[..., Any]) -> None:
    inherited = os.open("/", os.O_RDONLY)
    os.set_inheritable(inherited, True)

    def serve(request: object, describe: object, on_added: Any, on_live: Any) -> None:
        on_live(
            1,
            {
                "pid": os.getpid(),
                "sid": os.getsid(0),
                "cwd": os.getcwd(),
                "umask": os.umask(0),
                "stdin": os.readlink("/proc/self/fd/0"),
                "has_inherited": os.path.exists(f"/proc/self/fd/{inherited}")
                and os.readlink(f"/proc/self/fd/{inherited}") == "/",
                "nr_fds": len(os.listdir("/proc/self/fd")),
            },
        )

    live = launch(serve)
    os.close(inherited)
    assert live["sid"] == live["pid"]
    assert live["cwd"] == "/"
    assert live["umask"] == 0o077
    assert live["stdin"] == os.devnull
    assert not live["has_inherited"]
    assert live["nr_fds"] == 5  # 0, 1, 2, the report, and the listing itself
    os.waitpid(live["pid"], 0)


def test_server_logs_to_a_file_when_there_is_no_journal(launch: Callable[..., Any]) -> None:
    def serve(request: object, describe: object, on_added: Any, on_live: Any) -> None:
        logging.getLogger("ublk_loop").warning("before it is live")
        on_live(7, os.getpid())
        logging.getLogger("ublk_loop").warning("while it is live")
        print("from print")
        sys.stderr.write("from stderr\n")

    os.waitpid(launch(serve), 0)
    text = Path(state.log_path(7)).read_text()
    lines = ["before it is live", "while it is live", "from print", "from stderr"]
    assert [line.removeprefix("WARNING ") for line in text.splitlines()] == lines


def test_server_logs_its_error_and_exits_with_1_after_it_was_live(
    launch: Callable[..., Any],
) -> None:
    def serve(request: object, describe: object, on_added: Any, on_live: Any) -> None:
        on_live(7, os.getpid())
        raise DaemonError(errno.EIO, "queue 0")

    assert os.waitstatus_to_exitcode(os.waitpid(launch(serve), 0)[1]) == 1
    assert "queue 0: Input/output error" in Path(state.log_path(7)).read_text()


def test_server_logs_to_the_journal_when_there_is_one(
    launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as journal:
        journal.bind(str(path))
        journal.listen()
        monkeypatch.setattr(log, "JOURNAL_PATH", str(path))

        def serve(request: object, describe: object, on_added: Any, on_live: Any) -> None:
            on_live(7, os.getpid())
            logging.getLogger("ublk_loop").info("hello")
            logging.getLogger("ublk_loop").error("oh")

        os.waitpid(launch(serve), 0)
        stream, _ = journal.accept()
        with stream, stream.makefile() as lines:
            assert lines.read().splitlines() == ["ublk-7", "", *"61000", "<6>hello", "<3>oh"]
    assert not os.path.exists(state.log_path(7))


def test_error_crosses_the_pipe_unchanged() -> None:
    for error in (DaemonError(errno.EPERM, "a", "b"), BackingFileError(errno.EIO, "c")):
        packed = json.loads(json.dumps(protocol.pack_error(error)))
        again = protocol.unpack_error(packed)
        assert type(again) is type(error)
        assert str(again) == str(error)


def test_a_process_is_found_by_pid_and_start_time_only() -> None:
    pid = os.getpid()
    ticks = process.start_ticks(pid)
    assert ticks is not None
    found = process.ServerProcess.find(pid, ticks)
    assert found is not None
    found.close()
    found.close()
    assert process.ServerProcess.find(pid, ticks + 1) is None
    assert process.ServerProcess.find(-1) is None
    assert process.ServerProcess.find(0) is None


def test_a_process_is_waited_for_and_killed() -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    found = process.ServerProcess.find(pid)
    assert found is not None
    with found:
        assert not found.wait(0)
        found.send(signal.SIGKILL)
        assert found.wait(5)
        os.waitpid(pid, 0)
        found.send(signal.SIGKILL)
    assert process.start_ticks(pid) is None


def test_start_time_is_read_when_the_name_has_blanks_and_parentheses(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("a) R 1 (b")
        time.sleep(600)
        os._exit(0)
    try:
        mine = process.start_ticks(os.getpid())
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}/comm").read_text() != "a) R 1 (b\n":
            assert time.monotonic() < deadline
        ticks = process.start_ticks(pid)
        assert ticks is not None and mine is not None
        assert mine <= ticks <= mine + 100 * 3600
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
