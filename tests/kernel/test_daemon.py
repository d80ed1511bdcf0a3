"""The daemon on the real driver: it starts servers, and no device depends on it.

A daemon runs as a process of its own, with a state folder of the tests'.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from commands import UBLK
from daemons import Daemon
from proc_files import memory_kib

from ublk_loop import client, manage, paths, uapi
from ublk_loop.control import Control, list_dev_ids

Ublk = Callable[..., subprocess.CompletedProcess[str]]
WaitUntil = Callable[..., None]
FILE_BYTES = 4 << 20
MAX_PSS_KIB, NR_LIMIT_IS_FOR = 6 << 10, 100
NR_DEVICES = int(os.environ.get("UBLK_LOOP_SOAK_DEVICES", "20"))


def _is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_add_starts_a_daemon_once_and_both_outlive_the_command(
    daemon: Daemon,
    ublk: Ublk,
    backing_file: Callable[..., Path],
    control: Control,
    features: int,
) -> None:
    daemon.kill()
    path = backing_file(FILE_BYTES)
    words = ["add", "-t", "null", "--size", "1G"]
    both = [subprocess.Popen([UBLK, *words], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [each.communicate(timeout=60)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    nr_queues = min(2, os.cpu_count() or 1) if features & uapi.UBLK_F_BATCH_IO else 1
    assert all(re.match(rf"dev id \d: nr_hw_queues {nr_queues} ", text) for text in outputs)
    tids = [set(re.findall(r"tid (\d+)", text)) for text in outputs]
    assert [len(each) for each in tids] == [1, 1]  # one thread, for two queues too
    added = ublk("add", "-t", "loop", "-f", path, "-n", 7)
    assert (added.returncode, added.stderr) == (0, "")

    status = daemon.status()
    assert [device["dev_id"] for device in status["devices"]] == [0, 1, 7]
    assert {device["phase"] for device in status["devices"]} == {"SERVED"}
    info = control.get_dev_info(7)
    assert info.flags & uapi.UBLK_F_USER_RECOVERY_REISSUE
    assert f"daemon pid {info.ublksrv_pid} flags {info.flags:#x} state LIVE" in added.stdout
    parent = int(Path(f"/proc/{info.ublksrv_pid}/stat").read_text().split()[3])
    assert parent == status["pid"]
    assert oct(os.stat(paths.socket_path()).st_mode & 0o777) == "0o600"

    refused = ublk("daemon", "--detach")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"ublk: daemon: [^\n]*one runs already\n", refused.stderr)
    shown = ublk("daemon", "--status")
    assert "dev id 7: SERVED" in shown.stdout
    deleted = ublk("del", "-a")
    assert (deleted.returncode, deleted.stderr) == (0, "")
    assert daemon.status()["devices"] == []


def test_device_of_a_script_for_another_server_is_dead_after_its_server(
    daemon: Daemon, ublk: Ublk, control: Control, monkeypatch: Any, wait_until: WaitUntil
) -> None:
    # The daemon replaced the server: such scripts wait for DEAD.
    monkeypatch.setenv("UBLK_LOOP_DEL_FORCE", "1")
    added = ublk("add", "-t", "null", "-n", 3)
    assert (added.returncode, added.stderr) == (0, "")
    os.kill(control.get_dev_info(3).ublksrv_pid, signal.SIGKILL)
    wait_until(lambda: control.get_dev_info(3).state == uapi.UBLK_S_DEV_DEAD)
    assert ublk("add", "-t", "null", "-n", 4, "-r", 1).returncode == 0
    assert control.get_dev_info(4).flags & uapi.UBLK_F_USER_RECOVERY
    assert ublk("del", "-a").returncode == 0


def test_add_by_the_daemon_fails_as_without_one_and_leaves_nothing(
    daemon: Daemon, tmp_path: Path, backing_file: Callable[..., Path]
) -> None:
    reply = daemon.ask_add("-t loop -f", tmp_path / "absent")
    assert (reply["exit_code"], reply["out"]) == (1, "")
    assert reply["err"] == f"ublk: {tmp_path}/absent: No such file or directory\n"
    reply = daemon.ask_add("-t null -q 0")
    assert reply["exit_code"] == 2
    assert "Invalid value for '-q'" in reply["err"]
    reply = daemon.ask_add("-t loop --size 8M -f", backing_file(FILE_BYTES))
    assert "do not fit" in reply["err"]
    assert daemon.status()["devices"] == []
    assert list_dev_ids() == []


def test_devices_are_served_on_when_the_daemon_is_killed_and_the_next_one_finds_them(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    path = backing_file(FILE_BYTES)
    added = daemon.add("-t loop -f", path)
    daemon.kill()
    data = pattern(8192)
    with open_block(added["block_device"]) as block:
        block.write(0, data)
    assert path.read_bytes()[:8192] == data

    daemon.start()
    [device] = daemon.status()["devices"]
    assert (device["dev_id"], device["server_pid"]) == (added["dev_id"], added["server_pid"])
    daemon.kill(signal.SIGTERM)
    assert _is_alive(added["server_pid"])
    assert client.ask({"command": "status"}) is None
    daemon.start()
    manage.delete(added["dev_id"])
    wait_until(lambda: daemon.status()["devices"] == [])


def test_daemon_starts_while_a_child_of_the_last_one_has_copies_of_its_files(
    daemon: Daemon,
) -> None:
    # As each child has until it has closed them. Its socket was taken for a daemon, so that none
    # was started, and requests of a device whose server had died too were never answered.
    pid = daemon.pid
    copies = _files_of(pid)
    assert len(copies) > 3
    daemon.kill()
    sockets = [fd for fd in copies if stat.S_ISSOCK(os.fstat(fd).st_mode)]
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(daemon.start)
        assert not wait([started], 1).done
        for fd in sockets:
            os.close(fd)
        started.result(60)
    for fd in set(copies) - set(sockets):  # the lock among them
        os.close(fd)
    assert daemon.pid != pid


def _files_of(pid: int) -> list[int]:
    pidfd_getfd = 438
    pidfd = os.pidfd_open(pid)
    try:
        fds = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
        copies = [ctypes.CDLL(None).syscall(pidfd_getfd, pidfd, fd, 0) for fd in fds]
        return [fd for fd in copies if fd >= 0]  # else it has closed that meanwhile
    finally:
        os.close(pidfd)


def test_device_is_taken_back_when_its_client_hangs_up(
    daemon: Daemon, wait_until: WaitUntil, tmp_path: Path
) -> None:
    connection = client._connect()
    assert connection is not None
    request = {"command": "add", "words": ["-t", "null"], "cwd": "/", "two_lines": False}
    connection.sendall(json.dumps(request).encode() + b"\n")
    connection.close()
    daemon.add("-t null -n 9")  # whatever became of the other one, the daemon goes on
    manage.delete(9)
    wait_until(lambda: daemon.status()["devices"] == [], timeout_s=30)
    wait_until(lambda: list_dev_ids() == [], timeout_s=30)


def test_daemon_answers_a_bad_request_with_an_error(daemon: Daemon) -> None:
    pid = daemon.pid
    for line in (
        b"\n",
        b"{}\n",
        b"\xff\n",
        b'{"command":"quit"}\n',
        b'{"command":"stop"}\n{}\n',
        b"[" * 300_000,
    ):
        connection = client._connect()
        assert connection is not None
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.settimeout(10)
            connection.sendall(line)
            reply = json.loads(connection.makefile("rb").read())
            assert reply["exit_code"] == 1
            assert re.fullmatch(r"ublk: bad request: [^\n]+\n", reply["err"])
    assert daemon.pid == pid


def test_device_has_its_scheduler_when_add_answers(
    daemon: Daemon, backing_file: Callable[..., Path]
) -> None:
    """A client's reads hung: its first one never ended, and the scheduler was changed meanwhile.

    The kernel then holds back all that come until those in flight are over.
    """
    for _ in range(3):
        dev_id = daemon.add("-t loop -f", backing_file(FILE_BYTES))["dev_id"]
        assert "[none]" in Path(f"/sys/block/ublkb{dev_id}/queue/scheduler").read_text()
        assert manage.delete(dev_id) == []


def test_daemon_adds_the_devices_of_its_configuration(
    daemon: Daemon, tmp_path: Path, backing_file: Callable[..., Path], wait_until: WaitUntil
) -> None:
    daemon.kill(signal.SIGTERM)
    path = backing_file(FILE_BYTES)
    config = tmp_path / "ublk.toml"
    config.write_text(
        f'[device.3]\ntype = "loop"\nfile = "{path}"\nread_only = true\n'
        '[device.4]\ntype = "null"\nrecovery = "none"\n'
        '[device.5]\ntype = "loop"\nfile = "/nonexistent"\n'
    )
    words = [sys.executable, "-m", "ublk_loop", "daemon", "--config", str(config)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: client.ask({"command": "status"}) is not None, timeout_s=30)
        wait_until(lambda: len(daemon.status()["devices"]) == 2, timeout_s=30)
        assert list_dev_ids() == [3, 4]
        assert Path("/sys/block/ublkb3/ro").read_text() == "1\n"
        client.ask({"command": "stop"})
        log = process.communicate(timeout=30)[1]
        assert "/nonexistent: No such file or directory" in log
    finally:
        process.kill()
        process.wait()


@pytest.mark.deadline(120 + 5 * NR_DEVICES)
def test_idle_device_costs_little_memory_and_the_daemon_does_not_wake_up(
    daemon: Daemon, wait_until: WaitUntil
) -> None:
    began = time.monotonic()
    added = [daemon.add("-t null -d 128") for _ in range(NR_DEVICES)]
    added_s = time.monotonic() - began
    daemon_pid = daemon.pid
    servers = [memory_kib(device["server_pid"]) for device in added]
    pss_kib = [memory["Pss"] for memory in servers]
    with_daemon_kib = (sum(pss_kib) + memory_kib(daemon_pid)["Pss"]) / NR_DEVICES
    print(f"{NR_DEVICES} devices added in {added_s:.1f} s; PSS of a server {min(pss_kib)} to")
    print(f"{max(pss_kib)} KiB, on average {with_daemon_kib:.0f} with its share of the daemon")
    assert max(map(_pss_kib_among_many, servers)) <= MAX_PSS_KIB
    assert len(daemon.status()["devices"]) == NR_DEVICES

    def switches() -> str:
        return re.findall(r"ctxt_switches:\s+\d+", Path(f"/proc/{daemon_pid}/status").read_text())

    # A device that was just added is looked at once more a little later.
    wait_until(lambda: _is_the_same_for(2, switches), timeout_s=20)
    began = time.monotonic()
    for device in added:
        manage.delete(device["dev_id"])
    wait_until(lambda: daemon.status()["devices"] == [], timeout_s=30)
    print(f"all deleted in {time.monotonic() - began:.1f} s")


def _pss_kib_among_many(memory: dict[str, int]) -> float:
    # What is shared at all is shared by all, in the mean by 21.9 of 20 servers, a standby and the
    # daemon; so among fewer servers than the limit is for a share is larger than among those.
    shared_kib = memory["Shared_Clean"] + memory["Shared_Dirty"]
    return memory["Private_Clean"] + memory["Private_Dirty"] + shared_kib / NR_LIMIT_IS_FOR


def _is_the_same_for(seconds: float, look: Callable[[], object]) -> bool:
    before, end = look(), time.monotonic() + seconds
    while look() == before:
        if time.monotonic() >= end:
            return True
        time.sleep(0.05)
    return False
