"""Limits of a device: depths, queues, request sizes; and what is refused."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from ublk_loop import state
from ublk_loop.control import list_dev_ids
from ublk_loop.device import Device
from ublk_loop.errors import DriverError
from ublk_loop.target import LoopTarget, NullTarget, RamTarget
from ublk_loop.uapi import (
    UBLK_F_AUTO_BUF_REG,
    UBLK_F_BATCH_IO,
    UBLK_F_IO_DESC_SIZE,
    UBLK_F_NEED_GET_DATA,
    UBLK_F_PER_IO_DAEMON,
    UBLK_F_SUPPORT_ZERO_COPY,
    UBLK_F_USER_COPY,
    UBLK_F_ZONED,
)

KIB = 1 << 10
MIB = 1 << 20


class Recorder(RamTarget):
    """Remembers the lengths of its requests."""

    def __init__(self, nr_bytes: int) -> None:
        super().__init__(nr_bytes)
        self.lengths: list[int] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.lengths.append(len(data))
        super().write(offset, data)


def queue_attr(dev: Device, name: str) -> int:
    return int(Path(f"/sys/block/ublkb{dev.dev_id}/queue/{name}").read_text())


@pytest.mark.parametrize("queue_depth", [1, 2, 4096])
def test_queue_depth_from_1_to_the_drivers_limit_serves(
    device, backing_file, fio, queue_depth, transport
) -> None:
    path = backing_file(8 * MIB)
    dev = device(LoopTarget(path), queue_depth=queue_depth, max_io_buf_bytes=64 * KIB, **transport)
    assert dev.info.queue_depth == queue_depth
    jobs = {
        rw: {"rw": rw, "bs": "4k", "iodepth": min(queue_depth, 256), "size": 2 * MIB}
        for rw in ("write", "randwrite")
    }
    fio(dev.block_path, jobs, verify="crc32c")
    assert dev.hctxs[0].stats().nr_errors == 0


def test_queues_beyond_the_cpus_are_capped_and_their_threads_go_where_there_is_room(device) -> None:
    dev = device(NullTarget(MIB), nr_hw_queues=64, queue_depth=2)
    nr_cpus = os.cpu_count() or 1
    assert len(dev.hctxs) == dev.info.nr_hw_queues == nr_cpus
    for hctx in dev.hctxs:
        # A queue a CPU: bound to it, the thread would take turns with its client.
        thread = hctx.thread
        assert thread.affinity == os.sched_getaffinity(thread.tid) == frozenset(range(nr_cpus))


def test_threads_of_fewer_queues_than_cpus_are_bound_to_their_queues_cpus(device, control) -> None:
    dev = device(NullTarget(MIB), nr_hw_queues=1, queue_depth=2)
    (hctx,) = dev.hctxs
    own = control.get_queue_affinity(dev.dev_id, 0)
    assert hctx.thread.affinity == os.sched_getaffinity(hctx.thread.tid) == own


@pytest.mark.parametrize("batch", [None, False], ids=["batch", "no_batch"])
def test_one_thread_serves_all_queues_of_a_device(device, backing_file, fio, batch) -> None:
    dev = device(LoopTarget(backing_file(8 * MIB)), nr_hw_queues=2, nr_threads=1, batch=batch)
    (thread,) = dev.threads
    assert [hctx.thread for hctx in dev.hctxs] == [thread] * dev.info.nr_hw_queues
    assert thread.affinity == frozenset(range(os.cpu_count() or 1))
    jobs = {
        f"cpu{cpu}": {"rw": "randwrite", "bs": "4k", "size": "4m", "verify": "crc32c"}
        | {"offset": cpu * 4 * MIB, "cpus_allowed": cpu, "iodepth": 32}
        for cpu in range(dev.info.nr_hw_queues)
    }
    fio(dev.block_path, jobs)
    assert all(hctx.stats().nr_writes and hctx.stats().nr_reads for hctx in dev.hctxs)
    assert dev.errors() == []


@pytest.mark.parametrize("data", ["copy", "usercopy", "zerocopy"])
def test_threads_beyond_the_queues_have_tags_of_every_queue(
    device, backing_file, ext4_folder, fio, features, data
) -> None:
    if not features & UBLK_F_PER_IO_DAEMON:
        pytest.skip("this driver has one thread a queue (6.16)")
    path = backing_file(16 * MIB, folder=ext4_folder)
    target = LoopTarget(path, direct=data == "zerocopy")
    dev = device(target, nr_hw_queues=2, nr_threads=6, queue_depth=65, data=data)
    nr_queues = dev.info.nr_hw_queues
    assert not dev.info.flags & UBLK_F_BATCH_IO
    assert len({thread.tid for thread in dev.threads}) == len(dev.threads) == 6
    assert len(dev.hctxs) == 6 * nr_queues
    jobs = {
        f"cpu{cpu}": {"rw": "randwrite", "bs": "4k", "size": "8m", "verify": "crc32c"}
        | {"offset": cpu * 8 * MIB, "cpus_allowed": cpu, "iodepth": 64}
        for cpu in range(nr_queues)
    }
    fio(dev.block_path, jobs)
    for q_id in range(nr_queues):
        stats = [hctx.stats() for hctx in dev.hctxs if hctx.q_id == q_id]
        assert sum(each.nr_writes for each in stats) == 2048
        assert sum(each.nr_reads for each in stats) >= 2048  # the search for partitions reads too
        assert sum(each.nr_errors for each in stats) == 0
    assert dev.errors() == []


def test_every_thread_of_a_queue_serves_its_tags(device, fio, features) -> None:
    if not features & UBLK_F_PER_IO_DAEMON:
        pytest.skip("this driver has one thread a queue (6.16)")
    # So slow that all of the queue is in flight before the first one ends.
    dev = device(NullTarget(delay_us=500_000), nr_threads=6, queue_depth=65, batch=False)
    fio(dev.block_path, {"job": {"rw": "randread", "bs": "4k", "iodepth": 64, "number_ios": 64}})
    stats = [hctx.stats() for hctx in dev.hctxs]
    assert len(stats) == 6
    assert all(each.nr_reads for each in stats)
    assert sum(each.nr_reads for each in stats) >= 64


def test_queue_that_threads_share_is_bound_as_one_recovered_and_handed_over(
    here, add, backing_file, open_block, pattern, features, state_dir
) -> None:
    if not features & UBLK_F_PER_IO_DAEMON:
        pytest.skip("this driver has one thread a queue (6.16)")
    added = add("-t loop -T 3 -i 1 -f", backing_file(MIB, pattern(MIB)))
    dev_id = added["dev_id"]
    for words in ("recover -n", "upgrade -n"):
        if words == "recover -n":
            os.kill(added["server_pid"], signal.SIGKILL)
            os.waitpid(added["server_pid"], 0)
        assert here(words, dev_id).exit_code == 0
        [queue] = state.read(dev_id).queues
        assert len(queue.other_tids) == 2
        assert here("set_affinity --cpuset 1 -q 0 -n", dev_id).exit_code == 0
        for tid in (queue.tid, *queue.other_tids):
            assert os.sched_getaffinity(tid) == {1}
        with open_block(added["block_device"]) as client:
            assert client.read(0, MIB) == pattern(MIB)


def test_threads_beyond_the_tags_or_with_batches_are_not_made(device, features) -> None:
    assert len(device(NullTarget(), nr_threads=8, queue_depth=2, batch=False).threads) == (
        2 if features & UBLK_F_PER_IO_DAEMON else 1
    )
    if features & UBLK_F_BATCH_IO:
        assert len(device(NullTarget(), nr_threads=8, batch=True).threads) == 1


@pytest.mark.parametrize("flags", [0, UBLK_F_USER_COPY], ids=["copy", "user_copy"])
@pytest.mark.parametrize("max_io_buf_bytes", [4 * KIB, 64 * KIB, MIB, 4 * MIB])
def test_largest_request_is_what_was_asked_for(
    device, open_block, pattern, flags, max_io_buf_bytes
) -> None:
    target = Recorder(8 * MIB)
    dev = device(target, max_io_buf_bytes=max_io_buf_bytes, queue_depth=8, flags=flags)
    assert dev.info.max_io_buf_bytes == max_io_buf_bytes
    assert queue_attr(dev, "max_hw_sectors_kb") == max_io_buf_bytes >> 10
    # By default the kernel keeps file systems to less.
    Path(f"/sys/block/ublkb{dev.dev_id}/queue/max_sectors_kb").write_text(
        str(max_io_buf_bytes >> 10)
    )
    data = pattern(4 * MIB)
    with open_block(dev.block_path) as client:
        client.write(MIB, data)
        assert client.read(MIB, len(data)) == data
    assert sum(target.lengths) == len(data)
    # Memory in scattered pages may make it smaller, never larger.
    assert 4 * KIB <= max(target.lengths) <= max_io_buf_bytes


def test_terabytes_are_a_size_too(device, backing_file, open_block, pattern) -> None:
    nr_bytes = 3 << 40
    path = backing_file(nr_bytes)
    dev = device(LoopTarget(path))
    with open_block(dev.block_path) as client:
        client.write(nr_bytes - 4096, pattern(4096))
        assert client.read(nr_bytes - 4096, 4096) == pattern(4096)
    dev.delete()
    with path.open("rb") as file:
        file.seek(-4096, os.SEEK_END)
        assert file.read() == pattern(4096)


@pytest.mark.parametrize(
    "options",
    [
        {"queue_depth": 0},
        {"queue_depth": 4097},
        {"nr_hw_queues": 0},
        {"nr_hw_queues": 4097},
        {"max_io_buf_bytes": 0},
        {"max_io_buf_bytes": 2048},
        {"max_io_buf_bytes": (32 << 20) + 4096},
        {"dev_id": -2},
        {"flags": UBLK_F_SUPPORT_ZERO_COPY},
        {"flags": UBLK_F_ZONED | UBLK_F_USER_COPY},
        {"flags": 1 << 40},
        {"policy": "2015"},
    ],
    ids=str,
)
def test_bad_option_is_a_value_error_and_leaves_no_device(control, options) -> None:
    before = list_dev_ids()
    with pytest.raises(ValueError):
        Device.add(control, NullTarget(MIB), **options)
    assert list_dev_ids() == before


def test_batches_are_used_where_the_driver_offers_them_and_may_be_declined(
    device, features
) -> None:
    offered = features & UBLK_F_BATCH_IO
    assert device(NullTarget(MIB)).info.flags & UBLK_F_BATCH_IO == offered
    assert device(NullTarget(MIB), batch=False).info.flags & UBLK_F_BATCH_IO == 0
    no_batch = {"flags": UBLK_F_NEED_GET_DATA}
    assert device(NullTarget(MIB), **no_batch).info.flags & UBLK_F_BATCH_IO == 0


def test_batches_demanded_and_not_possible_leave_no_device(control, features) -> None:
    # Where the driver has them, not beside NEED_GET_DATA.
    options = {"flags": UBLK_F_NEED_GET_DATA} if features & UBLK_F_BATCH_IO else {}
    before = list_dev_ids()
    with pytest.raises(DriverError) as refusal:
        Device.add(control, NullTarget(MIB), batch=True, **options)
    assert refusal.value.errno in (errno.EINVAL, errno.EOPNOTSUPP)
    assert list_dev_ids() == before


def test_id_that_is_taken_is_eexist_and_its_device_lives_on(
    device, control, open_block, raises_errno
) -> None:
    dev = device(RamTarget(MIB))
    with pytest.raises(DriverError) as refusal:
        Device.add(control, NullTarget(MIB), dev_id=dev.dev_id)
    assert refusal.value.errno == errno.EEXIST
    with open_block(dev.block_path) as client:
        assert client.read(0, 4096) == bytes(4096)


def test_target_that_cannot_be_made_native_leaves_no_device(control) -> None:
    class Broken(NullTarget):
        def _native_config(self):
            raise OSError(errno.ENOMEM, "no")

    before = list_dev_ids()
    with pytest.raises(OSError) as failure:
        Device.add(control, Broken(MIB))
    assert failure.value.errno == errno.ENOMEM
    assert list_dev_ids() == before


def test_io_threads_are_io_flushers_and_workers_run_at_high_priority(
    device, backing_file, open_block
) -> None:
    dev = device(LoopTarget(backing_file(MIB)))
    with open_block(dev.block_path) as client:
        client.read(0, 4096)
        pf_memalloc_noio = 0x00080000
        pf_local_throttle = 0x00100000
        stat = Path("/proc/self/task", str(dev.threads[0].tid), "stat").read_text()
        flags = int(stat.rpartition(") ")[2].split()[6])
        assert flags & pf_memalloc_noio
        assert flags & pf_local_throttle
        nices = [
            int(Path("/proc/self/task", tid, "stat").read_text().rpartition(") ")[2].split()[16])
            for tid in os.listdir("/proc/self/task")
        ]
        assert -20 in nices


@pytest.mark.parametrize("io_desc_bytes", [24, 64, 256])
def test_descriptor_may_be_wider_than_what_is_used_of_it(
    device, control, backing_file, fio, features, io_desc_bytes
) -> None:
    if not features & UBLK_F_IO_DESC_SIZE:
        pytest.skip("this driver's descriptors have one size (7.3)")
    path = backing_file(8 * MIB)
    dev = device(LoopTarget(path), nr_hw_queues=2, queue_depth=200, io_desc_bytes=io_desc_bytes)
    assert control.get_dev_info(dev.dev_id).io_desc_size == io_desc_bytes
    fio(dev.block_path, {"job": {"rw": "randwrite", "bs": "4k", "iodepth": 64, "numjobs": 2,
        "size": 4 * MIB, "offset_increment": 4 * MIB}}, verify="crc32c")  # fmt: skip
    assert sum(hctx.stats().nr_writes for hctx in dev.hctxs) >= 2048


@pytest.mark.parametrize("io_desc_bytes", [16, 28, 264])
def test_descriptor_of_a_size_that_the_driver_does_not_have_is_refused(
    control, features, raises_errno, io_desc_bytes
) -> None:
    if not features & UBLK_F_IO_DESC_SIZE:
        pytest.skip("this driver's descriptors have one size (7.3)")
    with raises_errno(errno.EINVAL):
        Device.add(control, NullTarget(MIB), io_desc_bytes=io_desc_bytes)
    assert list_dev_ids() == []


def test_null_device_with_zero_copy_has_the_limits_of_a_narrow_disk(
    device, features, open_block
) -> None:
    if not features & UBLK_F_AUTO_BUF_REG:
        pytest.skip("this driver has no AUTO_BUF_REG (6.16)")
    dev = device(NullTarget(), data="zerocopy")
    names = ("dma_alignment", "max_segments", "max_segment_size")
    assert [queue_attr(dev, name) for name in names] == [4095, 32, 32768]
    with open_block(dev.block_path) as client:
        assert client.write(0, bytes(MIB)) == MIB
    free = device(NullTarget())
    assert queue_attr(free, "max_segments") > 32


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", ""),
        ("-u -q 2 -d 8 --max_sectors 8 --dev_sectors 64", ""),
        ("--param_types none", "the basic parameters are missing"),
        ("--logical_bs_shift 12 --physical_bs_shift 9", "larger than"),
        ("--max_sectors 2049", "max_sectors 2049"),
        ("--param_types basic,zoned", "the device is not zoned"),
    ],
)
def test_set_params_says_whether_the_driver_takes_them(here, words, reason) -> None:
    result = here(f"set_params {words}")
    assert (result.exit_code, result.stdout) == (bool(reason), "")
    assert reason in result.stderr
    assert result.stderr.count("\n") == bool(reason)
    assert list_dev_ids() == []


def test_set_params_of_a_zoned_device_are_asked_of_the_driver_that_has_them(here, features) -> None:
    zoned = "set_params -u --zoned --param_types basic,zoned"
    if not features & UBLK_F_ZONED:
        assert "lacks" in here(zoned).stderr
        return
    assert here(zoned).exit_code == 0
    for words in (
        "--chunk_sectors 96",
        "--max_zone_append_sectors 0",
        "--max_open_zones 17",
        "--max_active_zones 17",
    ):
        assert here(f"{zoned} {words}").exit_code == 1
    assert list_dev_ids() == []
