"""A disk that vanishes or refuses writes: the errno, once, and what goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def changeable(backing_file, attach_loop, run, pattern):
    """``path, change``: a disk of 1 MiB; ``change(target)`` gives it another dm target."""
    name = f"ublk-loop-change-{os.getpid()}"
    path = Path("/dev/mapper", name)
    with attach_loop(backing_file(MIB, pattern(MIB))) as disk:
        run("modprobe", "dm_flakey")

        def change(target: str) -> None:
            table = f"0 2048 {target.format(disk=disk)}"
            # Without --noflush, what is in flight ends first.
            run("dmsetup", "suspend", "--nolockfs", name)
            run("dmsetup", "load", name, "--table", table)
            run("dmsetup", "resume", name)

        run("dmsetup", "create", name, "--table", f"0 2048 linear {disk} 0")
        run("dmsetup", "mknodes")
        yield path, change
        run("dmsetup", "remove", "--retry", name)


@pytest.mark.parametrize("policy", ["auto", "2014"])
@pytest.mark.parametrize("no_batch", [False, True], ids=["batch", "no_batch"])
def test_disk_that_vanishes_and_comes_back_gives_eio_in_between_and_no_wrong_data(
    changeable, device, open_block, pattern, raises_errno, policy, no_batch
) -> None:
    path, change = changeable
    options = {"batch": False} if no_batch else {}
    dev = device(LoopTarget(path, direct=True), policy=policy, **options)
    with open_block(dev.block_path) as client:
        change("error")
        before = dev.hctxs[0].stats().nr_errors
        for call in (
            lambda: client.read(0, 64 * KIB),
            lambda: client.write(64 * KIB, pattern(64 * KIB, 1)),
            lambda: client.write(0, pattern(4 * KIB, 1), flags=os.RWF_DSYNC),
        ):
            with raises_errno(errno.EIO):
                call()
        assert dev.hctxs[0].stats().nr_errors >= before + 3
        change("linear {disk} 0")
        assert client.read(0, MIB) == pattern(MIB)
        client.write(64 * KIB, pattern(64 * KIB, 2))
        client.flush()
        assert client.read(64 * KIB, 64 * KIB) == pattern(64 * KIB, 2)


def test_writes_that_the_disk_refuses_fail_and_reads_go_on(
    changeable, device, open_block, pattern, raises_errno
) -> None:
    path, change = changeable
    dev = device(LoopTarget(path, direct=True))
    with open_block(dev.block_path) as client:
        change("flakey {disk} 0 0 3600 1 error_writes")
        with raises_errno(errno.EIO):
            client.write(0, pattern(4 * KIB, 1))
        assert client.read(0, MIB) == pattern(MIB)
        change("linear {disk} 0")
