"""ublk upgrade: a device in use gets a new server, and its users see nothing but a pause."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from daemons import Daemon
from proc_files import has_stopped
from writers import SyncedWriter

from ublk_loop import cli

WaitUntil = Callable[..., None]
FILE_BYTES = 64 << 20


def _upgrade(daemon: Daemon, dev_id: int) -> dict[str, Any]:
    reply = daemon.ask("upgrade", dev_id=dev_id)
    assert (reply["exit_code"], reply["err"]) == (0, "")
    done = reply["document"]
    assert isinstance(done, dict)
    return done


@pytest.mark.deadline(400)
def test_device_under_a_mounted_file_system_is_upgraded_with_all_data_and_no_error(
    daemon: Daemon,
    ublk: Any,
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    mounted: Any,
    wait_until: WaitUntil,
) -> None:
    added = daemon.add("-t loop -f", backing_file(FILE_BYTES))
    dev_id = added["dev_id"]
    run("mkfs.ext4", "-q", added["block_device"])
    daemon_pid = daemon.pid
    done = []
    with (
        mounted(added["block_device"], "-o", "errors=remount-ro") as folder,
        SyncedWriter(folder) as writer,
    ):
        wait_until(lambda: writer.goes_on(0), timeout_s=60)
        shown = ublk("upgrade", "-a", "--json")
        assert (shown.returncode, shown.stderr) == (0, "")
        [upgraded] = json.loads(shown.stdout)
        assert (upgraded["dev_id"], upgraded["error"]) == (dev_id, None)
        done.append(upgraded["done"])
        reply = daemon.ask("reload", executable=sys.executable)  # once more: it has executed itself
        assert reply["document"] == {"reloads": True}
        for _ in range(3):
            before = writer.nr_written
            done.append(_upgrade(daemon, dev_id))
            wait_until(partial(writer.goes_on, before), timeout_s=60)
    print("upgrades:", done)
    assert writer.errors == []
    assert [each["was_killed"] for each in done] == [False] * 4
    assert all(each["pause_ms"] > 0 for each in done)
    pids = [added["server_pid"], *(each["server_pid"] for each in done)]
    assert len(set(pids)) == 5
    assert [each["old_server_pid"] for each in done] == pids[:-1]
    assert daemon.pid == daemon_pid
    assert b"--reloaded" in Path(f"/proc/{daemon_pid}/cmdline").read_bytes()
    assert daemon.server_pid(dev_id) == pids[-1]
    with mounted(added["block_device"], "-o", "ro") as folder:
        writer.check(folder)
    run("e2fsck", "-fn", added["block_device"])


def test_device_is_upgraded_when_its_server_hangs_with_every_tag_in_flight(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    data = pattern(8192)
    added = daemon.add("-t loop -d 1 -f", backing_file(FILE_BYTES, data))
    os.kill(added["server_pid"], signal.SIGSTOP)
    wait_until(lambda: has_stopped(added["server_pid"]), timeout_s=20)
    answers: list[bytes] = []

    def read() -> None:
        with open_block(added["block_device"]) as block:
            answers.append(block.read(0, 8192))

    reader = threading.Thread(target=read)
    reader.start()
    inflight = Path(f"/sys/block/ublkb{added['dev_id']}/inflight")
    wait_until(lambda: inflight.read_text().split() != ["0", "0"], timeout_s=20)
    done = _upgrade(daemon, added["dev_id"])
    reader.join(60)
    assert done["was_killed"]
    assert answers == [data]


@pytest.mark.parametrize("recovery", ["none", "fail_all"])
def test_upgrade_is_refused_and_the_server_stays_where_requests_would_fail(
    daemon: Daemon, features: int, recovery: str
) -> None:
    reply = daemon.ask_add(f"-t null --recovery {recovery} --json")
    if reply["exit_code"]:
        assert "does not offer it" in reply["err"]  # FAIL_IO came in v6.13
        return
    added = json.loads(reply["out"])
    reply = daemon.ask("upgrade", dev_id=added["dev_id"])
    assert reply["exit_code"] == 1
    assert "without recovery" in reply["err"] or "requests would fail" in reply["err"]
    assert daemon.server_pid(added["dev_id"]) == added["server_pid"]
    assert daemon.ask("upgrade", dev_id=77)["exit_code"] == 1


def test_upgrade_of_all_skips_what_was_added_so_that_it_cannot_be(daemon: Daemon) -> None:
    # A bug: it failed as soon as there was a ram device.
    ram, upgraded = daemon.add("-t ram --size 1M"), daemon.add("-t null")
    result = CliRunner().invoke(cli.cli, ["upgrade", "-a", "--json"], prog_name="ublk")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ublk: dev {ram['dev_id']} is skipped: it was added without recovery")
    skipped, done = json.loads(result.stdout)
    assert (skipped["dev_id"], skipped["done"], skipped["error"]) == (ram["dev_id"], None, None)
    assert skipped["skipped"] in line
    assert done["done"]["old_server_pid"] == upgraded["server_pid"]
    assert daemon.server_pid(ram["dev_id"]) == ram["server_pid"]
    named = CliRunner().invoke(cli.cli, ["upgrade", "-n", str(ram["dev_id"])], prog_name="ublk")
    assert (named.exit_code, named.stdout) == (1, "")
    assert skipped["skipped"] in named.stderr


def test_upgrade_is_refused_and_the_server_stays_where_its_file_is_at_its_path_no_more(
    daemon: Daemon, backing_file: Callable[..., Path]
) -> None:
    # A bug: the server left, none could take its place, and the device was deleted with its data.
    path = backing_file(FILE_BYTES)
    elsewhere = path.with_suffix(".moved")
    added = daemon.add("-t loop -f", path)
    path.rename(elsewhere)
    for _ in ("no file", "another file"):
        reply = daemon.ask("upgrade", dev_id=added["dev_id"])
        assert (reply["exit_code"], reply["err"].count("\n")) == (1, 1)
        assert str(path) in reply["err"]
        assert daemon.server_pid(added["dev_id"]) == added["server_pid"]
        path.write_bytes(bytes(512))
    elsewhere.rename(path)
    assert _upgrade(daemon, added["dev_id"])["old_server_pid"] == added["server_pid"]


def test_device_on_a_loop_device_that_was_detached_meanwhile_is_upgraded(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    run: Callable[..., str],
    open_block: Any,
) -> None:
    # A bug: it went with the old server, its last user, and the device with all that was on it.
    loop = run("losetup", "-f", "--show", backing_file(1 << 20, pattern(1 << 20))).strip()
    added = daemon.add("-t loop -f", loop)
    run("losetup", "--detach", loop)
    new_pid = _upgrade(daemon, added["dev_id"])["server_pid"]
    with open_block(added["block_device"], read_only=True) as block:
        assert block.read(0, 1 << 20) == pattern(1 << 20)
    [shown] = [
        os.readlink(fd) for fd in Path(f"/proc/{new_pid}/fd").iterdir() if fd.is_block_device()
    ]
    assert shown == loop


def test_daemon_stays_when_what_is_installed_cannot_take_its_place(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = daemon.add("-t null")
    image = Path(f"/proc/{daemon.pid}/auxv")  # addresses, which are others once it has executed
    before = image.read_bytes()
    monkeypatch.delattr("ublk_loop.sandbox", raising=False)
    monkeypatch.setitem(sys.modules, "ublk_loop.sandbox", None)
    refused = CliRunner().invoke(cli.cli, ["upgrade", "-a"], prog_name="ublk")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "cannot run, nothing was changed" in refused.stderr
    assert daemon.ask("reload", executable="/nonexistent/python")["exit_code"] == 1
    assert image.read_bytes() == before
    assert daemon.server_pid(added["dev_id"]) == added["server_pid"]


def test_upgrade_without_a_daemon_replaces_the_server_too(
    ublk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing_file: Callable[..., Path]
) -> None:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path / "state"))
    added = json.loads(
        ublk("add", "-f", backing_file(FILE_BYTES), "-t", "loop", "-i", 1, "--json").stdout
    )
    shown = ublk("upgrade", "-n", added["dev_id"])
    assert (shown.returncode, shown.stderr) == (0, "")
    words = f"dev id {added['dev_id']}: daemon pid {added['server_pid']} -> "
    assert shown.stdout.startswith(words)
    assert "pause" in shown.stdout
    listed = json.loads(ublk("list", "--json").stdout)
    assert listed[0]["state"] == "LIVE"
    assert listed[0]["server_pid"] != added["server_pid"]
    assert ublk("del", "-a").returncode == 0
