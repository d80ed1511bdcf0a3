"""LoopTarget: the file that it opens."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from ublk_loop.errors import BackingFileError
from ublk_loop.target import LoopTarget


def test_takes_the_block_size_and_the_limit_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    for limit_bytes, size in ((None, 8192), (1 << 20, 8192), (4608, 4096)):
        taken = LoopTarget(path, limit_bytes=limit_bytes, logical_bs=4096)
        assert (taken.logical_bs, taken.size) == (4096, size)
        taken.close()
    with pytest.raises(ValueError, match="block size 8192"):
        LoopTarget(path, logical_bs=8192)
    with pytest.raises(BackingFileError) as refused:
        LoopTarget(path, limit_bytes=2048, logical_bs=4096)
    assert refused.value.errno == errno.EINVAL


def test_warns_of_the_end_of_a_file_that_does_not_fill_a_block(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(10_000))
    for logical_bs, limit_bytes, nr_rest in [
        (512, None, 272),
        (4096, None, 1808),
        (4096, 1 << 20, 1808),
        (4096, 9728, None),  # asked for
        (512, 9728, None),
    ]:
        with contextlib.closing(
            LoopTarget(path, limit_bytes=limit_bytes, logical_bs=logical_bs)
        ) as taken:
            warning = taken.mark(0)
        assert (f"the last {nr_rest} bytes of {path} " in warning) == (nr_rest is not None), warning
        assert bool(warning) == (nr_rest is not None), warning


def test_a_file_that_is_refused_keeps_its_mtime(tmp_path: Path) -> None:
    # A bug: whether holes can be punched was tried first, by punching one behind its end.
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    os.utime(path, ns=(1, 1))
    with pytest.raises(BackingFileError, match="do not fit"):
        LoopTarget(str(path), nr_bytes=8192)
    assert path.stat().st_mtime_ns == 1


def test_a_file_that_ends_before_the_offset_is_said_to_end_there(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(BackingFileError, match="too small: 0 bytes behind offset 8192 do not"):
        LoopTarget(str(path), offset_bytes=8192)
