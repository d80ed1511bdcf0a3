"""One fio job: its command line, its run, and what is kept of its report.

In: a path to run on. Out: a Sample. Never decides how often or in which order.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CompareError, run

FIO_GRACE_S = 120.0
LOAD_S = 600.0  # longer than any run
IDLE_S = 2.0  # how long a device is left alone before and while its wake-ups are counted
PERCENTILES = ("50", "90", "99", "99.9")
IDLE = "idle"


@dataclass(frozen=True)
class Job:
    """One fio job, or the wake-ups of an idle server (``rw`` is ``idle``).

    :param batch: requests that fio submits and reaps at a time.
    :param queues: hardware queues of the device, where the subject can choose.
    :param pin: ``server``: fio and the server's threads on CPU 0; ``all``: the kernel's unbound
        workqueues too, on which /dev/loop works.
    :param beside: meanwhile so many requests of the same kind are in flight on a second device of
        the same subject.
    """

    rw: str
    bs: str = "4k"
    iodepth: int = 64
    numjobs: int = 1
    batch: int = 1
    queues: int = 1
    pin: str = ""
    beside: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [IDLE] if self.rw == IDLE else [self.rw, self.bs, f"qd{self.iodepth}"]
        parts += [f"{self.numjobs} jobs"] if self.numjobs > 1 else []
        parts += [f"{self.queues} queues"] if self.queues > 1 else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [f"beside qd{self.beside}"] if self.beside else []
        parts += {"": [], "all": ["one CPU"], "server": ["one CPU, kworkers free"]}[self.pin]
        return " ".join(parts)

    def command(self, path: str, nr_bytes: int, seconds: float, ramp_s: float = 0) -> list[str]:
        """Return the fio command line; ``path`` is used up to ``nr_bytes``.

        :param ramp_s: how long to run before it counts.
        """
        pinned = ["taskset", "-c", "0"] if self.pin else []
        return [
            *pinned,
            "fio",
            "--name=compare",
            f"--filename={path}",
            f"--rw={self.rw}",
            f"--bs={self.bs}",
            f"--size={nr_bytes}",
            f"--iodepth={self.iodepth}",
            f"--numjobs={self.numjobs}",
            f"--iodepth_batch_submit={self.batch}",
            "--iodepth_batch_complete_min=1",
            f"--iodepth_batch_complete_max={self.batch}",
            f"--runtime={seconds * 1000:.0f}ms",  # of seconds it takes whole ones
            *([f"--ramp_time={ramp_s * 1000:.0f}ms"] if ramp_s else []),
            "--ioengine=libaio",
            "--direct=1",
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--group_reporting",
            f"--percentile_list={':'.join(PERCENTILES)}",
            "--output-format=json",
        ]


@dataclass
class Sample:
    """What one run gave. ``wakeups`` is the only figure of an idle one, a second."""

    iops: float = 0.0
    bandwidth: float = 0.0  # bytes a second
    latency_us: dict[str, float] = field(default_factory=dict)  # by percentile
    wakeups: float | None = None


def parse_job(text: str) -> Job:
    """Parse ``RW:BS:DEPTH[:JOBS[:BATCH]]``. :raises ValueError: if it is none."""
    rw, bs, depth, *rest = text.split(":")
    if len(rest) > 2:
        raise ValueError("too many parts")
    jobs, batch = [*(int(word) for word in rest), 1, 1][:2]
    return Job(rw, bs, int(depth), jobs, batch)


def parse_report(output: str, rw: str) -> Sample:
    """Return the sample in fio's JSON output.

    :raises CompareError: if fio met an error.
    """
    report = json.loads(output[output.index("{") :])["jobs"][0]
    if report["error"]:
        raise CompareError(f"fio met error {report['error']}")
    way = report["read" if "read" in rw else "write"]
    found: dict[str, Any] = way["clat_ns"].get("percentile", {})
    latency = {f"{float(key):g}": value / 1000 for key, value in found.items()}
    return Sample(way["iops"], way["bw_bytes"], latency)


def run_fio(job: Job, path: str, nr_bytes: int, seconds: float, ramp_s: float = 0) -> Sample:
    """Run fio once."""
    command = job.command(path, nr_bytes, seconds, ramp_s)
    output = run(*command, timeout_s=seconds + FIO_GRACE_S)
    return parse_report(output, job.rw)


@contextlib.contextmanager
def load(job: Job, path: str, nr_bytes: int) -> Iterator[None]:
    """Keep ``job.beside`` requests in flight on ``path`` meanwhile."""
    other = replace(job, iodepth=job.beside, beside=0)
    command = other.command(path, nr_bytes, LOAD_S)
    before = _nr_ios(path)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as fio:
        try:
            deadline = time.monotonic() + FIO_GRACE_S
            while _nr_ios(path) < before + 2 * job.beside:
                if fio.poll() is not None or time.monotonic() > deadline:
                    raise CompareError(f"fio does not run: {shlex.join(command)}")
                time.sleep(0.02)
            yield
        finally:
            fio.terminate()


def _nr_ios(path: str) -> int:
    fields = Path(f"/sys/block/{Path(path).name}/stat").read_text().split()
    return int(fields[0]) + int(fields[4])


def count_wakeups(server_pid: int) -> Sample:
    """Return how often the server's threads, idle for a while, run in a second."""
    time.sleep(IDLE_S)
    before, begin = _nr_switches(server_pid), time.monotonic()
    time.sleep(IDLE_S)
    after, seconds = _nr_switches(server_pid), time.monotonic() - begin
    nr = sum(max(0, count - before.get(tid, 0)) for tid, count in after.items())
    return Sample(wakeups=nr / seconds)


def _nr_switches(pid: int) -> dict[str, int]:
    counts = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        lines = Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines()
        switches = (line.split() for line in lines if "ctxt_switches" in line)
        counts[tid] = sum(int(words[1]) for words in switches)
    return counts
