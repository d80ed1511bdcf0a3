"""What is compared: how its device comes and goes, and how it turned out to be set up.

A subject is a word of the command line: ``raw``, ``loop``, ``loop-direct``, ``ublk`` and ``kublk``
with options after a colon, or ``NAME=ADD COMMAND;DELETE COMMAND``. Settings are read back from
sysfs and from the driver, never assumed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CompareError, run

UBLK = [sys.executable, "-m", "ublk_loop"]
SCHEDULER_S = 5.0
DEPTH = 128  # of every ublk device: ours and the peers'
WORKQUEUE_MASK = Path("/sys/devices/virtual/workqueue/cpumask")
QUEUE_SETTINGS = (
    "scheduler",
    "nr_requests",
    "logical_block_size",
    "max_sectors_kb",
    "write_cache",
    "rotational",
    "wbt_lat_usec",
    "dma_alignment",
)


@dataclass
class Served:
    """A subject's device while it exists."""

    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    server_pid: int = 0


@dataclass(frozen=True)
class Subject:
    """Something to compare. ``add`` and ``delete`` take {file}, {queues}, {node}, {id}."""

    name: str
    add: str = ""
    delete: str = ""

    @contextlib.contextmanager
    def serve(self, backing_file: Path, queues: int = 1, pin: str = "") -> Iterator[Served]:
        """Add the device, set its scheduler to none, pin its server if so asked; delete it."""
        if self.name == "raw":
            yield Served(str(backing_file))
            return
        prefix = ["taskset", "-c", "0"] if pin else []
        words = shlex.split(self.add.format(file=backing_file, queues=queues))
        node = node_of(run(*prefix, *words))
        try:
            _set_scheduler(node)
            served = Served(node, read_settings(node))
            _describe_ublk(served)
            if pin and served.server_pid:
                _pin(served.server_pid)
            yield served
        finally:
            words = shlex.split(self.delete.format(node=node, id=_dev_id(node)))
            run(*words)


def parse_subject(text: str, kublk: Path | None = None) -> Subject:
    """Return the subject that a word of the command line names.

    :raises ValueError: if it names none, or kublk is not there.
    """
    kind, _, options = text.partition(":")
    if text == "raw":
        return Subject("raw")
    if text in ("loop", "loop-direct"):
        direct = "on" if text == "loop-direct" else "off"
        add = f"losetup -f --show --direct-io={direct} {{file}}"
        return Subject(text, add, "losetup -d {node}")
    if kind == "ublk":
        ublk = shlex.join(UBLK)
        target = "" if "-t " in options else "-t loop -f {file}"
        queues = "" if "-q " in options else "-q {queues}"
        return Subject(
            text, f"{ublk} add {target} {queues} {options} --json", f"{ublk} del -n {{id}}"
        )
    if kind == "kublk":
        if kublk is None:
            raise ValueError(f"subject {text!r} needs --kublk PATH (tools/build_kublk.py makes it)")
        target, file = ("", "") if "-t " in options else ("-t loop", "{file}")
        add = f"{kublk} add {target} -q {{queues}} -d {DEPTH} {options} {file}"
        return Subject(text, add, f"{kublk} del -n {{id}}")
    name, equals, commands = text.partition("=")
    add, semicolon, delete = commands.partition(";")
    if not (equals and semicolon):
        raise ValueError(f"subject {text!r} is not known; see --help")
    return Subject(name, add.strip(), delete.strip())


def node_of(output: str) -> str:
    """Return the block device that an add command's output names.

    JSON as of ``ublk add --json``, ``dev id N`` as ublksrv and kublk print it, or the last word.
    """
    if output.lstrip().startswith("{"):
        return str(json.loads(output)["block_device"])
    match = re.search(r"dev id (\d+)", output)
    if match:
        return f"/dev/ublkb{match[1]}"
    words = output.split()
    if not words or not words[-1].startswith("/dev/"):
        raise CompareError(f"no block device in the output of the add command: {output.strip()!r}")
    return words[-1]


def read_settings(node: str) -> dict[str, Any]:
    """Return what sysfs says of a block device."""
    sysfs = _sysfs(node)
    found: dict[str, Any] = {}
    for name in QUEUE_SETTINGS:
        with contextlib.suppress(OSError):
            found[name] = (sysfs / "queue" / name).read_text().strip()
    chosen = re.search(r"\[(\S+)\]", found.get("scheduler", ""))
    if chosen:
        found["scheduler"] = chosen[1]
    with contextlib.suppress(OSError):
        found["nr_hw_queues"] = len(os.listdir(sysfs / "mq"))
    with contextlib.suppress(OSError):
        found["loop_dio"] = (sysfs / "loop/dio").read_text().strip()
    return found


@contextlib.contextmanager
def workqueues_on_one_cpu() -> Iterator[None]:
    """Bind the kernel's unbound workqueues, on which /dev/loop works, to CPU 0."""
    before = WORKQUEUE_MASK.read_text().strip()
    WORKQUEUE_MASK.write_text("1")
    try:
        yield
    finally:
        WORKQUEUE_MASK.write_text(before)


@contextlib.contextmanager
def daemon_of_its_own() -> Iterator[None]:
    """Have servers forked by a daemon that the block's first `ublk add` starts, pinned as that is.

    A daemon that runs is stopped, which no device notices; the next add starts another.
    """
    try:
        _stop_daemon()
        yield
    finally:
        _stop_daemon()


def _stop_daemon() -> None:
    with contextlib.suppress(CompareError):  # none runs
        run(*UBLK, "daemon", "--stop")


def _set_scheduler(node: str) -> None:
    # loop gets none by itself, a one-queue ublk device mq-deadline: like with like. A server of
    # ours that the daemon started gets it from a process that may be at it just now; the kernel
    # refuses a write beside another (v7.3: EBUSY), and then theirs has done it.
    path = _sysfs(node) / "queue/scheduler"
    deadline = time.monotonic() + SCHEDULER_S
    while "[none]" not in path.read_text():
        try:
            path.write_text("none")
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise CompareError(f"{path}: {error.strerror}") from error
            time.sleep(0.01)


def _sysfs(node: str) -> Path:
    return Path("/sys/block") / Path(node).name


def _dev_id(node: str) -> str:
    return node.removeprefix("/dev/ublkb")


def _describe_ublk(served: Served) -> None:
    # The driver's word on a ublk device, whoever serves it; of ours also policy and data mode.
    if not served.path.startswith("/dev/ublkb"):
        return
    listed = json.loads(run(*UBLK, "list", "-n", _dev_id(served.path), "--json"))
    document = listed[0] if isinstance(listed, list) else listed
    served.server_pid = int(document["server_pid"])
    skipped = ("dev_id", "state", "block_device", "char_device", "char_dev", "block_dev")
    served.settings["ublk"] = {key: document[key] for key in document if key not in skipped}


def _pin(pid: int) -> None:
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(tid), {0})
