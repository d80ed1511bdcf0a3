"""A backing file that others use too: cut, grown, filled and changed under the device."""

from __future__ import annotations

import errno
import os

import pytest

from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture(params=["auto", "2014"])
def policy(request):
    return request.param


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_write_to_a_hole_that_was_read_before_is_in_the_file(
    device, backing_file, ext4_folder, open_block, pattern, direct, policy
) -> None:
    path = backing_file(4 * MIB, folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct), policy=policy)
    with open_block(dev.block_path) as client:
        assert client.read(0, 4 * MIB) == bytes(4 * MIB)
        client.write(MIB + 512, pattern(64 * KIB))
        client.flush()
        assert client.read(MIB, 128 * KIB) == bytes(512) + pattern(64 * KIB) + bytes(65024)
    dev.delete()
    assert path.read_bytes() == bytes(MIB + 512) + pattern(64 * KIB) + bytes(
        3 * MIB - 512 - 64 * KIB
    )


def test_what_others_do_to_the_file_is_seen_through_the_device(
    device, backing_file, ext4_folder, open_block, pattern, policy
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=False), policy=policy)
    with open_block(dev.block_path) as client, path.open("r+b", buffering=0) as file:
        assert client.read(0, MIB) == pattern(MIB)
        os.pwrite(file.fileno(), b"theirs", 4096)
        assert client.read(4096, 512)[:6] == b"theirs"
        client.write(8192, b"ours" * 128)
        assert os.pread(file.fileno(), 512, 8192) == b"ours" * 128


def test_file_cut_and_grown_again_under_the_device_is_read_right(
    device, backing_file, ext4_folder, open_block, pattern, raises_errno, policy
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=False), policy=policy)
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB) == pattern(MIB)
        os.truncate(path, 512 * KIB)
        with raises_errno(errno.EIO):
            client.read(768 * KIB, 4096)
        client.write(900 * KIB, pattern(4096, 1))
        assert client.read(768 * KIB, 4096) == bytes(4096)
        os.truncate(path, MIB)
        assert client.read(0, MIB) == (
            pattern(MIB)[: 512 * KIB]
            + bytes(388 * KIB)
            + pattern(4096, 1)
            + bytes(MIB - 900 * KIB - 4096)
        )


def test_write_across_the_end_of_a_file_cut_inside_a_page_is_not_lost(
    device, backing_file, open_block, pattern, policy
) -> None:
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path, direct=False), policy=policy)
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB) == pattern(MIB)
        os.truncate(path, 512 * KIB + 1000)
        client.write(512 * KIB, pattern(4096, 1))
        client.flush()
    dev.delete()
    assert path.read_bytes()[512 * KIB :] == pattern(4096, 1)


def test_no_write_behind_a_cut_is_lost_after_many_that_needed_no_look_at_the_size(
    device, backing_file, open_block, pattern, policy
) -> None:
    # Far more batches than csrc/iothread.c asks the file's size for (UNSURE_BATCHES).
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path, direct=False), policy=policy)
    with open_block(dev.block_path) as client:
        for turn in range(3):
            client.write(0, pattern(MIB))
            for _ in range(200):
                client.read(4 * KIB, 4 * KIB)
            os.truncate(path, 512 * KIB + 1000 + turn)
            client.write(512 * KIB, pattern(4 * KIB, turn + 1))
            assert path.read_bytes()[512 * KIB :] == pattern(4 * KIB, turn + 1)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_device_at_an_odd_sector_of_the_file_serves_its_last_block(
    device, backing_file, ext4_folder, open_block, pattern, direct, policy
) -> None:
    # Neither the beginning nor the end of the device is at a page of the file.
    data = pattern(64 * KIB + 3 * 512)
    path = backing_file(len(data), data, folder=ext4_folder)
    dev = device(LoopTarget(path, offset_bytes=512, direct=direct), policy=policy)
    with open_block(dev.block_path) as client:
        end = os.lseek(client.fd, 0, os.SEEK_END)
        assert end == 64 * KIB + 2 * 512
        assert client.read(end - 512, 512) == data[-512:]
        assert client.read(0, end) == data[512:]
        client.write(end - 512, pattern(512, 1))
        client.write(0, pattern(512, 2))
    dev.delete()
    assert path.read_bytes() == data[:512] + pattern(512, 2) + data[1024:-512] + pattern(512, 1)
