"""DISCARD and WRITE_ZEROES: holes in the backing file, zeroes through the device."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20
DEV_BYTES = 4 * MIB
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16


def allocated_bytes(path: Path) -> int:
    # ext4 counts delayed blocks only once they are written back.
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def hole_at(path: Path, offset: int) -> tuple[int, int]:
    """Where the first hole from ``offset`` on begins, and where it ends."""
    with path.open("rb") as file:
        start = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
        return start, os.lseek(file.fileno(), start, os.SEEK_DATA)


@pytest.fixture(params=["ext4-buffered", "ext4-direct", "tmpfs"])
def loop_target(request, backing_file, ext4_folder, tmp_path, pattern) -> LoopTarget:
    """A target on a file full of data."""
    file_system, _, mode = request.param.partition("-")
    folder = ext4_folder if file_system == "ext4" else tmp_path
    path = backing_file(DEV_BYTES, pattern(DEV_BYTES), folder=folder)
    return LoopTarget(path, direct=mode == "direct")


def test_discard_makes_a_hole_that_reads_as_zeroes(
    device, loop_target, open_block, pattern
) -> None:
    path = Path(loop_target.path)
    allocated = allocated_bytes(path)
    dev = device(loop_target)
    with open_block(dev.block_path) as client:
        client.discard(MIB, MIB)
        assert client.read(0, DEV_BYTES) == (
            pattern(DEV_BYTES)[:MIB] + bytes(MIB) + pattern(DEV_BYTES)[2 * MIB :]
        )
    assert dev.hctxs[0].stats().nr_discards == 1
    assert hole_at(path, 0) == (MIB, 2 * MIB)
    assert allocated - allocated_bytes(path) == MIB
    assert path.stat().st_size == DEV_BYTES


def test_zero_out_keeps_the_blocks_allocated_and_reads_as_zeroes(
    device, loop_target, open_block, pattern
) -> None:
    # BLKZEROOUT asks for WRITE_ZEROES with NOUNMAP; tmpfs has no ZERO_RANGE, so there the target
    # writes zeroes.
    path = Path(loop_target.path)
    allocated = allocated_bytes(path)
    expected = bytearray(pattern(DEV_BYTES))
    dev = device(loop_target)
    with open_block(dev.block_path) as client:
        for offset, nr_bytes in [(MIB, MIB), (512, 512), (3 * MIB - 1024, 200 * KIB + 512)]:
            client.zero_out(offset, nr_bytes)
            expected[offset : offset + nr_bytes] = bytes(nr_bytes)
        assert client.read(0, DEV_BYTES) == expected
    stats = dev.hctxs[0].stats()
    assert (stats.nr_discards, stats.nr_writes, stats.nr_errors) == (3, 0, 0)
    assert path.read_bytes() == expected
    assert allocated_bytes(path) >= allocated  # ext4 may need a block more for its extents


def test_fallocate_zero_range_on_the_device_keeps_the_blocks_allocated(
    device, loop_target, open_block, pattern
) -> None:
    path = Path(loop_target.path)
    allocated = allocated_bytes(path)
    dev = device(loop_target)
    with open_block(dev.block_path) as client:
        client.fallocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, MIB, MIB)
        assert client.read(MIB, MIB) == bytes(MIB)
        assert client.read(2 * MIB, MIB) == pattern(DEV_BYTES)[2 * MIB : 3 * MIB]
    assert allocated_bytes(path) >= allocated


def test_fallocate_punch_hole_on_the_device_makes_a_hole_in_the_file(
    device, loop_target, open_block, pattern
) -> None:
    path = Path(loop_target.path)
    allocated = allocated_bytes(path)
    dev = device(loop_target)
    with open_block(dev.block_path) as client:
        client.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, MIB, MIB)
        assert client.read(MIB, MIB) == bytes(MIB)
        assert client.read(2 * MIB, MIB) == pattern(DEV_BYTES)[2 * MIB : 3 * MIB]
    assert allocated - allocated_bytes(path) == MIB


def test_discard_of_a_device_at_an_offset_makes_the_hole_at_that_offset(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    data = pattern(DEV_BYTES)
    path = backing_file(DEV_BYTES, data, folder=ext4_folder)
    dev = device(LoopTarget(path, offset_bytes=MIB))
    with open_block(dev.block_path) as client:
        client.discard(MIB, MIB)
        client.zero_out(0, 4 * KIB)
    dev.delete()
    after = bytearray(data)
    after[2 * MIB : 3 * MIB] = bytes(MIB)
    after[MIB : MIB + 4 * KIB] = bytes(4 * KIB)
    assert path.read_bytes() == after


def test_whole_device_is_discarded_in_one_call(device, backing_file, open_block) -> None:
    # 5 GiB: a single request cannot hold it, and its length fits no int32_t.
    path = backing_file(5 << 30, b"x" * 4096)
    dev = device(LoopTarget(path))
    with open_block(dev.block_path) as client:
        client.write((5 << 30) - 4096, b"y" * 4096)
        client.discard(0, 5 << 30)
        assert client.read(0, 4096) == client.read((5 << 30) - 4096, 4096) == bytes(4096)
    assert dev.hctxs[0].stats().nr_errors == 0
    assert allocated_bytes(path) == 0


def test_file_system_without_holes_gives_a_device_without_discard(
    device, backing_file, mounted, open_block, pattern
) -> None:
    with mounted("none", "-t", "ramfs") as folder:
        path = backing_file(MIB, pattern(MIB), folder=folder)
        dev = device(LoopTarget(path))
        with open_block(dev.block_path) as client:
            with pytest.raises(OSError) as refusal:
                client.discard(0, 64 * KIB)
            assert refusal.value.errno == errno.EOPNOTSUPP
            client.zero_out(64 * KIB, 64 * KIB)
            assert client.read(0, MIB) == (
                pattern(MIB)[: 64 * KIB] + bytes(64 * KIB) + pattern(MIB)[128 * KIB :]
            )
        dev.delete()
        path.unlink()


def test_discard_on_a_block_device_as_backing_reads_as_zeroes(
    device, backing_file, attach_loop, open_block, pattern
) -> None:
    path = backing_file(DEV_BYTES, pattern(DEV_BYTES))
    expected = bytearray(pattern(DEV_BYTES))
    with attach_loop(path) as disk:
        dev = device(LoopTarget(disk))
        with open_block(dev.block_path) as client:
            client.discard(MIB, MIB)
            client.zero_out(3 * MIB, 512 * KIB)
            expected[MIB : 2 * MIB] = bytes(MIB)
            expected[3 * MIB : 3 * MIB + 512 * KIB] = bytes(512 * KIB)
            assert client.read(0, DEV_BYTES) == expected
        dev.delete()
    assert path.read_bytes() == expected
    assert hole_at(path, 0) == (MIB, 2 * MIB)
