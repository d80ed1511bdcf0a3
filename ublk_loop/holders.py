"""Who uses a block device: mounts, swap, devices stacked on it, processes that have it open.

In: a dev_id. Out: one Holder each, which reads as a sentence. All comes from /proc and /sys. What
can wait for a stuck process or file system (mappings, files on it) is read on a thread that is
given up at a deadline. Runs in the CLI. It never changes anything, and leaves out what a plain user
may not see.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEEP_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Holder:
    """One user of a device. ``kind``: mount, swap, device, open, map or file.

    :param where: the mount point, the device on top, or the node or file that is open.
    :param pid: of the process; of a mount, 0 for our own namespace, else somebody in the other.
    """

    kind: str
    where: str
    pid: int = 0
    command: str = ""

    def __str__(self) -> str:
        process = f"pid {self.pid} ({self.command})"
        elsewhere = f", in the mount namespace of {process}" if self.pid else ""
        return {
            "mount": f"mounted on {self.where}{elsewhere}",
            "swap": f"{self.where} is in use as swap",
            "device": f"held by {self.where}",
            "open": f"{self.where} is open in {process}",
            "map": f"{self.where} is mapped by {process}",
            "file": f"{self.where}, a file on it, is in use by {process}",
        }[self.kind]


def find(dev_id: int, *, proc: str = "/proc", sysfs: str = "/sys") -> list[Holder]:
    """Return who uses ``/dev/ublkbN`` or a partition of it, besides this process."""
    scan = _Scan(dev_id, Path(proc), Path(sysfs))
    found = [*scan.mounts(), *scan.swaps(), *scan.devices(), *scan.openers()]
    found += _within(DEEP_TIMEOUT_S, scan.mappings)
    if not found:
        # A file system that was unmounted lazily is held by whoever is still in it.
        found += _within(DEEP_TIMEOUT_S, scan.files)
    return list(dict.fromkeys(found))


def _within(timeout_s: float, look: Callable[[], Iterator[Holder]]) -> list[Holder]:
    found: list[Holder] = []

    def collect() -> None:
        for holder in look():
            found.append(holder)

    thread = threading.Thread(target=collect, name="ublk-holders", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[:]


class _Scan:
    """One look at /proc and /sys for one device and its partitions."""

    def __init__(self, dev_id: int, proc: Path, sysfs: Path) -> None:
        self._proc = proc
        self._block = sysfs / "block"
        disk = self._block / f"ublkb{dev_id}"
        self._disks = [disk, *disk.glob(f"ublkb{dev_id}p*")]
        self._numbers = {_text(path / "dev") for path in self._disks} - {""}
        self._node = re.compile(rf"/(?:.*/)?ublkb{dev_id}(?:p\d+)?(?: \(deleted\))?")

    def mounts(self) -> Iterator[Holder]:
        """Mounts in any namespace, each mount point once, our own namespace first."""
        namespaces, points = set(), set()
        for name in ("self", *map(str, self._pids())):
            namespace = _link(self._proc / name / "ns/mnt")
            if not namespace or namespace in namespaces:
                continue
            namespaces.add(namespace)
            for point in self._mount_points(name):
                if point not in points:
                    points.add(point)
                    pid = 0 if name == "self" else int(name)
                    yield Holder("mount", point, pid, self._command(pid) if pid else "")

    def _mount_points(self, name: str) -> Iterator[str]:
        for line in _text(self._proc / name / "mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            fields, source = left.split(), right.split()[1:2]
            # btrfs has a number of its own, but names its device.
            if fields[2] in self._numbers or (source and self._is_node(unescape(source[0]))):
                yield unescape(fields[4])

    def swaps(self) -> Iterator[Holder]:
        """Swap on the device itself."""
        for line in _text(self._proc / "swaps").splitlines()[1:]:
            path = unescape(line.split()[0])
            if self._is_node(path):
                yield Holder("swap", path)

    def devices(self) -> Iterator[Holder]:
        """Devices on top: device mapper, md, bcache, and loop, which holds it as a file."""
        for disk in self._disks:
            for path in _listed(disk / "holders"):
                label = _text(self._block / path.name / "dm/name")
                yield Holder("device", f"{path.name} ({label})" if label else path.name)
        for path in _listed(self._block):
            if self._is_node(_text(path / "loop/backing_file")):
                yield Holder("device", path.name)

    def openers(self) -> Iterator[Holder]:
        """Processes with a descriptor of the node."""
        for pid in self._pids():
            for fd in _listed(self._proc / str(pid) / "fd"):
                path = _link(fd)
                if self._is_node(path):
                    yield Holder("open", path, pid, self._command(pid))

    def mappings(self) -> Iterator[Holder]:
        """Processes that have the node mapped, and perhaps closed."""
        for pid in self._pids():
            text = _text(self._proc / str(pid) / "maps")
            for line in text.splitlines() if "/ublkb" in text else ():
                path = line.split(maxsplit=5)[-1]
                if self._is_node(path):
                    yield Holder("map", path, pid, self._command(pid))

    def files(self) -> Iterator[Holder]:
        """Processes with a file or folder of a file system on the device."""
        for pid in self._pids():
            folder = self._proc / str(pid)
            for path in (folder / "cwd", folder / "root", folder / "exe", *_listed(folder / "fd")):
                with contextlib.suppress(OSError):
                    device = path.stat().st_dev
                    if f"{os.major(device)}:{os.minor(device)}" in self._numbers:
                        yield Holder("file", _link(path), pid, self._command(pid))

    def _pids(self) -> list[int]:
        names = (path.name for path in _listed(self._proc))
        return sorted(int(name) for name in names if name.isdigit() and int(name) != os.getpid())

    def _command(self, pid: int) -> str:
        # A server of ublk is no program that its user knows; its device is.
        for fd in _listed(self._proc / str(pid) / "fd"):
            if served := re.fullmatch(r"/dev/ublkc(\d+)", _link(fd)):
                return f"server of ublkb{served[1]}"
        return _text(self._proc / str(pid) / "comm")

    def _is_node(self, path: str) -> bool:
        return self._node.fullmatch(path) is not None


def unescape(field: str) -> str:
    """Return a field of mountinfo or swaps, which write blanks and backslash as ``\\ooo``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


__all__ = ["Holder", "find"]
