"""How a request's data goes: copied by whom, or not at all; what auto chooses, and the bytes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublk_loop import uapi
from ublk_loop.errors import BackingFileError, DriverError
from ublk_loop.shmem import SharedMemory
from ublk_loop.state import DATA_FLAGS, SharedFile, data_mode
from ublk_loop.target import LoopTarget, NullTarget

KIB = 1 << 10
MIB = 1 << 20
# Where csrc/batch.c draws the addresses of provided buffers.
BUFS_FROM, BUFS_TO = 1 << 44, 1 << 46


def test_servers_with_batch_io_provide_buffers_at_different_addresses(daemon, features) -> None:
    """What the driver writes for a killed server, another process had at the same address."""
    found = []
    for _ in range(2):
        added = daemon.add("-t null -q 1")
        maps = Path(f"/proc/{added['server_pid']}/maps").read_text()
        starts = [int(start, 16) for start in re.findall(r"^([0-9a-f]+)-", maps, re.MULTILINE)]
        found += [start for start in starts if BUFS_FROM <= start < BUFS_TO]
    assert len(set(found)) == len(found) == (2 if features & uapi.UBLK_F_BATCH_IO else 0)


@pytest.mark.parametrize(
    ("on_ext4", "direct", "wanted"),
    [
        (True, True, "zerocopy"),
        (True, False, "usercopy"),
        (False, True, "usercopy"),
        (False, False, "usercopy"),
    ],
)
def test_auto_chooses_the_data_mode_by_the_file_as_far_as_the_driver_can(
    device, backing_file, ext4_folder, tmp_path, features, on_ext4, direct, wanted
) -> None:
    path = backing_file(MIB, folder=ext4_folder if on_ext4 else tmp_path)
    dev = device(LoopTarget(path, direct=direct))
    flags = DATA_FLAGS[wanted]
    assert data_mode(dev.info.flags) == ("copy" if flags & ~features else wanted)
    # Only a disk has cold pages, for which the client's are registered beforehand.
    registers = dev.info.flags & uapi.UBLK_F_AUTO_BUF_REG
    assert registers == (features & uapi.UBLK_F_AUTO_BUF_REG if on_ext4 else 0)


def test_direct_io_reads_writes_and_syncs_the_clients_own_pages(
    device, backing_file, ext4_folder, open_block, pattern, features
) -> None:
    if not features & uapi.UBLK_F_AUTO_BUF_REG:
        with pytest.raises(DriverError) as refusal:
            device(LoopTarget(backing_file(MIB, folder=ext4_folder)), data="zerocopy")
        assert refusal.value.errno == errno.EOPNOTSUPP
        return
    path = backing_file(4 * MIB, pattern(4 * MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=True), data="zerocopy")
    expected = bytearray(pattern(4 * MIB))
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        for offset, nr_bytes in ((0, 4 * KIB), (512, 512), (MIB, 300 * KIB)):
            expected[offset : offset + nr_bytes] = pattern(nr_bytes, seed=offset)
            assert client.write(offset, pattern(nr_bytes, seed=offset)) == nr_bytes
            assert client.read(offset, nr_bytes) == expected[offset : offset + nr_bytes]
        flags = os.RWF_DSYNC
        assert os.pwritev(client.fd, [_page(b"d")], 8 * KIB, flags) == mmap.PAGESIZE
        expected[8 * KIB : 12 * KIB] = b"d" * 4 * KIB
        after = dev.hctxs[0].stats()
    assert after.nr_async - before.nr_async == after.nr_reads + after.nr_writes - (
        before.nr_reads + before.nr_writes
    )
    assert path.read_bytes() == expected


def test_a_direct_read_behind_the_end_of_the_file_fails_and_leaks_nothing(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=True))
    os.truncate(path, MIB // 2)
    with open_block(dev.block_path) as client:
        assert client.read(0, 4 * KIB) == pattern(MIB)[: 4 * KIB]
        for offset in (MIB // 2 - 2 * KIB, MIB - 4 * KIB):
            with pytest.raises(OSError) as refusal:
                client.read(offset, 4 * KIB)
            assert refusal.value.errno == errno.EIO


def test_the_memory_of_the_buffers_is_given_back_once_the_device_is_idle(
    device, backing_file, fio, wait_until
) -> None:
    dev = device(LoopTarget(backing_file(64 * MIB)), data="copy")
    before = _private_bytes()
    fio(dev.block_path, {"burst": {"rw": "write", "bs": "512k", "iodepth": 64, "size": 64 * MIB}})
    assert dev.hctxs[0].stats().write_bytes >= 64 * MIB
    wait_until(lambda: _private_bytes() < before + 4 * MIB)


def _private_bytes() -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
    )
    return int(line.split()[1]) * KIB


@pytest.fixture
def shared(tmp_path) -> Iterator[tuple[Path, mmap.mmap]]:
    """A file in memory, and a client's own mapping of it."""
    path = tmp_path / "shared"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as memory:
        yield path, memory


def test_requests_in_shared_memory_are_served_from_it(
    device, backing_file, ext4_folder, open_block, pattern, features, shared
) -> None:
    shared_path, memory = shared
    file = SharedFile(str(shared_path))
    if not features & uapi.UBLK_F_SHMEM_ZC:
        with pytest.raises(DriverError) as refusal:
            device(LoopTarget(backing_file(MIB)), shared=[SharedMemory(file)])
        assert refusal.value.errno == errno.EOPNOTSUPP
        return
    for folder, direct in ((shared_path.parent, False), (ext4_folder, False), (ext4_folder, True)):
        path = backing_file(MIB, pattern(MIB), folder=folder)
        dev = device(LoopTarget(path, direct=direct), shared=[SharedMemory(file)])
        with open_block(dev.block_path) as client, memoryview(memory) as view:
            before = dev.hctxs[0].stats()
            with view[64 * KIB : 192 * KIB] as buffer:
                assert os.preadv(client.fd, [buffer], 128 * KIB) == len(buffer)
                assert buffer == pattern(MIB)[128 * KIB : 256 * KIB]
                assert os.pwritev(client.fd, [buffer], 512 * KIB) == len(buffer)
            assert client.read(0, 4 * KIB) == pattern(MIB)[: 4 * KIB]
            after = dev.hctxs[0].stats()
        assert after.nr_shared - before.nr_shared == 2
        assert path.read_bytes()[512 * KIB : 640 * KIB] == pattern(MIB)[128 * KIB : 256 * KIB]
        dev.delete()


def test_shared_memory_that_is_mounted_below_a_disk_is_shared(
    add, ext4_folder, run, features
) -> None:
    """ublk add: No such file: the server had unmounted the disk, and what is mounted below it."""
    if not features & uapi.UBLK_F_SHMEM_ZC:
        return  # refused, as above
    folder = ext4_folder / "memory"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "none", folder)
    try:
        path = folder / "shared"
        path.write_bytes(bytes(MIB))
        for words in ("--no_batch", ""):
            assert add(f"-t null {words} --shmem", path)["state"] == "LIVE"
    finally:
        run("umount", "--lazy", folder)


def test_read_only_shared_memory_serves_writes_and_takes_no_reads(
    device, backing_file, open_block, pattern, features, shared
) -> None:
    if not features & uapi.UBLK_F_SHMEM_ZC:
        return  # refused, as above
    shared_path, memory = shared
    file = SharedFile(str(shared_path), read_only=True)
    null = device(NullTarget(MIB), shared=[SharedMemory(file)])
    with open_block(null.block_path) as client, memoryview(memory) as view:
        assert os.pwritev(client.fd, [view[: 64 * KIB]], 0) == 64 * KIB
    dev = device(LoopTarget(backing_file(MIB, pattern(MIB))), shared=[SharedMemory(file)])
    with open_block(dev.block_path) as client, memoryview(memory) as view:
        before = dev.hctxs[0].stats()
        with view[: 64 * KIB] as buffer:
            assert os.preadv(client.fd, [buffer], 128 * KIB) == len(buffer)
            assert buffer == pattern(MIB)[128 * KIB : 192 * KIB]
            assert dev.hctxs[0].stats().nr_shared == before.nr_shared
            assert os.pwritev(client.fd, [buffer], 512 * KIB) == len(buffer)
            assert dev.hctxs[0].stats().nr_shared == before.nr_shared + 1
        assert client.read(512 * KIB, 64 * KIB) == pattern(MIB)[128 * KIB : 192 * KIB]


def test_a_file_on_a_disk_or_of_an_odd_size_is_not_shared(
    device, backing_file, ext4_folder, tmp_path, features
) -> None:
    odd = backing_file(6000, folder=tmp_path)
    on_disk = backing_file(MIB, folder=ext4_folder)
    if features & uapi.UBLK_F_SHMEM_ZC:
        with pytest.raises(DriverError) as refusal:
            device(LoopTarget(backing_file(MIB)), shared=[SharedMemory(SharedFile(str(on_disk)))])
        assert refusal.value.errno == errno.EFAULT
    with pytest.raises(BackingFileError) as odd_size:
        SharedMemory(SharedFile(str(odd)))
    assert odd_size.value.errno == errno.EINVAL
    with pytest.raises(BackingFileError) as missing:
        SharedMemory(SharedFile(str(tmp_path / "absent")))
    assert missing.value.errno == errno.ENOENT
    with (
        pytest.raises(BackingFileError) as another,
        contextlib.closing(SharedMemory(SharedFile(str(odd), dev=1, ino=1))),
    ):
        pass
    assert another.value.errno == errno.ESTALE


def _page(byte: bytes) -> mmap.mmap:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page.write(byte * mmap.PAGESIZE)
    return page
