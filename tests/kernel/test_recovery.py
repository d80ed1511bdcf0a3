"""Servers that die, and what their devices' users see of it: nothing but a pause.

The daemon replaces a dead server. A test kills servers, and looks at the bytes.

UBLK_LOOP_SOAK_DAEMON_KILLS is how many are killed at any moment, instead of the few that CI does,
and UBLK_LOOP_SOAK_OPTIONS adds words to their device's `ublk add`, such as --no_batch.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon
from loads import DEV_BYTES, nr_written
from writers import SyncedWriter

from ublk_loop import manage, state, uapi
from ublk_loop.control import Control, list_dev_ids

WaitUntil = Callable[..., None]
FILE_BYTES = 64 << 20
NR_KILLS = 5
NR_ANY_KILLS = int(os.environ.get("UBLK_LOOP_SOAK_DAEMON_KILLS", "5"))
ANY_KILLS_OPTIONS = os.environ.get("UBLK_LOOP_SOAK_OPTIONS", "")
SEED = int(os.environ.get("UBLK_LOOP_SOAK_SEED", "1"))


def test_mounted_file_system_goes_on_when_its_server_is_killed_again_and_again(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    mounted: Any,
    wait_until: WaitUntil,
) -> None:
    added = daemon.add("-t loop -f", backing_file(FILE_BYTES))
    run("mkfs.ext4", "-q", added["block_device"])
    pids = {added["server_pid"]}
    with (
        mounted(added["block_device"], "-o", "errors=remount-ro") as folder,
        SyncedWriter(folder) as writer,
    ):
        for _ in range(NR_KILLS):
            done = writer.nr_written
            pids.add(daemon.kill_server(added["dev_id"], wait_until))
            wait_until(partial(writer.goes_on, done), timeout_s=60)
    assert writer.errors == []
    assert len(pids) == NR_KILLS + 1
    with mounted(added["block_device"], "-o", "ro") as folder:
        writer.check(folder)
    run("e2fsck", "-fn", added["block_device"])
    device = daemon.device(added["dev_id"])
    assert device is not None
    assert device["nr_recoveries"] == NR_KILLS


@pytest.mark.deadline(120 + 15 * NR_ANY_KILLS)
def test_kills_of_server_and_daemon_at_any_moment_lose_nothing_and_show_no_error(
    verifying_load: Any,
    daemon: Daemon,
    backing_file: Callable[..., Path],
    wait_until: WaitUntil,
) -> None:
    rng = random.Random(SEED)
    # The deadline runs from the first of kills that come close together.
    line = f"-t loop --recovery_deadline 86400 {ANY_KILLS_OPTIONS} -f"
    added = daemon.add(line, backing_file(DEV_BYTES))
    dev_id = added["dev_id"]
    load = verifying_load(added["block_device"])
    for number in range(NR_ANY_KILLS):
        before = nr_written(dev_id)
        wait_until(lambda before=before: nr_written(dev_id) > before, timeout_s=60)  # type: ignore[misc]
        print(f"{number} of {NR_ANY_KILLS} killed, {before} writes done", flush=True)
        # Any moment: there is nothing to wait for. Who lived for 2 s is replaced at once.
        time.sleep(rng.random() * 3)
        pid = daemon.server_pid(dev_id)
        if daemon_dies := rng.random() < 0.2:
            daemon.kill()
        os.kill(pid, signal.SIGKILL)
        if daemon_dies:
            daemon.start()
        wait_until(lambda pid=pid: daemon.server_pid(dev_id) not in (0, pid), timeout_s=60)  # type: ignore[misc]
    before = nr_written(dev_id)
    wait_until(lambda: nr_written(dev_id) > before + 100, timeout_s=60)
    assert [job["error"] for job in load.end().values()] == [0, 0]


def _check_is_deleted(daemon: Daemon, dev_id: int, wait_until: WaitUntil) -> None:
    """Wait until it is, and daemon and state folder know nothing of it any more."""
    wait_until(lambda: list_dev_ids() == [], timeout_s=60)
    wait_until(lambda: daemon.device(dev_id) is None, timeout_s=60)
    assert state.read(dev_id) is None


def _put_another_in_its_place(path: Path) -> Path:
    moved = path.rename(path.with_suffix(".moved"))
    with path.open("wb") as file:
        file.truncate(FILE_BYTES)
    return moved


@pytest.mark.parametrize("what", ["too small", "another file"])
def test_device_is_deleted_and_its_requests_fail_when_no_server_comes_in_time(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    open_block: Any,
    wait_until: WaitUntil,
    what: str,
) -> None:
    path = backing_file(FILE_BYTES)
    added = daemon.add("-t loop --recovery_deadline 3 -f", path)
    if what == "too small":  # no server will serve that
        os.truncate(path, 4096)
    else:
        _put_another_in_its_place(path).unlink()
    with open_block(added["block_device"]) as block:
        os.kill(added["server_pid"], signal.SIGKILL)
        with pytest.raises(OSError, match="Input/output error"):
            block.read(1 << 20, 4096)
    _check_is_deleted(daemon, added["dev_id"], wait_until)


def test_another_file_at_the_path_is_not_served_and_the_right_one_is_once_it_is_back(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    """It was served, to a client that had the device open."""
    data = pattern(8192)
    path = backing_file(FILE_BYTES, data)
    added = daemon.add("-t loop --recovery_deadline 86400 -f", path)
    known = state.read(added["dev_id"])
    how = {"dev_id": added["dev_id"], "as_json": True, "two_lines": False}
    with open_block(added["block_device"]) as block:
        moved = _put_another_in_its_place(path)
        os.kill(added["server_pid"], signal.SIGKILL)
        reply = daemon.ask("recover", **how)
        while reply["exit_code"] and "is alive" in reply["err"]:
            reply = daemon.ask("recover", **how)  # the daemon has not seen it die
        assert (reply["exit_code"], reply["out"], reply["err"].count("\n")) == (1, "", 1)
        assert f"{path}: {os.strerror(errno.ESTALE)}: " in reply["err"]
        moved.rename(path)
        wait_until(lambda: daemon.server_pid(added["dev_id"]) not in (0, added["server_pid"]), 60)
        assert block.read(0, 8192) == data
    now = state.read(added["dev_id"])
    assert known is not None
    assert now is not None
    assert now.spec == known.spec


def test_server_is_replaced_when_it_died_while_no_daemon_ran_and_the_next_daemon_knows(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    data = pattern(8192)
    added = daemon.add("-t loop -f", backing_file(FILE_BYTES, data))
    daemon.kill()
    os.kill(added["server_pid"], signal.SIGKILL)
    daemon.start()
    with open_block(added["block_device"]) as block:
        assert block.read(0, 8192) == data
    wait_until(lambda: daemon.server_pid(added["dev_id"]), timeout_s=60)
    device = daemon.device(added["dev_id"])
    assert device is not None
    assert device["nr_recoveries"] == 1
    assert daemon.ask("reload", executable=sys.executable)["document"] == {"reloads": True}
    assert daemon.device(added["dev_id"]) == device


def _begin_a_recovery(control: Control, dev_id: int) -> None:
    # As a server that is killed before it has fetched a queue. Linux 6.12 lets no other begin then.
    control.start_user_recovery(dev_id)


def test_device_that_no_server_can_take_over_any_more_is_deleted_before_its_deadline(
    daemon: Daemon, control: Control, features: int, open_block: Any, wait_until: WaitUntil
) -> None:
    """The daemon tried it until the deadline."""
    added = daemon.add("-t null --recovery_deadline 86400")
    dev_id = added["dev_id"]
    daemon.kill()
    with open_block(added["block_device"]) as block:
        os.kill(added["server_pid"], signal.SIGKILL)
        _begin_a_recovery(control, dev_id)
        daemon.start()
        if features & uapi.UBLK_F_QUIESCE:
            assert block.read(0, 4096) == bytes(4096)
            return
        with pytest.raises(OSError, match="Input/output error"):
            block.read(0, 4096)
    _check_is_deleted(daemon, dev_id, wait_until)


def test_device_that_no_server_can_take_over_any_more_says_so_and_is_deleted_by_hand(
    daemon: Daemon, control: Control, features: int, wait_until: WaitUntil
) -> None:
    added = daemon.add("-t null -r 1")
    dev_id = added["dev_id"]
    os.kill(added["server_pid"], signal.SIGKILL)
    _begin_a_recovery(control, dev_id)
    wait_until(lambda: daemon.device(dev_id) is None, timeout_s=30)
    reply = daemon.ask("recover", dev_id=dev_id, as_json=True, two_lines=False)
    if features & uapi.UBLK_F_QUIESCE:
        assert (reply["exit_code"], reply["err"]) == (0, "")
        return
    assert reply["exit_code"] == 1
    assert os.strerror(errno.ENOTRECOVERABLE) in reply["err"]
    assert control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_QUIESCED
    manage.delete(dev_id)
    assert list_dev_ids() == []


def test_device_added_with_r_waits_for_recover_by_hand(
    daemon: Daemon, control: Control, wait_until: WaitUntil
) -> None:
    added = daemon.add("-t null -r 1")
    dev_id = added["dev_id"]
    os.kill(added["server_pid"], signal.SIGKILL)
    wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_QUIESCED, timeout_s=30)
    wait_until(lambda: daemon.device(dev_id) is None, timeout_s=30)
    how = {"as_json": True, "two_lines": False}
    reply = daemon.ask("recover", dev_id=dev_id, **how)
    assert (reply["exit_code"], reply["err"]) == (0, "")
    assert json.loads(reply["out"])["state"] == "LIVE"
    again = daemon.ask("recover", dev_id=dev_id, **how)
    assert again["exit_code"] == 1
    assert "is alive" in again["err"]
    none = daemon.ask("recover", dev_id=77, **how)
    assert (none["exit_code"], none["out"]) == (1, "")


def test_recover_all_serves_ours_again_and_names_those_of_others(
    daemon: Daemon, ublk: Any, control: Control, wait_until: WaitUntil
) -> None:
    added = [daemon.add("-t null -r 1") for _ in range(3)]
    for each in added:
        os.kill(each["server_pid"], signal.SIGKILL)
    dev_ids = [each["dev_id"] for each in added]
    for dev_id in dev_ids:
        wait_until(lambda n=dev_id: daemon.device(n) is None, timeout_s=30)  # type: ignore[misc]
        wait_until(
            lambda n=dev_id: control.get_dev_info(n).state == uapi.UBLK_S_DEV_QUIESCED,  # type: ignore[misc]
            timeout_s=30,
        )
    state.remove(dev_ids[2])  # as if another program had added it
    shown = ublk("recover", "-a", "--json")
    assert shown.returncode == 0
    document = json.loads(shown.stdout)
    found = [(one["dev_id"], one["done"]["state"]) for one in document["recovered"]]
    assert found == [(dev_ids[0], "LIVE"), (dev_ids[1], "LIVE")]
    assert document["orphans"] == [dev_ids[2]]
    assert shown.stderr.startswith(f"ublk: dev {dev_ids[2]}: its server is gone, ")
    assert shown.stderr.count("\n") == 1


def test_write_of_a_killed_server_does_not_land_after_that_of_the_next(
    daemon: Daemon,
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
        added = daemon.add("-t loop --recovery fail_inflight -f /dev/mapper/slow")
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
