"""Who uses a device, read from folders made to look like /proc and /sys."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from ublk_loop import holders
from ublk_loop.errors import BusyError
from ublk_loop.holders import Holder


class Roots:
    """A /proc and a /sys with device 3 (259:7) and its first partition (259:8)."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        disk = self.sys / "block/ublkb3"
        for path, number in ((disk, "259:7"), (disk / "ublkb3p1", "259:8")):
            (path / "holders").mkdir(parents=True)
            (path / "dev").write_text(f"{number}\n")
        (self.proc / "self/ns").mkdir(parents=True)
        (self.proc / "self/ns/mnt").symlink_to("mnt:[1]")
        (self.proc / "self/mountinfo").write_text("")

    def process(self, pid: int, command: str, namespace: str = "mnt:[1]") -> Path:
        folder = self.proc / str(pid)
        (folder / "ns").mkdir(parents=True)
        (folder / "fd").mkdir()
        (folder / "ns/mnt").symlink_to(namespace)
        (folder / "comm").write_text(f"{command}\n")
        return folder

    def find(self) -> list[Holder]:
        return holders.find(3, proc=str(self.proc), sysfs=str(self.sys))


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path)


def test_nothing_is_found_when_nobody_uses_the_device(roots: Roots) -> None:
    process = roots.process(40, "fio")
    (process / "fd/3").symlink_to("/dev/ublkb30")
    (process / "fd/4").symlink_to("socket:[77]")
    (process / "maps").write_text("7f00-7f01 r--s 0 00:05 9    /dev/ublkb31\n")
    (process / "mountinfo").write_text("30 1 259:9 / /x rw - ext4 /dev/ublkb33 rw\n")
    assert roots.find() == []


def test_mounts_are_found_by_number_and_by_source_with_their_blanks(roots: Roots) -> None:
    (roots.proc / "self/mountinfo").write_text(
        "30 1 259:7 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/root rw\n"
        "31 1 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb3p1 rw\n"
        "32 1 0:45 / /mnt/other rw - tmpfs none rw\n"
    )
    assert [str(holder) for holder in roots.find()] == [
        "mounted on /mnt/a b",
        "mounted on /mnt/btrfs",
    ]


def test_a_mount_point_of_many_namespaces_is_named_once(roots: Roots) -> None:
    line = "30 1 259:7 / /mnt rw - ext4 /dev/ublkb3 rw\n"
    for pid, command in ((50, "web"), (51, "db")):
        process = roots.process(pid, command, namespace=f"mnt:[{pid}]")
        (process / "mountinfo").write_text(line)
    assert [str(holder) for holder in roots.find()] == [
        "mounted on /mnt, in the mount namespace of pid 50 (web)"
    ]
    (roots.proc / "self/mountinfo").write_text(line)
    assert [str(holder) for holder in roots.find()] == ["mounted on /mnt"]


def test_swap_stacked_devices_and_loop_devices_are_found(roots: Roots) -> None:
    (roots.proc / "swaps").write_text(
        "Filename\tType\tSize\tUsed\tPriority\n/dev/ublkb3p1 partition 1020 0 -2\n"
    )
    (roots.sys / "block/ublkb3/holders/dm-0").mkdir()
    (roots.sys / "block/dm-0/dm").mkdir(parents=True)
    (roots.sys / "block/dm-0/dm/name").write_text("vg-root\n")
    (roots.sys / "block/ublkb3/ublkb3p1/holders/md127").mkdir()
    (roots.sys / "block/loop5/loop").mkdir(parents=True)
    (roots.sys / "block/loop5/loop/backing_file").write_text("/dev/ublkb3\n")
    assert [str(holder) for holder in roots.find()] == [
        "/dev/ublkb3p1 is in use as swap",
        "held by dm-0 (vg-root)",
        "held by md127",
        "held by loop5",
    ]


def test_processes_are_found_by_descriptors_and_mappings_also_of_a_node_that_is_gone(
    roots: Roots,
) -> None:
    process = roots.process(40, "fio")
    (process / "fd/3").symlink_to("/dev/ublkb3")
    (process / "fd/4").symlink_to("/dev/ublkb3")
    process = roots.process(41, "db")
    (process / "fd/3").symlink_to("/srv/container/dev/ublkb3 (deleted)")
    (process / "maps").write_text("7f00-7f01 r--s 0 00:05 9      /dev/ublkb3p1\n")
    assert [str(holder) for holder in roots.find()] == [
        "/dev/ublkb3 is open in pid 40 (fio)",
        "/srv/container/dev/ublkb3 (deleted) is open in pid 41 (db)",
        "/dev/ublkb3p1 is mapped by pid 41 (db)",
    ]


def test_a_server_is_named_by_its_device_which_is_what_its_user_knows(roots: Roots) -> None:
    # A bug: "open in pid 40 (python3)", which no user has started.
    process = roots.process(40, "python3")
    (process / "fd/3").symlink_to("/dev/ublkb3p1")
    (process / "fd/4").symlink_to("/dev/ublkc12")
    [holder] = roots.find()
    assert str(holder) == "/dev/ublkb3p1 is open in pid 40 (server of ublkb12)"


def test_files_of_an_unmounted_file_system_are_found_only_if_nothing_else_is(
    roots: Roots, tmp_path: Path
) -> None:
    device = tmp_path.stat().st_dev
    (roots.sys / "block/ublkb3/dev").write_text(f"{os.major(device)}:{os.minor(device)}\n")
    process = roots.process(60, "bash")
    (process / "cwd").symlink_to(tmp_path)
    assert [str(holder) for holder in roots.find()] == [
        f"{tmp_path}, a file on it, is in use by pid 60 (bash)"
    ]
    (process / "fd/3").symlink_to("/dev/ublkb3")
    assert [holder.kind for holder in roots.find()] == ["open"]


def test_this_process_itself_is_left_out(roots: Roots) -> None:
    process = roots.process(os.getpid(), "ublk")
    (process / "fd/3").symlink_to("/dev/ublkb3")
    assert roots.find() == []


def test_a_busy_device_is_one_line_that_names_the_first_holder_and_a_way_out() -> None:
    found = [Holder("mount", "/mnt"), Holder("open", "/dev/ublkb3", 7, "fio")]
    error = BusyError("del dev 3", found)
    assert str(error) == (
        "del dev 3: Device or resource busy: mounted on /mnt, and 1 more:"
        " unmount or close it first, or use --lazy or --force"
    )
    assert "in use by the kernel" in str(BusyError("del dev 3", []))
    assert pickle.loads(pickle.dumps(error)).holders == tuple(found)
