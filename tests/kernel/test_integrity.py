"""Data under concurrency: overlapping requests, caches that are dropped, files that are cut.

Clients that overlap are judged by tests/support/stamps.py, files by tests/support/file_model.py,
both on every kind of device: policy, way of the data, batches, queues, cache, backing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from file_model import FileModel
from stamps import SECTOR_BYTES, Clients, fill

from ublk_loop.target import LoopTarget
from ublk_loop.uapi import UBLK_F_NEED_GET_DATA, UBLK_F_USER_COPY

KIB = 1 << 10
MIB = 1 << 20
DEV_BYTES = 4 * MIB
HOT_SECTORS = 256


@dataclass(frozen=True)
class Kind:
    """A kind of device; together they pair every value with nearly every other."""

    policy: str
    backing: str
    direct: bool
    nr_hw_queues: int
    transport: dict[str, Any] = field(default_factory=dict)


USER_COPY: dict[str, Any] = {"flags": UBLK_F_USER_COPY}
KINDS = {
    "auto-tmpfs-buffered-1q": Kind("auto", "tmpfs", False, 1),
    "auto-ext4-buffered-2q-user_copy": Kind("auto", "ext4", False, 2, USER_COPY),
    "auto-ext4-direct-2q-no_batch": Kind("auto", "ext4", True, 2, {"batch": False}),
    "auto-xfs-buffered-2q-get_data": Kind("auto", "xfs", False, 2, {"flags": UBLK_F_NEED_GET_DATA}),
    "auto-xfs-direct-1q-user_copy-no_batch": Kind(
        "auto", "xfs", True, 1, {**USER_COPY, "batch": False}
    ),
    "2014-xfs-buffered-2q-1_thread": Kind("2014", "xfs", False, 2, {"nr_threads": 1}),
    "2014-ext4-direct-1q-user_copy": Kind("2014", "ext4", True, 1, USER_COPY),
    "base-tmpfs-buffered-2q-no_batch": Kind("base", "tmpfs", False, 2, {"batch": False}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request) -> Kind:
    return request.param


@pytest.fixture
def serve(device, backing_file, backing_folder):
    """``serve(kind, nr_bytes)``: such a device, and its backing file."""

    def serve(kind: Kind, nr_bytes: int = DEV_BYTES):
        path = backing_file(nr_bytes, folder=backing_folder[kind.backing])
        target = LoopTarget(path, direct=kind.direct)
        options = {"policy": kind.policy, "nr_hw_queues": kind.nr_hw_queues, **kind.transport}
        return device(target, max_io_buf_bytes=64 * KIB, **options), path

    return serve


@contextlib.contextmanager
def meanwhile(disturb):
    """Call ``disturb`` again and again on a thread, until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.002):
            disturb()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(repeat)
        try:
            yield
        finally:
            over.set()
        done.result()


def test_overlapping_reads_and_writes_never_find_stale_lost_or_foreign_data(
    serve, open_block, kind
) -> None:
    dev, path = serve(kind)
    rng = random.Random(str(kind))
    with path.open("rb") as file:

        def forget() -> None:
            # Mapped, resident pages become cold ones, and the other way round.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), rng.randrange(HOT_SECTORS) * 512, 64 * KIB, 3)

        first = DEV_BYTES // 2 // SECTOR_BYTES - HOT_SECTORS // 2 + 1
        clients = Clients(lambda: open_block(dev.block_path), HOT_SECTORS, str(kind), first)
        with meanwhile(forget):
            clients.run(nr_clients=6, nr_operations=40)
    with open_block(dev.block_path) as client:
        assert client.read(0, first * SECTOR_BYTES) == bytes(first * SECTOR_BYTES)
        at_last = client.read(0, DEV_BYTES)
    assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0
    dev.delete()
    assert path.read_bytes() == at_last


@pytest.mark.parametrize("kind", ["auto-tmpfs-buffered-1q", "auto-ext4-buffered-2q-user_copy"])
def test_file_cut_again_and_again_spoils_nothing_in_front_of_the_cut(
    serve, open_block, kind
) -> None:
    # Behind the cut: EIO, zeroes or what was written there, and the server goes on.
    dev, path = serve(KINDS[kind])
    rng = random.Random(kind)
    half = DEV_BYTES // 2

    def cut() -> None:
        # Inside of a page, but of no word: half a word would be none of those written.
        os.truncate(path, half + rng.randrange(0, half, 8))
        os.truncate(path, rng.choice([DEV_BYTES, half + rng.randrange(0, half, 8)]))

    def use_the_rest() -> None:
        offset = half + rng.randrange(half // SECTOR_BYTES - 64) * SECTOR_BYTES
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(open_block(dev.block_path))
            assert client.write(offset, fill(offset, 64)) == 64 * SECTOR_BYTES
            try:
                found = client.read(offset, 64 * SECTOR_BYTES)
            except OSError as error:
                assert error.errno == errno.EIO
                return
            words = {found[at : at + 8] for at in range(0, len(found), 8)}
            assert words <= {bytes(8), *(fill(half + n * 512, 1)[:8] for n in range(half // 512))}

    clients = Clients(lambda: open_block(dev.block_path), HOT_SECTORS, kind)
    with meanwhile(cut), meanwhile(use_the_rest):
        clients.run(nr_clients=3, nr_operations=80)
    os.truncate(path, DEV_BYTES)
    clients.check()


# ---- a file system on the device, served by another process ----

CHECKS = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}
FS_BYTES = {"ext4": 48 * MIB, "xfs": 320 * MIB}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("auto-tmpfs-buffered-1q", "ext4"),
        ("auto-ext4-buffered-2q-user_copy", "xfs"),
        ("2014-ext4-direct-1q-user_copy", "ext4"),
    ],
)
def test_files_equal_their_models_while_the_file_system_is_stressed(
    apart, backing_file, backing_folder, mounted, run, stress_ng, kind, name
) -> None:
    how = KINDS[kind]
    options = {"policy": how.policy, "nr_hw_queues": how.nr_hw_queues, **how.transport}
    path = backing_file(FS_BYTES[name], folder=backing_folder[how.backing])
    dev = apart(path, direct=how.direct, **options)
    run(f"mkfs.{name}", "-q", dev.block_path)
    with mounted(dev.block_path, "-o", "discard") as folder:
        models = [FileModel(folder / f"file{n}", MIB, random.Random(f"{kind} {n}")) for n in (1, 2)]
        stress = stress_ng(folder, ("hdd", "dir", "rename", "fallocate"), seconds=2)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(model.run, 120) for model in models]:
                done.result()
        output = stress.communicate(timeout=60)[0]
        assert stress.returncode == 0, output
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        for model in models:
            model.check()
            model.close()
    run(*CHECKS[name], dev.block_path)
