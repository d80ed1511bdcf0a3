"""What ``ublk doctor`` checks of the devices: their servers, their settings, and what is left over.

In: a Host, and what the driver and the state files say of each device. Out: Findings. Runs in the
CLI. It changes nothing; a Finding's repair may, where nobody can lose by it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import holders, state, uapi
from .doctor_host import cgroup_limits
from .errors import DaemonError
from .finding import PROBLEM, WARNING, Finding, Host

if TYPE_CHECKING:
    from .control import DevInfo
    from .state import DeviceState

# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, which PR_SET_IO_FLUSHER sets: include/linux/sched.h.
IO_FLUSHER_FLAGS = 0x00080000 | 0x00100000
_LEFT_OVER = re.compile(r"(\d+)\.(?:json|log|lazy|json\.\d+)")


@dataclass(frozen=True)
class Known:
    """One device: what the driver says, and our state of it, or None."""

    info: DevInfo
    state: DeviceState | None


def check_device(host: Host, known: Known) -> Iterator[Finding]:
    """A device has a live server; if it is one of ours, with all that keeps it safe."""
    if known.info.state != uapi.UBLK_S_DEV_LIVE:
        yield from _check_dead(host, known.info)
        return
    yield from _check_scheduler(host, known)
    if known.state is not None:
        yield from _check_swap(host, known.info)
        yield from _check_server(host, known.info)


def _check_dead(host: Host, info: DevInfo) -> Iterator[Finding]:
    dev_id = info.dev_id
    if info.state in (uapi.UBLK_S_DEV_QUIESCED, uapi.UBLK_S_DEV_FAIL_IO):
        text = f"dev {dev_id} waits for a server ({info.state_name}): its own is gone"
        yield Finding(PROBLEM, "devices", text, f"ublk recover -n {dev_id}")
        return
    users = holders.find(dev_id, proc=str(host.path("proc")), sysfs=str(host.path("sys")))
    if users:
        text = f"dev {dev_id} is dead (its server is gone), and {users[0]}"
        yield Finding(PROBLEM, "devices", text, f"unmount or close it, then ublk del -n {dev_id}")
        return

    def delete() -> None:
        from . import manage

        manage.delete(dev_id)

    text = f"dev {dev_id} is dead: its server is gone, or it was never started"
    yield Finding(PROBLEM, "devices", text, f"ublk del -n {dev_id}", delete)


def _check_scheduler(host: Host, known: Known) -> Iterator[Finding]:
    dev_id = known.info.dev_id
    path = host.path(f"sys/block/ublkb{dev_id}/queue/scheduler")
    found = re.search(r"\[(\S+)\]", host.text(str(path.relative_to(host.root))))
    if known.state is not None and found and found[1] != "none":
        text = f"dev {dev_id} has the scheduler {found[1]}, which costs most of its speed"
        repair = lambda: _write(path, "none")  # noqa: E731
        yield Finding(WARNING, "devices", text, f"echo none >{path}", repair)


def _check_swap(host: Host, info: DevInfo) -> Iterator[Finding]:
    # With zero copy the disk below takes the client's own pages.
    swaps = [line.split()[0] for line in host.text("proc/swaps").splitlines()[1:] if line.strip()]
    if f"/dev/ublkb{info.dev_id}" in swaps and state.data_mode(info.flags) != "zerocopy":
        text = (
            f"dev {info.dev_id} is swap, and its server needs memory for each page that it writes:"
            " when the machine has none left, it hangs"
        )
        fix = "swapoff, and add it again with --direct_io and a file on ext4, xfs or a disk"
        yield Finding(WARNING, "devices", text, fix)


def _check_server(host: Host, info: DevInfo) -> Iterator[Finding]:
    dev_id, pid = info.dev_id, info.ublksrv_pid
    server = f"the server of dev {dev_id} (pid {pid})"
    again = f"ublk del -n {dev_id}, and add it again as root"
    if not host.path(f"proc/{pid}").exists():
        fix = "look again in a moment; if it stays so, ublk del --force"
        yield Finding(PROBLEM, "servers", f"{server} is gone, but the device is not", fix)
        return
    if host.link(f"proc/{pid}/ns/mnt") == host.link("proc/self/ns/mnt") != "":
        text = f"{server} shares the mount namespace of those who mount it: it may hang at its end"
        yield Finding(WARNING, "servers", text, again)
    bare = [tid for tid in host.names(f"proc/{pid}/task") if not _is_io_flusher(host, pid, tid)]
    if bare:
        text = f"{server} has {len(bare)} threads that are no IO_FLUSHER: reclaim may wait for them"
        yield Finding(WARNING, "servers", text, again)
    if host.status(pid, "VmLck") in ("", "0 kB"):
        text = f"{server} has not locked its memory: it may be swapped out to its own device"
        yield Finding(WARNING, "servers", text, again)
    oom = host.path(f"proc/{pid}/oom_score_adj")
    if host.text(f"proc/{pid}/oom_score_adj") not in ("-1000", ""):
        text = f"{server} can be chosen by the OOM killer"
        yield Finding(WARNING, "servers", text, f"echo -1000 >{oom}", lambda: _write(oom, "-1000"))
    yield from cgroup_limits(host, pid, f"{server} and what runs beside it")


def _is_io_flusher(host: Host, pid: int, tid: str) -> bool:
    text = host.text(f"proc/{pid}/task/{tid}/stat")
    command, _, rest = text.rpartition(") ")
    # A kernel thread of io_uring's, or one that has just ended, needs no mark.
    if not rest or "(iou-" in command:
        return True
    return int(rest.split()[6]) & IO_FLUSHER_FLAGS == IO_FLUSHER_FLAGS


def check_state_folder(host: Host, dev_ids: Collection[int]) -> Iterator[Finding]:
    """The state folder holds what belongs to a device, and that can be read."""
    folder = host.path(state.state_dir())
    for name in host.names(state.state_dir()):
        path = folder / name
        match = _LEFT_OVER.fullmatch(name)
        if match is None:
            continue
        dev_id = int(match[1])
        if dev_id not in dev_ids:
            text = f"{path} is left over: there is no dev {dev_id}"
            yield Finding(WARNING, "state", text, f"rm {path}", path.unlink)
        elif name.endswith(".json"):
            yield from _check_state_file(path, dev_id)


def _check_state_file(path: Path, dev_id: int) -> Iterator[Finding]:
    try:
        state.read(dev_id)
    except DaemonError as error:
        text = f"{path} cannot be used: {error.hint or error.strerror}"
        fix = f"ublk recover cannot serve dev {dev_id} again: copy your data, delete it, add it"
        yield Finding(PROBLEM, "state", text, fix)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


__all__ = ["IO_FLUSHER_FLAGS", "Known", "check_device", "check_state_folder"]
