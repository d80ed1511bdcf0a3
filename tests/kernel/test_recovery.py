"""Servers that die, and what their devices' users see of it: nothing but a pause.

The daemon replaces a dead server. A test kills servers, and looks at the bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ublk_loop import client, manage, state, uapi
from ublk_loop.control import Control, list_dev_ids

WaitUntil = Callable[..., None]
FILE_BYTES = 64 << 20
NR_KILLS = 5


@pytest.fixture(scope="module")
def daemon(driver: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One daemon for all tests here, as it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("daemon") / "state"
        patch.setenv("UBLK_LOOP_STATE_DIR", str(folder))
        patch.delenv("UBLK_LOOP_DAEMON", raising=False)
        client.start()
        yield
        client.ask({"command": "stop"})


@pytest.fixture
def add(
    daemon: None, control: Control, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """``add("-t null", *words)`` by the daemon; at the end, delete what is left."""
    monkeypatch.delenv("UBLK_LOOP_DAEMON")
    monkeypatch.delenv("UBLK_LOOP_TEST")

    def add(line: str, *words: object) -> dict[str, Any]:
        said = [*line.split(), *map(str, words), "--json"]
        reply = client.ask({"command": "add", "words": said, "cwd": "/", "two_lines": False})
        assert reply is not None
        assert (reply["exit_code"], reply["err"]) == (0, "")
        device = json.loads(reply["out"])
        assert isinstance(device, dict)
        return device

    yield add
    for dev_id in list_dev_ids():
        with contextlib.suppress(OSError):
            manage.delete(dev_id, force=True)
    client.start()


def _supervised(dev_id: int) -> dict[str, Any] | None:
    reply = client.ask({"command": "status"})
    assert reply is not None
    found = [each for each in reply["document"]["devices"] if each["dev_id"] == dev_id]
    return found[0] if found else None


def _server_pid(dev_id: int) -> int:
    device = _supervised(dev_id)
    return (device["server_pid"] or 0) if device and device["phase"] == "SERVED" else 0


def _kill_server(dev_id: int, wait_until: WaitUntil) -> int:
    """Kill the device's server, wait for the next one, and return its pid."""
    pid = _server_pid(dev_id)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: _server_pid(dev_id) not in (0, pid), timeout_s=60)
    return _server_pid(dev_id)


def test_mounted_file_system_goes_on_when_its_server_is_killed_again_and_again(
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    mounted: Any,
    pattern: Callable[..., bytes],
    wait_until: WaitUntil,
) -> None:
    added = add("-t loop -f", backing_file(FILE_BYTES))
    run("mkfs.ext4", "-q", added["block_device"])
    errors: list[OSError] = []
    written: list[int] = []
    stop = threading.Event()

    with mounted(added["block_device"], "-o", "errors=remount-ro") as folder:

        def write() -> None:
            number = 0
            try:
                while not stop.is_set():
                    with (folder / f"file{number % 8}").open("wb") as file:
                        file.write(pattern(256 << 10, seed=number))
                        file.flush()
                        os.fsync(file.fileno())
                    written.append(number)
                    number += 1
            except OSError as error:
                errors.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        pids = {added["server_pid"]}
        for _ in range(NR_KILLS):
            done = len(written)
            pids.add(_kill_server(added["dev_id"], wait_until))
            wait_until(lambda done=done: len(written) > done or errors, timeout_s=60)  # type: ignore[misc]
        stop.set()
        writer.join(60)
        assert errors == []
        assert len(pids) == NR_KILLS + 1
    with mounted(added["block_device"], "-o", "ro") as folder:
        for number in written[-8:]:
            data = (folder / f"file{number % 8}").read_bytes()
            assert data == pattern(256 << 10, seed=number)
    run("e2fsck", "-fn", added["block_device"])
    device = _supervised(added["dev_id"])
    assert device is not None
    assert device["nr_recoveries"] == NR_KILLS


def test_device_is_deleted_and_its_requests_fail_when_no_server_comes_in_time(
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    path = backing_file(FILE_BYTES)
    added = add("-t loop --recovery_deadline 3 -f", path)
    os.truncate(path, 4096)  # no server will serve that
    with open_block(added["block_device"]) as block:
        os.kill(added["server_pid"], signal.SIGKILL)
        with pytest.raises(OSError, match="Input/output error"):
            block.read(1 << 20, 4096)
    wait_until(lambda: list_dev_ids() == [], timeout_s=60)
    wait_until(lambda: _supervised(added["dev_id"]) is None, timeout_s=60)
    assert state.read(added["dev_id"]) is None


def test_server_is_replaced_when_it_died_while_no_daemon_ran(
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    data = pattern(8192)
    added = add("-t loop -f", backing_file(FILE_BYTES, data))
    reply = client.ask({"command": "status"})
    assert reply is not None
    pid = reply["document"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), timeout_s=30)
    os.kill(added["server_pid"], signal.SIGKILL)
    client.start()
    with open_block(added["block_device"]) as block:
        assert block.read(0, 8192) == data
    wait_until(lambda: _server_pid(added["dev_id"]), timeout_s=60)


def test_device_added_with_r_waits_for_recover_by_hand(
    add: Callable[..., dict[str, Any]], control: Control, wait_until: WaitUntil
) -> None:
    added = add("-t null -r 1")
    dev_id = added["dev_id"]
    os.kill(added["server_pid"], signal.SIGKILL)
    wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_QUIESCED, timeout_s=30)
    wait_until(lambda: _supervised(dev_id) is None, timeout_s=30)
    request = {"command": "recover", "dev_id": dev_id, "as_json": True, "two_lines": False}
    reply = client.ask(request)
    assert reply is not None
    assert (reply["exit_code"], reply["err"]) == (0, "")
    assert json.loads(reply["out"])["state"] == "LIVE"
    again = client.ask(request)
    assert again is not None
    assert again["exit_code"] == 1
    assert "is alive" in again["err"]
    none = client.ask({**request, "dev_id": 77})
    assert none is not None
    assert (none["exit_code"], none["out"]) == (1, "")


def test_write_of_a_killed_server_does_not_land_after_that_of_the_next(
    add: Callable[..., dict[str, Any]],
    run: Callable[..., str],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    # A disk that holds a write back for 3 s: the dead server's is in flight when it dies.
    nr_sectors = 16 << 11
    run("modprobe", "brd", "rd_nr=1", "rd_size=16384")
    table = f"0 {nr_sectors} delay /dev/ram0 0 0 /dev/ram0 0 3000"
    run("dmsetup", "create", "slow", "--table", table)
    run("dmsetup", "mknodes")
    try:
        # In flight requests fail, so that the old write is not simply issued again.
        added = add("-t loop --recovery fail_inflight -f /dev/mapper/slow")
        old, new = b"o" * 4096, b"n" * 4096
        errors: list[OSError] = []

        def write_old() -> None:
            with open_block(added["block_device"]) as block:
                try:
                    block.write(0, old)
                except OSError as error:
                    errors.append(error)

        def is_in_flight() -> bool:
            # The target's status: how many reads, writes and flushes it holds back.
            return int(run("dmsetup", "status", "slow").split()[4]) > 0

        writer = threading.Thread(target=write_old)
        writer.start()
        wait_until(is_in_flight, timeout_s=20)
        os.kill(added["server_pid"], signal.SIGKILL)
        writer.join(60)
        assert len(errors) == 1
        with open_block(added["block_device"]) as block:
            block.write(0, new)
        run("dmsetup", "suspend", "slow")  # waits for all that is in flight below
        run("dmsetup", "resume", "slow")
        with open_block("/dev/ram0") as disk:
            assert disk.read(0, 4096) == new
    finally:
        for dev_id in list_dev_ids():
            manage.delete(dev_id, force=True)
        run("dmsetup", "remove", "--retry", "slow")
        run("rmmod", "brd")
