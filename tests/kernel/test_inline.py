"""Policy auto: what is done at once, what the ring does, and the bytes, whoever moved them."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from pathlib import Path

import pytest
from page_cache import drop_caches, is_cached

from ublk_loop import uapi
from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20
PAGE = mmap.PAGESIZE
CLOCK_REALTIME_COARSE = 5


def test_resident_pages_are_read_and_written_at_once(
    device, backing_file, open_block, pattern
) -> None:
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        assert client.read(64 * KIB, 128 * KIB) == pattern(MIB)[64 * KIB : 192 * KIB]
        assert client.write(512, pattern(8 * KIB, seed=1)) == 8 * KIB
        assert client.read(512, 8 * KIB) == pattern(8 * KIB, seed=1)
        after = dev.hctxs[0].stats()
    assert after.nr_inline - before.nr_inline == 3
    assert path.read_bytes()[512 : 512 + 8 * KIB] == pattern(8 * KIB, seed=1)
    assert path.read_bytes()[512 + 8 * KIB :] == pattern(MIB)[512 + 8 * KIB :]


def test_file_in_memory_is_flushed_and_gives_up_pages_at_once(
    device, backing_file, open_block, pattern
) -> None:
    path = backing_file(4 * MIB, pattern(4 * MIB))
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        client.flush()
        client.discard(MIB, 64 * KIB)
        client.zero_out(2 * MIB, 64 * KIB)
        client.write(3 * MIB, bytes(4 * KIB), flags=os.RWF_DSYNC)
        after = dev.hctxs[0].stats()
        served = sum(
            getattr(after, name) - getattr(before, name)
            for name in ("nr_flushes", "nr_discards", "nr_writes")
        )
        assert served >= 4
        assert after.nr_inline - before.nr_inline == served
        client.discard(0, 2 * MIB)  # would keep the queue: a worker does it
        assert dev.hctxs[0].stats().nr_inline == after.nr_inline
    expected = bytearray(pattern(4 * MIB))
    for offset, nr_bytes in [(0, 2 * MIB), (2 * MIB, 64 * KIB), (3 * MIB, 4 * KIB)]:
        expected[offset : offset + nr_bytes] = bytes(nr_bytes)
    assert path.read_bytes() == expected


@pytest.fixture
def cold(device, backing_file, ext4_folder, open_block, pattern):
    """``path, dev, client``: 16 MiB of ``pattern`` on ext4, nothing of it in the page cache."""
    path = backing_file(16 * MIB, pattern(16 * MIB), folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        drop_caches()
        yield path, dev, client


def test_first_read_of_a_cold_page_leaves_the_page_cache_alone(cold, pattern) -> None:
    path, dev, client = cold
    offsets = range(4 * MIB, 12 * MIB, MIB)
    for offset in offsets:
        assert client.read(offset, 4 * KIB) == pattern(16 * MIB)[offset : offset + 4 * KIB]
    stats = dev.hctxs[0].stats()
    assert stats.nr_async >= len(offsets)
    assert not any(is_cached(path, offset) for offset in offsets)


def test_random_read_next_to_a_page_that_was_read_leaves_the_page_cache_alone(
    cold, pattern
) -> None:
    path, _, client = cold
    for place in range(4 * MIB, 12 * MIB, MIB):
        for offset in (place, place + PAGE):
            assert client.read(offset, PAGE) == pattern(16 * MIB)[offset : offset + PAGE]
            assert not is_cached(path, offset)


def test_request_whose_pages_the_ring_has_as_a_cold_read_was_expected_is_served_as_any_other(
    cold, pattern
) -> None:
    path, _, client = cold
    model = bytearray(pattern(16 * MIB))
    expecting = iter(range(8 * MIB, 16 * MIB, 32 * KIB))
    for _ in range(200):  # each tag fetches a request after one of these
        offset = next(expecting)
        assert client.read(offset, PAGE) == model[offset : offset + PAGE]
    for number, nr_bytes in enumerate((512, PAGE, 12 * KIB, 64 * KIB, 256 * KIB, 512 * KIB)):
        place = slice(number * MIB + 512, number * MIB + 512 + nr_bytes)
        data = pattern(nr_bytes, seed=number + 1)
        for whole in (model[place], data, data):  # cold, not there as it is written, there
            offset = next(expecting)
            assert client.read(offset, PAGE) == model[offset : offset + PAGE]
            assert client.read(place.start, nr_bytes) == model[place]
            offset = next(expecting)
            assert client.read(offset, PAGE) == model[offset : offset + PAGE]
            assert client.write(place.start, whole) == nr_bytes
            model[place] = whole
        client.flush()
    offset = next(expecting)
    assert client.read(offset, PAGE) == model[offset : offset + PAGE]
    client.discard(7 * MIB, 64 * KIB)
    model[7 * MIB : 7 * MIB + 64 * KIB] = bytes(64 * KIB)
    assert client.read(0, 8 * MIB) == model[: 8 * MIB]
    assert path.read_bytes() == model


def test_page_that_another_program_wrote_is_read_as_written_where_all_else_is_cold(
    cold, pattern
) -> None:
    path, _, client = cold
    # What all else was lately is guessed of a page too, and that is dirty.
    model = bytearray(pattern(16 * MIB))
    with path.open("r+b", buffering=0) as other:
        for offset in range(MIB, 15 * MIB, 256 * KIB):
            assert client.read(offset, PAGE) == model[offset : offset + PAGE]
        for seed, offset in enumerate(range(MIB + 64 * KIB, 15 * MIB, 256 * KIB), 1):
            other.seek(offset)
            other.write(pattern(PAGE, seed=seed))
            model[offset : offset + PAGE] = pattern(PAGE, seed=seed)
            for _ in range(3):
                assert client.read(offset, PAGE) == model[offset : offset + PAGE]
        assert client.read(0, MIB) == model[:MIB]
    assert path.read_bytes() == model


def test_cold_read_into_memory_that_the_disk_does_not_take_is_right(cold, pattern) -> None:
    _, _, client = cold
    with mmap.mmap(-1, 2 * MIB) as memory:
        cases = itertools.product((4 * KIB, 64 * KIB, 256 * KIB), (4, 256, 2048))
        for number, (nr_bytes, shift) in enumerate(cases, 4):
            with memoryview(memory)[shift : shift + nr_bytes] as data:
                assert os.preadv(client.fd, [data], number * MIB) == nr_bytes
                assert data == pattern(16 * MIB)[number * MIB :][:nr_bytes]


def test_page_written_behind_a_first_read_is_read_as_written(cold, pattern) -> None:
    _, _, client = cold
    assert client.read(8 * MIB, 4 * KIB) == pattern(16 * MIB)[8 * MIB :][: 4 * KIB]
    assert client.write(8 * MIB, pattern(512, seed=1)) == 512
    expected = pattern(512, seed=1) + pattern(16 * MIB)[8 * MIB + 512 :][: 8 * KIB - 512]
    assert client.read(8 * MIB, 8 * KIB) == expected
    drop_caches()
    assert client.read(8 * MIB, 8 * KIB) == expected


@pytest.mark.parametrize("nr_read", [11, 12])
def test_page_read_again_brings_the_16_around_it_if_most_of_them_were_read(
    cold, pattern, nr_read: int
) -> None:
    path, dev, client = cold
    expected = pattern(16 * MIB)
    place = 8 * MIB
    pages = [place + number * PAGE for number in range(16)]
    # Backwards, that is no stream.
    for offset in (*reversed(pages[:nr_read]), pages[3]):
        assert not is_cached(path, offset)
        assert client.read(offset, PAGE) == expected[offset : offset + PAGE]
    cached = [offset for offset in pages if is_cached(path, offset)]
    assert cached == (pages if nr_read == 12 else [])
    assert not is_cached(path, place - PAGE)
    assert not is_cached(path, place + 16 * PAGE)
    before = dev.hctxs[0].stats()
    for offset in cached:
        assert client.read(offset, PAGE) == expected[offset : offset + PAGE]
    assert dev.hctxs[0].stats().nr_async == before.nr_async


def test_page_that_is_read_often_comes_to_the_page_cache_alone(cold, pattern) -> None:
    path, dev, client = cold
    expected = pattern(16 * MIB)[8 * MIB :][:PAGE]
    for _ in range(3):
        assert not is_cached(path, 8 * MIB)
        assert client.read(8 * MIB, PAGE) == expected
    assert is_cached(path, 8 * MIB)
    assert not is_cached(path, 8 * MIB + PAGE)
    before = dev.hctxs[0].stats()
    assert client.read(8 * MIB, PAGE) == expected
    assert dev.hctxs[0].stats().nr_async == before.nr_async


def test_what_was_read_is_known_though_the_kernel_reads_ahead_for_a_stream(cold, pattern) -> None:
    path, _, client = cold
    expected = pattern(16 * MIB)
    once = 12 * MIB
    for offset in (once, once, *range(4 * MIB, 6 * MIB, PAGE)):
        assert client.read(offset, PAGE) == expected[offset : offset + PAGE]
    assert not is_cached(path, once)
    assert client.read(once, PAGE) == expected[once : once + PAGE]
    assert is_cached(path, once)


def test_cold_pages_are_read_by_the_ring_and_then_at_once(cold, pattern) -> None:
    _, dev, client = cold
    # Not the first pages: what the kernel read for partitions stays mapped, with its folio.
    expected = pattern(16 * MIB)[8 * MIB :][: 64 * KIB]
    before = dev.hctxs[0].stats()
    assert client.read(8 * MIB, 64 * KIB) == expected
    # Two reads leave the page cache alone, the third fills it.
    assert client.read(8 * MIB, 64 * KIB) == expected
    assert client.read(8 * MIB, 64 * KIB) == expected
    warm = dev.hctxs[0].stats()
    assert client.read(8 * MIB, 64 * KIB) == expected
    after = dev.hctxs[0].stats()
    assert warm.nr_async - before.nr_async == 3
    assert after.nr_async == warm.nr_async
    assert after.nr_inline - warm.nr_inline == 1


def test_cold_pages_of_a_disk_are_read_at_once_when_they_have_come(
    device, backing_file, attach_loop, open_block, pattern
) -> None:
    with attach_loop(backing_file(MIB, pattern(MIB))) as disk:
        dev = device(LoopTarget(disk, direct=False), policy="auto")
        with open_block(dev.block_path) as client:
            for _ in range(5):  # past the page cache, then into it
                before = dev.hctxs[0].stats()
                assert client.read(MIB // 2, 4 * KIB) == pattern(MIB)[MIB // 2 :][: 4 * KIB]
        assert dev.hctxs[0].stats().nr_inline - before.nr_inline == 1


def test_direct_io_is_done_by_the_ring_both_ways(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=True), policy="auto")
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        assert client.read(0, 64 * KIB) == pattern(MIB)[: 64 * KIB]
        assert client.write(4 * KIB, pattern(64 * KIB, seed=1)) == 64 * KIB
        after = dev.hctxs[0].stats()
    assert after.nr_async - before.nr_async == 2
    assert path.read_bytes()[4 * KIB : 68 * KIB] == pattern(64 * KIB, seed=1)


def test_large_write_to_resident_pages_goes_from_the_clients_pages_to_the_files(
    device, backing_file, ext4_folder, open_block, pattern, features
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        assert client.write(4 * KIB, pattern(256 * KIB, seed=1)) == 256 * KIB
        after = dev.hctxs[0].stats()
        assert client.read(4 * KIB, 256 * KIB) == pattern(256 * KIB, seed=1)
    by_ring = bool(features & uapi.UBLK_F_SUPPORT_ZERO_COPY)
    assert after.nr_async - before.nr_async == by_ring
    assert after.nr_inline - before.nr_inline == (not by_ring)
    expected = bytearray(pattern(MIB))
    expected[4 * KIB : 260 * KIB] = pattern(256 * KIB, seed=1)
    assert path.read_bytes() == expected


def _iou_wrk_wakeups() -> int:
    tasks = Path("/proc/self/task").glob("*")
    texts = [(task / "status").read_text() for task in tasks]
    found = [text for text in texts if text.startswith("Name:\tiou-wrk")]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in found)


def test_direct_write_in_each_tick_of_the_clock_needs_no_thread_of_io_urings(
    device, backing_file, ext4_folder, open_block
) -> None:
    """mtime is set to a new tick by who may wait, so each went to such a thread."""
    nr_ticks = 32
    path = backing_file(MIB, bytes(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=True), policy="auto")
    with open_block(dev.block_path) as client:
        client.write(0, bytes(4 * KIB))
        before = _iou_wrk_wakeups()
        begin = path.stat().st_mtime_ns
        for _ in range(nr_ticks):
            tick = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
            while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) == tick:
                pass
            client.write(0, bytes(4 * KIB))
        assert _iou_wrk_wakeups() - before < nr_ticks // 2
    assert path.stat().st_mtime_ns > begin


def test_page_that_is_cut_off_after_it_was_used_is_eio_and_the_device_goes_on(
    device, backing_file, open_block, pattern, raises_errno
) -> None:
    """The mapping faults with SIGBUS there, which once could have ended the server."""
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB // 2) == pattern(MIB)[: MIB // 2]
        os.truncate(path, 64 * KIB)
        with raises_errno(5):
            client.read(128 * KIB, 4 * KIB)
        assert client.read(0, 64 * KIB) == pattern(MIB)[: 64 * KIB]
        # A write behind the end makes the file longer, as /dev/loop has it.
        assert client.write(128 * KIB, pattern(4 * KIB, seed=1)) == 4 * KIB
        assert client.read(128 * KIB, 4 * KIB) == pattern(4 * KIB, seed=1)
        assert client.read(64 * KIB, 64 * KIB) == bytes(64 * KIB)


def test_reading_a_hole_does_not_fill_it(device, backing_file, open_block) -> None:
    path = backing_file(4 * MIB)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        for offset in range(0, 4 * MIB, 512 * KIB):
            assert client.read(offset, 512 * KIB) == bytes(512 * KIB)
    assert path.stat().st_blocks == 0


@pytest.mark.parametrize("seconds_write", [False, True], ids=["discarded", "written-again"])
def test_used_page_that_is_discarded_reads_as_zeroes_and_stays_a_hole(
    device, backing_file, open_block, pattern, seconds_write
) -> None:
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB // 2) == pattern(MIB)[: MIB // 2]
        client.discard(0, MIB // 2)
        if seconds_write:
            client.write(0, pattern(MIB // 2, seed=2))
            assert client.read(0, MIB // 2) == pattern(MIB // 2, seed=2)
            return
        assert client.read(0, MIB // 2) == bytes(MIB // 2)
    assert path.stat().st_blocks * 512 == MIB // 2


def test_part_of_used_pages_that_is_discarded_is_a_hole_and_the_rest_is_kept(
    device, backing_file, open_block, pattern
) -> None:
    begin, end = 61 * 4 * KIB, 191 * 4 * KIB  # neither is a multiple of 64 pages
    path = backing_file(2 * MIB, pattern(2 * MIB))
    dev = device(LoopTarget(path), policy="auto")
    model = bytearray(pattern(2 * MIB))
    model[begin:end] = bytes(end - begin)
    with open_block(dev.block_path) as client:
        assert client.read(0, 2 * MIB) == pattern(2 * MIB)
        client.discard(begin, end - begin)
        for at in range(0, 2 * MIB, 4 * KIB):
            assert client.read(at, 4 * KIB) == model[at : at + 4 * KIB]
    assert path.stat().st_blocks * 512 == 2 * MIB - (end - begin)


def test_hole_that_was_read_is_read_as_it_is_written_then(
    device, backing_file, open_block, pattern
) -> None:
    path = backing_file(MIB)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB // 2) == bytes(MIB // 2)
        for turn in range(3):  # by a system call, then by the mapping
            data = pattern(256 * KIB, seed=turn)
            client.write(4 * KIB, data)
            assert client.read(0, MIB // 2) == bytes(4 * KIB) + data + bytes(MIB // 4 - 4 * KIB)
    assert path.stat().st_blocks * 512 == 256 * KIB


@pytest.mark.parametrize(
    ("nr_bytes", "is_whole"), [(4 * KIB, True), (48 * KIB, True), (KIB, False)]
)
def test_new_pages_of_a_disks_file_are_written_at_once_but_not_parts_of_them(
    device, backing_file, ext4_folder, open_block, pattern, nr_bytes, is_whole
) -> None:
    # 80 of them: one that happens to take long has write_work do the next 64.
    model = bytearray(81 * 64 * KIB)
    path = backing_file(len(model), folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto")
    with open_block(dev.block_path) as client:
        before = dev.hctxs[0].stats()
        for at in range(64 * KIB, len(model), 64 * KIB):  # the kernel has read the first page
            model[at : at + nr_bytes] = pattern(nr_bytes, seed=at)
            assert client.write(at, pattern(nr_bytes, seed=at)) == nr_bytes
        assert (dev.hctxs[0].stats().nr_inline > before.nr_inline) == is_whole
        assert client.read(0, len(model)) == model
    assert path.read_bytes() == model


@pytest.mark.parametrize("offset_bytes", [512, 4096 + 1536])
def test_mapping_of_a_device_at_an_odd_offset_begins_there(
    device, backing_file, open_block, pattern, offset_bytes
) -> None:
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path, offset_bytes=offset_bytes), policy="auto")
    with open_block(dev.block_path) as client:
        assert client.read(0, 64 * KIB) == pattern(MIB)[offset_bytes:][: 64 * KIB]
        client.write(1024, pattern(4 * KIB, seed=1))
        last = dev.target.size - 512
        assert client.read(last, 512) == pattern(MIB)[offset_bytes:][last : last + 512]
    begin = offset_bytes + 1024
    assert path.read_bytes()[begin : begin + 4 * KIB] == pattern(4 * KIB, seed=1)


@pytest.mark.parametrize("batch", [None, False], ids=["best", "command-a-tag"])
@pytest.mark.parametrize("poll_us", [0, 50])
def test_fio_verifies_with_and_without_batches_and_spinning(
    control, device, backing_file, ext4_folder, fio, batch, poll_us
) -> None:
    path = backing_file(32 * MIB, folder=ext4_folder)
    dev = device(LoopTarget(path), policy="auto", batch=batch, poll_us=poll_us)
    offered = control.get_features() & uapi.UBLK_F_BATCH_IO
    assert dev.info.flags & uapi.UBLK_F_BATCH_IO == (offered if batch is None else 0)
    jobs = {
        f"{rw}{bs}": {"rw": rw, "bs": bs, "size": "4m", "iodepth": depth, "verify": "crc32c"}
        for rw, bs, depth in (("randwrite", "4k", 64), ("write", "512", 32), ("randrw", "64k", 8))
    }
    fio(dev.block_path, jobs)
