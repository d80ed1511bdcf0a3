"""ublk doctor on machines that are made up: folders with the files that it reads."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ublk_loop import cli, doctor, doctor_devices, doctor_host, sandbox, uapi
from ublk_loop.control import DevInfo
from ublk_loop.doctor_devices import Known
from ublk_loop.errors import DriverError
from ublk_loop.finding import NOTE, PROBLEM, WARNING, Finding, Host
from ublk_loop.state import DeviceOptions, DeviceState, QueueState, TargetSpec

INFO = DevInfo(dev_id=3, state=uapi.UBLK_S_DEV_LIVE, ublksrv_pid=70)
STATE = DeviceState(
    dev_id=3,
    sysfs_ino=0,
    server_pid=70,
    server_start_ticks=1,
    options=DeviceOptions(),
    spec=TargetSpec("null", nr_bytes=1 << 20),
    target={"name": "null"},
    queues=(QueueState(0, 71, (0,)),),
)
IO_FLUSHER = 0x00180000


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, release="6.12.1", is_root=True)


def _write(host: Host, name: str, text: str = "") -> Path:
    path = host.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _only(findings: object) -> Finding:
    (finding,) = list(findings)  # type: ignore[call-overload]
    assert isinstance(finding, Finding)
    return finding


def _server(host: Host) -> None:
    """A server without a fault."""
    for pid, namespace in (("self", "mnt:[1]"), ("70", "mnt:[2]")):
        folder = host.path(f"proc/{pid}/ns")
        folder.mkdir(parents=True)
        (folder / "mnt").symlink_to(namespace)
    _write(host, "proc/70/status", "Name:\tpython3\nVmLck:\t  900 kB\n")
    _write(host, "proc/70/oom_score_adj", "-1000\n")
    _stat(host, 70, IO_FLUSHER)
    _stat(host, 71, IO_FLUSHER)
    _write(host, "sys/block/ublkb3/queue/scheduler", "[none] mq-deadline\n")


def _stat(host: Host, tid: int, flags: int, command: str = "ublk) q0") -> None:
    _write(host, f"proc/70/task/{tid}/stat", f"{tid} ({command}) S 1 1 1 0 -1 {flags} 0 0\n")


# ---- the machine ----


def test_a_machine_without_landlock_and_libseccomp_is_warned_of_what_a_server_then_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacks() -> None:
        raise OSError(errno.ENOENT, "no libseccomp.so.2")

    monkeypatch.setattr(sandbox, "has_landlock", lambda: False)
    monkeypatch.setattr(sandbox, "load_libseccomp", lacks)
    landlock, seccomp = doctor_host.check_sandbox()
    assert landlock.severity == seccomp.severity == WARNING
    assert "lsm=" in landlock.fix
    assert "libseccomp2" in seccomp.fix
    monkeypatch.setattr(sandbox, "has_landlock", lambda: True)
    monkeypatch.setattr(sandbox, "load_libseccomp", lambda: None)
    assert list(doctor_host.check_sandbox()) == []


def test_a_driver_that_is_not_loaded_is_a_problem_with_the_command_that_loads_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(host, "lib/modules/6.12.1/modules.dep", "kernel/drivers/block/ublk_drv.ko.xz: x.ko.xz\n")
    finding = _only(doctor_host.check_driver(host))
    assert finding.severity == PROBLEM
    assert "modprobe ublk_drv" in finding.fix
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(doctor_host, "_run", lambda *words: ran.append(words))
    assert doctor.repair([finding]) == [(finding, "")]
    assert ran == [("modprobe", "ublk_drv")]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"etc/os-release": 'ID=debian\nVERSION_ID="12"\n'}, "bookworm-backports"),
        ({"etc/os-release": "ID=fedora\n"}, "CONFIG_BLK_DEV_UBLK"),
        ({"run/.containerenv": ""}, "on the host: modprobe"),
        ({"sys/module/ublk_drv/version": ""}, "devtmpfs"),
    ],
)
def test_a_machine_without_the_driver_is_told_what_to_do(
    host: Host, files: dict[str, str], words: str
) -> None:
    for name, text in files.items():
        _write(host, name, text)
    finding = _only(doctor_host.check_driver(host))
    assert (finding.severity, finding.repair) == (PROBLEM, None)
    assert words in finding.fix


def test_a_driver_that_is_there_is_no_finding(host: Host) -> None:
    _write(host, "dev/ublk-control")
    assert list(doctor_host.check_driver(host)) == []
    everything = _only(doctor_host.check_features(host, lambda: (1 << 21) - 1))
    assert (everything.severity, "--no_batch" in everything.fix) == (NOTE, True)


def test_a_driver_that_refuses_is_a_problem_and_what_it_lacks_a_note(host: Host) -> None:
    _write(host, "dev/ublk-control")

    def refuse() -> int:
        raise DriverError(errno.EPERM, "io_uring_setup", "io_uring is off")

    finding = _only(doctor_host.check_features(host, refuse))
    assert (finding.severity, finding.fix) == (PROBLEM, "io_uring is off")
    assert _only(doctor_host.check_features(host, lambda: 0)).severity == PROBLEM
    lacking = ((1 << 21) - 1) & ~uapi.UBLK_F_BATCH_IO
    finding = _only(doctor_host.check_features(host, lambda: lacking))
    assert finding.severity == NOTE
    assert "BATCH_IO" in finding.text
    assert "QUIESCE" not in finding.text


@pytest.mark.parametrize(("setting", "is_root", "is_off"), [("2", True, True), ("1", True, False)])
def test_io_uring_that_is_switched_off_is_a_problem(
    host: Host, setting: str, is_root: bool, is_off: bool
) -> None:
    _write(host, "proc/sys/kernel/io_uring_disabled", f"{setting}\n")
    found = list(doctor_host.check_io_uring(dataclasses.replace(host, is_root=is_root)))
    assert [finding.severity for finding in found] == [PROBLEM] * is_off


def test_an_old_liburing_is_a_warning(host: Host) -> None:
    _write(host, "proc/self/maps", "7f00-7f01 r-xp 0 0:1 9 /usr/lib/liburing.so.2.2\n")
    assert "2.2" in _only(doctor_host.check_liburing(host)).text
    _write(host, "proc/self/maps", "7f00-7f01 r-xp 0 0:1 9 /usr/lib/liburing.so.2.10\n")
    assert list(doctor_host.check_liburing(host)) == []


def test_each_missing_capability_of_root_is_a_warning(host: Host) -> None:
    _write(host, "proc/self/status", "CapEff:\t000001ffffffffff\n")
    assert list(doctor_host.check_rights(host)) == []
    _write(host, "proc/self/status", "CapEff:\t000001fffeffffff\n")
    assert "CAP_SYS_RESOURCE" in _only(doctor_host.check_rights(host)).text


def test_a_narrow_cgroup_anywhere_above_is_a_warning(host: Host) -> None:
    _write(host, "proc/self/cgroup", "0::/a/b\n")
    _write(host, "sys/fs/cgroup/a/b/memory.max", "max\n")
    _write(host, "sys/fs/cgroup/a/b/pids.max", "4096\n")
    assert list(doctor_host.check_cgroup(host)) == []
    _write(host, "sys/fs/cgroup/a/pids.max", "16\n")
    finding = _only(doctor_host.check_cgroup(host))
    assert finding.severity == WARNING
    assert "16 tasks (cgroup /a)" in finding.text


def test_no_udev_is_a_problem_only_where_nobody_else_makes_nodes(host: Host) -> None:
    assert _only(doctor_host.check_udev(host)).severity == PROBLEM
    _write(host, "proc/self/mountinfo", "22 1 0:5 / /dev rw - devtmpfs udev rw\n")
    assert _only(doctor_host.check_udev(host)).severity == NOTE
    _write(host, "run/udev/control")
    assert list(doctor_host.check_udev(host)) == []


def test_too_many_unprivileged_devices_are_a_warning(host: Host) -> None:
    _write(host, "sys/module/ublk_drv/parameters/ublks_max", "64\n")
    assert list(doctor_host.check_ublks_max(host, 63)) == []
    assert "ublks_max" in _only(doctor_host.check_ublks_max(host, 64)).text


# ---- the devices ----


def test_a_device_with_a_sound_server_is_no_finding(host: Host) -> None:
    _server(host)
    _stat(host, 72, 0, command="iou-wrk-71")  # the kernel's own
    assert list(doctor_devices.check_device(host, Known(INFO, STATE))) == []


def test_a_wrong_scheduler_is_a_warning_and_repaired(host: Host) -> None:
    _server(host)
    path = _write(host, "sys/block/ublkb3/queue/scheduler", "none [mq-deadline]\n")
    finding = _only(doctor_devices.check_device(host, Known(INFO, STATE)))
    assert finding.severity == WARNING
    assert doctor.repair([finding]) == [(finding, "")]
    assert path.read_text() == "none"
    _write(host, "sys/block/ublkb3/queue/scheduler", "none [mq-deadline]\n")
    assert list(doctor_devices.check_device(host, Known(INFO, None))) == []


def test_swap_whose_server_needs_memory_to_take_a_page_is_a_warning(host: Host) -> None:
    _server(host)
    _write(host, "proc/swaps", "Filename Type Size Used Priority\n/dev/ublkb3 partition 8 0 -2\n")
    finding = _only(doctor_devices.check_device(host, Known(INFO, STATE)))
    assert (finding.severity, "--direct_io" in finding.fix) == (WARNING, True)
    flags = uapi.UBLK_F_USER_COPY | uapi.UBLK_F_AUTO_BUF_REG
    zero_copy = dataclasses.replace(INFO, flags=flags)
    assert list(doctor_devices.check_device(host, Known(zero_copy, STATE))) == []


def test_a_server_without_its_protection_is_a_warning_each(host: Host) -> None:
    _server(host)
    _stat(host, 71, 0x00080000)
    _write(host, "proc/70/status", "VmLck:\t0 kB\n")
    path = _write(host, "proc/70/oom_score_adj", "0\n")
    host.path("proc/70/ns/mnt").unlink()
    host.path("proc/70/ns/mnt").symlink_to("mnt:[1]")
    found = list(doctor_devices.check_device(host, Known(INFO, STATE)))
    assert [finding.severity for finding in found] == [WARNING] * 4
    for word in ("mount namespace", "1 threads that are no IO_FLUSHER", "locked", "OOM"):
        assert any(word in finding.text for finding in found)
    assert len(doctor.repair(found)) == 1
    assert path.read_text() == "-1000"


def test_a_live_device_without_a_process_is_a_problem(host: Host) -> None:
    assert _only(doctor_devices.check_device(host, Known(INFO, STATE))).severity == PROBLEM


def test_a_device_that_waits_is_a_problem_for_recover(host: Host) -> None:
    waiting = dataclasses.replace(INFO, state=uapi.UBLK_S_DEV_QUIESCED)
    finding = _only(doctor_devices.check_device(host, Known(waiting, STATE)))
    assert (finding.severity, finding.fix) == (PROBLEM, "ublk recover -n 3")


def test_a_dead_device_is_deleted_unless_it_is_in_use(host: Host) -> None:
    dead = dataclasses.replace(INFO, state=uapi.UBLK_S_DEV_DEAD)
    finding = _only(doctor_devices.check_device(host, Known(dead, None)))
    assert (finding.severity, finding.fix) == (PROBLEM, "ublk del -n 3")
    assert finding.repair is not None
    host.path("proc/self/ns").mkdir(parents=True)
    host.path("proc/self/ns/mnt").symlink_to("mnt:[1]")
    _write(host, "proc/self/mountinfo", "30 1 259:7 / /mnt rw - ext4 /dev/ublkb3 rw\n")
    finding = _only(doctor_devices.check_device(host, Known(dead, None)))
    assert finding.repair is None
    assert "mounted on /mnt" in finding.text


def test_files_of_devices_that_are_gone_are_left_over_and_removed(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))
    stale = [_write(host, name) for name in ("3.json", "3.log", "3.json.70", "3.lazy")]
    kept = [_write(host, name) for name in ("4.log", "README", "daemon.sock")]
    rooted = dataclasses.replace(host, root=Path("/"))
    found = list(doctor_devices.check_state_folder(rooted, {4}))
    assert [finding.severity for finding in found] == [WARNING] * 4
    doctor.repair(found)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in kept)
    _write(host, "4.json", "{")
    finding = _only(doctor_devices.check_state_folder(rooted, {4}))
    assert (finding.severity, finding.repair) == (PROBLEM, None)


# ---- the command ----


def test_doctor_prints_problems_first_with_their_fixes_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        Finding(PROBLEM, "driver", "not loaded", "modprobe ublk_drv", lambda: None),
        Finding(NOTE, "udev", "not running", "nothing"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    result = CliRunner().invoke(cli.cli, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "problem  driver: not loaded",
        "         fix: modprobe ublk_drv",
        "note     udev: not running",
        "         fix: nothing",
        "1 problem, 0 warnings, 1 note; ublk doctor --fix repairs what it safely can",
    ]
    result = CliRunner().invoke(cli.cli, ["doctor", "--json"])
    assert [one["can_fix"] for one in json.loads(result.stdout)] == [True, False]
    monkeypatch.setattr(doctor, "examine", lambda: found[1:])
    assert CliRunner().invoke(cli.cli, ["doctor"]).exit_code == 0


def test_doctor_says_what_it_fixed_and_what_it_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such module")

    rounds = iter([[Finding(PROBLEM, "a", "broken", "mend", fail)], []])
    monkeypatch.setattr(doctor, "examine", lambda: next(rounds))
    result = CliRunner().invoke(cli.cli, ["doctor", "--fix"])
    assert result.exit_code == 0
    assert result.stderr == "ublk: could not fix (no such module): a: broken\n"


def test_examining_this_machine_works_whatever_it_is() -> None:
    for finding in doctor.examine():
        assert finding.text and finding.fix
        assert "\n" not in finding.text + finding.fix
