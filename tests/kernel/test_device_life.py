"""A device's life: added, started, stopped, deleted, 200 times, under load, and while held."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ublk_loop.control import list_dev_ids
from ublk_loop.device import Device
from ublk_loop.target import LoopTarget, NullTarget, RamTarget
from ublk_loop.uapi import UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE

KIB = 1 << 10
MIB = 1 << 20


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise KeyError(field)


def test_device_goes_from_dead_to_live_to_gone(control, wait_until) -> None:
    dev = Device.add(control, NullTarget(MIB))
    assert control.get_dev_info(dev.dev_id).state == UBLK_S_DEV_DEAD
    assert os.path.exists(dev.char_path)
    assert not os.path.exists(dev.block_path)
    dev.start()
    info = control.get_dev_info(dev.dev_id)
    assert info.state == UBLK_S_DEV_LIVE
    assert info.ublksrv_pid == os.getpid()
    assert os.path.exists(dev.block_path)
    dev.stop()
    assert control.get_dev_info(dev.dev_id).state == UBLK_S_DEV_DEAD
    assert not os.path.exists(dev.block_path)
    dev.delete()
    assert dev.dev_id not in list_dev_ids()
    wait_until(lambda: not os.path.exists(dev.char_path))


def test_device_that_was_never_started_is_deleted(control) -> None:
    dev = Device.add(control, NullTarget(MIB))
    dev.delete()
    assert dev.dev_id not in list_dev_ids()


def test_stop_twice_and_close_twice_do_no_harm(device) -> None:
    dev = device(NullTarget(MIB))
    dev.stop()
    dev.stop()
    dev.close()
    dev.close()
    dev.delete()


def test_end_is_noticed_when_somebody_else_stops_the_device(device, control) -> None:
    dev = device(NullTarget(MIB))
    noticed = threading.Event()
    dev.on_end(noticed.set)
    assert not dev.wait(0)
    control.stop_dev(dev.dev_id)
    assert dev.wait(5)
    assert noticed.wait(5)
    assert dev.errors() == []
    dev.delete()


def test_same_id_is_served_again_and_again(device) -> None:
    for nr_bytes in (MIB, 2 * MIB, 3 * MIB):
        dev = device(NullTarget(nr_bytes), dev_id=7)
        assert dev.dev_id == 7
        assert int(Path("/sys/block/ublkb7/size").read_text()) * 512 == nr_bytes
        dev.delete()


def test_bytes_are_there_again_after_del_and_add(device, backing_file, open_block, pattern) -> None:
    path = backing_file(MIB)
    for seed in range(3):
        dev = device(LoopTarget(path))
        with open_block(dev.block_path) as client:
            assert client.read(0, MIB) == (pattern(MIB, seed) if seed else bytes(MIB))
            client.write(0, pattern(MIB, seed + 1))
        dev.delete()


def test_several_devices_live_side_by_side(device, backing_file, open_block, pattern) -> None:
    paths = [backing_file(MIB) for _ in range(4)]
    devices = [device(LoopTarget(path), nr_hw_queues=2) for path in paths]
    assert len({dev.dev_id for dev in devices}) == 4
    for seed, dev in enumerate(devices):
        with open_block(dev.block_path) as client:
            client.write(0, pattern(MIB, seed))
    for dev in devices:
        dev.delete()
    for seed, path in enumerate(paths):
        assert path.read_bytes() == pattern(MIB, seed)


@pytest.mark.deadline(300)
def test_200_adds_and_dels_leak_nothing(control) -> None:
    # Four at a time: a cycle mostly waits for the kernel.
    def cycle(_: int) -> None:
        dev = Device.add(control, NullTarget(MIB), queue_depth=4, max_io_buf_bytes=64 * KIB)
        dev.start()
        dev.delete()

    def sizes() -> tuple[int, int]:
        gc.collect()
        return memory_bytes("VmSize"), memory_bytes("VmRSS")

    def cycles(nr: int) -> None:
        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(cycle, range(nr)):
                pass

    cycles(40)  # malloc's arenas and thread stacks settle
    nr_fds, nr_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    vm_bytes, rss_bytes = sizes()
    cycles(160)
    vm_growth, rss_growth = (a - b for a, b in zip(sizes(), (vm_bytes, rss_bytes), strict=True))
    assert len(os.listdir("/proc/self/fd")) == nr_fds
    assert threading.active_count() == nr_threads
    # A leaked ring, arena (256 KiB) or stack (8 MiB) a cycle would be 40 MiB and more.
    assert vm_growth < 16 * MIB
    assert rss_growth < 4 * MIB


@pytest.mark.parametrize("target_kind", ["loop", "ram"])
def test_del_while_fio_runs_ends_fio_with_errors_and_leaves_nothing(
    device, backing_file, wait_until, target_kind
) -> None:
    target = LoopTarget(backing_file(16 * MIB)) if target_kind == "loop" else RamTarget(16 * MIB)
    dev = device(target, nr_hw_queues=2)
    command = [
        *("fio", "--name=load", f"--filename={dev.block_path}", "--thread", "--direct=1"),
        *("--ioengine=libaio", "--rw=randrw", "--bs=4k", "--iodepth=32", "--size=16m"),
        *("--time_based", "--runtime=60", "--allow_file_create=0"),
    ]
    load = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: dev.hctxs[0].stats().nr_writes > 100, timeout_s=30)
        dev.delete()
        assert not os.path.exists(dev.block_path)
        assert load.wait(20) != 0
    finally:
        load.kill()
        load.wait()


class SlowTarget(RamTarget):
    """Reads wait until ``gate`` is set, once it was cleared."""

    def __init__(self, nr_bytes: int) -> None:
        super().__init__(nr_bytes)
        self.gate = threading.Event()
        self.gate.set()

    def read(self, offset: int, buffer: memoryview) -> None:
        assert self.gate.wait(30)
        super().read(offset, buffer)


def test_del_with_a_read_in_flight_waits_for_it(device, open_block, wait_until) -> None:
    target = SlowTarget(MIB)
    dev = device(target)
    target.gate.clear()
    try:
        with open_block(dev.block_path) as client, ThreadPoolExecutor(2) as threads:
            read = threads.submit(client.read, 0, 4096)
            wait_until(lambda: dev.hctxs[0].stats().nr_inflight == 1)
            deletion = threads.submit(dev.stop)
            wait_until(lambda: not deletion.done() and not read.done())
            target.gate.set()
            deletion.result(timeout=20)
            assert read.exception(timeout=5) is None or read.exception().errno == errno.EIO
    finally:
        target.gate.set()
    dev.delete()


def test_stop_gives_up_at_its_deadline_and_succeeds_later(
    device, open_block, wait_until, raises_errno
) -> None:
    target = SlowTarget(MIB)
    dev = device(target)
    target.gate.clear()
    try:
        with open_block(dev.block_path) as client, ThreadPoolExecutor(1) as threads:
            read = threads.submit(client.read, 0, 4096)
            wait_until(lambda: dev.hctxs[0].stats().nr_inflight == 1)
            begun = time.monotonic()
            with raises_errno(errno.ETIMEDOUT):
                dev.stop(timeout_s=0.5)
            assert time.monotonic() - begun < 10
            target.gate.set()
            read.exception(timeout=10)
    finally:
        target.gate.set()
    dev.stop()
    dev.delete()


def test_device_whose_block_device_is_held_open_is_stopped(device, open_block) -> None:
    dev = device(RamTarget(MIB))
    with open_block(dev.block_path) as client:
        dev.stop()
        with pytest.raises(OSError):
            client.write(0, bytes(4096))
        assert not os.path.exists(dev.block_path)
    dev.delete()


def test_device_with_a_mounted_file_system_is_deleted_once_it_is_unmounted(
    device, mounted, run, pattern
) -> None:
    dev = device(RamTarget(32 * MIB))
    run("mkfs.ext4", "-q", dev.block_path)
    with mounted(dev.block_path) as folder:
        (folder / "file").write_bytes(pattern(MIB))
        os.sync()
        assert (folder / "file").read_bytes() == pattern(MIB)
    dev.delete()
