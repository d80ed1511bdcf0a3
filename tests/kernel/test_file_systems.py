"""The main job: a file becomes a device with a file system, filled, checked, and found again."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import ublk_loop
from ublk_loop import identity
from ublk_loop.state import FileIdentity
from ublk_loop.target import LoopTarget
from ublk_loop.uapi import UBLK_F_NEED_GET_DATA, UBLK_F_USER_COPY

MIB = 1 << 20


@dataclass(frozen=True)
class FileSystem:
    """How one is made and checked, and on what kind of device."""

    mkfs: tuple[str, ...]
    fsck: tuple[str, ...]
    nr_bytes: int
    direct: bool
    nr_hw_queues: int = 1
    flags: int = 0


FILE_SYSTEMS = {
    "ext4": FileSystem(("mkfs.ext4", "-q"), ("e2fsck", "-fn"), 128 * MIB, True, 2),
    "xfs": FileSystem(
        ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), 320 * MIB, False, 1, UBLK_F_USER_COPY
    ),
    "btrfs": FileSystem(
        ("mkfs.btrfs", "-q"), ("btrfs", "check"), 256 * MIB, False, 2, UBLK_F_NEED_GET_DATA
    ),
}


@pytest.fixture(params=FILE_SYSTEMS.values(), ids=FILE_SYSTEMS.keys())
def file_system(request) -> FileSystem:
    return request.param


@pytest.fixture(scope="module")
def tree(tmp_path_factory, pattern) -> Path:
    """A real tree, and some of everything a tree can hold."""
    folder = tmp_path_factory.mktemp("tree")
    package = Path(ublk_loop.__file__).parent
    shutil.copytree(package, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(os.__file__).parent / "json", folder / "json")
    odd = folder / "odd"
    odd.mkdir(mode=0o2750)
    (odd / "large").write_bytes(pattern(8 * MIB))
    (odd / "empty").touch(mode=0o600)
    os.link(odd / "large", odd / "hard link")
    os.symlink("../odd/nowhere", odd / "symlink")
    os.mkfifo(odd / "fifo")
    with (odd / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    for number in range(100):
        (odd / f"small {number}").write_bytes(pattern(number * 50, number))
    deep = odd.joinpath(*["deep"] * 20)
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    return folder


def test_tree_survives_unmount_fsck_del_and_add(
    device, backing_file, ext4_folder, mounted, run, tree, fingerprint, file_system, tmp_path
) -> None:
    folder = ext4_folder if file_system.direct else tmp_path
    path = backing_file(file_system.nr_bytes, folder=folder)

    def serve():
        return device(
            LoopTarget(path, direct=file_system.direct),
            nr_hw_queues=file_system.nr_hw_queues,
            flags=file_system.flags,
        )

    expected = fingerprint(tree)
    dev = serve()
    run(*file_system.mkfs, dev.block_path)
    with mounted(dev.block_path) as top:
        run("cp", "-a", tree, top / "tree")
        os.sync()
        assert fingerprint(top / "tree") == expected
    run(*file_system.fsck, dev.block_path)
    assert sum(hctx.stats().nr_flushes for hctx in dev.hctxs) > 0
    assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0
    dev.delete()

    dev = serve()
    run(*file_system.fsck, dev.block_path)
    with mounted(dev.block_path, "-o", "ro") as top:
        assert fingerprint(top / "tree") == expected
    dev.delete()


def _identity(path: Path) -> FileIdentity:
    with path.open("rb") as file:
        return identity.of(file.fileno())


def test_file_is_known_again_when_its_file_system_is_mounted_from_another_device(
    backing_file, attach_loop, mounted, run, file_system
) -> None:
    # What a recovery compares. The disk with its number is another one by then.
    image, other = backing_file(file_system.nr_bytes), backing_file(1 << 20)
    run(*file_system.mkfs, image)
    with attach_loop(image) as disk, mounted(disk) as folder:
        (folder / "file").write_bytes(b"data")
        known, known_disk = _identity(folder / "file"), _identity(disk)
        with attach_loop(other) as path:
            assert identity.is_another(known_disk, _identity(path))
    assert known != FileIdentity()
    with attach_loop(other), attach_loop(image) as disk, mounted(disk) as folder:
        assert not identity.is_another(known_disk, _identity(disk))
        path = folder / "file"
        assert _identity(path) == known
        path.unlink()
        path.write_bytes(b"data")
        assert identity.is_another(known, _identity(path))


def test_fstrim_gives_the_space_of_deleted_files_back(
    device, backing_file, mounted, run, pattern
) -> None:
    path = backing_file(64 * MIB)
    dev = device(LoopTarget(path))
    run("mkfs.ext4", "-q", dev.block_path)
    with mounted(dev.block_path) as top:
        (top / "file").write_bytes(pattern(16 * MIB))
        os.sync()
        full = path.stat().st_blocks * 512
        (top / "file").unlink()
        os.sync()
        run("fstrim", top)
        assert full - path.stat().st_blocks * 512 >= 15 * MIB
    run("e2fsck", "-fn", dev.block_path)


def test_file_written_inside_is_found_by_the_kernels_loop_device(
    device, backing_file, mounted, attach_loop, run, pattern
) -> None:
    path = backing_file(32 * MIB)
    dev = device(LoopTarget(path))
    run("mkfs.ext4", "-q", dev.block_path)
    with mounted(dev.block_path) as top:
        (top / "file").write_bytes(pattern(4 * MIB))
    dev.delete()
    with attach_loop(path) as disk, mounted(disk, "-o", "ro") as top:
        assert (top / "file").read_bytes() == pattern(4 * MIB)


def test_journal_is_replayed_after_the_server_dies(
    ublk, backing_file, mounted, run, device, pattern
) -> None:
    # A server that is killed takes its device along; what was synced is in the file.
    path = backing_file(64 * MIB)
    added = ublk("add", "-t", "loop", "-f", path)
    assert added.returncode == 0, added.stderr
    dev_id = next(int(word) for word in added.stdout.replace(":", " ").split() if word.isdigit())
    block_path = f"/dev/ublkb{dev_id}"
    run("mkfs.ext4", "-q", block_path)
    folder = Path(run("mktemp", "-d").strip())
    run("mount", block_path, folder)
    (folder / "synced").write_bytes(pattern(2 * MIB))
    os.sync()
    (folder / "not synced").write_bytes(pattern(MIB))
    server_pid = int(ublk("list", "-n", dev_id).stdout.partition("daemon pid ")[2].split()[0])
    os.kill(server_pid, 9)
    subprocess.run(["umount", str(folder)], timeout=60)
    folder.rmdir()
    assert ublk("del", "-n", dev_id).returncode == 0

    dev = device(LoopTarget(path))
    with mounted(dev.block_path) as top:
        assert (top / "synced").read_bytes() == pattern(2 * MIB)
    run("e2fsck", "-fn", dev.block_path)
