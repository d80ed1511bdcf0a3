"""``ublk del`` on the real driver: it refuses while a device is in use, says by whom, and ends.

Each way of using a device is tried on each driver: with TRY_STOP_DEV (SAFE_STOP_DEV among the
features, v7.0) the driver refuses, without it ``ublk del`` claims the device and looks round.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from servers import reap_children

from ublk_loop import manage, state, uapi
from ublk_loop.control import Control

Here = Callable[..., Result]
WaitUntil = Callable[..., None]
FILE_BYTES = 16 << 20
CLONE_NEWNS = 0x00020000
PROT_READ, MAP_SHARED = 1, 1
pytestmark = pytest.mark.usefixtures("state_dir")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place to mount on."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


@pytest.fixture
def dev_id(here: Here, backing_file: Callable[..., Path]) -> int:
    """A loop device with an ext4 file system."""
    result = here("add -t loop --json -f", backing_file(FILE_BYTES))
    assert result.exit_code == 0, result.output
    dev_id: int = json.loads(result.stdout)["dev_id"]
    subprocess.run(["mkfs.ext4", "-q", f"/dev/ublkb{dev_id}"], check=True)
    return dev_id


def _is_gone(dev_id: int) -> bool:
    nodes = (f"/dev/ublkb{dev_id}", f"/dev/ublkc{dev_id}", state.state_path(dev_id))
    return not any(os.path.exists(path) for path in nodes)


def _assert_refused(here: Here, dev_id: int, *words: str) -> list[dict[str, Any]]:
    """``del`` refuses, names who uses the device, and has changed nothing."""
    result = here("del --json -n", dev_id)
    assert result.exit_code == 1, result.output
    first, *lines = result.stderr.splitlines()
    assert first.startswith(f"ublk: del dev {dev_id}: Device or resource busy: ")
    document = json.loads(result.stdout)
    assert [one["dev_id"] for one in document] == [dev_id]
    assert not document[0]["deleted"]
    found: list[dict[str, Any]] = document[0]["holders"]
    assert len(lines) == len(found)
    assert all(line.startswith("\t") for line in lines)
    for word in words:
        assert any(word in line for line in lines), result.stderr
    assert "state LIVE" in here("list -n", dev_id).stdout
    return found


def _assert_deleted(here: Here, dev_id: int) -> None:
    result = here("del -n", dev_id)
    assert (result.exit_code, result.output) == (0, "")
    assert _is_gone(dev_id)


@contextlib.contextmanager
def _process(function: Callable[[], None]) -> Iterator[int]:
    """A child that has run ``function`` and waits to be killed."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os.write(write_fd, b"\n")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write_fd)
    try:
        assert os.read(read_fd, 1) == b"\n"
        yield pid
    finally:
        os.close(read_fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_del_refuses_while_the_device_is_mounted(here: Here, dev_id: int, mounted: Any) -> None:
    with mounted(f"/dev/ublkb{dev_id}") as folder:
        (folder / "file").write_bytes(b"kept")
        found = _assert_refused(here, dev_id, f"mounted on {folder}")
        assert [one["kind"] for one in found] == ["mount"]
    _assert_deleted(here, dev_id)


def test_del_names_a_process_of_the_namespace_in_which_the_device_is_mounted(
    here: Here, dev_id: int, folder: Path
) -> None:
    def mount() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", f"/dev/ublkb{dev_id}", folder], check=True)

    with _process(mount) as pid:
        _assert_refused(here, dev_id, f"mounted on {folder}, in the mount namespace of pid {pid}")
    _assert_deleted(here, dev_id)


def test_del_names_a_process_in_a_lazily_unmounted_file_system(
    here: Here, dev_id: int, run: Callable[..., str], folder: Path
) -> None:
    run("mount", f"/dev/ublkb{dev_id}", folder)
    with _process(lambda: os.chdir(folder)) as pid:
        run("umount", "--lazy", folder)
        found = _assert_refused(here, dev_id, f"is in use by pid {pid} ")
        assert [one["kind"] for one in found] == ["file"]
    _assert_deleted(here, dev_id)


@pytest.mark.parametrize("way", ["open", "map"])
def test_del_names_a_process_that_has_the_device_open_or_mapped(
    here: Here, dev_id: int, way: str
) -> None:
    def use() -> None:
        fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY)
        if way == "map":
            # Not the mmap module, which keeps a descriptor of its own.
            mmap = ctypes.CDLL(None).mmap
            mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
            assert mmap(None, 4096, PROT_READ, MAP_SHARED, fd, 0) != -1
            os.close(fd)

    command = Path("/proc/self/comm").read_text().strip()
    with _process(use) as pid:
        found = _assert_refused(here, dev_id, f"pid {pid} ({command})")
        assert [(one["kind"], one["pid"]) for one in found] == [(way, pid)]
    _assert_deleted(here, dev_id)


def test_del_names_what_is_stacked_on_the_device(
    here: Here, dev_id: int, run: Callable[..., str], attach_loop: Any
) -> None:
    path = f"/dev/ublkb{dev_id}"
    table = f"0 {FILE_BYTES // 512} linear {path} 0"
    run("dmsetup", "create", "ublk-test", "--noudevsync", "--table", table)
    try:
        _assert_refused(here, dev_id, "held by dm-", "(ublk-test)")
    finally:
        run("dmsetup", "remove", "--noudevsync", "ublk-test")
    with attach_loop(Path(path)) as loop:
        _assert_refused(here, dev_id, f"held by {loop.name}")
    _assert_deleted(here, dev_id)


def test_del_refuses_while_the_device_is_swap(
    here: Here, dev_id: int, run: Callable[..., str]
) -> None:
    path = f"/dev/ublkb{dev_id}"
    run("mkswap", path)
    run("swapon", path)
    try:
        _assert_refused(here, dev_id, f"{path} is in use as swap")
    finally:
        run("swapoff", path)
    _assert_deleted(here, dev_id)


def test_del_names_the_mount_of_a_partition(
    here: Here, backing_file: Callable[..., Path], mounted: Any, wait_until: WaitUntil
) -> None:
    path = backing_file(FILE_BYTES)
    # One MBR entry: Linux, from sector 2048 to the end.
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little")
    entry += (FILE_BYTES // 512 - 2048).to_bytes(4, "little")
    with path.open("r+b") as file:
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")
    added = json.loads(here("add -t loop --json -f", path).stdout)
    part = f"{added['block_device']}p1"
    wait_until(lambda: os.path.exists(part))  # the driver may look for partitions later
    subprocess.run(["mkfs.ext4", "-q", part], check=True)
    with mounted(part) as folder:
        _assert_refused(here, added["dev_id"], f"mounted on {folder}")
    _assert_deleted(here, added["dev_id"])


def test_del_of_a_device_that_a_probe_holds_for_a_moment_succeeds(here: Here, dev_id: int) -> None:
    fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.5)  # what is tested is that del outwaits it
        os._exit(0)
    os.close(fd)
    _assert_deleted(here, dev_id)
    os.waitpid(pid, 0)


def test_force_stops_a_mounted_device_and_all_is_gone_once_it_is_unmounted(
    here: Here,
    dev_id: int,
    control: Control,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., str],
    folder: Path,
    wait_until: WaitUntil,
) -> None:
    monkeypatch.setattr(manage, "DEL_TIMEOUT_S", 1.0)
    server_pid = control.get_dev_info(dev_id).ublksrv_pid
    run("mount", f"/dev/ublkb{dev_id}", folder)
    result = here("del --force -n", dev_id)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "it goes when that ends" in result.stderr
    assert _is_gone(dev_id)
    reap_children()
    assert not os.path.exists(f"/proc/{server_pid}")
    run("umount", folder)
    added = here("add -t null -n", dev_id)  # the number is free again
    assert added.exit_code == 0, added.output
    _assert_deleted(here, dev_id)


def test_del_of_all_goes_on_after_a_refusal_and_says_which(
    here: Here, dev_id: int, mounted: Any
) -> None:
    other = json.loads(here("add -t null --json").stdout)["dev_id"]
    with mounted(f"/dev/ublkb{dev_id}") as folder:
        result = here("del -a --json")
        assert result.exit_code == 1
        done = {one["dev_id"]: one["deleted"] for one in json.loads(result.stdout)}
        assert done == {dev_id: False, other: True}
        assert f"del dev {dev_id}: " in result.stderr
        assert f"mounted on {folder}" in result.stderr
        assert _is_gone(other)
    _assert_deleted(here, dev_id)


def test_lazy_deletes_a_device_when_its_last_user_is_gone(
    here: Here,
    dev_id: int,
    ublk: Callable[..., subprocess.CompletedProcess[str]],
    run: Callable[..., str],
    folder: Path,
    state_dir: Path,
    wait_until: WaitUntil,
) -> None:
    run("mount", f"/dev/ublkb{dev_id}", folder)
    first = ublk("del", "-n", dev_id, "--lazy")
    assert (first.returncode, first.stdout) == (0, "")
    assert "once nobody uses it" in first.stderr
    again = here("del --lazy -n", dev_id)
    assert again.exit_code == 0
    assert "waits for that already" in again.stderr
    (folder / "file").write_bytes(b"still served")
    assert "state LIVE" in here("list -n", dev_id).stdout
    run("umount", folder)
    wait_until(lambda: _is_gone(dev_id), timeout_s=30)
    wait_until(lambda: os.listdir(state_dir) == [])


def test_lazy_deletes_a_device_at_once_when_nobody_uses_it(here: Here, dev_id: int) -> None:
    result = here("del --lazy -n", dev_id)
    assert (result.exit_code, result.output) == (0, "")
    assert _is_gone(dev_id)


def test_lazy_leaves_a_later_device_of_the_same_number_alone(
    here: Here,
    dev_id: int,
    ublk: Callable[..., subprocess.CompletedProcess[str]],
    run: Callable[..., str],
    folder: Path,
    state_dir: Path,
    wait_until: WaitUntil,
) -> None:
    run("mount", f"/dev/ublkb{dev_id}", folder)
    assert ublk("del", "-n", dev_id, "--lazy").returncode == 0
    with Control() as control:
        control.stop_dev(dev_id)
    run("umount", folder)
    here("del --force -n", dev_id)  # unless the waiter has seen already that it is dead
    wait_until(lambda: _is_gone(dev_id), timeout_s=20)
    assert here("add -t null -n", dev_id).exit_code == 0
    wait_until(lambda: not (state_dir / f"{dev_id}.lazy").exists(), timeout_s=30)
    assert "state LIVE" in here("list -n", dev_id).stdout
    _assert_deleted(here, dev_id)


def test_del_of_a_dead_device_does_not_ask_who_uses_it(
    here: Here, dev_id: int, control: Control, wait_until: WaitUntil
) -> None:
    with open(f"/dev/ublkb{dev_id}", "rb"):
        os.kill(control.get_dev_info(dev_id).ublksrv_pid, signal.SIGKILL)
        wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_DEAD, timeout_s=20)
    _assert_deleted(here, dev_id)


def test_environment_makes_del_as_ruthless_as_the_reference_servers(
    here: Here, dev_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UBLK_LOOP_DEL_FORCE", "1")
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        open(f"/dev/ublkb{dev_id}", "rb") as device,
        subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[device.fileno()]) as user,
    ):
        device.close()
        monkeypatch.setattr(manage, "DEL_TIMEOUT_S", 1.0)
        result = here("del -n", dev_id)
        user.communicate()
    assert result.exit_code == 0
    assert _is_gone(dev_id)
