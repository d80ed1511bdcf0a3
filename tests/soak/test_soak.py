"""Hours of what the kernel tests do in seconds, with other numbers in each round.

Run by hand, as root, on a kernel with ublk_drv or in a guest (tools/vm.py):

    UBLK_LOOP_SOAK_S=3600 python -m pytest -v tests/soak

Each test goes on for UBLK_LOOP_SOAK_S seconds (600 by default). ``UBLK_LOOP_SOAK_SEED`` repeats the
choices of a run that failed; every failure names its seed and round.

Some kernel tests go on for longer when told so, which docs/reliability.md did for its figures:

    UBLK_LOOP_SOAK_KILLS=1000     tests/kernel/test_kills.py
    UBLK_LOOP_SOAK_DAEMON_KILLS=1000  tests/kernel/test_recovery.py -k any_moment
        (UBLK_LOOP_SOAK_OPTIONS=--no_batch in user-mode Linux)
    UBLK_LOOP_SOAK_LIVES=500      tests/kernel/test_lives.py      (UBLK_LOOP_SOAK_STEPS each)
    UBLK_LOOP_SOAK_CHURNS=1000    tests/kernel/test_churn.py
    UBLK_LOOP_SOAK_DEVICES=300    tests/kernel/test_daemon.py -k idle
    UBLK_LOOP_SOAK_CUTS=100       tests/kernel/test_power_cut.py   (each of three; 4 GiB of memory)

tests/soak/test_many.py has 300 devices in one daemon. tests/soak/fuzz.py needs no driver;
tests/soak/machine_cuts.py kills the guests that it starts.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ublk_loop.control import Control
from ublk_loop.device import Device
from ublk_loop.target import LoopTarget, NullTarget, RamTarget, Target
from ublk_loop.uapi import UBLK_F_NEED_GET_DATA, UBLK_F_USER_COPY

KIB = 1 << 10
MIB = 1 << 20
SOAK_S = float(os.environ.get("UBLK_LOOP_SOAK_S", "600"))
SEED = os.environ.get("UBLK_LOOP_SOAK_SEED", str(time.time_ns()))
pytestmark = pytest.mark.deadline(SOAK_S + 600)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Iterator[Iterator[random.Random]]:
    """``for rng in rounds``: a round's source of chance, until the time is over."""
    begun = time.monotonic()
    number = 0

    def generate() -> Iterator[random.Random]:
        nonlocal number
        while time.monotonic() - begun < SOAK_S:
            number += 1
            yield random.Random(f"{SEED} {request.node.name} {number}")

    yield generate()
    print(f"round {number} of UBLK_LOOP_SOAK_SEED={SEED}")


def some_options(rng: random.Random) -> dict[str, Any]:
    return {
        "nr_hw_queues": rng.randint(1, 4),
        "queue_depth": rng.choice([1, 2, 32, 128, 1024]),
        "max_io_buf_bytes": rng.choice([4 * KIB, 64 * KIB, 512 * KIB, MIB]),
        "flags": rng.choice([0, UBLK_F_USER_COPY, UBLK_F_NEED_GET_DATA]),
        "policy": rng.choice(["2014", "base"]),
    }


@contextlib.contextmanager
def served(control: Control, target: Target, options: dict[str, Any]) -> Iterator[Device]:
    dev = Device.add(control, target, **options)
    try:
        dev.start()
        yield dev
    finally:
        dev.delete()


def memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def test_random_operations_equal_a_model(
    control, backing_file, ext4_folder, tmp_path, open_block, operate, rounds
) -> None:
    for rng in rounds:
        dev_bytes = rng.choice([64 * KIB, 4 * MIB, 16 * MIB])
        folder = rng.choice([ext4_folder, tmp_path])
        offset_bytes = 4096 * rng.randrange(3)
        path = backing_file(offset_bytes + dev_bytes, folder=folder)
        direct = rng.choice([True, False])
        target = LoopTarget(path, offset_bytes=offset_bytes, direct=direct)
        model = bytearray(dev_bytes)
        with served(control, target, some_options(rng)) as dev:
            for _ in range(5):
                with open_block(dev.block_path, direct=rng.choice([True, False])) as client:
                    for _ in range(200):
                        operate(client, model, rng)
                    client.flush()
        assert path.read_bytes()[offset_bytes:] == model
        path.unlink()


def test_fio_verifies_every_mixture(control, backing_file, ext4_folder, fio, rounds) -> None:
    for rng in rounds:
        path = backing_file(64 * MIB, folder=ext4_folder)
        target = LoopTarget(path, direct=rng.choice([True, False]))
        smallest = rng.choice([512, 4 * KIB, 64 * KIB])
        job = {
            "rw": rng.choice(["write", "randwrite", "randrw", "rw"]),
            "bsrange": f"{smallest}-{smallest * rng.choice([1, 2, 16])}",
            "iodepth": rng.choice([1, 3, 64, 256]),
            "size": 16 * MIB,
            "io_size": 16 * MIB,
            "offset_increment": 16 * MIB,
            "numjobs": rng.randint(1, 4),
            "randseed": rng.randrange(1 << 30),
        }
        with served(control, target, some_options(rng)) as dev:
            fio(dev.block_path, {"job": job}, verify="crc32c", timeout_s=600)
            assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0
        path.unlink()


def test_file_system_stays_clean_while_trees_come_and_go(
    control, backing_file, mounted, run, fingerprint, rounds
) -> None:
    tree = Path(os.__file__).parent / "email"
    expected = fingerprint(tree)
    path = backing_file(256 * MIB)
    with served(control, LoopTarget(path), {}) as dev:
        run("mkfs.ext4", "-q", dev.block_path)
    for rng in rounds:
        target = LoopTarget(path, direct=rng.choice([True, False, None]))
        with served(control, target, some_options(rng)) as dev:
            with mounted(dev.block_path, "-o", rng.choice(["discard", "nodiscard"])) as top:
                for _ in range(5):
                    copy = top / f"tree{rng.randrange(4)}"
                    if copy.exists():
                        assert fingerprint(copy) == expected
                        shutil.rmtree(copy)
                    else:
                        run("cp", "-a", tree, copy)
                run("fstrim", top)
            run("e2fsck", "-fn", dev.block_path, timeout_s=300)


def test_adds_and_dels_leak_nothing(control, rounds) -> None:
    sizes: list[tuple[int, int, int]] = []
    for number, rng in enumerate(rounds):
        with served(control, NullTarget(MIB), some_options(rng)):
            pass
        if number % 100 == 0:
            gc.collect()
            nr_fds = len(os.listdir("/proc/self/fd"))
            sizes.append((nr_fds, memory_bytes("VmSize"), memory_bytes("VmRSS")))
    settled = sizes[1:]  # the first hundred makes the arenas of malloc
    if len(settled) > 1:
        growth = [last - first for first, last in zip(settled[0], settled[-1], strict=True)]
        assert growth[0] == 0
        assert growth[1] < 64 * MIB
        assert growth[2] < 8 * MIB


def test_del_at_any_moment_of_a_load_ends_it(control, backing_file, rounds) -> None:
    for rng in rounds:
        path = backing_file(16 * MIB)
        target = LoopTarget(path) if rng.random() < 0.5 else RamTarget(16 * MIB)
        with served(control, target, some_options(rng)) as dev:
            load = subprocess.Popen(
                [
                    *("fio", "--name=load", f"--filename={dev.block_path}", "--thread"),
                    *("--direct=1", "--ioengine=libaio", "--bsrange=512-64k", "--iodepth=64"),
                    *(f"--rw={rng.choice(['randrw', 'write', 'randread'])}", "--size=16m"),
                    *("--time_based", "--runtime=300", f"--fsync={rng.choice([0, 8])}"),
                    "--allow_file_create=0",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(rng.random() * 3)  # any moment: there is nothing to wait for
        try:
            assert load.wait(60) != 0
        finally:
            load.kill()
            load.wait()
        path.unlink()
