"""The power goes at any moment: what was synced through the device is there after the restart.

Below the backing file's own file system, dm-log-writes records what became durable, and when.
Whatever its first n entries leave on a disk is a disk after a cut (tests/support/write_log.py); it
is mounted again, the device served again, and every acknowledged record looked for.
"""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from records import NR_SLOTS, SLOT_BYTES, Records
from write_log import WriteLog, send_mark

from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20
NR_PASSES = 12  # of large writes over what records are written to: enough for a split
DISK_BYTES = 448 * MIB
NR_CUTS = int(os.environ.get("UBLK_LOOP_SOAK_CUTS", "5"))
NR_RECORDS = max(24, 2 * NR_CUTS)
SEED = int(os.environ.get("UBLK_LOOP_SOAK_SEED", "1"))


@dataclass(frozen=True)
class Stack:
    """What is on the device (a file system or nothing), and how it is served."""

    file_system: str
    policy: str
    direct: bool
    dev_bytes: int
    slot_bytes: int = SLOT_BYTES
    is_split: bool = False  # the records are large writes to small folios, by the mapping


STACKS = {
    "raw": Stack("", "auto", False, 8 * MIB),
    "split": Stack("", "auto", False, 8 * MIB, 256 * KIB, is_split=True),
    "ext4": Stack("ext4", "auto", True, 32 * MIB),
    "xfs": Stack("xfs", "2014", False, 320 * MIB),
}


@pytest.fixture
def logged(attach_loop, run, tmp_path):
    """``with logged(disk) as (path, name)``: the disk, what it is told is logged to ``log``."""

    @contextlib.contextmanager
    def logged(disk: Path):
        log = tmp_path / "log"
        log.touch()
        os.truncate(log, 2048 * MIB)
        name = f"ublk-loop-log-{os.getpid()}"
        with attach_loop(disk) as below, attach_loop(log) as log_disk:
            table = f"0 {DISK_BYTES // 512} log-writes {below} {log_disk}"
            run("dmsetup", "create", name, "--table", table)
            run("dmsetup", "mknodes")
            try:
                yield Path("/dev/mapper", name), name
            finally:
                run("dmsetup", "remove", "--retry", name)

    return logged


@pytest.fixture
def made_disk(attach_loop, mounted, run, tmp_path):
    """``made_disk(stack)``: an ext4 with the backing file in it, and on that the file system."""

    def made_disk(stack: Stack) -> Path:
        disk = tmp_path / "disk"
        disk.touch()
        os.truncate(disk, DISK_BYTES)
        run("mkfs.ext4", "-q", disk)
        with attach_loop(disk) as below, mounted(below) as folder:
            path = folder / "backing"
            path.touch()
            os.truncate(path, stack.dev_bytes)
            if stack.file_system:
                run(f"mkfs.{stack.file_system}", "-q", path)
        return disk

    return made_disk


def _split(client, stack: Stack) -> None:
    for _ in range(NR_PASSES):
        for slot in range(NR_SLOTS):
            client.write(slot * stack.slot_bytes, bytes(stack.slot_bytes))


@pytest.fixture
def store(mounted):
    """``with store(stack, dev) as place``: the device itself, or what is mounted from it."""

    @contextlib.contextmanager
    def store(stack: Stack, block_path: str):
        if not stack.file_system:
            yield Path(block_path)
            return
        with mounted(block_path) as folder:
            yield folder

    return store


@pytest.mark.deadline(120 + 20 * NR_CUTS)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_synced_records_are_there_after_a_cut_at_any_moment(
    made_disk, logged, store, mounted, attach_loop, apart, device, open_block, run, tmp_path, stack
) -> None:
    run("modprobe", "--all", "dm_log_writes", stack.file_system or "ext4", check=False)
    disk = made_disk(stack)
    image, cut_image = tmp_path / "image", tmp_path / "cut"
    run("cp", "--sparse=always", disk, image)
    with logged(disk) as (below, name), mounted(below) as folder:
        dev = apart(folder / "backing", direct=stack.direct, policy=stack.policy)
        try:
            if stack.is_split:
                with open_block(dev.block_path) as client:
                    _split(client, stack)
            with store(stack, dev.block_path) as place:
                records = Records(place, SEED, stack.slot_bytes)
                records.write(0, NR_RECORDS, lambda n: send_mark(name, str(n)))
        finally:
            dev.delete()
    log = WriteLog(tmp_path / "log")
    first = next(at for at, entry in enumerate(log.entries) if entry.text == "0")
    rng = random.Random(SEED)
    replayed = 0
    for end in sorted(rng.randrange(first + 1, len(log.entries) + 1) for _ in range(NR_CUTS)):
        log.replay(image, replayed, end)
        replayed = end
        run("cp", "--sparse=always", image, cut_image)
        nr_acknowledged = len(log.marks(end))
        with attach_loop(cut_image) as below, mounted(below) as folder:
            dev = device(LoopTarget(folder / "backing"))
            try:
                with store(stack, dev.block_path) as place:
                    records = Records(place, SEED, stack.slot_bytes)
                    records.check(range(nr_acknowledged), nr_acknowledged + 1)
            finally:
                dev.delete()
    assert len(log.marks(len(log.entries))) == NR_RECORDS
    print(f"{NR_CUTS} cuts among {len(log.entries)} entries")
