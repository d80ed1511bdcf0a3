"""Policies: which requests overtake which, seen from inside targets that can be held."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from proc_files import nr_sleeping_on_disk

from ublk_loop.target import LoopTarget, Target

KIB = 1 << 10
MIB = 1 << 20
BLOCK_BYTES = 4096


class HeldTarget(Target):
    """Writes wait until ``gate`` is set; remembers what was begun, and how many ran at once."""

    name = "held"

    def __init__(self) -> None:
        self.size = 4 * MIB
        self.gate = threading.Event()
        self.begun: list[tuple[str, int]] = []
        self.most_at_once = 0
        self._nr_running = 0
        self._lock = threading.Lock()

    def _begin(self, what: str, offset: int) -> None:
        with self._lock:
            self.begun.append((what, offset))
            self._nr_running += 1
            self.most_at_once = max(self.most_at_once, self._nr_running)

    def _end(self) -> None:
        with self._lock:
            self._nr_running -= 1

    def read(self, offset: int, buffer: memoryview) -> None:
        self._begin("read", offset)
        buffer[:] = bytes(len(buffer))
        self._end()

    def write(self, offset: int, data: memoryview) -> None:
        self._begin("write", offset)
        assert self.gate.wait(20)
        self._end()

    def flush(self) -> None:
        self._begin("flush", 0)
        self._end()


@pytest.fixture
def held(device):
    """``held(policy)``: a served HeldTarget; its gate is open at the end, come what may."""
    targets = []

    def held(policy: str):
        target = HeldTarget()
        targets.append(target)
        return target, device(target, policy=policy)

    yield held
    for target in targets:
        target.gate.set()


@pytest.mark.parametrize("policy", ["auto", "2014"])
def test_read_overtakes_a_blocked_write(held, open_block, wait_until, policy) -> None:
    target, dev = held(policy)
    with open_block(dev.block_path) as client, ThreadPoolExecutor() as clients:
        write = clients.submit(client.write, 0, bytes(BLOCK_BYTES))
        wait_until(lambda: ("write", 0) in target.begun)
        read = clients.submit(client.read, MIB, BLOCK_BYTES)
        assert read.result(timeout=10) == bytes(BLOCK_BYTES)
        assert not write.done()
        target.gate.set()
        assert write.result() == BLOCK_BYTES


def test_read_waits_for_a_blocked_write_under_base(held, open_block, wait_until) -> None:
    target, dev = held("base")
    with open_block(dev.block_path) as client, ThreadPoolExecutor() as clients:
        write = clients.submit(client.write, 0, bytes(BLOCK_BYTES))
        wait_until(lambda: ("write", 0) in target.begun)
        begun = len(target.begun)
        read = clients.submit(client.read, MIB, BLOCK_BYTES)
        wait_until(lambda: dev.hctxs[0].stats().nr_inflight == 2)
        assert target.begun[begun:] == []
        target.gate.set()
        assert write.result() == BLOCK_BYTES
        assert read.result() == bytes(BLOCK_BYTES)
        assert target.begun[begun:] == [("read", MIB)]
    assert target.most_at_once == 1


@pytest.mark.parametrize("policy", ["auto", "2014", "base"])
def test_writes_and_flushes_run_one_at_a_time_in_order(
    held, open_block, wait_until, policy
) -> None:
    target, dev = held(policy)
    offsets = [block * 64 * KIB for block in (5, 3, 9, 1, 7)]
    with open_block(dev.block_path) as client, ThreadPoolExecutor() as clients:
        writes = []
        for nr_before, offset in enumerate(offsets):
            writes.append(clients.submit(client.write, offset, bytes(BLOCK_BYTES)))
            wait_until(lambda n=nr_before + 1: dev.hctxs[0].stats().nr_inflight == n)
        flush = clients.submit(client.flush)
        wait_until(lambda: dev.hctxs[0].stats().nr_inflight == len(offsets) + 1)
        target.gate.set()
        for write in writes:
            assert write.result() == BLOCK_BYTES
        flush.result()
    writers = [what for what in target.begun if what[0] != "read"]
    assert writers == [*(("write", offset) for offset in offsets), ("flush", 0)]


@pytest.mark.parametrize("policy", ["auto", "2014", "base"])
def test_writes_that_arrive_in_batches_run_one_at_a_time_in_order(held, fio, policy) -> None:
    target, dev = held(policy)
    target.gate.set()
    target.begun.clear()
    target.most_at_once = 0
    # With a gap behind each block, or the kernel would merge them.
    job = {"rw": "write:4k", "bs": "4k", "size": 2 * MIB, "iodepth": 64, "iodepth_batch": 16}
    fio(dev.block_path, {"job": job})
    assert target.begun == [("write", offset) for offset in range(0, 2 * MIB, 8 * KIB)]
    assert target.most_at_once == 1


def test_base_executes_everything_one_at_a_time(held, fio) -> None:
    target, dev = held("base")
    target.gate.set()
    fio(dev.block_path, {"rw": {"rw": "randrw", "bs": "4k", "iodepth": 32, "size": MIB}})
    assert target.most_at_once == 1


# ---- the native target, held by a suspended disk ----


@pytest.mark.parametrize(("policy", "nr_at_once"), [("2014", 4), ("base", 1)])
def test_native_reads_run_at_once_under_2014_and_one_by_one_under_base(
    suspendable, device, open_block, run, wait_until, policy, nr_at_once
) -> None:
    dev = device(LoopTarget(suspendable, direct=True), policy=policy)
    nr_reads = 4
    with open_block(dev.block_path) as client, ThreadPoolExecutor(nr_reads) as clients:
        run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
        try:
            reads = []
            for n in range(1, nr_reads + 1):
                # In batches of one: several would share a worker, and not sleep on the disk.
                reads.append(clients.submit(client.read, n * 64 * KIB, 4 * KIB))
                wait_until(lambda n=n: dev.hctxs[0].stats().nr_inflight == n)
                # The clients sleep too.
                wait_until(lambda n=n: nr_sleeping_on_disk() == n + min(n, nr_at_once))
            assert not any(read.done() for read in reads)
        finally:
            run("dmsetup", "resume", suspendable)
        assert all(read.result() == bytes(4 * KIB) for read in reads)


@pytest.mark.parametrize("policy", ["auto", "2014"])
def test_native_read_overtakes_a_write_that_waits_for_the_disk(
    suspendable, device, open_block, run, wait_until, policy
) -> None:
    # A buffered read of pages in the cache needs no disk; a write with FUA does.
    dev = device(LoopTarget(suspendable, direct=False), policy=policy)
    with open_block(dev.block_path) as client, ThreadPoolExecutor(2) as clients:
        assert client.read(0, 4 * KIB) == bytes(4 * KIB)
        run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
        try:
            write = clients.submit(client.write, 512 * KIB, b"w" * 4096, flags=os.RWF_DSYNC)
            wait_until(lambda: dev.hctxs[0].stats().nr_inflight == 1)
            # On a thread, or a read that waits could not be helped by resume.
            read = clients.submit(client.read, 0, 4 * KIB)
            assert read.result(timeout=20) == bytes(4 * KIB)
            assert not write.done()
        finally:
            run("dmsetup", "resume", suspendable)
        assert write.result() == 4096
