"""What ``ublk doctor`` checks of the machine: driver, io_uring, liburing, rights, limits, udev.

In: a Host. Out: Findings. Every check reads files only, but for the driver's features, which are
asked of the driver. Runs in the CLI. It changes nothing; a Finding's repair may.
"""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Callable, Iterator

from . import sandbox, uapi
from .errors import UblkLoopError
from .finding import NOTE, PROBLEM, WARNING, Finding, Host
from .listing import FEATURES

MIN_LIBURING = (2, 3)
MIN_MEMORY_BYTES = 128 << 20
MIN_NR_PIDS = 128
COMMAND_TIMEOUT_S = 30
_CAPABILITIES = {
    14: ("CAP_IPC_LOCK", "servers cannot lock their memory: reclaim may wait for itself"),
    21: ("CAP_SYS_ADMIN", "the driver refuses every command but for unprivileged devices"),
    23: ("CAP_SYS_NICE", "workers run without their priority of -20"),
    24: ("CAP_SYS_RESOURCE", "servers are no IO_FLUSHER and can be chosen by the OOM killer"),
}
# What is lost without a feature that newer drivers have.
_USEFUL = {
    uapi.UBLK_F_USER_RECOVERY: "no device survives its server",
    uapi.UBLK_F_USER_RECOVERY_FAIL_IO: "no add -e",
    uapi.UBLK_F_UPDATE_SIZE: "a device keeps its size",
    uapi.UBLK_F_QUIESCE: "a server cannot be replaced while it serves",
    uapi.UBLK_F_BATCH_IO: "a command for each request, which is slower",
    uapi.UBLK_F_SAFE_STOP_DEV: "who opens a device just as it is deleted may see it stop",
}

# Nothing tells a driver that has been mended (docs/reliability.md).
_BATCH_FAULT = (
    "BATCH_IO: when a server is killed, drivers up to Linux 7.3 may write numbers of requests to"
    " its buffers' address in another process; servers keep those where nothing else is mapped"
)


def check_driver(host: Host) -> Iterator[Finding]:
    """The driver is there, and its control device can be opened."""
    if host.path("dev/ublk-control").exists():
        return
    where = f"Linux {host.release}"
    if host.path("sys/module/ublk_drv").exists():
        fix = "mount devtmpfs on /dev; in a container: pass the device /dev/ublk-control in"
        yield Finding(PROBLEM, "driver", "the driver is loaded, but /dev/ublk-control is not", fix)
    elif _module_is_installed(host):
        fix = "modprobe ublk_drv; at each boot: echo ublk_drv >/etc/modules-load.d/ublk.conf"
        text = f"the driver of {where}, module ublk_drv, is not loaded"
        yield Finding(PROBLEM, "driver", text, fix, lambda: _run("modprobe", "ublk_drv"))
    elif is_container(host):
        fix = "on the host: modprobe ublk_drv; then pass the device /dev/ublk-control in"
        yield Finding(PROBLEM, "driver", "this container has no /dev/ublk-control", fix)
    else:
        text = f"{where} has no ublk driver (CONFIG_BLK_DEV_UBLK)"
        yield Finding(PROBLEM, "driver", text, _kernel_advice(host))


def check_features(host: Host, ask: Callable[[], int]) -> Iterator[Finding]:
    """The driver answers, and what it lacks of what newer ones have."""
    if not host.path("dev/ublk-control").exists():
        return
    try:
        features = ask()
    except UblkLoopError as error:
        yield Finding(PROBLEM, "driver", str(error.strerror), error.hint or "run as root")
        return
    if not features:
        text = f"the driver of Linux {host.release} is too old: it does not tell its features"
        yield Finding(PROBLEM, "driver", text, _kernel_advice(host))
        return
    lacking = [f"{FEATURES[bit]}: {loss}" for bit, loss in _USEFUL.items() if not features & bit]
    if lacking:
        yield Finding(NOTE, "driver", f"it lacks {'; '.join(lacking)}", "a newer kernel has it")
    if features & uapi.UBLK_F_BATCH_IO:
        yield Finding(NOTE, "driver", _BATCH_FAULT, "none needed; ublk add --no_batch does without")


def check_io_uring(host: Host) -> Iterator[Finding]:
    """io_uring is not switched off."""
    setting = host.text("proc/sys/kernel/io_uring_disabled")
    if setting == "2" or (setting == "1" and not host.is_root):
        fix = "sysctl kernel.io_uring_disabled=0"
        text = f"io_uring is switched off (kernel.io_uring_disabled={setting})"
        yield Finding(PROBLEM, "io_uring", text, fix)


def check_liburing(host: Host) -> Iterator[Finding]:
    """The compiled module loads, with a liburing that is new enough."""
    try:
        from . import _uring  # noqa: F401
    except ImportError as error:
        fix = "apt-get install liburing2, or build the package anew"
        yield Finding(PROBLEM, "liburing", f"the compiled module does not load: {error}", fix)
        return
    match = re.search(r"/liburing\.so\.(\d+)\.(\d+)", host.text("proc/self/maps"))
    if match and (int(match[1]), int(match[2])) < MIN_LIBURING:
        text = f"liburing {match[1]}.{match[2]} is older than the 2.3 that is tested"
        yield Finding(WARNING, "liburing", text, "upgrade the package liburing2")


def check_rights(host: Host) -> Iterator[Finding]:
    """We have the capabilities that a server uses, or say what goes without."""
    if not host.is_root:
        text = "not root: devices, processes and mounts of others are not seen"
        yield Finding(NOTE, "rights", text, "sudo ublk doctor")
        return
    effective = int(host.status("self", "CapEff") or "0", 16)
    for bit, (name, loss) in _CAPABILITIES.items():
        if not effective >> bit & 1:
            yield Finding(WARNING, "rights", f"without {name} {loss}", f"grant {name}")


def check_sandbox() -> Iterator[Finding]:
    """A server can give up what it does not need."""
    if not sandbox.has_landlock():
        text = "the kernel has no Landlock: a server that was taken over can open other files"
        fix = "boot with Landlock in the list of the kernel's parameter lsm="
        yield Finding(WARNING, "sandbox", text, fix)
    try:
        sandbox.load_libseccomp()
    except OSError:
        text = "no libseccomp.so.2: a server that was taken over can make any system call"
        yield Finding(WARNING, "sandbox", text, "apt-get install libseccomp2, or its like")


def check_memlock(host: Host) -> Iterator[Finding]:
    """A server may lock its memory."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if not host.is_root and limit != resource.RLIM_INFINITY:
        text = f"RLIMIT_MEMLOCK is {limit >> 10} KiB: servers of yours cannot lock their memory"
        yield Finding(NOTE, "limits", text, "ulimit -l unlimited, or limits.conf(5)")


def check_cgroup(host: Host) -> Iterator[Finding]:
    """The cgroup that servers start in leaves them room."""
    yield from cgroup_limits(host, "self", "servers started here")


def cgroup_limits(host: Host, pid: int | str, who: str) -> Iterator[Finding]:
    """Return what is narrow in the cgroup (v2) of a process, or in one above it."""
    own = re.search(r"^0::(/.*)$", host.text(f"proc/{pid}/cgroup"), re.MULTILINE)
    folder = own[1].strip("/") if own else ""
    while folder:
        base = f"sys/fs/cgroup/{folder}"
        for name, lowest, unit in (
            ("memory.max", MIN_MEMORY_BYTES, "bytes of memory"),
            ("pids.max", MIN_NR_PIDS, "tasks"),
        ):
            value = host.text(f"{base}/{name}")
            if value.isdigit() and int(value) < lowest:
                text = f"{who} are limited to {value} {unit} (cgroup /{folder})"
                yield Finding(WARNING, "limits", text, f"raise {name}; {lowest} is enough")
        folder = folder.rpartition("/")[0]


def check_udev(host: Host) -> Iterator[Finding]:
    """Somebody makes device nodes."""
    lines = host.text("proc/self/mountinfo").splitlines()
    has_devtmpfs = any(" /dev " in line and " - devtmpfs " in line for line in lines)
    if host.path("run/udev/control").exists():
        return
    if has_devtmpfs:
        text = "udev is not running: no links in /dev/disk, no rules for unprivileged devices"
        yield Finding(NOTE, "udev", text, "nothing to do, unless you need them")
    else:
        where = "in a container: bind-mount the host's /dev" if is_container(host) else "start udev"
        text = "/dev is no devtmpfs and udev is not running: new devices get no nodes"
        yield Finding(PROBLEM, "udev", text, where)


def check_ublks_max(host: Host, nr_unprivileged: int) -> Iterator[Finding]:
    """There is room for another unprivileged device."""
    limit = host.text("sys/module/ublk_drv/parameters/ublks_max")
    if limit.isdigit() and nr_unprivileged >= int(limit):
        fix = f"echo {2 * int(limit)} >/sys/module/ublk_drv/parameters/ublks_max"
        text = f"{nr_unprivileged} unprivileged devices, as many as ublks_max allows"
        yield Finding(WARNING, "driver", text, fix)


def is_container(host: Host) -> bool:
    """Whether this looks like a container."""
    marks = ("run/.containerenv", ".dockerenv", "run/systemd/container")
    return any(host.path(mark).exists() for mark in marks)


def _module_is_installed(host: Host) -> bool:
    folder = f"lib/modules/{host.release}"
    listed = host.text(f"{folder}/modules.dep") + host.text(f"{folder}/modules.builtin")
    return "/ublk_drv.ko" in listed


def _kernel_advice(host: Host) -> str:
    system = dict(
        line.split("=", 1) for line in host.text("etc/os-release").splitlines() if "=" in line
    )
    if system.get("ID") == "debian" and system.get("VERSION_ID", "").strip('"') == "12":
        return (
            "boot a newer kernel: enable bookworm-backports,"
            " apt-get install -t bookworm-backports linux-image-amd64, reboot"
        )
    return (
        "boot a kernel with CONFIG_BLK_DEV_UBLK, Linux 6.4 or newer (Debian 13 has it; some"
        f" distributions keep it in a package of extra modules for {host.release})"
    )


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{words[0]} failed")


__all__ = [
    "cgroup_limits",
    "check_cgroup",
    "check_driver",
    "check_features",
    "check_io_uring",
    "check_liburing",
    "check_memlock",
    "check_rights",
    "check_sandbox",
    "check_ublks_max",
    "check_udev",
    "is_container",
]
