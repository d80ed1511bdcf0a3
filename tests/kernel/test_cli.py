"""The ublk command on the real driver: each verb, what it prints, and what is left afterwards.

Python starts slowly in an emulated guest: most commands run in this process (``here``), which forks
the servers as the real command does; what only a process of its own can show uses ``ublk``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from proc_files import has_stopped

from ublk_loop import manage, scheduler, state, uapi
from ublk_loop.control import Control
from ublk_loop.device import Device
from ublk_loop.target import NullTarget

Here = Callable[..., Result]
WaitUntil = Callable[..., None]
PF_IO_FLUSHER = 0x00080000 | 0x00100000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE
FILE_BYTES = 4 << 20
pytestmark = pytest.mark.usefixtures("state_dir")


def _succeed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def _fail(result: Result) -> str:
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert re.fullmatch(r"ublk: [^\n]+\n", result.stderr)
    return result.stderr


def _document(text: str) -> dict[str, Any]:
    document = json.loads(text)
    assert isinstance(document, dict)
    return document


def _task_flags(pid: int, tid: int) -> int:
    stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
    return int(stat.rpartition(") ")[2].split()[6])


def _is_gone(dev_id: int) -> bool:
    nodes = (f"/dev/ublkb{dev_id}", f"/dev/ublkc{dev_id}", state.state_path(dev_id))
    return not any(os.path.exists(path) for path in nodes)


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_ublk_adds_lists_and_deletes_a_device_that_outlives_the_command(
    ublk: Callable[..., subprocess.CompletedProcess[str]],
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    control: Control,
    state_dir: Path,
) -> None:
    path = backing_file(FILE_BYTES)
    added = ublk("add", "-t", "loop", "-f", path, "-q", 2, "-d", 32, "-n", 5)
    assert (added.returncode, added.stderr) == (0, "")
    info = control.get_dev_info(5)
    assert info.state == uapi.UBLK_S_DEV_LIVE
    lines = added.stdout.splitlines()
    assert re.fullmatch(
        r"dev id 5: nr_hw_queues [12] queue_depth 32 block size \d+ dev_capacity 8192", lines[0]
    )
    assert lines[1] == (
        f"\tmax rq size 524288 daemon pid {info.ublksrv_pid} flags {info.flags:#x} state LIVE"
    )
    assert re.fullmatch(r"\tublkc: \d+:5 ublkb: \d+:\d+ owner: 0:0", lines[2])
    tids = [
        int(match[1]) for line in lines if (match := re.match(r"\tqueue \d+: tid (\d+) ", line))
    ]
    assert len(tids) == info.nr_hw_queues
    assert lines[-1].startswith(f'\ttarget {{"backing_file":"{path}","dev_size":{FILE_BYTES},')

    pid = info.ublksrv_pid
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    assert int(re.search(r"VmLck:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) > 0  # type: ignore[index]
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert all(_task_flags(pid, tid) & PF_IO_FLUSHER == PF_IO_FLUSHER for tid in (pid, *tids))

    data = pattern(65536)
    with open_block("/dev/ublkb5") as client:
        client.write(0, data)
    assert path.read_bytes()[:65536] == data

    listed = ublk("list")
    assert (listed.returncode, listed.stdout) == (0, added.stdout)
    deleted = ublk("del", "-n", 5)
    assert (deleted.returncode, deleted.stdout, deleted.stderr) == (0, "", "")
    assert _is_gone(5)
    assert not os.path.exists(f"/proc/{pid}")
    assert os.listdir(state_dir) == []
    again = ublk("del", "-n", 5)
    assert (again.returncode, again.stdout) == (1, "")
    assert re.fullmatch(r"ublk: [^\n]*dev 5: No such device[^\n]*\n", again.stderr)


def test_list_json_and_verbose_tell_of_the_same_devices(here: Here, control: Control) -> None:
    added = _document(_succeed(here("add -t null --size 1G -d 16 --json")))
    dev_id = added["dev_id"]
    assert added["state"] == "LIVE"
    assert added["nr_sectors"] == 1 << 21
    assert os.path.exists(added["block_device"])
    assert json.loads(_succeed(here("list --json"))) == [added]
    assert json.loads(_succeed(here("list --json -n", dev_id))) == [added]
    verbose = _document(_succeed(here("list -v -n", dev_id)))
    assert verbose["dev_info"]["ublksrv_pid"] == added["server_pid"]
    assert verbose["queues"]["0"]["tid"] == added["queues"][0]["tid"]
    assert "No such device" in _fail(here("list -n", dev_id + 1))
    _succeed(here("del -n", dev_id))
    assert json.loads(_succeed(here("list --json"))) == []
    assert _succeed(here("list")) == ""
    features = json.loads(_succeed(here("features --json")))
    assert features["features"] == control.get_features()
    assert "CMD_IOCTL_ENCODE" in _succeed(here("features"))


def test_add_serves_the_part_of_the_file_that_it_was_told(
    here: Here, backing_file: Callable[..., Path], pattern: Callable[..., bytes], open_block: Any
) -> None:
    data = pattern(FILE_BYTES)
    path = backing_file(FILE_BYTES, data)
    line = "add -t loop --json -R --buffered_io -o 8 --size 1M -f"
    added = _document(_succeed(here(line, path)))
    block = Path(f"/sys/block/ublkb{added['dev_id']}")
    assert (block / "ro").read_text() == "1\n"
    assert (block / "size").read_text() == "2048\n"
    assert added["target"]["offset"] == 8
    with open_block(added["block_device"], read_only=True) as client:
        assert client.read(0, 8192) == data[4096 : 4096 + 8192]


def test_add_says_why_and_leaves_nothing_when_it_is_refused(
    here: Here,
    backing_file: Callable[..., Path],
    tmp_path: Path,
    state_dir: Path,
    features: int,
) -> None:
    path = backing_file(FILE_BYTES)
    if not features & uapi.UBLK_F_AUTO_BUF_REG:
        assert "does not offer it" in _fail(here("add -t null -z"))
    assert "No such file" in _fail(here("add -t loop -f", tmp_path / "absent"))
    assert "Is a directory" in _fail(here("add -t loop -f", tmp_path))
    assert "too small" in _fail(here("add -t loop -f", backing_file(100)))
    assert "do not fit" in _fail(here("add -t loop --size 8M -f", path))
    assert here("list").stdout == ""
    assert not state_dir.exists()

    added = _document(_succeed(here("add -t loop --json -f", path)))
    assert "File exists" in _fail(here("add -t null -n", added["dev_id"]))
    assert [each["dev_id"] for each in json.loads(here("list --json").stdout)] == [added["dev_id"]]


def test_file_in_the_place_of_a_devices_node_is_moved_aside(
    here: Here, backing_file: Callable[..., Path], open_block: Any
) -> None:
    """fio, begun too late, made a file of /dev/ublkb0, and the next device had no node."""
    node, aside = Path("/dev/ublkb77"), Path("/dev/ublkb77.file")
    node.write_text("written to a device that was gone")
    path = backing_file(FILE_BYTES)
    try:
        result = here("add -t loop -n 77 -f", path)
        assert result.exit_code == 0
        assert result.stderr.startswith("ublk: warning: /dev/ublkb77 was a file")
        assert aside.read_text() == "written to a device that was gone"
        with open_block(node) as client:
            client.write(0, b"x" * 4096)
        assert path.read_bytes()[:4096] == b"x" * 4096
    finally:
        aside.unlink()


def test_add_says_why_and_leaves_nothing_when_the_server_cannot_write_its_state(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path / "file" / "state"))
    assert "state folder" in _fail(here("add -t null"))
    assert here("list").stdout == ""


def test_add_says_why_and_leaves_nothing_when_the_server_is_killed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = os.getpid()

    def die(_: object) -> None:
        assert os.getpid() != launcher
        os.write(2, b"famous last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(state, "write", die)
    message = _fail(here("add -t null -r 1"))
    assert "SIGKILL" in message
    assert "famous last words" in message
    assert here("list").stdout == ""


def test_server_deletes_its_device_when_it_is_asked_to_end(here: Here, state_dir: Path) -> None:
    added = _document(_succeed(here("add -t ram --size 1M --json")))
    os.kill(added["server_pid"], signal.SIGTERM)
    assert _exit_code(added["server_pid"]) == 0
    assert _is_gone(added["dev_id"])
    assert os.listdir(state_dir) == []


def test_server_ends_when_its_device_is_stopped_from_outside(
    here: Here, control: Control, state_dir: Path
) -> None:
    added = _document(_succeed(here("add -t null --json")))
    control.stop_dev(added["dev_id"])
    assert _exit_code(added["server_pid"]) == 0
    assert os.listdir(state_dir) == []
    assert "state DEAD" in _succeed(here("list -n", added["dev_id"]))
    _succeed(here("del -n", added["dev_id"]))
    assert _is_gone(added["dev_id"])


def test_device_is_dead_and_can_be_deleted_when_its_server_was_killed(
    here: Here, control: Control, wait_until: WaitUntil
) -> None:
    added = _document(_succeed(here("add -t null --json")))
    dev_id = added["dev_id"]
    os.kill(added["server_pid"], signal.SIGKILL)
    wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_DEAD, timeout_s=20)
    assert "state DEAD" in _succeed(here("list -n", dev_id))
    assert "Invalid argument" in _fail(here("recover -n", dev_id))
    _succeed(here("del -n", dev_id))
    assert _is_gone(dev_id)


@pytest.mark.parametrize("option", ["-r", "-i"])
def test_recover_serves_the_device_again_and_waiting_requests_end_well(
    here: Here,
    control: Control,
    wait_until: WaitUntil,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    option: str,
) -> None:
    data = pattern(FILE_BYTES)
    path = backing_file(FILE_BYTES, data)
    line = f"add -t loop {option} 1 -q 2 -o 8 --policy base --json -f"
    added = _document(_succeed(here(line, path)))
    dev_id = added["dev_id"]
    assert "is alive" in _fail(here("recover -n", dev_id))
    os.kill(added["server_pid"], signal.SIGKILL)
    os.waitpid(added["server_pid"], 0)

    answers: list[bytes] = []

    def read() -> None:
        with open_block(f"/dev/ublkb{dev_id}") as client:
            answers.append(client.read(65536, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_QUIESCED)
    assert "state QUIESCED" in _succeed(here("list -n", dev_id))
    recovered = _document(_succeed(here("recover --json -n", dev_id)))
    reader.join(30)
    assert answers == [data[4096 + 65536 :][:4096]]
    assert recovered["state"] == "LIVE"
    assert recovered["server_pid"] != added["server_pid"]
    assert recovered["target"] == added["target"]
    assert recovered["policy"] == "base"
    assert json.loads(_succeed(here("list --json"))) == [recovered]

    os.kill(recovered["server_pid"], signal.SIGKILL)
    _succeed(here("del -n", dev_id))
    assert _is_gone(dev_id)


def test_recover_fails_and_the_device_still_waits_when_the_file_is_gone(
    here: Here,
    control: Control,
    features: int,
    wait_until: WaitUntil,
    backing_file: Callable[..., Path],
) -> None:
    path = backing_file(FILE_BYTES)
    # -e came with v6.13.
    fail_io = features & uapi.UBLK_F_USER_RECOVERY_FAIL_IO
    option, waiting = (
        ("-e", uapi.UBLK_S_DEV_FAIL_IO) if fail_io else ("-r", uapi.UBLK_S_DEV_QUIESCED)
    )
    added = _document(_succeed(here(f"add -t loop {option} 1 --json -f", path)))
    dev_id = added["dev_id"]
    os.kill(added["server_pid"], signal.SIGKILL)
    wait_until(lambda: control.get_dev_info(dev_id).state == waiting)
    os.truncate(path, FILE_BYTES // 2)
    assert "do not fit" in _fail(here("recover -n", dev_id))
    os.truncate(path, FILE_BYTES)
    assert "state LIVE" in _succeed(here("recover -n", dev_id))


def test_del_kills_a_server_that_hangs(
    here: Here, monkeypatch: pytest.MonkeyPatch, open_block: Any, wait_until: WaitUntil
) -> None:
    monkeypatch.setattr(manage, "STOP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(manage, "LEAVE_TIMEOUT_S", 1.0)
    added = _document(_succeed(here("add -t null --json")))
    inflight = Path(f"/sys/block/ublkb{added['dev_id']}/inflight")
    os.kill(added["server_pid"], signal.SIGSTOP)
    wait_until(lambda: has_stopped(added["server_pid"]), timeout_s=20)
    errors: list[int | None] = []

    def read() -> None:
        with open_block(added["block_device"]) as client:
            try:
                client.read(0, 4096)
            except OSError as error:
                errors.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: inflight.read_text().split() != ["0", "0"])
    _succeed(here("del --force -n", added["dev_id"]))
    reader.join(30)
    assert errors == [errno.EIO]
    assert _exit_code(added["server_pid"]) == -signal.SIGKILL
    assert _is_gone(added["dev_id"])


def test_del_of_all_and_async_leave_no_device(here: Here, state_dir: Path) -> None:
    for _ in range(2):
        _succeed(here("add -t null"))
    _succeed(here("del -a"))
    assert here("list").stdout == ""
    added = _document(_succeed(here("add -t null --json")))
    _succeed(here("del --async -n", added["dev_id"]))
    assert os.listdir(state_dir) == []


def test_stop_keeps_the_number_of_a_device_that_nobody_uses(here: Here) -> None:
    added = _document(_succeed(here("add -t null --json")))
    dev_id = added["dev_id"]
    with open(added["block_device"], "rb") as device:
        user = subprocess.Popen(["sleep", "60"], stdin=device)
    with user:
        for word in ("", "--safe"):
            assert "resource busy" in here(f"stop {word} -n", dev_id).stderr
        assert os.path.exists(added["block_device"])
        user.kill()
    _succeed(here("stop --safe -n", dev_id))
    [stopped] = json.loads(_succeed(here("list --json -n", dev_id)))
    assert (stopped["state"], stopped["dev_id"]) == ("DEAD", dev_id)
    assert not os.path.exists(added["block_device"])
    assert _exit_code(added["server_pid"]) == 0
    assert "File exists" in _fail(here("add -t null -n", dev_id))
    _succeed(here("del -n", dev_id))
    assert _is_gone(dev_id)


def test_requests_of_a_slow_null_device_end_late_or_with_its_server(
    here: Here, open_block: Any, wait_until: WaitUntil, features: int
) -> None:
    added = _document(_succeed(here("add -t fault_inject --json --size 1M --delay_us 1000")))
    with open_block(added["block_device"]) as client:
        assert client.write(0, bytes(8192)) == 8192
        assert len(client.read(4096, 8192)) == 8192
        client.discard(0, 1 << 20)
    _succeed(here("del -n", added["dev_id"]))

    if not features & uapi.UBLK_F_NO_AUTO_PART_SCAN:
        return  # an add that looks for partitions would wait for them
    words = "--size 1M --delay_us 3600000000 --no_auto_part_scan"
    added = _document(_succeed(here(f"add -t null --json {words}")))
    inflight = Path(f"/sys/block/ublkb{added['dev_id']}/inflight")
    client = subprocess.Popen(
        ["dd", f"if={added['block_device']}", "of=/dev/null", "bs=4k", "iflag=direct"],
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: inflight.read_text().split() != ["0", "0"])
    os.kill(added["server_pid"], signal.SIGKILL)
    assert client.wait(30) == 1
    assert _exit_code(added["server_pid"]) == -signal.SIGKILL
    _succeed(here("del -n", added["dev_id"]))


def test_set_affinity_moves_the_queues_thread_and_each_queue_that_it_serves(here: Here) -> None:
    added = _document(_succeed(here("add -t null --json")))
    dev_id, tid = added["dev_id"], added["queues"][0]["tid"]
    cpu = max(os.sched_getaffinity(0))
    _succeed(here(f"set_affinity -n {dev_id} -q 0 --cpuset [{cpu}]"))
    assert os.sched_getaffinity(tid) == {cpu}
    listed = _succeed(here("list")).splitlines()
    for queue in added["queues"]:
        assert queue["tid"] == tid
        assert f"\tqueue {queue['q_id']}: tid {tid} affinity({cpu} )" in listed
    assert "Invalid argument" in _fail(here(f"set_affinity -n {dev_id} -q 0 --cpuset [60000]"))
    assert "Invalid argument" in _fail(here(f"set_affinity -n {dev_id} -q 9 --cpuset [{cpu}]"))


def test_commands_work_when_the_state_file_is_corrupt(here: Here) -> None:
    added = _document(_succeed(here("add -t null --json")))
    dev_id = added["dev_id"]
    Path(state.state_path(dev_id)).write_text("{")
    listed = here("list")
    assert listed.exit_code == 0
    assert len(listed.stdout.splitlines()) == 3
    assert re.fullmatch(r"ublk: state file [^\n]+\n", listed.stderr)
    deleted = here("del -n", dev_id)
    assert deleted.exit_code == 0
    assert re.fullmatch(r"ublk: state file [^\n]+\n", deleted.stderr)
    assert _is_gone(dev_id)


def test_list_shows_a_device_of_another_server_and_leaves_it_alone(
    here: Here, device: Callable[..., Device]
) -> None:
    served = device(NullTarget(1 << 20))
    text = _succeed(here("list -n", served.dev_id))
    assert len(text.splitlines()) == 3
    assert f"daemon pid {os.getpid()} " in text
    assert "no state of it" in _fail(here("recover -n", served.dev_id))
    _fail(here("set_affinity -q 0 --cpuset [0] -n", served.dev_id))


@pytest.mark.parametrize("way", ["SIGINT", "del"])
def test_foreground_serves_until_it_is_interrupted_or_the_device_is_deleted(
    here: Here, way: str
) -> None:
    line = "-m ublk_loop add -t null --foreground --json"
    command = [sys.executable, *line.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "}\n")
        added = _document("".join(lines) + "}")
        assert added["server_pid"] == server.pid
        assert "state LIVE" in _succeed(here("list"))
        if way == "SIGINT":
            server.send_signal(signal.SIGINT)
        else:
            _succeed(here("del -n", added["dev_id"]))
        assert server.wait(30) == 0
    assert _is_gone(added["dev_id"])


def test_add_without_a_daemon_answers_though_the_backing_does_not(
    suspendable: Path,
    here: Here,
    features: int,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
) -> None:
    """The search for partitions waits for the backing, the scheduler for it, and add for that."""
    if not features & uapi.UBLK_F_NO_AUTO_PART_SCAN:
        pytest.skip("this driver looks for partitions before a device is live (7.0)")
    monkeypatch.setattr(scheduler, "WAIT_S", 1.0)
    run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
    try:
        added = _document(_succeed(here("add --json -t loop --buffered_io -f", suspendable)))
    finally:
        run("dmsetup", "resume", suspendable)
    path = Path(f"/sys/block/ublkb{added['dev_id']}/queue/scheduler")
    wait_until(lambda: "[none]" in path.read_text(), timeout_s=30)
    _succeed(here("del -n", added["dev_id"]))


def test_state_is_kept_in_run_ublk_unless_told_otherwise(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UBLK_LOOP_STATE_DIR")
    added = _document(_succeed(here("add -t null --json")))
    path = Path(f"/run/ublk/{added['dev_id']}.json")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    _succeed(here("del -n", added["dev_id"]))
    assert not path.exists()
