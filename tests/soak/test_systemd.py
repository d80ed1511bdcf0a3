"""The units of contrib/systemd under a real systemd, which is process 1 of a namespace of its own.

    tools/vm.py --vm -- python -m pytest -v tests/soak/test_systemd.py

It writes to /etc and takes over the control groups, so it runs in a guest of tools/vm.py only. The
machine that is tested has a device in ublk.toml and a mount of it in fstab; from outside the test
reaches its commands by nsenter and its files by /proc/PID/root.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from writers import SyncedWriter

from ublk_loop import manage
from ublk_loop.control import list_dev_ids

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("/etc/systemd/system")
CONFIG = Path("/etc/ublk/ublk.toml")
FOLDER = Path("/mnt")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # not what tests set for `ublk`
WATCHDOG_S = 5
BOOT_TIMEOUT_S = 240
TIMEOUT_S = 60
STATES = ["ublk.socket", "ublk.service", "ublk@0.service", "mnt.mount"]
pytestmark = [
    pytest.mark.skipif(not Path("/run/vm").is_dir(), reason="only in a guest of tools/vm.py"),
    pytest.mark.skipif(not SYSTEMD.exists(), reason="needs systemd"),
]


class Boot:
    """A booted systemd."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    @property
    def folder(self) -> Path:
        """What is mounted from the device."""
        return Path(f"/proc/{self._pid()}/root{FOLDER}")

    def run(self, *words: object) -> str:
        """Run a command in the machine, and return what it prints; nothing before it is up."""
        enter = ["nsenter", "-t", str(self._pid()), "-m", "-p"]
        command = [*enter, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=ENVIRONMENT
        )
        return done.stdout

    def states(self) -> list[str]:
        """The states of STATES."""
        return self.run("systemctl", "is-active", *STATES).split()

    def daemon_pid(self) -> int:
        """The daemon's pid; 0: none."""
        return int(self.run("systemctl", "show", "-p", "MainPID", "--value", "ublk.service"))

    def server_pid(self) -> int:
        """The pid of the device's server."""
        devices = json.loads(self.run("/usr/local/sbin/ublk", "list", "-n", 0, "--json"))
        return int(devices[0]["server_pid"])

    def _pid(self) -> int:
        return int(self._children.read_text() or 0)  # 0, which no command enters: not there yet


def _install(image: Path) -> None:
    for unit in (ROOT / "contrib/systemd").glob("*.s*"):
        shutil.copy(unit, UNITS)
    _write(
        UNITS / "ublk.service.d/test.conf",
        f"[Service]\nWatchdogSec={WATCHDOG_S}\nEnvironment=PYTHONPATH={ROOT}\n",
    )
    _write(
        UNITS / "test.target",
        "[Unit]\nRequires=basic.target\nWants=remote-fs.target ublk.service ublk@0.service\n",
    )
    # Of no use here; the last one empties /tmp, where the image is.
    for unit in ("timers.target", "systemd-timesyncd.service", "systemd-tmpfiles-setup.service"):
        (UNITS / unit).unlink(missing_ok=True)
        (UNITS / unit).symlink_to("/dev/null")
    command = shlex.join([sys.executable, "-m", "ublk_loop"])
    _write(Path("/usr/local/sbin/ublk"), f'#!/bin/sh\nexec {command} "$@"\n', 0o755)
    _write(CONFIG, f'[device.0]\ntype = "loop"\nfile = "{image}"\n', 0o600)
    options = "x-systemd.requires=ublk@0.service,_netdev"
    _write(Path("/etc/fstab"), f"/dev/ublkb0 {FOLDER} ext4 {options} 0 2\n")


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def image(backing_file: Callable[..., Path], run: Callable[..., str]) -> Path:
    """A file with an ext4."""
    path = backing_file(64 << 20)
    run("mkfs.ext4", "-q", path)
    return path


@pytest.fixture
def boot(image: Path, leaves_nothing: object) -> Iterator[Boot]:
    """systemd with the units, on its way."""
    _install(image)
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    words = [*command, SYSTEMD, "--unit=test.target"]
    with subprocess.Popen(words, env=ENVIRONMENT) as process:
        try:
            yield Boot(process)
        finally:
            process.kill()
            # Of a mount that died with its namespace the kernel may still wait for the device.
            for dev_id in list_dev_ids():
                manage.delete(dev_id, force=True)


@pytest.mark.deadline(BOOT_TIMEOUT_S + 8 * TIMEOUT_S)
def test_device_and_mount_of_the_configuration_outlive_every_end_of_the_daemon(
    boot: Boot, image: Path, run: Callable[..., str], wait_until: Callable[..., None]
) -> None:
    """ublk@.service required ublk.service: systemd deleted the device when the daemon crashed."""
    all_active = ["active"] * len(STATES)
    wait_until(lambda: boot.states() == all_active, timeout_s=BOOT_TIMEOUT_S)
    server_pid = boot.server_pid()
    attacks = {
        "crash": lambda pid: boot.run("kill", "-KILL", pid),
        "hang": lambda pid: boot.run("kill", "-STOP", pid),  # until the watchdog's time is over
        "restart": lambda _: boot.run("systemctl", "restart", "ublk.service"),
    }
    with SyncedWriter(boot.folder) as writer:
        for attack in attacks.values():
            pid, nr_written = boot.daemon_pid(), writer.nr_written
            attack(pid)
            wait_until(lambda pid=pid: boot.daemon_pid() not in (0, pid), timeout_s=TIMEOUT_S)  # type: ignore[misc]
            wait_until(lambda: boot.states() == all_active, timeout_s=TIMEOUT_S)
            wait_until(lambda n=nr_written: writer.goes_on(n), timeout_s=TIMEOUT_S)  # type: ignore[misc]
        boot.run("systemctl", "stop", "ublk.service")
        assert boot.states() == ["active", "inactive", "active", "active"]
        boot.run("/usr/local/sbin/ublk", "add", "-n", 1, "-t", "null")  # by the socket
        assert boot.states() == all_active
    assert writer.errors == []
    assert boot.server_pid() == server_pid
    assert boot.run("journalctl", "-q", "-b", "-t", "ublk-0", "-o", "cat")
    boot.run("systemctl", "poweroff")
    assert -boot.process.wait(2 * TIMEOUT_S) in (0, signal.SIGINT)  # as the kernel tells a reboot
    run("e2fsck", "-fn", image)
    assert "clean" in run("dumpe2fs", "-h", image)
