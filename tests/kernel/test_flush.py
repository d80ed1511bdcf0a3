"""FLUSH and FUA: they reach the target, and the target's word reaches the client.

A backing whose flushes can be counted: a second device below the first, served from Python.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from ublk_loop.target import LoopTarget, RamTarget

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


def flush_is_inline(dev, client) -> bool:
    before = dev.hctxs[0].stats().nr_inline
    client.flush()
    return dev.hctxs[0].stats().nr_inline > before


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
