"""Bytes: what is written through a device is what stands in its backing file, and the reverse."""

from __future__ import annotations

import mmap
import os
import random

import pytest

from ublk_loop.target import LoopTarget

MIB = 1 << 20
DEV_BYTES = 4 * MIB
# (offset, length): a sector, across pages, across blocks, more than one request, the end.
RANGES = [
    (0, 512),
    (3584, 1024),
    (8192, 4096),
    (64 * 1024 - 512, 128 * 1024 + 1024),
    (MIB + 512, MIB + 4096),
    (DEV_BYTES - 512, 512),
    (0, 1024),
]


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def direct(request):
    return request.param


def write_all_ranges(client, pattern, model: bytearray) -> None:
    for seed, (offset, nr_bytes) in enumerate(RANGES):
        data = pattern(nr_bytes, seed)
        assert client.write(offset, data) == nr_bytes
        model[offset : offset + nr_bytes] = data


@pytest.mark.parametrize("policy", ["auto", "2014", "base"])
def test_bytes_written_through_the_device_stand_in_the_backing_file(
    device, backing_file, ext4_folder, open_block, pattern, transport, direct, policy
) -> None:
    model = bytearray(pattern(DEV_BYTES, 99))
    path = backing_file(DEV_BYTES, bytes(model), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct), policy=policy, **transport)
    with open_block(dev.block_path, direct=True) as client:
        write_all_ranges(client, pattern, model)
        for offset, nr_bytes in RANGES:
            assert client.read(offset, nr_bytes) == model[offset : offset + nr_bytes]
        assert client.read(0, DEV_BYTES) == model
    dev.delete()
    assert path.read_bytes() == model


def test_bytes_of_a_buffered_client_stand_in_the_backing_file_after_its_fsync(
    device, backing_file, ext4_folder, open_block, pattern, transport, direct
) -> None:
    model = bytearray(pattern(DEV_BYTES, 99))
    path = backing_file(DEV_BYTES, bytes(model), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct), **transport)
    with open_block(dev.block_path, direct=False) as client:
        write_all_ranges(client, pattern, model)
        client.flush()
        assert path.read_bytes() == model
        assert client.read(0, DEV_BYTES) == model


def test_random_operations_equal_a_model(
    device, backing_file, ext4_folder, open_block, operate, transport, direct
) -> None:
    rng = random.Random(f"{transport} {direct}")
    model = bytearray(DEV_BYTES)
    path = backing_file(DEV_BYTES + 4096, folder=ext4_folder)
    target = LoopTarget(path, offset_bytes=4096, direct=direct)
    dev = device(target, nr_hw_queues=2, max_io_buf_bytes=64 * 1024, **transport)
    with open_block(dev.block_path) as client:
        for _ in range(150):
            operate(client, model, rng)
        assert client.read(0, DEV_BYTES) == model
    dev.delete()
    assert path.read_bytes() == bytes(4096) + model


@pytest.mark.parametrize("offset_bytes", [MIB, 4096 + 512])
def test_device_at_an_offset_leaves_the_rest_of_the_file_alone(
    device, backing_file, ext4_folder, open_block, pattern, direct, offset_bytes
) -> None:
    file_bytes = offset_bytes + DEV_BYTES + MIB
    before = pattern(file_bytes, 99)
    path = backing_file(file_bytes, before, folder=ext4_folder)
    target = LoopTarget(path, offset_bytes=offset_bytes, nr_bytes=DEV_BYTES, direct=direct)
    dev = device(target)
    model = bytearray(before[offset_bytes : offset_bytes + DEV_BYTES])
    with open_block(dev.block_path) as client:
        assert os.lseek(client.fd, 0, os.SEEK_END) == DEV_BYTES
        assert client.read(0, DEV_BYTES) == model
        write_all_ranges(client, pattern, model)
    dev.delete()
    after = path.read_bytes()
    assert after[:offset_bytes] == before[:offset_bytes]
    assert after[offset_bytes : offset_bytes + DEV_BYTES] == model
    assert after[offset_bytes + DEV_BYTES :] == before[offset_bytes + DEV_BYTES :]


def test_file_of_an_unaligned_size_gives_a_device_of_whole_blocks(
    device, backing_file, ext4_folder, open_block, pattern, direct
) -> None:
    data = pattern(MIB + 512 + 188)
    path = backing_file(len(data), data, folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct))
    with open_block(dev.block_path) as client:
        assert os.lseek(client.fd, 0, os.SEEK_END) == MIB + 512
        assert client.read(MIB, 512) == data[MIB : MIB + 512]
        client.write(MIB, bytes(512))
    dev.delete()
    assert path.read_bytes() == data[:MIB] + bytes(512) + data[-188:]


def test_client_memory_that_is_not_page_aligned_is_read_and_written_right(
    device, backing_file, ext4_folder, open_block, pattern, direct
) -> None:
    path = backing_file(MIB, folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct))
    data = pattern(64 * 1024)
    with (
        open_block(dev.block_path) as client,
        mmap.mmap(-1, 128 * 1024) as memory,
        memoryview(memory) as view,
        view[512 : 512 + len(data)] as unaligned,
    ):
        unaligned[:] = data
        assert os.pwritev(client.fd, [unaligned], 4096) == len(data)
        unaligned[:] = bytes(len(data))
        assert os.preadv(client.fd, [unaligned], 4096) == len(data)
        assert unaligned == data
    dev.delete()
    assert path.read_bytes()[4096 : 4096 + len(data)] == data


def test_counters_equal_what_the_client_did(device, backing_file, open_block, pattern) -> None:
    dev = device(LoopTarget(backing_file(MIB)))
    before = dev.hctxs[0].stats()
    with open_block(dev.block_path) as client:
        for block in range(10):
            client.write(block * 4096, pattern(4096))
        for block in range(7):
            client.read(block * 8192, 8192)
        client.flush()
    after = dev.hctxs[0].stats()
    assert after.nr_writes - before.nr_writes == 10
    assert after.write_bytes - before.write_bytes == 10 * 4096
    assert after.nr_reads - before.nr_reads == 7
    assert after.read_bytes - before.read_bytes == 7 * 8192
    assert after.nr_flushes - before.nr_flushes == 1
    assert after.nr_errors == 0
    assert after.nr_inflight == 0
