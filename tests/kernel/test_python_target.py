"""Targets written in Python: what they store, what they raise, what they are asked and when."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ublk_loop import manage
from ublk_loop.control import list_dev_ids
from ublk_loop.target import RamTarget, Target

README = Path(__file__).parents[2] / "README.md"
KIB = 1 << 10
MIB = 1 << 20


class MinimalTarget(Target):
    """Reads and writes and nothing else."""

    name = "minimal"

    def __init__(self) -> None:
        self.size = MIB
        self.memory = bytearray(self.size)
        self.is_closed = False

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.memory[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.memory[offset : offset + len(data)] = data

    def close(self) -> None:
        self.is_closed = True


class FailingTarget(MinimalTarget):
    """Raises what it is told to, once."""

    failure: BaseException | None = None

    def _fail(self) -> None:
        failure, self.failure = self.failure, None
        if failure:
            raise failure

    def read(self, offset: int, buffer: memoryview) -> None:
        self._fail()
        super().read(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._fail()
        super().write(offset, data)

    def flush(self) -> None:
        self._fail()

    def discard(self, offset: int, nr_bytes: int) -> None:
        self._fail()

    def write_zeroes(self, offset: int, nr_bytes: int) -> None:
        self._fail()


class MeetingTarget(MinimalTarget):
    """Once there is a meeting, a read ends only when all of its party run side by side."""

    meeting: threading.Barrier | None = None

    def read(self, offset: int, buffer: memoryview) -> None:
        if self.meeting:
            self.meeting.wait()
        super().read(offset, buffer)


def queue_attr(dev, name: str) -> int:
    return int(Path(f"/sys/block/ublkb{dev.dev_id}/queue/{name}").read_text())


def test_ram_target_passes_fio_verification(device, fio, transport) -> None:
    dev = device(RamTarget(16 * MIB), nr_hw_queues=2, **transport)
    jobs = {
        f"{rw}-{depth}": {"rw": rw, "iodepth": depth, "bsrange": "512-256k", "size": 2 * MIB}
        for rw in ("write", "randwrite")
        for depth in (1, 64)
    }
    fio(dev.block_path, jobs, verify="crc32c")
    assert sum(hctx.stats().nr_errors for hctx in dev.hctxs) == 0


def test_ram_target_holds_an_ext4_file_system(device, mounted, run, pattern) -> None:
    dev = device(RamTarget(32 * MIB))
    run("mkfs.ext4", "-q", dev.block_path)
    with mounted(dev.block_path, "-o", "discard") as folder:
        (folder / "kept").write_bytes(pattern(8 * MIB))
        (folder / "removed").write_bytes(pattern(2 * MIB, 1))
        (folder / "removed").unlink()
    run("e2fsck", "-fn", dev.block_path)
    with mounted(dev.block_path, "-o", "ro") as folder:
        assert (folder / "kept").read_bytes() == pattern(8 * MIB)


def test_ram_target_reads_zeroes_after_discard_of_any_range(device, open_block, pattern) -> None:
    dev = device(RamTarget(MIB))
    model = bytearray(pattern(MIB))
    with open_block(dev.block_path) as client:
        client.write(0, pattern(MIB))
        for offset, nr_bytes in [(512, 1024), (5120, 12 * KIB), (512 * KIB, 64 * KIB)]:
            client.zero_out(offset, nr_bytes)
            model[offset : offset + nr_bytes] = bytes(nr_bytes)
            assert client.read(0, MIB) == model


def test_minimal_target_is_offered_neither_flush_nor_discard(device, open_block, pattern) -> None:
    target = MinimalTarget()
    dev = device(target)
    assert queue_attr(dev, "discard_max_bytes") == 0
    assert queue_attr(dev, "write_zeroes_max_bytes") == 0
    with open_block(dev.block_path) as client:
        client.write(8192, pattern(8192))
        client.flush()
        with pytest.raises(OSError) as refusal:
            client.discard(0, 4096)
        assert refusal.value.errno == errno.EOPNOTSUPP
        client.zero_out(8192, 4096)  # the kernel writes zeroes instead
        assert client.read(8192, 8192) == bytes(4096) + pattern(8192)[4096:]
    stats = dev.hctxs[0].stats()
    assert (stats.nr_flushes, stats.nr_discards, stats.nr_errors) == (0, 0, 0)
    dev.delete()
    assert target.is_closed


@pytest.mark.parametrize(
    ("defined", "read_only", "text"),
    [
        ("", False, "Half does not define read and write: it must$"),
        ("write", False, "Half does not define read: it must$"),
        ("write", True, "Half does not define read: it must$"),
        ("read", False, "Half does not define write: it must, or be read_only$"),
        ("read", True, None),
    ],
)
def test_target_that_lacks_what_every_device_needs_is_refused_before_there_is_one(
    device, defined, read_only, text
) -> None:
    # A bug: it was added, and each request failed.
    methods = {defined: vars(MinimalTarget)[defined]} if defined else {}
    is_closed = []
    half = type("Half", (Target,), {**methods, "close": lambda self: is_closed.append(True)})()
    half.size, half.memory, half.read_only = MIB, bytearray(MIB), read_only
    with contextlib.nullcontext() if text is None else pytest.raises(ValueError, match=text):
        device(half)
    assert is_closed == ([] if text is None else [True])
    assert len(list_dev_ids()) == (text is None)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.ETIMEDOUT, "late"), errno.ETIMEDOUT),
        (OSError(errno.ENODATA, "medium"), errno.ENODATA),
        (OSError(errno.EIO, "io"), errno.EIO),
        (OSError("no errno"), errno.EIO),
        (OSError(errno.EPERM, "no such block status"), errno.EIO),
        (ValueError("a bug"), errno.EIO),
    ],
    ids=["ENOSPC", "ETIMEDOUT", "ENODATA", "EIO", "no-errno", "EPERM", "ValueError"],
)
def test_exception_reaches_the_client_as_its_errno_and_the_device_goes_on(
    device, open_block, pattern, raises_errno, failure, code
) -> None:
    target = FailingTarget()
    dev = device(target)
    with open_block(dev.block_path) as client:
        for operation in (
            lambda: client.write(0, pattern(4096)),
            lambda: client.read(0, 4096),
            lambda: client.discard(0, 4096),
            client.flush,
        ):
            target.failure = failure
            with raises_errno(code):
                operation()
            operation()
        assert client.read(0, 4096) == pattern(4096)
    assert dev.hctxs[0].stats().nr_errors == 4


def test_target_that_exits_the_program_gives_eio_and_the_device_goes_on(
    device, open_block, raises_errno
) -> None:
    target = FailingTarget()
    dev = device(target)
    with open_block(dev.block_path) as client:
        target.failure = SystemExit(1)
        with raises_errno(errno.EIO):
            client.read(0, 4096)
        assert client.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("nr_readers", [2, 16])
def test_reads_run_at_the_same_time(device, open_block, nr_readers) -> None:
    target = MeetingTarget()
    dev = device(target)
    target.meeting = threading.Barrier(nr_readers, timeout=20)
    with open_block(dev.block_path) as client, ThreadPoolExecutor(nr_readers) as clients:
        reads = [clients.submit(client.read, tag * 4096, 4096) for tag in range(nr_readers)]
        assert all(read.result() == bytes(4096) for read in reads)


def test_write_past_the_granted_buffer_never_reaches_the_target(device, open_block) -> None:
    largest = 0

    class Measuring(MinimalTarget):
        def write(self, offset: int, data: memoryview) -> None:
            nonlocal largest
            largest = max(largest, len(data))
            assert data.readonly
            super().write(offset, data)

    target = Measuring()
    dev = device(target, max_io_buf_bytes=64 * KIB)
    data = os.urandom(MIB)
    with open_block(dev.block_path) as client:
        client.write(0, data)
    assert largest == 64 * KIB
    assert target.memory == data


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "del"])
def test_the_example_of_the_readme_serves_until_it_is_ended(
    leaves_nothing: object, tmp_path: Path, way: str
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    script = tmp_path / "stripes.py"
    script.write_text(program)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        path = Path(server.stdout.readline().strip())
        with path.open("rb") as disk:
            assert disk.read(1024) == b"a" * 512 + b"b" * 512
        if way == "del":
            manage.delete(int(path.name.removeprefix("ublkb")))
        else:
            server.send_signal(getattr(signal, way))
        assert server.wait(30) == 0
    assert not path.exists()


@pytest.mark.parametrize("moment", ["mark", "ready"])  # half added; live, and not yet waiting
def test_a_signal_that_comes_early_leaves_no_device(
    leaves_nothing: object, tmp_path: Path, moment: str
) -> None:
    script = tmp_path / "ends_early.py"
    script.write_text(
        f"""
import os, signal
from ublk_loop import Device, RamTarget

def end(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    return ""

target = RamTarget(1 << 20)
if {moment!r} == "mark":
    target.mark = end
    Device.serve(target)
else:
    Device.serve(target, ready=end)
"""
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
