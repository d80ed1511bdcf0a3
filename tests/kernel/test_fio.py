"""fio --verify=crc32c: four patterns, depths 1 to 128, blocks of 512 B to 1 MiB, everywhere."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Any

import pytest

from ublk_loop.target import LoopTarget
from ublk_loop.uapi import UBLK_F_NEED_GET_DATA, UBLK_F_USER_COPY

KIB = 1 << 10
MIB = 1 << 20
DEV_BYTES = 16 * MIB
PATTERNS = ["write", "read", "randwrite", "randread"]  # each read verifies the write before it
DEPTHS = [1, 64, 128]
BLOCK_BYTES = [512, 4 * KIB, 64 * KIB, MIB]
JOB_BYTES = {512: 64 * KIB, 4 * KIB: 512 * KIB, 64 * KIB: 8 * MIB, MIB: 16 * MIB}


@dataclass(frozen=True)
class Kind:
    """A kind of device; together they pair every value with nearly every other."""

    policy: str
    direct: bool
    nr_hw_queues: int
    transport: dict[str, Any] = field(default_factory=dict)
    max_io_buf_bytes: int = 512 * KIB


KINDS = {
    "auto-buffered-1q-copy": Kind("auto", False, 1),
    "auto-direct-2q-1_thread": Kind("auto", True, 2, {"nr_threads": 1}, MIB),
    "auto-buffered-2q-user_copy-no_batch": Kind(
        "auto", False, 2, {"flags": UBLK_F_USER_COPY, "batch": False}
    ),
    "auto-direct-1q-need_get_data": Kind("auto", True, 1, {"flags": UBLK_F_NEED_GET_DATA}),
    "2014-buffered-2q-user_copy": Kind("2014", False, 2, {"flags": UBLK_F_USER_COPY}),
    "2014-direct-1q-copy-no_batch": Kind("2014", True, 1, {"batch": False, "poll_us": 0}, MIB),
    "base-buffered-2q-need_get_data": Kind("base", False, 2, {"flags": UBLK_F_NEED_GET_DATA}),
    "base-direct-1q-user_copy": Kind("base", True, 1, {"flags": UBLK_F_USER_COPY}),
}


def jobs_for(kind: Kind) -> dict[str, dict[str, object]]:
    # Half of the block sizes at each depth, the other half for the next kind of device.
    turn = list(KINDS.values()).index(kind)
    steps = [
        (rw, depth, bs)
        for nr, depth in enumerate(DEPTHS)
        for bs in BLOCK_BYTES[(turn + nr) % 2 :: 2]
        for rw in PATTERNS
    ]
    # Jobs take turns on the CPUs, so that each queue gets its share.
    cpus = sorted(os.sched_getaffinity(0))
    return {
        f"{rw}-{depth}-{bs}": {
            "rw": rw,
            "iodepth": depth,
            "bs": bs,
            "size": JOB_BYTES[bs] if depth > 1 else JOB_BYTES[bs] // 4,
            "do_verify": 0 if "write" in rw else 1,
            "cpus_allowed": cpus[nr // 2 % len(cpus)],
        }
        for nr, (rw, depth, bs) in enumerate(steps)
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_fio_verifies_all_patterns_depths_and_block_sizes(
    device, backing_file, ext4_folder, fio, kind
) -> None:
    path = backing_file(DEV_BYTES, folder=ext4_folder)
    dev = device(
        LoopTarget(path, direct=kind.direct),
        policy=kind.policy,
        nr_hw_queues=kind.nr_hw_queues,
        max_io_buf_bytes=kind.max_io_buf_bytes,
        **kind.transport,
    )
    jobs = jobs_for(kind)
    before = [hctx.stats() for hctx in dev.hctxs]
    report = fio(dev.block_path, jobs, verify="crc32c")
    after = [hctx.stats() for hctx in dev.hctxs]
    for job in report["jobs"]:
        wanted = jobs[job["jobname"]]
        side = "write" if "write" in str(wanted["rw"]) else "read"
        assert job[side]["io_bytes"] == wanted["size"], job["jobname"]
    nr_bytes = sum(int(str(job["size"])) for job in jobs.values()) // 2
    assert sum(s.write_bytes for s in after) - sum(s.write_bytes for s in before) == nr_bytes
    assert sum(s.read_bytes for s in after) - sum(s.read_bytes for s in before) >= nr_bytes
    assert len(after) == min(kind.nr_hw_queues, os.cpu_count() or 1)
    for stats in after:
        assert stats.nr_reads > 0
        assert stats.nr_writes > 0
        assert stats.nr_errors == 0
        assert stats.nr_inflight == 0


def test_fio_verifies_writes_of_a_buffered_client(device, backing_file, ext4_folder, fio) -> None:
    dev = device(LoopTarget(backing_file(DEV_BYTES, folder=ext4_folder)), nr_hw_queues=2)
    mixed = {"bsrange": "512-64k", "size": 8 * MIB, "invalidate": 1}
    jobs = {rw: {"rw": rw, **mixed} for rw in ("write", "randwrite")}
    fio(dev.block_path, jobs, verify="crc32c", direct=0, ioengine="psync", end_fsync=1)
    assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0


def test_fio_verifies_two_writers_and_two_readers_at_once(
    device, backing_file, ext4_folder, fio
) -> None:
    dev = device(LoopTarget(backing_file(DEV_BYTES, folder=ext4_folder)), nr_hw_queues=2)
    half = DEV_BYTES // 2
    jobs = {
        "both": {
            "rw": "randrw",
            "bsrange": "512-64k",
            "iodepth": 32,
            "size": half,
            "io_size": 4 * MIB,
            "offset_increment": half,
            "numjobs": 2,
        }
    }
    report = fio(dev.block_path, jobs, verify="crc32c")
    assert len(report["jobs"]) == 2
    assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0


def test_fio_notices_a_byte_changed_behind_the_device(device, backing_file, fio) -> None:
    path = backing_file(MIB)
    dev = device(LoopTarget(path))
    size = {"bs": "4k", "size": MIB}
    fio(dev.block_path, {"write": {"rw": "write", "do_verify": 0, **size}}, verify="crc32c")
    with path.open("r+b") as file:
        file.seek(512 * KIB + 2000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    for rw in ("read", "randread"):
        report = fio(dev.block_path, {rw: {"rw": rw, **size}}, verify="crc32c", check=False)
        assert report["jobs"][0]["error"] == errno.EILSEQ
