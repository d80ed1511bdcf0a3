"""A real udevd for a test, with rules of the test's beside those of the package."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ublk_loop import uapi

RULES_DIR = Path("/run/udev/rules.d")
TIMEOUT_S = 60.0
# What later versions of the package do with every ublk disk, and Debian 12's with other disks only:
# probe it when it comes, and again whenever somebody has closed it after writing.
PROBE_RULES = """
SUBSYSTEM!="block", GOTO="end"
KERNEL!="ublkb*", GOTO="end"
ACTION=="remove", GOTO="end"
OPTIONS+="watch"
IMPORT{builtin}="blkid"
ENV{ID_FS_UUID_ENC}=="?*", SYMLINK+="disk/by-uuid/$env{ID_FS_UUID_ENC}"
LABEL="end"
"""


@contextlib.contextmanager
def running_udev(name: str, rules: str) -> Iterator[None]:
    """Run udevd with ``rules`` in a file of this name; it has handled all events at the end."""
    RULES_DIR.mkdir(parents=True, exist_ok=True)
    installed = RULES_DIR / name
    installed.write_text(rules)
    control_mode = os.stat(uapi.CONTROL_PATH).st_mode & 0o777
    process = subprocess.Popen(["/lib/systemd/systemd-udevd"])
    try:
        _wait_for_ping()
        _udevadm("trigger", "--settle", "/sys/class/misc/ublk-control")
        yield
        _udevadm("settle", f"--timeout={TIMEOUT_S:.0f}")
    finally:
        process.terminate()  # as `udevadm control --exit`, which it may take for somebody else's
        process.wait(2 * TIMEOUT_S)
        installed.unlink()
        Path("/run/udev/control").unlink(missing_ok=True)
        os.chmod(uapi.CONTROL_PATH, control_mode)


def _udevadm(*words: str) -> None:
    subprocess.run(["udevadm", *words], check=True, capture_output=True, timeout=2 * TIMEOUT_S)


def _wait_for_ping() -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while subprocess.run(["udevadm", "control", "--ping"], capture_output=True).returncode:
        assert time.monotonic() < deadline, "udevd does not answer"
        time.sleep(0.05)
