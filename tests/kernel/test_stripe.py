"""``-t stripe``: which bytes of the device are where in its files, and what becomes of them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ublk_loop.errors import BackingFileError
from ublk_loop.target import StripeTarget

KIB = 1 << 10
FILE_BYTES = 1024 * KIB
# Of two files and three, with chunks smaller and larger than the requests.
SHAPES = [(2, 64 * KIB), (3, 4 * KIB), (3, 512 * KIB)]


def laid_out(files: list[bytes], chunk_bytes: int) -> bytes:
    """Return what a device of these files reads as."""
    rows = range(0, len(files[0]) // chunk_bytes * chunk_bytes, chunk_bytes)
    return b"".join(file[row : row + chunk_bytes] for row in rows for file in files)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1] // KIB}K")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    nr_files, chunk_bytes = request.param
    return nr_files, chunk_bytes


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_bytes_of_a_stripe_go_chunk_by_chunk_from_file_to_file(
    device, backing_file, ext4_folder, open_block, pattern, transport, shape, direct
) -> None:
    nr_files, chunk_bytes = shape
    # What does not fill a chunk is left alone.
    contents = [pattern(FILE_BYTES + 512 * n, seed=n) for n in range(nr_files)]
    paths = [backing_file(len(data), data, folder=ext4_folder) for data in contents]
    target = StripeTarget([str(path) for path in paths], chunk_bytes=chunk_bytes, direct=direct)
    dev = device(target, **transport)
    model = bytearray(laid_out(contents, chunk_bytes))
    assert dev.target.size == len(model)
    places = random.Random(7)
    with open_block(dev.block_path, direct=True) as client:
        assert client.read(0, len(model)) == model
        for seed in range(40):
            nr_bytes = 512 * places.randint(1, 512)
            offset = 512 * places.randint(0, (len(model) - nr_bytes) // 512)
            data = pattern(nr_bytes, seed=seed)
            assert client.write(offset, data) == nr_bytes
            model[offset : offset + nr_bytes] = data
            assert client.read(offset, nr_bytes) == data
        os.fsync(client.fd)
        assert client.read(0, len(model)) == model
    dev.delete()
    assert laid_out([path.read_bytes() for path in paths], chunk_bytes) == model
    assert [path.read_bytes()[FILE_BYTES:] for path in paths] == [
        data[FILE_BYTES:] for data in contents
    ]


def test_discarded_and_zeroed_ranges_of_a_stripe_read_as_zeroes_and_nothing_else_does(
    device, backing_file, open_block, pattern, shape
) -> None:
    nr_files, chunk_bytes = shape
    contents = [pattern(FILE_BYTES, seed=n) for n in range(nr_files)]
    paths = [backing_file(FILE_BYTES, data) for data in contents]
    dev = device(StripeTarget([str(path) for path in paths], chunk_bytes=chunk_bytes))
    model = bytearray(laid_out(contents, chunk_bytes))
    ranges = [(0, 4 * KIB), (60 * KIB, 300 * KIB), (516 * KIB, 1020 * KIB), (1540 * KIB, 4 * KIB)]
    with open_block(dev.block_path, direct=True) as client:
        for number, (offset, nr_bytes) in enumerate(ranges):
            (client.discard, client.zero_out)[number % 2](offset, nr_bytes)
            model[offset : offset + nr_bytes] = bytes(nr_bytes)
            assert client.read(0, len(model)) == model
    dev.delete()
    assert laid_out([path.read_bytes() for path in paths], chunk_bytes) == model


def test_an_error_of_one_file_of_a_stripe_is_the_requests_own(
    device, backing_file, open_block, pattern, raises_errno
) -> None:
    paths = [backing_file(FILE_BYTES, pattern(FILE_BYTES)) for _ in range(2)]
    dev = device(StripeTarget([str(path) for path in paths]))
    os.truncate(paths[1], 0)
    with open_block(dev.block_path, direct=True) as client:
        assert client.read(0, 64 * KIB) == pattern(FILE_BYTES)[: 64 * KIB]
        with raises_errno(errno.EIO):
            client.read(64 * KIB, 4 * KIB)
        with raises_errno(errno.EIO):
            client.read(0, 256 * KIB)


def test_a_stripe_needs_files_of_one_size_that_nobody_else_has(backing_file) -> None:
    one, other, small = backing_file(FILE_BYTES), backing_file(2 * FILE_BYTES), backing_file(4096)
    for paths, code in (
        ([one, other], errno.EINVAL),
        ([one, small], errno.EINVAL),
        ([small], errno.EINVAL),
        ([one, one], errno.EINVAL),
        ([one, one.with_name("absent")], errno.ENOENT),
    ):
        with pytest.raises(BackingFileError) as refusal:
            StripeTarget([str(path) for path in paths])
        assert refusal.value.errno == code
    # Nothing was left locked.
    StripeTarget([str(one)]).close()


def test_a_stripe_is_added_listed_recovered_and_deleted_by_the_command(
    here: Callable[..., Result],
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    open_block: Any,
    pattern: Callable[..., bytes],
) -> None:
    paths = [backing_file(FILE_BYTES, pattern(FILE_BYTES, seed=n)) for n in range(2)]
    added = add("-t stripe -r 1 -i 1 --chunk_size 16384", *paths)
    dev_id = added["dev_id"]
    expected = laid_out([path.read_bytes() for path in paths], 16384)
    assert added["target"]["backing_files"] == [str(path) for path in paths]
    refused = here("resize --size 1M -n", dev_id)
    assert (refused.exit_code, refused.stdout) == (1, "")
    os.kill(added["server_pid"], signal.SIGKILL)
    os.waitpid(added["server_pid"], 0)
    other = here(f"recover -n {dev_id} -t stripe", paths[1], paths[0])
    assert (other.exit_code, other.stdout) == (1, "")
    again = here(f"recover --json -n {dev_id} -t stripe -r 1", *paths)
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["target"] == added["target"]
    with open_block(added["block_device"]) as client:
        assert client.read(0, len(expected)) == expected
    assert here("del -n", dev_id).exit_code == 0
