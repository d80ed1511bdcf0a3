"""What a server can no longer do once its device is live, and that it serves well all the same.

A probe is a process of the test's that confines itself as a server does and then tries what an
intruder would; the threads of a real server are looked at in /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from click.testing import Result

from ublk_loop.control import Control, DevInfo, list_dev_ids
from ublk_loop.params import params_for
from ublk_loop.sandbox import CAP_FOWNER, Sandbox

CLONE_NEWUSER = 0x10000000
SECCOMP_MODE_FILTER = "2"
Rights = Callable[[int], dict[int, tuple[int, str, str]]]


def _errno_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def _libc_call(name: str, *arguments: Any) -> Callable[[], None]:
    def call() -> None:
        if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), name)

    return call


def _confined(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What becomes of each attempt in a process that is confined as a server's main thread."""

    def probe() -> dict[str, str]:
        Sandbox().confine_main()
        return {name: _errno_of(attempt) for name, attempt in attempts.items()}

    answers: dict[str, str] = in_child(probe)
    return answers


def test_a_confined_process_cannot_do_what_a_server_need_not(
    state_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("secret")
    attempts: dict[str, Callable[[], object]] = {
        "read another file": other.read_text,
        "write another file": lambda: other.write_text(""),
        "make a file elsewhere": lambda: os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY),
        "remove a file elsewhere": other.unlink,
        "open a device": lambda: os.open("/dev/kmsg", os.O_RDONLY),
        "open the driver": lambda: os.open("/dev/ublk-control", os.O_RDWR),
        "list a folder": lambda: os.listdir("/etc"),
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "fork": os.fork,
        "make a socket": lambda: socket.socket(socket.AF_INET),
        "make a unix socket": lambda: socket.socket(socket.AF_UNIX),
        "trace a process": _libc_call("ptrace", 16, os.getppid(), None, None),
        "signal a process": lambda: os.kill(os.getppid(), signal.SIGCONT),
        "mount": _libc_call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
        "make a namespace": _libc_call("unshare", CLONE_NEWUSER),
        "become another user": lambda: os.setuid(1),
        "change an owner": lambda: os.chown(other, 1, 1),
        "change a mode": lambda: os.chmod(other, 0o777),
        "make a device": lambda: os.mknod(tmp_path / "node", 0o60600, os.makedev(8, 0)),
        "load a module": _libc_call("syscall", 313, 0, b"", 0),
        "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, 0),
        "reboot": _libc_call("reboot", 0x01234567),
    }
    answers = _confined(attempts)
    assert answers.keys() == attempts.keys()
    assert {k: v for k, v in answers.items() if v not in ("EACCES", "EPERM")} == {}
    assert other.read_text() == "secret"


def test_a_confined_process_can_still_do_what_a_server_must(
    state_dir: Path, tmp_path: Path
) -> None:
    backing_fd = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT)
    state_dir.mkdir(mode=0o700)
    (state_dir / "0.json").write_text("{}")

    def run_thread() -> None:
        thread = threading.Thread(target=lambda: os.pwrite(backing_fd, b"thread", 0))
        thread.start()
        thread.join()

    attempts: dict[str, Callable[[], object]] = {
        "write the backing file": lambda: os.pwrite(backing_fd, bytes(4096), 0),
        "flush it": lambda: os.fdatasync(backing_fd),
        "start a thread": run_thread,
        "raise its priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
        "read the state": (state_dir / "0.json").read_text,
        "replace the state": lambda: (state_dir / "1.json").write_text("{}"),
        "remove the state": (state_dir / "0.json").unlink,
    }
    answers = _confined(attempts)
    os.close(backing_fd)
    assert answers == dict.fromkeys(attempts, "done")
    assert (tmp_path / "backing").read_bytes()[:6] == b"thread"


def test_a_ring_that_keeps_rights_sends_commands_for_who_has_none(control: Control) -> None:
    info = control.add_dev(DevInfo())
    params = params_for(dev_nr_bytes=1 << 20, max_io_buf_bytes=info.max_io_buf_bytes)

    def probe() -> dict[str, str]:
        with Control() as weak, Control() as strong:
            Sandbox().confine_main(strong.keep_rights)
            return {
                "weak": _errno_of(lambda: weak.set_params(info.dev_id, params)),
                "strong": _errno_of(lambda: strong.set_params(info.dev_id, params)),
                "strong again": _errno_of(lambda: strong.del_dev(info.dev_id)),
            }

    assert in_child(probe) == {"weak": "EPERM", "strong": "done", "strong again": "done"}
    assert info.dev_id not in list_dev_ids()


def _rights(pid: int) -> dict[int, tuple[int, str, str]]:
    """Capabilities, no_new_privs and seccomp mode of each thread, also the ones of io_uring."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            fields = dict(
                line.split(":\t", 1)
                for line in (task / "status").read_text().splitlines()
                if ":\t" in line
            )
            capabilities = int(fields["CapPrm"], 16) | int(fields["CapEff"], 16)
            found[int(task.name)] = (capabilities, fields["NoNewPrivs"], fields["Seccomp"])
    return found


@pytest.fixture
def final_rights(wait_until: Callable[..., None]) -> Rights:
    """``final_rights(pid)``: of each thread once the filter is there, a server's last step."""

    def final_rights(pid: int) -> dict[int, tuple[int, str, str]]:
        wait_until(lambda: _rights(pid)[pid][2] == SECCOMP_MODE_FILTER, timeout_s=30)
        return _rights(pid)

    return final_rights


@pytest.mark.parametrize("options", ["", "--policy 2014", "--direct_io", "--usercopy", "-r 1"])
def test_every_thread_of_a_server_is_confined_and_serves(
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    ext4_folder: Path,
    pattern: Callable[..., bytes],
    open_block: Any,
    final_rights: Rights,
    options: str,
) -> None:
    path = backing_file(4 << 20, folder=ext4_folder)
    device = add(f"-t loop {options} -f", path)
    data = pattern(1 << 20)
    with open_block(device["block_device"]) as client:
        client.write(0, data)
        client.flush()
        client.discard(2 << 20, 1 << 20)
        assert client.read(0, 1 << 20) == data
    assert path.read_bytes()[: 1 << 20] == data
    rights = final_rights(device["server_pid"])
    assert len(rights) >= 3
    assert set(rights.values()) == {(0, "1", SECCOMP_MODE_FILTER)}


def test_io_threads_may_act_as_owner_of_a_file_that_is_anothers(
    add: Callable[..., dict[str, Any]], backing_file: Callable[..., Path], final_rights: Rights
) -> None:
    path = backing_file(1 << 20)
    os.chown(path, 1, 1)
    device = add("-t loop -f", path)
    rights = final_rights(device["server_pid"])
    assert rights[device["queues"][0]["tid"]][0] == 1 << CAP_FOWNER


@pytest.mark.parametrize("way", ["SIGTERM", "del", "kill and recover"])
def test_a_confined_server_ends_and_takes_its_device_along(
    add: Callable[..., dict[str, Any]],
    here: Callable[..., Result],
    final_rights: Rights,
    state_dir: Path,
    way: str,
) -> None:
    device = add("-t ram --size 1M" if way == "SIGTERM" else "-t null -r 1")
    dev_id, pid = device["dev_id"], device["server_pid"]
    final_rights(pid)
    if way == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        if way == "kill and recover":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            result = here(f"recover --json -n {dev_id}")
            assert result.exit_code == 0, result.output
            pid = json.loads(result.stdout)["server_pid"]
            assert final_rights(pid)[pid] == (0, "1", SECCOMP_MODE_FILTER)
        assert here(f"del -n {dev_id}").output == ""
    assert not os.path.exists(f"/dev/ublkc{dev_id}")
    assert os.listdir(state_dir) == []


def _nr_rings(pid: int) -> int:
    return sum(
        os.readlink(fd) == "anon_inode:[io_uring]" for fd in Path(f"/proc/{pid}/fd").iterdir()
    )


def test_reads_of_a_batch_share_a_ring_also_under_a_confined_server(
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    ext4_folder: Path,
    final_rights: Rights,
    fio: Any,
) -> None:
    device = add("-t loop --policy 2014 -f", backing_file(8 << 20, folder=ext4_folder))
    final_rights(device["server_pid"])
    before = _nr_rings(device["server_pid"])
    fio(device["block_device"], {"reads": {"rw": "randread", "bs": "4k", "iodepth": 32}}, size="8M")
    assert _nr_rings(device["server_pid"]) > before


def test_fio_verifies_what_a_confined_server_wrote(
    add: Callable[..., dict[str, Any]], backing_file: Callable[..., Path], fio: Any
) -> None:
    device = add("-t loop -q 2 -f", backing_file(8 << 20))
    job = {"rw": "randrw", "bs": "4k-64k", "iodepth": 32, "verify": "crc32c", "size": "8M"}
    fio(device["block_device"], {"verify": job})
    subprocess.run(["mkfs.ext4", "-q", device["block_device"]], check=True)
    subprocess.run(["e2fsck", "-fn", device["block_device"]], check=True)
