"""Backings that do less than they were asked for: never called a success.

The backing file is a FUSE file that the test itself answers for, so that each read and write can be
cut short, interrupted or refused at will.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublk_loop.target import LoopTarget

KIB = 1 << 10
FILE_BYTES = 256 * KIB

GETATTR, OPEN, READ, WRITE, RELEASE, FSYNC, FLUSH, INIT = 3, 14, 15, 16, 18, 20, 25, 26
FORGET, INTERRUPT, BATCH_FORGET, DESTROY = 2, 36, 42, 38
FOPEN_DIRECT_IO = 1
IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
MAX_WRITE = 128 * KIB
_libc = ctypes.CDLL(None, use_errno=True)


class FuseFile:
    """A mount whose root is one regular file, served by a thread of the test.

    ``script`` is how the next reads or writes go: an int is the most bytes one does, an OSError
    refuses it; after the script's end everything is done whole.
    Source: include/uapi/linux/fuse.h, Documentation/filesystems/fuse.
    """

    def __init__(self, path: Path) -> None:
        self.data = bytearray(FILE_BYTES)
        self.script: list[int | OSError] = []
        self.calls: list[tuple[str, int, int]] = []  # what, offset, bytes done
        self.path = path
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
        path.touch()
        if _libc.mount(b"ublk-loop-test", bytes(path), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if _libc.umount2(bytes(self.path), 0):
            raise OSError(ctypes.get_errno(), "umount")
        self._thread.join(10)
        os.close(self._fd)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, MAX_WRITE + 8 * KIB)
            except InterruptedError:
                continue
            except OSError:  # ENODEV: unmounted
                return
            _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
            if opcode in (FORGET, INTERRUPT, BATCH_FORGET, DESTROY):
                continue
            try:
                code, payload = 0, self._answer(opcode, request[IN_HEADER.size :])
            except OSError as error:
                code, payload = error.errno or errno.EIO, b""
            length = OUT_HEADER.size + len(payload)
            with contextlib.suppress(FileNotFoundError):  # whoever asked no longer waits
                os.write(self._fd, OUT_HEADER.pack(length, -code, unique) + payload)

    def _answer(self, opcode: int, body: bytes) -> bytes:
        if opcode == INIT:
            return struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 16, 12, MAX_WRITE, 1, 0, 0, 0)
        if opcode == GETATTR:
            return struct.pack("=QII", 3600, 0, 0) + self._attributes()
        if opcode == OPEN:
            return struct.pack("=QIi", 0, FOPEN_DIRECT_IO, 0)
        if opcode == READ:
            _, offset, nr_bytes = struct.unpack_from("=QQI", body)
            nr_bytes = self._turn("read", offset, nr_bytes)
            return bytes(self.data[offset : offset + nr_bytes])
        if opcode == WRITE:
            _, offset, nr_bytes = struct.unpack_from("=QQI", body)
            nr_bytes = self._turn("write", offset, nr_bytes)
            self.data[offset : offset + nr_bytes] = body[40 : 40 + nr_bytes]
            return struct.pack("=II", nr_bytes, 0)
        if opcode == FSYNC:
            self._turn("fsync", 0, 0)
            return b""
        if opcode in (RELEASE, FLUSH):
            return b""
        raise OSError(errno.ENOSYS, f"opcode {opcode}")

    def _attributes(self) -> bytes:
        sizes = (1, len(self.data), len(self.data) // 512, 0, 0, 0)
        owner = (stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)
        return struct.pack("=QQQQQQIIIIIIIIII", *sizes, 0, 0, 0, *owner)

    def _turn(self, what: str, offset: int, nr_bytes: int) -> int:
        step = self.script.pop(0) if self.script else nr_bytes
        if isinstance(step, OSError):
            self.calls.append((what, offset, -(step.errno or 0)))
            raise step
        done = min(step, nr_bytes)
        self.calls.append((what, offset, done))
        return done


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.fixture
def fuse_file(run, tmp_path) -> Iterator[FuseFile]:
    run("modprobe", "fuse", check=False)
    file = FuseFile(tmp_path / "fuse")
    yield file
    file.close()


@pytest.fixture(params=["auto", "2014"])
def fuse_device(request, fuse_file, device):
    """A device on the FUSE file, quiet before the test begins."""
    dev = device(LoopTarget(fuse_file.path, direct=False), policy=request.param)
    fuse_file.calls.clear()
    yield dev
    fuse_file.script.clear()
    dev.delete()


def test_read_that_comes_in_pieces_is_put_together(
    fuse_device, fuse_file, open_block, pattern
) -> None:
    fuse_file.data[:] = pattern(FILE_BYTES)
    fuse_file.script = [1, 1000, 4095, 512]
    with open_block(fuse_device.block_path) as client:
        assert client.read(8192, 16 * KIB) == pattern(FILE_BYTES)[8192 : 24 * KIB]
    assert [call[:2] for call in fuse_file.calls] == [
        ("read", 8192 + done) for done in (0, 1, 1001, 5096, 5608)
    ]


def test_write_that_goes_in_pieces_is_finished(fuse_device, fuse_file, open_block, pattern) -> None:
    fuse_file.script = [1, 1000, 4095, 512]
    with open_block(fuse_device.block_path) as client:
        assert client.write(8192, pattern(16 * KIB)) == 16 * KIB
    expected = bytearray(FILE_BYTES)
    expected[8192 : 24 * KIB] = pattern(16 * KIB)
    assert fuse_file.data == expected
    assert len(fuse_file.calls) == 5


@pytest.mark.parametrize("what", ["read", "write"])
def test_interrupted_call_goes_round_again(
    fuse_device, fuse_file, open_block, pattern, what
) -> None:
    fuse_file.data[: 4 * KIB] = pattern(4 * KIB)
    fuse_file.script = [error(errno.EINTR), 512, error(errno.EINTR), error(errno.EINTR)]
    with open_block(fuse_device.block_path) as client:
        if what == "read":
            assert client.read(0, 4 * KIB) == pattern(4 * KIB)
        else:
            assert client.write(0, pattern(4 * KIB, 1)) == 4 * KIB
            assert fuse_file.data[: 4 * KIB] == pattern(4 * KIB, 1)
    assert fuse_file.script == []


@pytest.mark.parametrize("what", ["read", "write"])
def test_call_that_stops_at_zero_bytes_is_eio(
    fuse_device, fuse_file, open_block, raises_errno, what
) -> None:
    fuse_file.script = [1024, 0]
    with open_block(fuse_device.block_path) as client, raises_errno(errno.EIO):
        if what == "read":
            client.read(0, 4 * KIB)
        else:
            client.write(0, bytes(4 * KIB))
    assert fuse_device.hctxs[0].stats().nr_errors == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ETIMEDOUT])
def test_write_refused_after_a_first_piece_is_that_errno(
    fuse_device, fuse_file, open_block, raises_errno, code
) -> None:
    fuse_file.script = [512, error(code)]
    with open_block(fuse_device.block_path) as client:
        with raises_errno(code):
            client.write(0, bytes(4 * KIB))
        assert client.write(0, b"x" * 4 * KIB) == 4 * KIB
    assert fuse_file.data[: 4 * KIB] == b"x" * 4 * KIB


def test_read_refused_after_a_first_piece_is_that_errno(
    fuse_device, fuse_file, open_block, raises_errno
) -> None:
    fuse_file.script = [512, error(errno.ENODATA)]
    with open_block(fuse_device.block_path) as client:
        with raises_errno(errno.ENODATA):
            client.read(0, 4 * KIB)
        assert client.read(0, 4 * KIB) == bytes(4 * KIB)


def test_flush_refused_by_the_file_system_is_that_errno(
    fuse_device, fuse_file, open_block, raises_errno
) -> None:
    with open_block(fuse_device.block_path) as client:
        client.write(0, bytes(4 * KIB))
        fuse_file.script = [error(errno.ENOSPC)]
        with raises_errno(errno.ENOSPC):
            client.flush()
        client.flush()
    assert [what for what, *_ in fuse_file.calls] == ["write", "fsync", "fsync"]


def test_zeroes_are_written_in_pieces_where_the_file_system_has_no_fallocate(
    fuse_device, fuse_file, open_block, pattern
) -> None:
    fuse_file.data[:] = pattern(FILE_BYTES)
    expected = bytearray(pattern(FILE_BYTES))
    expected[4096 : 200 * KIB] = bytes(200 * KIB - 4096)
    fuse_file.script = [1000, 512, error(errno.EINTR), 65535]
    with open_block(fuse_device.block_path) as client:
        client.zero_out(4096, 200 * KIB - 4096)
    assert fuse_file.data == expected
    assert fuse_device.hctxs[0].stats().nr_discards == 1
