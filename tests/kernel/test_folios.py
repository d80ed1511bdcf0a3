"""Files of ext4 that are written a little at a time: small folios, and the same bytes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import struct
from pathlib import Path

import pytest

from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20
PAGE = mmap.PAGESIZE
REGION = 2 * MIB
# Small writes that on any machine take longer than the split of a region is thought to take.
NR_WRITES = 3000
NR_PASSES = 12  # of large writes over a region: enough for a split
LARGE = 256 * KIB  # what a region that was not split has written by the ring
NR_PLACES = 100  # of a page, in a region, with room between them
COMPOUND = 1 << 15 | 1 << 16  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL


def _nr_pages_in_large_folios(path: Path, offset: int, nr_bytes: int) -> int:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), nr_bytes, offset=offset) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at in range(0, nr_bytes, PAGE):
            assert memory[at] >= 0  # puts the page into our page table
        numbers = _read_u64s("/proc/self/pagemap", address // PAGE, nr_bytes // PAGE)
        frames = [number & ((1 << 55) - 1) for number in numbers]
    flags = [_read_u64s("/proc/kpageflags", frame, 1)[0] for frame in frames]
    return sum(bool(flag & COMPOUND) for flag in flags)


def _read_u64s(path: str, index: int, count: int) -> tuple[int, ...]:
    with open(path, "rb") as file:
        return struct.unpack(f"={count}Q", os.pread(file.fileno(), 8 * count, 8 * index))


@pytest.mark.parametrize("offset_bytes", [0, PAGE])
def test_region_that_is_written_a_little_at_a_time_gets_small_folios_and_keeps_its_bytes(
    device, backing_file, ext4_folder, open_block, pattern, offset_bytes
) -> None:
    path = backing_file(3 * REGION, pattern(3 * REGION), folder=ext4_folder)
    has_large = _nr_pages_in_large_folios(path, 0, REGION)
    dev = device(LoopTarget(path, offset_bytes=offset_bytes), policy="auto")
    model = bytearray(pattern(3 * REGION)[offset_bytes:])
    rng = random.Random(1)
    with open_block(dev.block_path) as client:
        for turn in range(NR_WRITES):
            at = rng.randrange(PAGE, REGION - PAGE, 512)
            model[at : at + 1024] = pattern(1024, seed=turn)
            assert client.write(at, pattern(1024, seed=turn)) == 1024
        assert client.read(0, REGION) == model[:REGION]
        assert dev.hctxs[0].stats().nr_errors == 0
    assert path.read_bytes()[offset_bytes:] == model
    # Folios at the edges may be shared with what is around the device.
    assert _nr_pages_in_large_folios(path, 0, REGION - 64 * KIB) <= 16
    if has_large:
        assert _nr_pages_in_large_folios(path, REGION, REGION) > 0


def test_large_writes_to_a_split_region_go_by_the_mapping_and_keep_their_bytes(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    """They were written page by page, at twice the cost of a region that was never split."""
    path = backing_file(3 * REGION, pattern(3 * REGION), folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    model = bytearray(pattern(3 * REGION))
    with open_block(dev.block_path) as client:

        def write(at: int, nr_bytes: int, seed: int) -> None:
            model[at : at + nr_bytes] = pattern(nr_bytes, seed=seed)
            assert client.write(at, pattern(nr_bytes, seed=seed)) == nr_bytes

        for turn in range(NR_WRITES):
            write(turn % 500 * PAGE, PAGE, turn)
        before = dev.hctxs[0].stats()
        for turn, at in enumerate((0, 4 * PAGE, REGION - LARGE)):
            write(at, LARGE, turn)
        inside = dev.hctxs[0].stats()
        write(REGION - LARGE // 2, LARGE, 7)  # the next region was not split
        write(2 * REGION - PAGE, LARGE, 8)
        client.flush()
        assert client.read(0, 3 * REGION) == model
        assert dev.hctxs[0].stats().nr_errors == 0
    assert inside.nr_inline - before.nr_inline == inside.nr_writes - before.nr_writes
    assert path.read_bytes() == model


def _rewrite(client, pattern, *, flushes: bool = False) -> bytes:
    """Write the region's large parts NR_PASSES times; return what it holds then."""
    for turn in range(NR_PASSES):
        model = pattern(REGION, seed=turn)
        for at in range(0, REGION, LARGE):
            assert client.write(at, model[at : at + LARGE]) == LARGE
        if flushes:
            client.flush()
    return model


@pytest.mark.parametrize("flushes", [False, True])
def test_region_that_large_writes_rewrite_while_it_is_dirty_gets_small_folios(
    device, backing_file, ext4_folder, open_block, pattern, flushes
) -> None:
    path = backing_file(2 * REGION, pattern(2 * REGION), folder=ext4_folder)
    has_large = _nr_pages_in_large_folios(path, 0, REGION)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        model = _rewrite(client, pattern, flushes=flushes)
        assert client.read(0, REGION) == model
        client.flush()
        assert dev.hctxs[0].stats().nr_errors == 0
    assert path.read_bytes()[:REGION] == model
    nr_large = _nr_pages_in_large_folios(path, 0, REGION)
    assert nr_large <= 16 or flushes
    if has_large:
        assert (nr_large > 16) == flushes


def test_region_of_a_sparse_file_that_large_writes_rewrite_gets_small_folios(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    """What the ring had written was taken for new for ever, and new pages do not count."""
    path = backing_file(2 * REGION, folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        model = _rewrite(client, pattern)
        assert client.read(0, REGION) == model
    assert path.read_bytes()[:REGION] == model
    assert _nr_pages_in_large_folios(path, 0, REGION) <= 16


@pytest.fixture
def khugepaged(wait_until):
    """A function that has khugepaged look at all memory of all processes."""
    knobs = Path("/sys/kernel/mm/transparent_hugepage")
    wanted = {
        "enabled": "always",
        "khugepaged/scan_sleep_millisecs": "1",
        "khugepaged/pages_to_scan": "100000",
    }
    before = {name: (knobs / name).read_text() for name in wanted}
    before["enabled"] = before["enabled"].partition("[")[2].partition("]")[0]
    full_scans = knobs / "khugepaged/full_scans"

    def scan() -> None:
        wanted_scans = int(full_scans.read_text()) + 3  # of which one began after now
        wait_until(lambda: int(full_scans.read_text()) >= wanted_scans, timeout_s=60)

    for name, value in wanted.items():
        (knobs / name).write_text(value)
    yield scan
    for name, value in before.items():
        (knobs / name).write_text(value)


def test_small_folios_stay_small_when_khugepaged_sees_the_mapping(
    device, backing_file, ext4_folder, open_block, pattern, khugepaged
) -> None:
    """It made one huge folio of a split region, all of which each write then dirtied."""
    path = backing_file(4 * REGION, pattern(4 * REGION), folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        for turn in range(NR_WRITES):
            assert client.write(turn % 500 * PAGE, pattern(PAGE, seed=turn)) == PAGE
        assert client.read(0, REGION)
        client.flush()
        khugepaged()
    assert _nr_pages_in_large_folios(path, 0, REGION) <= 16


@pytest.fixture
def failing(backing_file, attach_loop, mounted, run, tmp_path):
    """``folder, fail``: ext4 on a disk that refuses writes after ``fail(True)``."""
    name = f"ublk-loop-failing-{os.getpid()}"
    node = Path("/dev/mapper", name)
    with attach_loop(backing_file(16 * MIB)) as disk:
        run("modprobe", "dm_flakey")
        run("dmsetup", "create", name, "--table", f"0 {32 * KIB} linear {disk} 0")
        run("dmsetup", "mknodes")
        run("mkfs.ext4", "-q", "-O", "^has_journal", node)

        def fail(is_failing: bool) -> None:
            target = f"flakey {disk} 0 0 3600 1 error_writes" if is_failing else f"linear {disk} 0"
            run("dmsetup", "suspend", "--nolockfs", name)
            run("dmsetup", "load", name, "--table", f"0 {32 * KIB} {target}")
            run("dmsetup", "resume", name)

        with mounted(node) as folder:
            yield folder, fail
        run("dmsetup", "remove", "--retry", name)


def test_flush_reports_what_could_not_be_written_back_before_a_split(
    failing, device, open_block, pattern, raises_errno
) -> None:
    """Whoever waits for a write-back takes note of its error: only a flush may."""
    folder, fail = failing
    path = folder / "backing"
    path.write_bytes(pattern(REGION))
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        client.flush()
        fail(True)
        for turn in range(NR_WRITES):
            place = turn % NR_PLACES
            assert client.write(place * 5 * PAGE, pattern(PAGE, seed=place)) == PAGE
        fail(False)
        with raises_errno(errno.EIO):
            client.flush()
        for place in range(NR_PLACES):
            assert client.read(place * 5 * PAGE, PAGE) == pattern(PAGE, seed=place)
        client.flush()
