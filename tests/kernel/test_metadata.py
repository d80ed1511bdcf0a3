"""Blocks with metadata: protection information that the kernel makes and checks, kept in a file."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ublk_loop.device import Device
from ublk_loop.integrity import IntegrityTarget
from ublk_loop.state import Metadata
from ublk_loop.target import LoopTarget, NullTarget
from ublk_loop.uapi import UBLK_F_INTEGRITY

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 512
FILE_BYTES = 4 * MIB
NONE = b"\xff"
# As NVMe has it: 8 bytes of CRC, 2 for applications, 6 of the block's number.
NVME = Metadata(64, pi_offset=48, csum="nvme", is_capable=True, has_reftag=True)
SCSI = Metadata(8, csum="t10dif", has_reftag=True)
WORDS = {
    NVME: "--metadata_size 64 --pi_offset 48 --csum_type nvme --integrity_capable"
    " --integrity_reftag",
}


@pytest.fixture(autouse=True)
def needs_integrity(features: int) -> None:
    if not features & UBLK_F_INTEGRITY:
        pytest.skip("this driver has no metadata (7.0)")


def target_of(data: Path, metadata: Metadata, file: Path, **options: Any) -> IntegrityTarget:
    return IntegrityTarget(LoopTarget(data, **options), metadata, LoopTarget(file, direct=False))


def kept(file: Path, metadata: Metadata, block: int) -> bytes:
    start = block * metadata.nr_bytes
    return file.read_bytes()[start : start + metadata.nr_bytes]


@pytest.mark.parametrize("metadata", [NVME, SCSI], ids=["nvme", "t10dif"])
@pytest.mark.parametrize("direct", [False, True])
def test_what_is_written_passes_the_check_of_what_is_read(
    device, backing_file, ext4_folder, open_block, operate, metadata, direct
) -> None:
    data = backing_file(FILE_BYTES, folder=ext4_folder)
    file = backing_file(FILE_BYTES // BLOCK * metadata.nr_bytes, folder=ext4_folder)
    dev = device(target_of(data, metadata, file, direct=direct))
    model, rng = bytearray(FILE_BYTES), random.Random(metadata.nr_bytes)
    with open_block(dev.block_path) as client:
        assert client.read(0, FILE_BYTES) == model  # never written: not checked
        for _ in range(150):
            operate(client, model, rng)
        assert client.read(0, FILE_BYTES) == model
    dev.delete()
    assert data.read_bytes() == model
    again = device(target_of(data, metadata, file, direct=direct))
    with open_block(again.block_path) as client:
        assert client.read(0, FILE_BYTES) == model


def test_metadata_is_where_its_block_says_and_none_is_left_of_what_was_discarded(
    device, backing_file, open_block, pattern
) -> None:
    data, file = backing_file(MIB), backing_file(MIB // BLOCK * 64)
    dev = device(target_of(data, NVME, file))
    with open_block(dev.block_path) as client:
        client.write(256 * KIB, pattern(128 * KIB))
        client.discard(256 * KIB, 4 * KIB)
    for block in (256 * KIB // BLOCK + 8, 384 * KIB // BLOCK - 1):
        found = kept(file, NVME, block)
        assert found[:48] == bytes(48)
        assert found[48:56] not in (bytes(8), NONE * 8)
        assert found[58:] == struct.pack(">Q", block)[2:]
    for block in (0, 256 * KIB // BLOCK, 384 * KIB // BLOCK):
        assert kept(file, NVME, block) == NONE * 64


@pytest.mark.parametrize("what", ["data", "guard", "reftag"])
def test_block_that_was_corrupted_behind_the_device_is_eilseq_and_no_other(
    device, backing_file, open_block, pattern, raises_errno, what
) -> None:
    data, file = backing_file(MIB), backing_file(MIB // BLOCK * 64)
    dev = device(target_of(data, NVME, file))
    at = {
        "data": (data, 10 * BLOCK + 7),
        "guard": (file, 10 * 64 + 50),
        "reftag": (file, 10 * 64 + 60),
    }
    path, offset = at[what]
    with open_block(dev.block_path) as client:
        client.write(0, pattern(64 * KIB))
        with path.open("r+b") as other:
            other.seek(offset)
            [byte] = other.read(1)
            other.seek(offset)
            other.write(bytes([byte ^ 0x10]))
        for start, nr_bytes in ((10 * BLOCK, BLOCK), (0, 64 * KIB)):
            with raises_errno(errno.EILSEQ):
                client.read(start, nr_bytes)
        for start, nr_bytes in ((0, 10 * BLOCK), (11 * BLOCK, 32 * KIB)):
            assert client.read(start, nr_bytes) == pattern(64 * KIB)[start : start + nr_bytes]
        client.write(10 * BLOCK, pattern(BLOCK))
        assert client.read(10 * BLOCK, BLOCK) == pattern(BLOCK)


def test_failed_write_of_metadata_is_the_writes_errno(
    device, backing_file, mounted, open_block, pattern, raises_errno
) -> None:
    data = backing_file(MIB)
    with mounted("none", "-t", "tmpfs", "-o", "size=96k") as folder:
        file = backing_file(MIB // BLOCK * 64, folder=folder)
        with raises_errno(errno.ENOSPC):
            target_of(data, NVME, file)
        assert (file.stat().st_blocks, file.stat().st_size) == (0, MIB // BLOCK * 64)
        file.write_bytes(NONE * 64 * KIB)
        os.truncate(file, MIB // BLOCK * 64)
        dev = device(target_of(data, NVME, file))
        with open_block(dev.block_path) as client:
            client.write(0, pattern(512 * KIB))
            with raises_errno(errno.ENOSPC):
                client.write(512 * KIB, pattern(512 * KIB))
            assert client.read(0, 512 * KIB) == pattern(512 * KIB)
        dev.delete()
        file.unlink()


def integrity_attr(dev: Device, name: str) -> str:
    return Path(f"/sys/block/ublkb{dev.dev_id}/integrity/{name}").read_text().strip()


def test_null_device_says_what_its_metadata_is_and_reads_without_a_check(
    device, open_block
) -> None:
    dev = device(IntegrityTarget(NullTarget(), NVME, None))
    assert integrity_attr(dev, "format") == "EXT-DIF-TYPE1-CRC64"
    assert integrity_attr(dev, "device_is_integrity_capable") == "1"
    with open_block(dev.block_path) as client:
        client.write(0, bytes(512 * KIB))
        client.read(0, 512 * KIB)
    tagged = device(IntegrityTarget(NullTarget(), Metadata(16, csum="nvme", tag_bytes=8), None))
    assert integrity_attr(tagged, "tag_size") == "8"
    opaque = device(IntegrityTarget(NullTarget(), Metadata(8), None))
    assert integrity_attr(opaque, "format") == "nop"


def test_file_that_cannot_hold_the_metadata_is_einval(backing_file, raises_errno) -> None:
    data, file = backing_file(MIB), backing_file(MIB // BLOCK * 8 - 4096)
    with contextlib.closing(target_of(data, SCSI, file)) as target:
        assert target.size == MIB - 4096 // 8 * BLOCK
    for metadata, path, nr_bytes in (
        (SCSI, file, MIB),
        (SCSI, data, None),
        (Metadata(255), backing_file(2 * MIB), 4 * MIB),
    ):
        with raises_errno(errno.EINVAL):
            IntegrityTarget(
                LoopTarget(data), metadata, LoopTarget(path, direct=False), nr_bytes=nr_bytes
            )


def test_device_with_metadata_is_added_recovered_and_deleted_by_the_command(
    here: Callable[..., Result],
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    open_block: Any,
    pattern: Callable[..., bytes],
    raises_errno: Any,
) -> None:
    data, file = backing_file(MIB), backing_file(MIB // BLOCK * 64)
    added = add(f"-t loop -r 1 -u {WORDS[NVME]}", data, file)
    assert added["target"]["metadata_file"] == str(file)
    with open_block(added["block_device"]) as client:
        client.write(0, pattern(MIB))
    os.kill(added["server_pid"], signal.SIGKILL)
    os.waitpid(added["server_pid"], 0)
    again = here("recover -n", added["dev_id"])
    assert again.exit_code == 0, again.stderr
    assert here("resize -n", added["dev_id"]).exit_code == 1
    with open_block(added["block_device"]) as client:
        assert client.read(0, MIB) == pattern(MIB)
        with data.open("r+b") as other:
            other.write(bytes(BLOCK))
        with raises_errno(errno.EILSEQ):
            client.read(0, BLOCK)
