"""ublk resize: a device's size follows its file, or what it is told, while the device is in use."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ublk_loop import uapi

Here = Callable[..., Result]
MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("state_dir")


def _added(here: Here, line: str, *words: object) -> tuple[int, str]:
    device = json.loads(here(f"add --json {line}", *words).stdout)
    return device["dev_id"], device["block_device"]


def _nr_bytes(device: str) -> int:
    return int(Path("/sys/class/block", os.path.basename(device), "size").read_text()) * 512


def test_mounted_file_system_grows_with_its_file(
    here: Here,
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    mounted: Any,
    features: int,
) -> None:
    path = backing_file(32 * MIB)
    dev_id, device = _added(here, "-t loop -f", path)
    run("mkfs.ext4", "-q", device)
    with mounted(device) as folder:
        os.truncate(path, 96 * MIB)
        result = here("resize -n", dev_id)
        if not features & uapi.UBLK_F_UPDATE_SIZE:
            assert result.exit_code == 1
            assert "does not offer it" in result.stderr
            assert _nr_bytes(device) == 32 * MIB
            return
        assert result.stdout == f"dev id {dev_id}: {96 * MIB} bytes\n"
        run("resize2fs", device)
        data = os.urandom(48 * MIB)
        (folder / "file").write_bytes(data)
    with mounted(device, "-o", "ro") as folder:
        assert (folder / "file").read_bytes() == data
    run("e2fsck", "-fn", device)
    [shown] = json.loads(here("list --json -n", dev_id).stdout)
    assert shown["nr_sectors"] == 96 * MIB // 512


def test_size_may_be_chosen_and_is_only_made_smaller_by_force_while_in_use(
    here: Here, backing_file: Callable[..., Path], open_block: Any, features: int
) -> None:
    path = backing_file(4 * MIB)
    dev_id, device = _added(here, "-t loop --size 2M -f", path)
    for size, why in (("8M", "make it longer first"), ("1000", "not a positive multiple of 512")):
        assert why in here("resize --size", size, "-n", dev_id).stderr
    if not features & uapi.UBLK_F_UPDATE_SIZE:
        return
    assert here("update_size -s 3145728 -n", dev_id).exit_code == 0  # kublk's words
    assert _nr_bytes(device) == 3 * MIB
    with open_block(device) as client:
        assert len(client.read(2 * MIB, 4096)) == 4096
        with open(device, "rb") as stdin, subprocess.Popen(["sleep", "100"], stdin=stdin) as other:
            refused = here("resize --size 1M -n", dev_id)
            other.kill()
        assert (refused.exit_code, _nr_bytes(device)) == (1, 3 * MIB)
        assert "would be lost, unless with --force" in refused.stderr
        assert here("resize --size 1M --force -n", dev_id).exit_code == 0
        assert client.read(2 * MIB, 4096) == b""  # behind the end
    assert _nr_bytes(device) == MIB
    assert here("resize -n", dev_id).exit_code == 0  # as far as it was told last
    assert _nr_bytes(device) == MIB


def test_what_a_device_has_grown_by_is_read_written_and_discarded(
    here: Here,
    backing_file: Callable[..., Path],
    ext4_folder: Path,
    open_block: Any,
    pattern: Callable[..., bytes],
    features: int,
) -> None:
    if not features & uapi.UBLK_F_UPDATE_SIZE:
        return
    path = backing_file(MIB, folder=ext4_folder)
    dev_id, device = _added(here, "-t loop -f", path)
    os.truncate(path, 64 << 30)
    assert here("resize -n", dev_id).exit_code == 0
    data = pattern(64 << 10)
    with open_block(device) as client:
        for offset in (MIB - 4096, 3 * MIB, 32 << 30, (64 << 30) - len(data)):
            assert client.read(offset, len(data)) == bytes(len(data))
            for _ in range(3):
                assert client.write(offset, data) == len(data)
            assert client.read(offset, len(data)) == data
            client.discard(offset, len(data))
            assert client.read(offset, len(data)) == bytes(len(data))
    [shown] = json.loads(here("list --json -n", dev_id).stdout)
    assert shown["state"] == "LIVE"


def test_device_whose_file_was_moved_takes_its_size_all_the_same(
    here: Here, backing_file: Callable[..., Path], features: int
) -> None:
    # A bug: "its server is gone", as none had the file open by the name that it once had.
    path = backing_file(MIB)
    dev_id, device = _added(here, "-t loop -f", path)
    moved = path.rename(path.with_suffix(".moved"))
    path.touch()
    os.truncate(moved, 2 * MIB)
    result = here("resize -n", dev_id)
    if features & uapi.UBLK_F_UPDATE_SIZE:
        assert (result.exit_code, _nr_bytes(device)) == (0, 2 * MIB)
    assert "server" not in result.stderr


def test_recovery_keeps_the_new_size(
    here: Here, backing_file: Callable[..., Path], features: int
) -> None:
    if not features & uapi.UBLK_F_UPDATE_SIZE:
        return
    path = backing_file(MIB)
    dev_id, device = _added(here, "-t loop -i 1 -f", path)
    os.truncate(path, 2 * MIB)
    assert here("resize -n", dev_id).exit_code == 0
    assert here("quiesce -n", dev_id).exit_code == 0
    assert here("recover -n", dev_id).exit_code == 0
    assert _nr_bytes(device) == 2 * MIB


def test_device_without_a_file_needs_a_size(here: Here, features: int) -> None:
    dev_id, device = _added(here, "-t null --size 1M")
    assert "say a size" in here("resize -n", dev_id).stderr
    ram_id, _ = _added(here, "-t ram --size 1M")
    assert "memory" in here("resize --size 2M -n", ram_id).stderr
    if features & uapi.UBLK_F_UPDATE_SIZE:
        assert here("resize --size 3M -n", dev_id).exit_code == 0
        assert _nr_bytes(device) == 3 * MIB
