"""What the kernel tests share: devices, files, file systems, clients and fio on the real driver.

A device is served by the test's own process (``device``) or by the command line (``ublk``). What a
test starts ends with it: an autouse fixture fails a test that leaves a device, thread, process,
mount or file descriptor behind, or a splat in the kernel's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from commands import UBLK
from daemons import Daemon
from loads import Load
from servers import Apart, reap_children

from ublk_loop import cli, manage
from ublk_loop.control import Control, list_dev_ids
from ublk_loop.device import Device
from ublk_loop.state import DeviceOptions, TargetSpec
from ublk_loop.target import Target
from ublk_loop.uapi import UBLK_F_NEED_GET_DATA

COMMAND_TIMEOUT_S = 60
SETTLE_TIMEOUT_S = 10
MARK = "UBLK_LOOP_TEST"
HUNG_TASK_S = 30
SPLAT = re.compile(
    r"WARNING:|BUG:|Oops|blocked for more than|possible (circular|recursive) locking|"
    r"inconsistent lock state|suspicious RCU|general protection fault|refcount_t:"
)
SECTOR_BYTES = 512
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
_libc = ctypes.CDLL(None, use_errno=True)


def run_command(*words: object, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True) -> str:
    """Run a command, which must succeed unless ``check`` is off, and return its stdout."""
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode:
        pytest.fail(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """``run(*words, timeout_s=60, check=True)`` runs a command and returns its stdout."""
    return run_command


# ---- the driver, and what a test leaves behind ----


@contextlib.contextmanager
def _changed(knob: Path, value: str) -> Iterator[None]:
    before = knob.read_text()
    knob.write_text(value)
    try:
        yield
    finally:
        knob.write_text(before)


@pytest.fixture(scope="session", autouse=True)
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Skip without root and ublk_drv; have the kernel report a hung task soon."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    # Nothing loads them on demand where udev does not run.
    run_command("modprobe", "--all", "ublk_drv", "loop", "dm_mod", check=False)
    if not os.path.exists("/dev/ublk-control"):
        pytest.skip("needs the kernel module ublk_drv")
    knobs = {
        "hung_task_timeout_secs": str(HUNG_TASK_S),
        "modprobe": str(_make_modprobe(tmp_path_factory.mktemp("modprobe"))),
    }
    with contextlib.ExitStack() as stack:
        for name, value in knobs.items():
            knob = Path("/proc/sys/kernel", name)
            if knob.exists():
                stack.enter_context(_changed(knob, value))
        yield


def _make_modprobe(folder: Path) -> Path:
    # The kernel looks for a module each time that a device gets the scheduler `none`: 0.4 s in an
    # emulated guest, a quarter of a test's time.
    path = folder / "modprobe"
    path.write_text(
        f'#!/bin/sh\n[ "$3" != none-iosched ] || exit 1\nexec {shutil.which("modprobe")} "$@"\n'
    )
    path.chmod(0o755)
    return path


class KernelLog:
    """The kernel's log from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Return the messages since the last call."""
        messages = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return messages
            except BrokenPipeError:  # overwritten before we came: go on with the oldest there is
                continue
            messages.append(record.partition(";")[2].partition("\n")[0])

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True)
class Census:
    """What exists now that a test could leave behind."""

    devices: frozenset[str]
    threads: frozenset[str]
    processes: frozenset[str]
    fds: frozenset[str]
    mounts: frozenset[str]

    @classmethod
    def take(cls, mark: str) -> Census:
        return cls(_devices(), _threads(), _processes(mark), _fds(), _mounts())

    def added_to(self, before: Census) -> dict[str, list[str]]:
        added = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return {name: sorted(what) for name, what in added.items() if what}


def _devices() -> frozenset[str]:
    ublk = {str(p) for p in Path("/dev").glob("ublk[bc]*")}
    ublk |= {str(p) for p in Path("/sys/class/ublk-char").glob("*")}
    # A loop device stays when it is detached; every other disk goes.
    disks = {
        str(p)
        for p in Path("/sys/block").glob("*")
        if not p.name.startswith("loop") or (p / "loop/backing_file").exists()
    }
    return frozenset(ublk | disks)


def _threads() -> frozenset[str]:
    # An io-wq thread is the kernel's: one idle one stays with the process (seen in 6.12).
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            if not name.startswith("iou-wrk-"):
                found.add(f"tid {task.name} {name}")
    return frozenset(found)


def _processes(mark: str) -> frozenset[str]:
    # Whoever was started by the test has its mark, daemons and grandchildren too; a zombie has no
    # environment any more, but then it is a child of ours.
    found = set()
    for pid in _pids() - EARLIER_PIDS:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", 0) as environ:
            if mark.encode() in environ.read():
                found.add(_process_name(Path("/proc", pid)))
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                found.add(_process_name(Path("/proc", pid)))
    return frozenset(found)


def _pids() -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit()}


# Most are the kernel's. (We are one of them.)
EARLIER_PIDS = _pids()


def _process_name(proc: Path) -> str:
    command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return f"{proc.name} {command}"


def _fds() -> frozenset[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the directory
            found.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
    return frozenset(found)


def _mounts() -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return frozenset(line.split()[4] for line in lines)


def _clean_up(left: dict[str, list[str]]) -> None:
    # So that one failure does not become many.
    for name in left.get("processes", []):
        with contextlib.suppress(OSError):
            os.kill(int(name.split()[0]), signal.SIGKILL)
    for mount in left.get("mounts", []):
        run_command("umount", "--lazy", mount, check=False)
    for path in left.get("devices", []):
        if match := re.fullmatch(r"/dev/ublkc(\d+)", path):
            with contextlib.suppress(OSError), Control() as control:
                control.del_dev(int(match[1]), timeout_s=10)


@pytest.fixture(autouse=True)
def leaves_nothing(
    driver: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelLog]:
    """Fail a test that leaves something behind or made the kernel complain; give it the log."""
    mark = f"{os.getpid()}:{request.node.nodeid}"
    monkeypatch.setenv(MARK, mark)
    # A daemon outlives the command that starts it: the tests of the daemon have one of their own.
    monkeypatch.setenv("UBLK_LOOP_DAEMON", "0")
    log = KernelLog()
    before = Census.take(mark)
    yield log
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while (left := Census.take(mark).added_to(before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    splats = [line for line in log.read() if SPLAT.search(line)]
    log.close()
    _clean_up(left)
    assert not left, f"left behind: {left}"
    assert not splats, f"the kernel's log: {splats}"


@pytest.fixture
def kernel_log(leaves_nothing: KernelLog) -> KernelLog:
    """The kernel's log since the test's start."""
    return leaves_nothing


# ---- devices ----


@pytest.fixture
def control(leaves_nothing: KernelLog) -> Iterator[Control]:
    with Control() as control:
        yield control


@pytest.fixture
def features(control: Control) -> int:
    """The driver's UBLK_F_*."""
    return control.get_features()


# How the data goes to and from the server, and how it fetches and commits: options of Device.add.
TRANSPORTS: dict[str, dict[str, Any]] = {
    "copy": {"data": "copy"},
    "copy-no_batch": {"data": "copy", "batch": False},
    "user_copy": {"data": "usercopy"},
    "user_copy-no_batch": {"data": "usercopy", "batch": False},
    "need_get_data": {"flags": UBLK_F_NEED_GET_DATA},
    "auto": {},  # zero copy, for one, where the driver has it and I/O is direct
    "auto-no_batch": {"batch": False},
}


@pytest.fixture(params=TRANSPORTS.values(), ids=TRANSPORTS.keys())
def transport(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way of the data between driver and server in turn; BATCH_IO where the driver has it."""
    options: dict[str, Any] = request.param
    return options


@pytest.fixture
def device(control: Control) -> Iterator[Callable[..., Device]]:
    """Serve a device from this process: ``device(target, **options of Device.add)``.

    What is left of it at the test's end is deleted.
    """
    served: list[Device] = []

    def serve(target: Target, **options: Any) -> Device:
        device = Device.add(control, target, **options)
        served.append(device)
        device.start()
        return device

    yield serve
    for device in reversed(served):
        if os.path.exists(device.char_path):
            device.delete()


@pytest.fixture
def apart(control: Control, state_dir: Path) -> Iterator[Callable[..., Apart]]:
    """Serve a file from a process of its own: ``apart(path, direct=None, **DeviceOptions)``."""
    served: list[Apart] = []

    def serve(path: Path, *, direct: bool | None = None, **options: Any) -> Apart:
        spec = TargetSpec("loop", path=str(path), direct=direct)
        served.append(Apart(spec, DeviceOptions(**options)))
        return served[-1]

    yield serve
    for each in reversed(served):
        each.delete()


@pytest.fixture(scope="module")
def module_daemon(driver: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests of a module, as it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("daemon") / "state"
        patch.setenv("UBLK_LOOP_STATE_DIR", str(folder))
        patch.delenv("UBLK_LOOP_DAEMON", raising=False)
        daemon = Daemon()
        daemon.start()
        yield daemon
        daemon.ask("stop")


@pytest.fixture
def daemon(
    module_daemon: Daemon, control: Control, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Daemon]:
    """The module's daemon; what it serves at the test's end is deleted."""
    monkeypatch.delenv("UBLK_LOOP_DAEMON")
    # What a test starts anew is shared by the tests after it, and no leftover.
    monkeypatch.delenv(MARK)
    yield module_daemon
    for dev_id in list_dev_ids():
        with contextlib.suppress(OSError):
            manage.delete(dev_id, force=True)
    module_daemon.start()


@pytest.fixture
def ublk(leaves_nothing: KernelLog) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line: ``ublk("add", "-t", "null")``; the caller looks at the exit code."""

    def ublk(
        *words: object, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        command = [UBLK, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)

    return ublk


@pytest.fixture
def state_dir(leaves_nothing: KernelLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(folder))
    return folder


Here = Callable[..., Result]


@pytest.fixture
def here(state_dir: Path, control: Control) -> Iterator[Here]:
    """``here("add -t null", *words)``: run a command in this process, which forks the servers.

    Python starts slowly in an emulated guest. At the end what is left is deleted.
    """

    def run(line: str, *words: object) -> Result:
        words = (*line.split(), *words)
        return CliRunner().invoke(cli.cli, [str(word) for word in words], prog_name="ublk")

    yield run
    for path in state_dir.glob("*.json"):
        with contextlib.suppress(OSError):
            manage.delete(int(path.stem), force=True)
    reap_children()


@pytest.fixture
def add(here: Here) -> Callable[..., dict[str, Any]]:
    """``add("-t loop -f", path)``: ``ublk add`` by ``here``; the document of the new device."""

    def add(line: str, *words: object) -> dict[str, Any]:
        result = here(f"add --json {line}", *words)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    return add


@pytest.fixture(scope="session")
def raises_errno() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """``with raises_errno(errno.EIO)``: an OSError of this errno."""

    @contextlib.contextmanager
    def raises_errno(code: int) -> Iterator[None]:
        with pytest.raises(OSError) as failure:
            yield
        assert errno.errorcode[failure.value.errno or 0] == errno.errorcode[code]

    return raises_errno


# ---- files and file systems ----


@pytest.fixture(scope="session")
def pattern() -> Callable[..., bytes]:
    """``pattern(nr_bytes, seed=0)``: bytes that differ from place to place and seed to seed."""

    def pattern(nr_bytes: int, seed: int = 0) -> bytes:
        return random.Random(seed).randbytes(nr_bytes)

    return pattern


@pytest.fixture
def backing_file(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make a backing file: ``backing_file(nr_bytes, data=b"", folder=tmp_path)``, else sparse."""
    made: list[Path] = []

    def make(nr_bytes: int, data: bytes = b"", folder: Path = tmp_path) -> Path:
        path = folder / f"backing{len(made)}"
        made.append(path)
        with path.open("wb") as file:
            file.write(data)
            file.truncate(nr_bytes)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def attach_loop() -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """``with attach_loop(file, *losetup options) as path``: the kernel's loop device on a file."""

    @contextlib.contextmanager
    def attach(file: Path, *options: str) -> Iterator[Path]:
        path = Path(run_command("losetup", "--find", "--show", *options, file).strip())
        try:
            yield path
        finally:
            run_command("losetup", "--detach", path)

    return attach


@pytest.fixture(scope="session")
def mounted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., contextlib.AbstractContextManager[Path]]:
    """``with mounted(device, *mount options) as folder``."""

    @contextlib.contextmanager
    def mounted(source: object, *options: str) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("mnt")
        run_command("mount", *options, source, folder)
        try:
            yield folder
        finally:
            run_command("umount", folder)
            folder.rmdir()

    return mounted


@pytest.fixture(scope="session")
def ext4_folder(
    driver: None, tmp_path_factory: pytest.TempPathFactory, attach_loop: Any, mounted: Any
) -> Iterator[Path]:
    """A folder on ext4, whose direct I/O bypasses the page cache (on tmpfs it does not)."""
    image = tmp_path_factory.mktemp("ext4") / "image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    run_command("mkfs.ext4", "-q", "-O", "^has_journal", image)
    with attach_loop(image) as disk, mounted(disk, "-o", "discard") as folder:
        yield folder
    image.unlink()


@pytest.fixture(scope="session")
def xfs_folder(
    driver: None, tmp_path_factory: pytest.TempPathFactory, attach_loop: Any, mounted: Any
) -> Iterator[Path]:
    """A folder on xfs."""
    image = tmp_path_factory.mktemp("xfs") / "image"
    with image.open("wb") as file:
        file.truncate(1024 << 20)
    run_command("mkfs.xfs", "-q", image)
    with attach_loop(image) as disk, mounted(disk, "-o", "discard") as folder:
        yield folder
    image.unlink()


@pytest.fixture
def backing_folder(tmp_path: Path, ext4_folder: Path, xfs_folder: Path) -> dict[str, Path]:
    """``backing_folder["xfs"]``: where a backing file lies on tmpfs, ext4 or xfs."""
    return {"tmpfs": tmp_path, "ext4": ext4_folder, "xfs": xfs_folder}


@pytest.fixture
def suspendable(backing_file: Any, attach_loop: Any) -> Iterator[Path]:
    """A disk of 1 MiB that ``dmsetup suspend`` stops."""
    name = f"ublk-loop-test-{os.getpid()}"
    with attach_loop(backing_file(1 << 20)) as disk:
        run_command("dmsetup", "create", name, "--table", f"0 2048 linear {disk} 0")
        run_command("dmsetup", "mknodes")
        yield Path("/dev/mapper", name)
        run_command("dmsetup", "resume", name)
        run_command("dmsetup", "remove", "--retry", name)


@pytest.fixture
def stress_ng(leaves_nothing: KernelLog) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``stress_ng(folder, stressors, seconds)`` starts a load that verifies what it does."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, stressors: tuple[str, ...], seconds: float) -> subprocess.Popen[str]:
        words = ["stress-ng", "--temp-path", str(folder), "--verify", "--oom-avoid-bytes", "64M"]
        words += ["--timeout", f"{seconds}s", "--hdd-bytes", "4M", "--fallocate-bytes", "4M"]
        words += ["--dir-dirs", "64"]
        for name in stressors:
            words += [f"--{name}", "1"]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Path], dict[str, tuple[object, ...]]]:
    """``fingerprint(folder)``: type, mode, owner, size, time, links and contents of all below."""

    def one(path: Path) -> tuple[object, ...]:
        info = path.lstat()
        facts = (oct(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns)
        if stat.S_ISLNK(info.st_mode):
            return (*facts, os.readlink(path))
        if stat.S_ISREG(info.st_mode):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            return (*facts, info.st_nlink, info.st_size, digest)
        return facts

    def fingerprint(folder: Path) -> dict[str, tuple[object, ...]]:
        return {str(path.relative_to(folder)): one(path) for path in folder.rglob("*")}

    return fingerprint


# ---- clients of a block device ----


class BlockClient:
    """An opened block device: byte ranges in and out. Each call raises the client's OSError."""

    def __init__(self, path: str | Path, *, direct: bool = True, read_only: bool = False) -> None:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self.fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))

    def __enter__(self) -> BlockClient:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, nr_bytes: int) -> bytes:
        with mmap.mmap(-1, nr_bytes) as buffer:
            nr_read = os.preadv(self.fd, [buffer], offset)
            return buffer[:nr_read]

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            return os.pwritev(self.fd, [buffer], offset, flags)

    def flush(self) -> None:
        os.fsync(self.fd)

    def discard(self, offset: int, nr_bytes: int) -> None:
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("=QQ", offset, nr_bytes))

    def zero_out(self, offset: int, nr_bytes: int) -> None:
        fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("=QQ", offset, nr_bytes))

    def fallocate(self, mode: int, offset: int, nr_bytes: int) -> None:
        range_ = (ctypes.c_long(offset), ctypes.c_long(nr_bytes))
        if _libc.fallocate(self.fd, mode, *range_):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


@pytest.fixture(scope="session")
def open_block() -> type[BlockClient]:
    """``with open_block(path, direct=True, read_only=False) as client``."""
    return BlockClient


@pytest.fixture(scope="session")
def operate() -> Callable[[BlockClient, bytearray, random.Random], None]:
    """``operate(client, model, rng)``: do something by chance to the device and to its model.

    The device must read as zeroes what was discarded.
    """

    def operate(client: BlockClient, model: bytearray, rng: random.Random) -> None:
        nr_sectors = len(model) // SECTOR_BYTES
        start = rng.randrange(nr_sectors)
        length = min(rng.choice([1, 2, 7, 8, 64, 513, 2048]), nr_sectors - start)
        offset, nr_bytes = start * SECTOR_BYTES, length * SECTOR_BYTES
        what = rng.choice(["read", "read", "write", "write", "write", "clear", "flush"])
        if what == "read":
            assert client.read(offset, nr_bytes) == model[offset : offset + nr_bytes]
        elif what == "write":
            data = rng.randbytes(nr_bytes)
            flags = rng.choice([0, 0, os.RWF_DSYNC])
            assert client.write(offset, data, flags=flags) == nr_bytes
            model[offset : offset + nr_bytes] = data
        elif what == "clear":
            rng.choice([client.discard, client.zero_out])(offset, nr_bytes)
            model[offset : offset + nr_bytes] = bytes(nr_bytes)
        else:
            client.flush()

    return operate


@pytest.fixture
def fio(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``fio(path, jobs, **globals)`` runs fio's jobs on a device and returns its report.

    Jobs run one after another; unless ``check=False`` each must end without an error.
    """

    def fio(
        path: str,
        jobs: dict[str, dict[str, object]],
        *,
        check: bool = True,
        timeout_s: float = COMMAND_TIMEOUT_S,
        **options: object,
    ) -> dict[str, Any]:
        report = tmp_path / "fio.json"
        defaults = {"filename": path, "ioengine": "libaio", "direct": 1, "verify_fatal": 1}
        defaults["allow_file_create"] = 0  # were the device gone, /dev would get a file
        sections = {"global": {**defaults, **options}, **jobs}
        lines = ["[global]", "thread", "stonewall", "group_reporting=0"]
        for name, job in sections.items():
            lines += [f"[{name}]"] * (name != "global")
            lines += [f"{key}={value}" for key, value in job.items()]
        job_file = tmp_path / "job.fio"
        job_file.write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            ["fio", "--output-format=json", f"--output={report}", str(job_file)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        text = report.read_text()
        parsed: dict[str, Any] = json.loads(text[text.index("{") :])
        parsed["returncode"] = done.returncode
        errors = {job["jobname"]: job["error"] for job in parsed["jobs"] if job["error"]}
        if check and (done.returncode or errors):
            pytest.fail(f"fio: exit {done.returncode}, errors {errors}\n{text[:2000]}{done.stderr}")
        return parsed

    return fio


@pytest.fixture
def verifying_load(tmp_path: Path, leaves_nothing: KernelLog) -> Iterator[Callable[[str], Load]]:
    """``verifying_load(block_path)`` starts fio; ``end()`` ends it and returns its report."""
    started: list[Load] = []

    def start(block_path: str) -> Load:
        started.append(Load(block_path, tmp_path / "load.json"))
        return started[-1]

    yield start
    for load in started:
        load.process.kill()
        # Its device is gone, or serves it: what serves it is to be set up later.
        load.process.wait(60)
