"""``ublk`` itself, csrc/client.c: what it sends, what it prints, and when Python takes over."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ublk_loop import protocol

SOURCE = Path(__file__).parents[2] / "ublk_loop" / "csrc" / "client.c"
FALLBACK = '#!/bin/sh\necho "python: $*"\nexit 7\n'


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    command = ["cc", "-Wall", "-Wextra", "-Werror", '-DUBLK_LOOP_VERSION="1.2"']
    subprocess.run([*command, "-o", folder / "ublk", SOURCE], check=True)
    (folder / "ublk-command").write_text(FALLBACK)
    (folder / "ublk-command").chmod(0o755)
    return folder / "ublk"


class Ublk:
    """Runs the program in a folder of its own, with a daemon that answers once, or none."""

    def __init__(self, program: Path, folder: Path, threads: ThreadPoolExecutor) -> None:
        self._program = program
        self._folder = folder
        self._threads = threads

    def __call__(self, *words: str | bytes, **environment: str) -> tuple[int, bytes, bytes]:
        done = subprocess.run(
            [self._program, *words],
            env={"UBLK_LOOP_STATE_DIR": str(self._folder), **environment},
            cwd=self._folder,
            capture_output=True,
            timeout=20,
        )
        return done.returncode, done.stdout, done.stderr

    def answer(self, reply: bytes) -> Future[bytes]:
        """Have a daemon answer the next request, which is what the result will be."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.chdir(self._folder)
        listener.bind("daemon.sock")
        listener.listen()
        listener.settimeout(20)
        return self._threads.submit(_answer, listener, reply)


def _answer(listener: socket.socket, reply: bytes) -> bytes:
    with listener:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            request = file.readline()
            connection.sendall(reply)
    return request


@pytest.fixture
def ublk(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ublk]:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        yield Ublk(program, tmp_path, threads)


def test_words_folder_and_variables_go_to_the_daemon_whose_answer_is_printed(
    ublk: Ublk, tmp_path: Path
) -> None:
    reply = protocol.Reply(3, "out\n", "\udcffrr\n")
    asked = ublk.answer(protocol.pack_output(reply))
    words = ("del", "-n", 'a "b" \\ \n\t\x7f')
    assert ublk(*words, UBLK_LOOP_LIST_STYLE="two-lines", HOME="/x") == (3, b"out\n", b"\xffrr\n")
    environment = {"UBLK_LOOP_STATE_DIR": str(tmp_path), "UBLK_LOOP_LIST_STYLE": "two-lines"}
    request = protocol.parse_request(asked.result().rstrip(b"\n"))
    assert request == protocol.Run("1.2", words, str(tmp_path), environment)


def test_answer_of_a_megabyte_is_printed_whole(ublk: Ublk) -> None:
    text = "x" * (1 << 20)
    ublk.answer(protocol.pack_output(protocol.Reply(0, text, "")))
    assert ublk("list") == (0, text.encode(), b"")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--version",),
        ("daemon", "--status"),
        ("add", "-t", "null", "--foreground"),
        ("del", "-n", "0", "--lazy"),
        ("list", "--help"),
        ("add", "-f", b"\xc3\xa4"),
    ],
)
def test_python_does_what_is_not_for_the_daemon(ublk: Ublk, words: tuple[str | bytes, ...]) -> None:
    ublk.answer(b"never\n").cancel()
    spoken = b" ".join(word if isinstance(word, bytes) else word.encode() for word in words)
    assert ublk(*words) == (7, b"python: " + spoken + b"\n", b"")
    with socket.socket(socket.AF_UNIX) as last:  # lets the daemon's thread end
        last.connect("daemon.sock")


def test_python_does_it_where_no_daemon_runs_or_may_be_used(ublk: Ublk) -> None:
    assert ublk("list") == (7, b"python: list\n", b"")
    assert ublk("list", UBLK_LOOP_DAEMON="0") == (7, b"python: list\n", b"")


@pytest.mark.parametrize("reply", [b'{"exit_code":-1}\n', b"-1 0 0\n"])
def test_python_does_it_if_the_daemon_will_not(ublk: Ublk, reply: bytes) -> None:
    ublk.answer(reply)
    assert ublk("list") == (7, b"python: list\n", b"")


def test_command_that_a_daemon_took_before_it_ended_is_not_done_twice(ublk: Ublk) -> None:
    ublk.answer(b"")
    assert ublk("add", "-t", "null") == (1, b"", b"ublk: daemon: it went away\n")


def test_answer_that_was_cut_short_is_an_error(ublk: Ublk) -> None:
    ublk.answer(b"0 5 0\nabc")
    assert ublk("list") == (1, b"", b"ublk: daemon: its reply was cut short\n")


def test_output_that_cannot_be_written_is_an_error(ublk: Ublk, program: Path) -> None:
    ublk.answer(protocol.pack_output(protocol.Reply(0, "text\n", "")))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [program, "list"], env={"UBLK_LOOP_STATE_DIR": "."}, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"ublk: stdout: No space left on device\n")
