"""FLUSH and FUA: they reach the target, and the target's word reaches the client.

A backing whose flushes can be counted: a second device below the first, served from Python.
"""

from __future__ import annotations

import errno
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proc_files import nr_sleeping_on_disk

from ublk_loop.target import LoopTarget, RamTarget

KIB = 1 << 10
MIB = 1 << 20


class FlushCounter(RamTarget):
    """Counts its flushes, and fails them on demand."""

    def __init__(self, nr_bytes: int) -> None:
        super().__init__(nr_bytes)
        self.nr_flushes = 0
        self.error = 0

    def flush(self) -> None:
        self.nr_flushes += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


class SlowWriter(RamTarget):
    """Without a cache, so that a flush of what is clean is quick; a write is not."""

    def write(self, offset: int, data: memoryview) -> None:
        time.sleep(0.001)
        super().write(offset, data)


def write_cache(dev) -> str:
    return Path(f"/sys/block/ublkb{dev.dev_id}/queue/write_cache").read_text().strip()


@pytest.fixture
def counter() -> FlushCounter:
    return FlushCounter(4 * MIB)


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def stacked(request, device, counter):
    """A loop device whose backing is a device that counts flushes."""
    lower = device(counter)
    return device(LoopTarget(lower.block_path, direct=request.param))


def test_fsync_reaches_a_python_target_as_flush(device, counter, open_block) -> None:
    dev = device(counter)
    with open_block(dev.block_path) as client:
        client.write(0, bytes(4096))
        assert counter.nr_flushes == 0
        client.flush()
        client.flush()
    assert counter.nr_flushes == 2
    assert dev.hctxs[0].stats().nr_flushes == 2


def test_fsync_reaches_what_is_below_the_backing_file(
    stacked, counter, open_block, pattern
) -> None:
    with open_block(stacked.block_path) as client:
        client.write(0, pattern(64 * 1024))
        before = counter.nr_flushes
        client.flush()
    assert stacked.hctxs[0].stats().nr_flushes == 1
    assert counter.nr_flushes == before + 1


def test_fua_write_is_durable_before_it_completes(stacked, counter, open_block, pattern) -> None:
    # A synchronous write of the block device is a FUA write, then a flush. Each of them must flush
    # the device below.
    with open_block(stacked.block_path) as client:
        client.write(8192, pattern(8192), flags=os.RWF_DSYNC)
    assert stacked.hctxs[0].stats().nr_flushes == 1
    assert counter.nr_flushes >= 2
    with memoryview(bytearray(8192)) as stored:
        counter.read(8192, stored)
        assert stored == pattern(8192)


def test_flush_that_fails_below_fails_the_clients_fsync(stacked, counter, open_block) -> None:
    with open_block(stacked.block_path) as client:
        client.write(0, bytes(4096))
        counter.error = errno.EIO
        with pytest.raises(OSError) as failure:
            client.flush()
        assert failure.value.errno == errno.EIO
        counter.error = 0
        client.flush()
    assert stacked.hctxs[0].stats().nr_errors == 1


def test_writable_loop_device_has_a_cache_that_takes_fua(device, backing_file) -> None:
    dev = device(LoopTarget(backing_file(MIB)))
    assert write_cache(dev) == "write back"
    assert Path(f"/sys/block/ublkb{dev.dev_id}/queue/fua").read_text().strip() == "1"


def test_read_only_loop_device_has_no_cache(device, backing_file) -> None:
    dev = device(LoopTarget(backing_file(MIB), read_only=True))
    assert write_cache(dev) == "write through"


def test_target_without_flush_gets_none(device, open_block) -> None:
    dev = device(RamTarget(MIB))
    assert write_cache(dev) == "write through"
    with open_block(dev.block_path) as client:
        client.write(0, bytes(4096))
        client.flush()
    assert dev.hctxs[0].stats().nr_flushes == 0


@pytest.fixture
def quick(device, open_block, wait_until):
    """A device whose flushes have come to be done at once, and its client."""
    dev = device(LoopTarget(device(SlowWriter(4 * MIB)).block_path, direct=False), policy="auto")
    with open_block(dev.block_path) as client:
        client.read(0, 4 * MIB)  # into the page cache: a write to it is inline
        client.read(0, 4 * MIB)
        wait_until(lambda: flush_is_inline(dev, client))
        yield dev, client


def flush_is_inline(dev, client, q_id: int = 0) -> bool:
    before = dev.hctxs[q_id].stats().nr_inline
    client.flush()
    return dev.hctxs[q_id].stats().nr_inline > before


def test_flush_goes_to_the_worker_after_a_slow_one(quick, wait_until) -> None:
    dev, client = quick
    client.write(0, bytes(4096))
    client.flush()  # slow, whoever does it
    assert not flush_is_inline(dev, client)
    wait_until(lambda: flush_is_inline(dev, client))


def test_flush_of_much_that_was_written_goes_to_the_worker(quick) -> None:
    dev, client = quick
    client.write(0, bytes(2 * MIB))
    assert not flush_is_inline(dev, client)


def test_flush_is_the_workers_under_policy_2014(device, open_block) -> None:
    lower = device(SlowWriter(4 * MIB))
    dev = device(LoopTarget(lower.block_path, direct=False), policy="2014")
    with open_block(dev.block_path) as client:
        assert not any(flush_is_inline(dev, client) for _ in range(32))


@pytest.mark.parametrize("flags", [0, os.RWF_DSYNC], ids=["flush", "fua"])
def test_flush_that_is_done_at_once_waits_for_a_disk_that_stands_still_and_other_devices_do_not(
    suspendable, device, backing_file, open_block, pattern, run, wait_until, flags
) -> None:
    # Without a cache, so that a flush of what is clean is quick.
    numbers = os.stat(suspendable).st_rdev
    queue = f"/sys/dev/block/{os.major(numbers)}:{os.minor(numbers)}/queue"
    Path(queue, "write_cache").write_text("write through")
    dev = device(LoopTarget(suspendable, direct=False))
    other = device(LoopTarget(backing_file(MIB, pattern(MIB))))
    with (
        open_block(dev.block_path) as client,
        open_block(other.block_path) as other_client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.read(0, MIB)  # into the page cache: a write to it is inline
        client.read(0, MIB)
        wait_until(lambda: flush_is_inline(dev, client))

        def write() -> None:
            client.write(4096, pattern(4096, seed=1), flags=flags)
            client.flush()

        run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
        try:
            writing = pool.submit(write)
            # The client, and the iothread; or a worker, if the last flush, done at once, was slow.
            wait_until(lambda: nr_sleeping_on_disk() == 2, timeout_s=20)
            assert other_client.read(0, MIB // 2) == pattern(MIB)[: MIB // 2]
            assert not writing.done()
        finally:
            run("dmsetup", "resume", suspendable)
        writing.result(60)
        with open_block(suspendable, read_only=True) as disk:
            assert disk.read(4096, 4096) == pattern(4096, seed=1)
        assert not flush_is_inline(dev, client)  # the last one was slow
        wait_until(lambda: flush_is_inline(dev, client))
    assert dev.hctxs[0].stats().nr_errors == 0


class Queues:
    """A device with two queues, and what is below it: ``stored`` tells what is there for good."""

    def __init__(self, dev, cpus, stored) -> None:
        self.dev = dev
        self.stored = stored
        self._cpus = cpus

    def use(self, q_id: int) -> None:
        """What this thread does from now on goes by that queue."""
        os.sched_setaffinity(0, self._cpus[q_id])


@pytest.fixture(params=[None, 1], ids=["thread-a-queue", "one-thread"])
def on_queues(request, device, control, ext4_folder, backing_file):
    """``on_queues("disk" or "ext4")``: :class:`Queues`; of a disk all that it got is stored."""
    before = os.sched_getaffinity(0)

    def serve(backing: str) -> Queues:
        if backing == "disk":
            lower = RamTarget(8 * MIB)
            path = device(lower).block_path
        else:
            path = backing_file(8 * MIB, folder=ext4_folder)
        target = LoopTarget(path, direct=False)
        dev = device(target, nr_hw_queues=2, nr_threads=request.param)
        assert dev.info.nr_hw_queues == 2

        def stored(offset: int, nr_bytes: int) -> bytes:
            if backing == "ext4":
                return path.read_bytes()[offset : offset + nr_bytes]
            with memoryview(bytearray(nr_bytes)) as data:
                lower.read(offset, data)
                return bytes(data)

        return Queues(dev, [control.get_queue_affinity(dev.dev_id, q) for q in (0, 1)], stored)

    yield serve
    os.sched_setaffinity(0, before)


def test_flush_that_one_queue_does_at_once_covers_what_another_wrote(
    on_queues, open_block, pattern, wait_until
) -> None:
    queues = on_queues("disk")
    nr_inline = 0
    with open_block(queues.dev.block_path) as client:
        for turn in range(8):
            queues.use(0)
            wait_until(lambda: flush_is_inline(queues.dev, client), timeout_s=20)
            # New pages; each may go to the worker, who may not be over yet when the flush comes.
            queues.use(1)
            offset = (turn + 1) * 256 * KIB
            data = pattern(52 * KIB, seed=turn)
            client.write(offset, data[: 48 * KIB])
            client.write(offset + 48 * KIB, data[48 * KIB :])
            queues.use(0)
            nr_inline += flush_is_inline(queues.dev, client)
            assert queues.stored(offset, len(data)) == data
    assert nr_inline
    assert [hctx.stats().nr_errors for hctx in queues.dev.hctxs] == [0, 0]


@pytest.mark.parametrize("backing", ["disk", "ext4"])
def test_clients_of_two_queues_find_what_they_wrote_and_what_they_flushed_is_stored(
    on_queues, open_block, backing
) -> None:
    queues = on_queues(backing)
    half = 4 * MIB

    def use(q_id: int) -> None:
        rng = random.Random(f"{backing} {q_id}")
        queues.use(q_id)
        model, begin = bytearray(half), q_id * half
        with open_block(queues.dev.block_path) as client:
            for _ in range(150):
                what = rng.choice(["write", "write", "write", "fua", "flush", "read"])
                nr_bytes = rng.choice([512, 4 * KIB, 4 * KIB, 16 * KIB, 48 * KIB, 192 * KIB])
                offset = rng.randrange(0, half - nr_bytes, min(nr_bytes, 4 * KIB))
                if what == "read":
                    assert client.read(begin + offset, nr_bytes) == model[offset:][:nr_bytes]
                elif what == "flush":
                    for _ in range(rng.choice([1, 20])):  # until they are done at once again
                        client.flush()
                else:
                    data = rng.randbytes(nr_bytes)
                    flags = os.RWF_DSYNC if what == "fua" else 0
                    assert client.write(begin + offset, data, flags=flags) == nr_bytes
                    model[offset : offset + nr_bytes] = data
                if what in ("flush", "fua"):
                    assert queues.stored(begin, half) == model
            assert client.read(begin, half) == model

    with ThreadPoolExecutor(2) as pool:
        for using in [pool.submit(use, q_id) for q_id in (0, 1)]:
            using.result()
    stats = [hctx.stats() for hctx in queues.dev.hctxs]
    assert all(each.nr_flushes and each.nr_inline and not each.nr_errors for each in stats)
