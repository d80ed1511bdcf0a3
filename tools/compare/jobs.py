"""One fio job: its command line, its run, and what is kept of its report.

In: a path to run on. Out: a Sample. Never decides how often or in which order.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CompareError, run

FIO_GRACE_S = 120.0
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
    :param beside: as the second job of the same fio so many requests of the same kind are in flight
        on a second device of the same subject.
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

    def command(
        self, path: str, nr_bytes: int, seconds: float, ramp_s: float = 0, other_path: str = ""
    ) -> list[str]:
        """Return the fio command line; ``path`` is used up to ``nr_bytes``.

        :param ramp_s: how long to run before it counts.
        :param other_path: the second device, if something is to go on beside.
        """
        pinned = ["taskset", "-c", "0"] if self.pin else []
        beside = [
            "--name=beside",
            "--new_group",
            f"--filename={other_path}",
            f"--iodepth={self.beside}",
        ]
        return [
            *pinned,
            "fio",
            f"--rw={self.rw}",
            f"--bs={self.bs}",
            f"--size={nr_bytes}",
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
            "--name=compare",
            f"--filename={path}",
            f"--iodepth={self.iodepth}",
            *(beside if self.beside else []),
        ]


@dataclass
class Sample:
    """What one run gave. ``wakeups`` is the only figure of an idle one, a second.

    ``beside_iops``: of the job on the second device.
    """

    iops: float = 0.0
    bandwidth: float = 0.0  # bytes a second
    latency_us: dict[str, float] = field(default_factory=dict)  # by percentile
    wakeups: float | None = None
    beside_iops: float | None = None


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
    reports = json.loads(output[output.index("{") :])["jobs"]
    for report in reports:
        if report["error"]:
            raise CompareError(f"fio met error {report['error']}")
    way, *beside = [report["read" if "read" in rw else "write"] for report in reports]
    found: dict[str, Any] = way["clat_ns"].get("percentile", {})
    latency = {f"{float(key):g}": value / 1000 for key, value in found.items()}
    sample = Sample(way["iops"], way["bw_bytes"], latency)
    for other in beside:
        sample.beside_iops = other["iops"]
    return sample


def run_fio(
    job: Job,
    path: str,
    nr_bytes: int,
    seconds: float,
    ramp_s: float = 0,
    other_path: str = "",
) -> Sample:
    """Run fio once."""
    command = job.command(path, nr_bytes, seconds, ramp_s, other_path)
    output = run(*command, timeout_s=seconds + FIO_GRACE_S)
    return parse_report(output, job.rw)


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
