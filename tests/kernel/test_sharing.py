"""Two devices on one file: allowed while the other is not in use, said, and one file to both."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ublk_loop import sharing
from ublk_loop.errors import BackingFileError
from ublk_loop.target import LoopTarget, StripeTarget

KIB = 1 << 10
MIB = 1 << 20
FILE_BYTES = 4 * MIB
# How each of the two goes to the file.
PAIRS = {
    "cache-cache": ({}, {}),
    "cache-direct": ({}, {"direct": True}),
    "direct-direct": ({"direct": True}, {"direct": True}),
}


@contextlib.contextmanager
def held_open(path: str) -> Iterator[None]:
    """``with held_open(path)``: another process has it open."""
    with open(path, "rb") as file, subprocess.Popen(["sleep", "100"], stdin=file) as process:
        yield
        process.kill()


@pytest.mark.parametrize("policy", ["auto", "2014"])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_one_device_writes_the_other_reads(
    device, backing_file, ext4_folder, open_block, operate, pattern, pair, policy
) -> None:
    path = backing_file(FILE_BYTES, pattern(FILE_BYTES), folder=ext4_folder)
    model = bytearray(pattern(FILE_BYTES))
    rng = random.Random(pair)
    devices = [device(LoopTarget(path, **options), policy=policy) for options in PAIRS[pair]]
    with open_block(devices[0].block_path) as one, open_block(devices[1].block_path) as other:
        for _ in range(300):
            operate(rng.choice([one, other]), model, rng)
        for client in (one, other):
            assert client.read(0, FILE_BYTES) == model
            client.flush()
    for each in devices:
        each.delete()
    assert path.read_bytes() == model


def test_two_devices_write_a_little_at_a_time_to_one_region_of_large_folios(
    device, backing_file, ext4_folder, open_block, pattern
) -> None:
    path = backing_file(FILE_BYTES, pattern(FILE_BYTES), folder=ext4_folder)
    model = bytearray(pattern(FILE_BYTES))
    rng = random.Random(1)
    devices = [device(LoopTarget(path), policy="auto") for _ in range(2)]
    with open_block(devices[0].block_path) as one, open_block(devices[1].block_path) as other:
        for turn in range(400):  # each splits the region into small folios meanwhile
            at = rng.randrange(0, 2 * MIB, 512)
            model[at : at + 1024] = pattern(1024, seed=turn)
            assert (one, other)[turn % 2].write(at, pattern(1024, seed=turn)) == 1024
            assert (other, one)[turn % 2].read(at, 1024) == model[at : at + 1024]
        assert one.read(0, FILE_BYTES) == other.read(0, FILE_BYTES) == model
    assert path.read_bytes() == model


def test_second_device_is_warned_of_and_its_file_is_free_again_after_both(
    device, backing_file
) -> None:
    path = backing_file(MIB)
    one = device(LoopTarget(path))
    assert one.warning == ""
    other = device(LoopTarget(path))
    reader = device(LoopTarget(path, read_only=True))
    both = f"dev {other.dev_id} writes the same file as dev {one.dev_id}, {path}: "
    assert other.warning.startswith(both)
    theirs = f"dev {one.dev_id}, dev {other.dev_id}"
    both = f"dev {reader.dev_id} reads the same file as {theirs} writes, {path}: "
    assert reader.warning.startswith(both)
    for each in (one, other):
        each.delete()
    assert device(LoopTarget(path, read_only=True)).warning == ""  # two that read
    reader.delete()


def test_file_of_a_device_in_use_is_ebusy(apart, backing_file, mounted, run, raises_errno) -> None:
    path = backing_file(16 * MIB)
    run("mkfs.ext4", "-q", path)
    dev = apart(path)
    with mounted(dev.block_path):
        with pytest.raises(BackingFileError, match=f"dev {dev.dev_id} .* mounted on ") as refusal:
            LoopTarget(path)
        assert refusal.value.errno == errno.EBUSY
        with raises_errno(errno.EBUSY):
            LoopTarget(path, read_only=True)
        with raises_errno(errno.EBUSY):
            StripeTarget([str(path), str(backing_file(16 * MIB))])
    with held_open(dev.block_path), pytest.raises(BackingFileError, match="open in pid"):
        LoopTarget(path)
    LoopTarget(path).close()


def test_file_that_another_program_has_locked_is_ebusy(backing_file, raises_errno) -> None:
    path = backing_file(MIB)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with raises_errno(errno.EBUSY):
            LoopTarget(path)
    LoopTarget(path).close()


def test_mark_of_a_device_that_is_gone_is_ebusy(backing_file, raises_errno) -> None:
    # A killed server's, whose last write a slow disk still has.
    path = backing_file(MIB)
    with path.open("r+b") as file:
        sharing.mark(file.fileno(), str(path), 77, read_only=False)
        with pytest.raises(BackingFileError, match="dev 77 has not ended"):
            LoopTarget(path)
        with raises_errno(errno.EBUSY):
            LoopTarget(path, recovers=77)


def test_every_other_device_is_found_on_a_file(backing_file) -> None:
    path = backing_file(MIB)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("r+b")) for _ in range(6)]
        dev_ids = (3, 0, (1 << 20) - 1, 4, 70_000, 1)
        for file, dev_id in zip(files, dev_ids, strict=True):
            sharing.mark(file.fileno(), str(path), dev_id, read_only=dev_id == 4)
        for read_only, hidden in ((False, set()), (True, {4})):
            found = sharing.others(files[0].fileno(), 0, MIB, read_only=read_only)
            assert found == sorted(set(dev_ids) - {3} - hidden)


def test_command_says_what_it_refuses_and_what_it_warns_of(
    here: Callable[..., Result],
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    open_block: Any,
    pattern: Callable[..., bytes],
) -> None:
    path = backing_file(2 * MIB, pattern(2 * MIB))
    first = add("-t loop -r 1 --size 1M -f", path)
    with held_open(first["block_device"]):
        refused = here("add -t loop -f", path)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert f"dev {first['dev_id']} serves it too, and is in use: " in refused.stderr
        # Not where the two have no page of the file in common.
        upper = add("-t loop -o 2048 -f", path)
    second = here("losetup -f --show", path)
    assert second.exit_code == 0
    theirs = f"dev {first['dev_id']}, dev {upper['dev_id']}"
    device = second.stdout.strip()
    ours = f"dev {device.removeprefix('/dev/ublkb')}"
    assert second.stderr.startswith(f"ublk: warning: {ours} writes the same file as {theirs}, ")
    # One that lost its server gets another, whoever else serves the file, and in use or not.
    os.kill(first["server_pid"], signal.SIGKILL)
    os.waitpid(first["server_pid"], 0)
    with held_open(device), open_block(device) as client:
        client.write(4096, pattern(4096, seed=1))
        recovered = here("recover -n", first["dev_id"])
        assert (recovered.exit_code, recovered.stderr) == (0, "")
    with open_block(first["block_device"]) as client:
        assert client.read(4096, 4096) == pattern(4096, seed=1)
    with open_block(upper["block_device"]) as client:
        assert client.read(0, MIB) == pattern(2 * MIB)[MIB:]


def test_daemon_passes_the_warning_on(daemon, backing_file) -> None:
    path = backing_file(MIB)
    first = daemon.add("-t loop -f", path)
    reply = daemon.ask_add("-t loop -f", path)
    assert reply["exit_code"] == 0
    assert f"the same file as dev {first['dev_id']}, {path}: " in reply["err"]
    assert reply["err"].startswith("ublk: warning: ")
