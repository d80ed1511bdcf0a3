"""Too little memory: swap and file systems on our own device, threads that cannot be made, OOM.

The squeeze is a cgroup's. What is served lies on ext4 on a brd disk, so that its own pages are not
what the cgroup has to give up.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon
from squeeze import Cgroup, Hog, cgroup

from ublk_loop import manage
from ublk_loop.doctor_devices import IO_FLUSHER_FLAGS

MIB = 1 << 20
LIMIT_BYTES = 20 * MIB
HOG_BYTES = 32 * MIB
TIMEOUT_S = 100
# User-mode Linux stops when a server with BATCH_IO is killed (docs/reliability.md).
OPTIONS = os.environ.get("UBLK_LOOP_SOAK_OPTIONS", "")
WaitUntil = Callable[..., None]
pytestmark = pytest.mark.deadline(3 * TIMEOUT_S)


@pytest.fixture(scope="module")
def disk_folder(driver: None, run: Callable[..., str], mounted: Any) -> Iterator[Path]:
    """A folder of ext4 on a disk: not tmpfs, whose pages can be swapped out themselves."""
    run("modprobe", "brd", "rd_nr=1", f"rd_size={96 << 10}")
    run("mkfs.ext4", "-q", "-F", "/dev/ram0")
    with mounted("/dev/ram0") as folder:
        yield folder
    run("rmmod", "brd")


@pytest.fixture
def squeezed(leaves_nothing: object) -> Iterator[Cgroup]:
    """Where little memory is: who wants more has to wait.

    Above memory.max it would be killed, should for a moment no page be free and none be written
    back: until a killed server has a successor none can be.
    """
    with cgroup("ublk-loop-test", memory_high=LIMIT_BYTES) as made:
        yield made


def _allocated(path: Path, nr_bytes: int) -> Path:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, nr_bytes)
    return path


@contextlib.contextmanager
def _swap_on(device: str, run: Callable[..., str]) -> Iterator[None]:
    run("mkswap", device)
    run("swapon", "--priority", "10", device)
    try:
        yield
    finally:
        run("swapoff", device, timeout_s=TIMEOUT_S)


def _swapped_bytes(device: str) -> int:
    lines = [line.split() for line in Path("/proc/swaps").read_text().splitlines()]
    return next(int(words[3]) << 10 for words in lines if words[0] == device)


def _threads(pid: int) -> dict[str, str]:
    """The names of a process's threads, by tid."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {task.name: (task / "comm").read_text().rstrip("\n") for task in tasks}


def _is_safe(pid: int) -> None:
    """Assert that a process has its memory locked, and is IO_FLUSHER in all its threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(re.search(r"^VmLck:\s+(\d+) kB", status, re.MULTILINE)[1]) > 0  # type: ignore[index]
    for tid, name in _threads(pid).items():  # those that io_uring made among them
        stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(") ")[2]
        assert int(stat.split()[6]) & IO_FLUSHER_FLAGS == IO_FLUSHER_FLAGS, name


def test_swap_on_our_device_gives_all_pages_back_while_its_server_is_killed(
    daemon: Daemon,
    disk_folder: Path,
    squeezed: Cgroup,
    run: Callable[..., str],
    wait_until: WaitUntil,
) -> None:
    path = _allocated(disk_folder / "swap", HOG_BYTES + 16 * MIB)
    added = daemon.add(f"-t loop {OPTIONS} -f", path)
    device = added["block_device"]
    with _swap_on(device, run), Hog(HOG_BYTES, squeezed) as hog:
        wait_until(lambda: _swapped_bytes(device) > HOG_BYTES // 8, timeout_s=TIMEOUT_S)
        _is_safe(added["server_pid"])
        _is_safe(daemon.kill_server(added["dev_id"], wait_until))
        assert hog.end(TIMEOUT_S) == (0, True)
    _is_safe(daemon.pid)
    assert manage.delete(added["dev_id"]) == []
    path.unlink()


# Two files at once, in little memory of its own; then it finds in them what it wrote.
WRITER = """
import os, random, sys
path, nr_chunks, nr_bytes = sys.argv[1], int(sys.argv[2]), 1 << 16
files = [open(path + name, "w+b", 0) for name in "ab"]
def chunks():
    rng = random.Random(1)
    for number in range(nr_chunks):
        yield files[number % 2], rng.randbytes(nr_bytes)
for file, data in chunks():
    file.write(data)
for file in files:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(0)
for file, data in chunks():
    if file.read(nr_bytes) != data:
        sys.exit("it holds something else")
"""


def test_ext4_on_our_device_makes_progress_while_the_page_cache_is_full(
    daemon: Daemon,
    disk_folder: Path,
    squeezed: Cgroup,
    run: Callable[..., str],
    mounted: Any,
) -> None:
    path = _allocated(disk_folder / "file", HOG_BYTES + 24 * MIB)
    added = daemon.add("-t loop --direct_io -f", path)
    run("mkfs.ext4", "-q", added["block_device"])
    with mounted(added["block_device"]) as folder:
        nr_chunks = HOG_BYTES >> 16
        command = [sys.executable, "-S", "-c", WRITER, folder / "file", str(nr_chunks)]
        writer = subprocess.Popen(command, preexec_fn=lambda: squeezed.take(os.getpid()))
        assert writer.wait(TIMEOUT_S) == 0
    run("e2fsck", "-fn", added["block_device"], timeout_s=TIMEOUT_S)
    assert manage.delete(added["dev_id"]) == []
    path.unlink()


def _status(pid: int, tid: str, field: str) -> str:
    text = Path(f"/proc/{pid}/task/{tid}/status").read_text()
    return re.search(rf"^{field}:\s+(\S+)", text, re.MULTILINE)[1]  # type: ignore[index]


def _workers(pid: int) -> list[str]:
    """The states of a server's workers, D if it waits for the disk."""
    names = _threads(pid).items()
    return [_status(pid, tid, "State") for tid, name in names if name == "ul-worker"]


def test_rescuer_serves_on_when_all_workers_are_stuck_and_no_thread_can_be_made(
    daemon: Daemon,
    suspendable: Path,
    run: Callable[..., str],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    added = daemon.add("-t loop --policy 2014 --buffered_io -f", suspendable)
    pid = added["server_pid"]
    readers: list[threading.Thread] = []
    cached = pattern(128 << 10)
    with contextlib.ExitStack() as stack:
        stack.callback(manage.delete, added["dev_id"], force=True)
        block = stack.enter_context(open_block(added["block_device"]))
        stack.callback(lambda: [reader.join(60) for reader in readers])
        block.write(0, cached)
        made = stack.enter_context(cgroup("ublk-loop-test", pids_max=1))
        made.take(pid)
        run("dmsetup", "suspend", "--noflush", suspendable)
        stack.callback(run, "dmsetup", "resume", suspendable)
        while len(workers := _workers(pid)) > len(readers):
            offset = MIB - (64 << 10) * (len(readers) + 1)
            readers.append(threading.Thread(target=block.read, args=(offset, 4096)))
            readers[-1].start()
            wait_until(lambda: _workers(pid).count("D") == len(readers), timeout_s=20)
        before = _threads(pid)
        [rescuer] = [tid for tid, name in before.items() if name == f"ublk{added['dev_id']}"]
        nr_sleeps = int(_status(pid, rescuer, "voluntary_ctxt_switches"))
        for offset in range(0, len(cached), 32 << 10):
            assert block.read(offset, 32 << 10) == cached[offset : offset + (32 << 10)]
        assert _threads(pid) == before
        assert _workers(pid) == ["D"] * len(workers)
        assert int(_status(pid, rescuer, "voluntary_ctxt_switches")) > nr_sleeps
    assert not any(reader.is_alive() for reader in readers)


def test_hog_is_killed_and_never_the_server_when_memory_is_out(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
) -> None:
    added = daemon.add("-t loop -f", backing_file(4 * MIB))
    pid = added["server_pid"]
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    assert Path(f"/proc/{daemon.pid}/oom_score_adj").read_text() == "-1000\n"
    with cgroup("ublk-loop-test", memory_max=LIMIT_BYTES, memory_swap_max=0) as made:
        made.take(pid)
        with Hog(HOG_BYTES, made) as hog:
            assert hog.end(TIMEOUT_S) == (-signal.SIGKILL, False)
        assert made.nr_events("oom_kill") == 1
    data = pattern(MIB)
    with open_block(added["block_device"]) as block:
        block.write(0, data)
        assert block.read(0, MIB) == data
    assert daemon.server_pid(added["dev_id"]) == pid


def test_server_that_the_kernel_kills_for_memory_is_replaced(
    daemon: Daemon,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    wait_until: WaitUntil,
) -> None:
    added = daemon.add(f"-t loop -d 128 --data copy {OPTIONS} -f", backing_file(16 * MIB))
    dev_id, pid = added["dev_id"], added["server_pid"]
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # somebody has taken its protection away
    data = pattern(4 * MIB)
    with cgroup("ublk-loop-test", memory_max=MIB, memory_swap_max=0) as made:
        made.take(pid)
        with open_block(added["block_device"]) as block:
            for offset in range(0, 16 * MIB, 4 * MIB):
                block.write(offset, data)
                assert block.read(offset, 4 * MIB) == data
        wait_until(lambda: daemon.server_pid(dev_id) not in (0, pid), timeout_s=60)
        assert made.nr_events("oom_kill") == 1
