#!/usr/bin/env python3
"""Compare block devices over one backing file by fio: ours, /dev/loop, the raw file, any peer.

In: subjects, and a profile (a matrix of backings and fio jobs). Out: a table, JSON with everything
that was measured and the settings it was measured under, and pictures; saved JSON can be drawn
again. Runs are interleaved and their order is random, a cell is repeated until its interval is
narrow or the time is up, and every figure is set against the first subject's of the same round, so
that a shared, noisy machine harms both alike.

Needs root and a kernel with ublk_drv; where there is none it runs itself in a guest (tools/vm.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

TOOLS = Path(__file__).resolve().parent
UBLK = [sys.executable, "-m", "ublk_loop"]
WORK = Path("/run/ublk-compare")
PATTERNS = ("randread", "read", "randwrite", "write")
FIO_GRACE_S = 120


@dataclass(frozen=True)
class Job:
    """One fio job; ``batch`` is submitted and reaped at a time, ``cpus`` binds fio."""

    rw: str
    bs: str = "4k"
    iodepth: int = 64
    numjobs: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        parts = [self.rw, self.bs, f"qd{self.iodepth}"]
        if self.numjobs > 1:
            parts.append(f"{self.numjobs} jobs")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        return " ".join(parts)

    def command(self, path: str, nr_bytes: int, seconds: float) -> list[str]:
        """The fio command line; the file or device at ``path`` is used up to ``nr_bytes``."""
        return [
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
            f"--runtime={seconds}",
            "--ioengine=libaio",
            "--direct=1",
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--group_reporting",
            "--output-format=json",
        ]


@dataclass(frozen=True)
class Backing:
    """Where the backing files lie: ``tmpfs``, ``ext4`` (on brd) or ``null_blk:USEC`` under ext4."""

    name: str
    nr_bytes: int = 128 << 20

    @contextlib.contextmanager
    def directory(self, nr_files: int) -> Iterator[Path]:
        """Mount it with room for ``nr_files`` files."""
        root = WORK / self.name.replace(":", "-")
        root.mkdir(parents=True, exist_ok=True)
        room = nr_files * self.nr_bytes + (64 << 20)
        with contextlib.ExitStack() as stack:
            if self.name == "tmpfs":
                _run("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(root))
            else:
                disk = stack.enter_context(self._disk(room))
                _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", disk)
                _run("mount", disk, str(root))
            stack.callback(_run, "umount", str(root))
            yield root

    @contextlib.contextmanager
    def _disk(self, room: int) -> Iterator[str]:
        if self.name == "ext4":
            _run("modprobe", "brd", "rd_nr=1", f"rd_size={room >> 10}")
            try:
                yield "/dev/ram0"
            finally:
                _run("modprobe", "-r", "brd")
            return
        kind, _, usec = self.name.partition(":")
        if kind != "null_blk":
            raise click.UsageError(f"backing {self.name!r} is none of tmpfs, ext4, null_blk:USEC")
        _run("modprobe", "null_blk", "nr_devices=0")
        node = Path("/sys/kernel/config/nullb/compare")
        node.mkdir()
        settings = {
            "irqmode": 2,
            "completion_nsec": int(usec) * 1000,
            "memory_backed": 1,
            "size": room >> 20,
            "hw_queue_depth": 256,
            "power": 1,
        }
        for name, value in settings.items():
            (node / name).write_text(str(value))
        try:
            yield "/dev/nullb0" if Path("/dev/nullb0").exists() else "/dev/compare"
        finally:
            node.rmdir()
            _run("modprobe", "-r", "null_blk")

    @property
    def is_cold(self) -> bool:
        """Whether the page cache is dropped before each run: a disk whose latency is the point."""
        return self.name.startswith("null_blk")


@dataclass(frozen=True)
class Subject:
    """Something to compare: how its device comes and goes."""

    name: str
    add: str = ""
    delete: str = ""

    @contextlib.contextmanager
    def serve(self, backing_file: Path) -> Iterator[str]:
        """Yield the path that fio is given."""
        if self.name == "raw":
            yield str(backing_file)
            return
        words = {"file": str(backing_file)}
        node = _node(_run(*shlex.split(self.add.format(**words))))
        try:
            _set_scheduler(node)
            yield node
        finally:
            _run(*shlex.split(self.delete.format(node=node, id=node.removeprefix("/dev/ublkb"))))


def parse_subject(text: str) -> Subject:
    """Return the subject that a command-line word names.

    ``raw``, ``loop``, ``loop-direct``, ``ublk`` with options for ``ublk add`` after a colon
    (``ublk:--policy base``), or a peer: ``NAME=ADD COMMAND;DELETE COMMAND`` with ``{file}``,
    ``{id}`` and ``{node}``; the add command's last word of output is the node, unless it prints
    JSON as ``ublk add --json`` does.
    """
    if text == "raw":
        return Subject("raw")
    if text in ("loop", "loop-direct"):
        direct = "on" if text == "loop-direct" else "off"
        return Subject(
            text, f"losetup -f --show --direct-io={direct} {{file}}", "losetup -d {node}"
        )
    if text == "ublk" or text.startswith("ublk:"):
        options = text.partition(":")[2]
        kind = "" if "-t " in options else "-t loop -f {file}"
        ublk = shlex.join(UBLK)
        return Subject(text, f"{ublk} add {kind} {options} --json", f"{ublk} del -n {{id}}")
    name, equals, commands = text.partition("=")
    add, semicolon, delete = commands.partition(";")
    if not (equals and semicolon):
        raise click.UsageError(f"subject {text!r} is not known; see --help")
    return Subject(name, add.strip(), delete.strip())


@dataclass(frozen=True)
class Profile:
    """A matrix of cells, and how long to measure them."""

    subjects: tuple[str, ...]
    cells: tuple[tuple[Backing, Job], ...]
    seconds: float
    nr_rounds_min: int
    nr_rounds_max: int


TMPFS = Backing("tmpfs")
EXT4 = Backing("ext4")

PROFILES = {
    "quick": Profile(("loop", "ublk"), tuple((TMPFS, Job(rw)) for rw in PATTERNS), 3, 3, 3),
    "loop-mq": Profile(
        ("ublk:--policy base", "ublk:--policy 2014"),
        tuple((Backing("null_blk:500"), Job(rw)) for rw in PATTERNS),
        3,
        5,
        15,
    ),
    "full": Profile(
        ("loop", "loop-direct", "raw", "ublk"),
        (
            *((backing, Job(rw)) for backing in (TMPFS, EXT4) for rw in PATTERNS),
            *((TMPFS, Job(rw, iodepth=1)) for rw in ("randread", "randwrite")),
            *((TMPFS, Job(rw, batch=16)) for rw in ("randread", "randwrite")),
            *((TMPFS, Job(rw, numjobs=2)) for rw in ("randread", "randwrite")),
            *((TMPFS, Job(rw, bs=bs, iodepth=16)) for bs in ("64k", "1m") for rw in PATTERNS[1::2]),
            *((Backing(f"null_blk:{usec}"), Job("randread")) for usec in (100, 1000)),
        ),
        3,
        5,
        15,
    ),
}


@dataclass
class Sample:
    """One fio run."""

    iops: float
    bandwidth: float  # bytes a second
    p50_us: float
    p99_us: float


@dataclass
class Cell:
    """All samples of one backing and job; one list a subject, a sample a round."""

    backing: Backing
    job: Job
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def ratios(self, subject: str, baseline: str) -> list[float]:
        """IOPS of ``subject`` over the baseline's, round by round."""
        pairs = zip(self.samples[subject], self.samples[baseline], strict=False)
        return [ours.iops / base.iops for ours, base in pairs if base.iops]

    def interval(self, subject: str, baseline: str) -> tuple[float, float, float]:
        """Median ratio, and a bootstrapped 95 % interval of it."""
        ratios = self.ratios(subject, baseline)
        dice = random.Random(0)
        medians = sorted(
            statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(1000)
        )
        return statistics.median(ratios), medians[25], medians[974]

    def is_narrow(self, baseline: str, width: float = 0.1) -> bool:
        """Whether every subject's interval is within ``width`` of its median."""
        for subject in self.samples:
            median, low, high = self.interval(subject, baseline)
            if high - low > width * median:
                return False
        return True


def _run(*command: str, timeout_s: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        what = f"{shlex.join(command)}: exit {done.returncode}"
        raise click.ClickException(f"{what}\n{done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _node(output: str) -> str:
    if output.startswith("{"):
        return str(json.loads(output)["block_device"])
    return output.split()[-1]


def _set_scheduler(node: str) -> None:
    # loop gets none by itself, a one-queue ublk device mq-deadline: compare like with like.
    Path(f"/sys/block/{Path(node).name}/queue/scheduler").write_text("none")


def _fill(path: Path, nr_bytes: int) -> None:
    # Real data: a hole would be served from the zero page.
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(nr_bytes >> 20):
            file.write(block)
        os.fsync(file.fileno())


def measure(job: Job, path: str, nr_bytes: int, seconds: float) -> Sample:
    """Run fio once."""
    output = _run(*job.command(path, nr_bytes, seconds), timeout_s=seconds + FIO_GRACE_S)
    report = json.loads(output[output.index("{") :])["jobs"][0]
    if report["error"]:
        raise click.ClickException(f"fio {job.name} on {path}: error {report['error']}")
    way = report["read" if "read" in job.rw else "write"]
    percentile = way["clat_ns"].get("percentile", {})
    return Sample(
        iops=way["iops"],
        bandwidth=way["bw_bytes"],
        p50_us=percentile.get("50.000000", 0) / 1000,
        p99_us=percentile.get("99.000000", 0) / 1000,
    )


class Comparison:
    """Runs a profile's cells, interleaved, until they are narrow or the time is up."""

    def __init__(self, profile: Profile, budget_s: float, console: Console) -> None:
        self.profile = profile
        self.subjects = [parse_subject(text) for text in profile.subjects]
        self.cells = [Cell(backing, job) for backing, job in profile.cells]
        self._deadline = time.monotonic() + budget_s
        self._console = console

    @property
    def baseline(self) -> str:
        """The subject that ratios are of: the first."""
        return self.subjects[0].name

    def run(self) -> None:
        """Measure every cell; those of one backing together."""
        _run("modprobe", "-q", "loop")  # without udev nothing loads it on demand
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        nr_runs = len(self.cells) * len(self.subjects) * self.profile.nr_rounds_min
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            task = progress.add_task("starting", total=nr_runs)
            for backing in dict.fromkeys(cell.backing for cell in self.cells):
                cells = [cell for cell in self.cells if cell.backing == backing]
                with self._served(backing) as paths:
                    self._measure_backing(cells, paths, progress, task)

    @contextlib.contextmanager
    def _served(self, backing: Backing) -> Iterator[dict[str, str]]:
        with contextlib.ExitStack() as stack:
            root = stack.enter_context(backing.directory(len(self.subjects)))
            paths = {}
            for number, subject in enumerate(self.subjects):
                file = root / f"backing{number}"
                _fill(file, backing.nr_bytes)
                paths[subject.name] = stack.enter_context(subject.serve(file))
            yield paths

    def _measure_backing(
        self, cells: list[Cell], paths: dict[str, str], progress: Progress, task: Any
    ) -> None:
        nr_rounds = 0
        while nr_rounds < self.profile.nr_rounds_max:
            late = time.monotonic() > self._deadline
            if nr_rounds >= self.profile.nr_rounds_min:
                cells = [cell for cell in cells if not cell.is_narrow(self.baseline)]
            if not cells or (late and nr_rounds > 0):
                return
            if nr_rounds >= self.profile.nr_rounds_min:
                extra = len(cells) * len(paths)
                progress.update(task, total=(progress.tasks[0].total or 0) + extra)
            runs = [(cell, name) for cell in cells for name in paths]
            random.shuffle(runs)
            for cell, name in runs:
                progress.update(task, description=f"{cell.backing.name} {cell.job.name} {name}")
                if cell.backing.is_cold:
                    _run("sync")
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                sample = measure(cell.job, paths[name], cell.backing.nr_bytes, self.profile.seconds)
                cell.samples.setdefault(name, []).append(sample)
                progress.advance(task)
            nr_rounds += 1
            if not self._console.is_terminal:
                # A progress bar shows nothing there.
                self._console.print(f"{cells[0].backing.name}: round {nr_rounds} is done")

    def report(self) -> dict[str, Any]:
        """Everything measured, JSON-serialisable."""
        return {
            "date": time.strftime("%Y-%m-%d"),
            "kernel": platform.release(),
            "nr_cpus": os.cpu_count(),
            "scheduler": "none",
            "fio": _run("fio", "--version").strip(),
            "seconds": self.profile.seconds,
            "baseline": self.baseline,
            "subjects": {subject.name: asdict(subject) for subject in self.subjects},
            "cells": [
                {
                    "backing": cell.backing.name,
                    "job": asdict(cell.job),
                    "name": cell.job.name,
                    "fio": shlex.join(cell.job.command("DEVICE", cell.backing.nr_bytes, 0)),
                    "samples": {
                        name: [asdict(sample) for sample in samples]
                        for name, samples in cell.samples.items()
                    },
                }
                for cell in self.cells
            ],
        }


def load_cells(report: dict[str, Any]) -> list[Cell]:
    """Return the cells of a saved report."""
    return [
        Cell(
            Backing(cell["backing"]),
            Job(**cell["job"]),
            {name: [Sample(**s) for s in samples] for name, samples in cell["samples"].items()},
        )
        for cell in report["cells"]
    ]


def make_table(report: dict[str, Any]) -> Table:
    """Return the table: medians of IOPS, and the ratio to the baseline with its interval."""
    baseline = report["baseline"]
    names = list(report["subjects"])
    plural = "" if report["nr_cpus"] == 1 else "s"
    title = (
        f"IOPS (medians), and ratio to {baseline} (95 % interval)\n"
        f"Linux {report['kernel']}, {report['nr_cpus']} CPU{plural}, "
        f"scheduler {report['scheduler']}, {report['date']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("backing")
    table.add_column("job")
    for name in names:
        table.add_column(name, justify="right")
    for cell in load_cells(report):
        row = [cell.backing.name, cell.job.name]
        for name in names:
            if name not in cell.samples:
                row.append("-")
                continue
            iops = statistics.median(sample.iops for sample in cell.samples[name])
            text = f"{iops / 1000:.1f}k"
            if name != baseline:
                median, low, high = cell.interval(name, baseline)
                text += f"  {median:.2f} ({low:.2f}-{high:.2f})"
            row.append(text)
        table.add_row(*row)
    return table


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
    """Write PNG and SVG pictures; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, names = load_cells(report), list(report["subjects"])
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for what, title in (("iops", "IOPS"), ("p99_us", "99th percentile latency, us")):
        figure, axes = plt.subplots(figsize=(max(8, len(cells) * 1.1), 5), layout="constrained")
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            values = [
                [getattr(s, what) for s in cell.samples.get(name, [])] or [0] for cell in cells
            ]
            middles = [statistics.median(v) for v in values]
            spread = [
                [m - min(v) for m, v in zip(middles, values, strict=True)],
                [max(v) - m for m, v in zip(middles, values, strict=True)],
            ]
            places = [index + number * width for index in range(len(cells))]
            axes.bar(places, middles, width, yerr=spread, capsize=2, label=name)
        axes.set_xticks(
            [index + 0.4 - width / 2 for index in range(len(cells))],
            [f"{cell.backing.name}\n{cell.job.name}" for cell in cells],
            rotation=45,
            ha="right",
            fontsize=8,
        )
        axes.set_title(f"{title} | Linux {report['kernel']}, {report['nr_cpus']} CPUs, medians")
        axes.legend()
        for suffix in ("png", "svg"):
            path = directory / f"{what}.{suffix}"
            figure.savefig(path, dpi=120)
            paths.append(path)
        plt.close(figure)
    return paths


def _run_in_guest(arguments: list[str], out: Path, vm_options: list[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(TOOLS / "vm.py"),
        "--vm",
        *vm_options,
        "--shared",
        str(out),
        "--",
    ]
    return subprocess.call([*command, sys.executable, str(Path(__file__).resolve()), *arguments])


@click.command(
    epilog="""\b
Examples:
  tools/fio_compare.py                          ours beside /dev/loop, four patterns
  tools/fio_compare.py --profile loop-mq        the 2014 table: base against 2014
  tools/fio_compare.py --subject loop --subject "ublk:-q 2" --job randread:4k:64
  tools/fio_compare.py --draw results/report.json
"""
)
@click.option("--profile", type=click.Choice(list(PROFILES)), default="quick", show_default=True)
@click.option("--subject", "subjects", multiple=True, help="First: the baseline.")
@click.option("--job", "jobs", multiple=True, help="RW:BS:DEPTH[:JOBS[:BATCH]].")
@click.option("--backing", "backings", multiple=True, help="tmpfs, ext4 or null_blk:USEC.")
@click.option("--seconds", type=float, help="Length of one fio run.")
@click.option("--rounds", type=int, help="Exactly so many rounds.")
@click.option("--budget", type=float, default=3600, show_default=True, help="Seconds in all.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results.")
@click.option("--draw", "saved", type=click.Path(exists=True, path_type=Path), help="Draw it.")
@click.option("--kernel", default="7.3", show_default=True, help="Of a guest.")
@click.option("--cpus", default=2, show_default=True, help="Of a guest.")
@click.option("--icount", is_flag=True, help="Count instructions: 1e9 / IOPS.")
@click.option("--vm", is_flag=True, help="Use a guest in any case.")
@click.option("--here", is_flag=True, help="Never use a guest.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, not a table.")
def main(
    profile: str,
    subjects: tuple[str, ...],
    jobs: tuple[str, ...],
    backings: tuple[str, ...],
    seconds: float | None,
    rounds: int | None,
    budget: float,
    out: Path | None,
    saved: Path | None,
    kernel: str,
    cpus: int,
    icount: bool,
    vm: bool,
    here: bool,
    as_json: bool,
) -> None:
    """Compare block devices over one backing file by fio."""
    console = Console(stderr=True)
    if saved:
        report = json.loads(saved.read_text())
        _show(report, as_json)
        for path in draw(report, out or saved.parent):
            console.print(str(path))
        return
    chosen = _choose(profile, subjects, jobs, backings, seconds, rounds)
    if not here and (vm or icount or not _host_has_ublk()):
        raise SystemExit(_guest(chosen, out, kernel, cpus, icount, as_json, console))
    comparison = Comparison(chosen, budget, console)
    comparison.run()
    report = comparison.report()
    _show(report, as_json)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report, indent=1))


def _host_has_ublk() -> bool:
    if os.geteuid() != 0:
        return False
    subprocess.run(["modprobe", "-q", "ublk_drv"], check=False)
    return Path("/dev/ublk-control").exists()


def _guest(
    chosen: Profile,
    out: Path | None,
    kernel: str,
    cpus: int,
    icount: bool,
    as_json: bool,
    console: Console,
) -> int:
    arguments = ["--here", *(word for word in sys.argv[1:] if word not in ("--vm", "--icount"))]
    vm_options = ["--kernel", kernel, *(["--icount"] if icount else ["--cpus", str(cpus)])]
    if out is None:
        command = [sys.executable, str(TOOLS / "vm.py"), "--vm", *vm_options, "--"]
        return subprocess.call(
            [*command, sys.executable, str(Path(__file__).resolve()), *arguments]
        )
    code = _run_in_guest(arguments, out.resolve(), vm_options)
    if code == 0:
        for path in draw(json.loads((out / "report.json").read_text()), out):
            console.print(str(path))
    return code


def _choose(
    name: str,
    subjects: tuple[str, ...],
    jobs: tuple[str, ...],
    backings: tuple[str, ...],
    seconds: float | None,
    rounds: int | None,
) -> Profile:
    profile = PROFILES[name]
    if subjects:
        profile = replace(profile, subjects=subjects)
    if jobs or backings:
        wanted = [_parse_job(text) for text in jobs] or [Job(rw) for rw in PATTERNS]
        places = [Backing(text) for text in backings] or [TMPFS]
        profile = replace(profile, cells=tuple((place, job) for place in places for job in wanted))
    if seconds:
        profile = replace(profile, seconds=seconds)
    if rounds:
        profile = replace(profile, nr_rounds_min=rounds, nr_rounds_max=rounds)
    for text in profile.subjects:
        parse_subject(text)
    return profile


def _parse_job(text: str) -> Job:
    words = text.split(":")
    try:
        rw, bs, depth, *rest = words
        return Job(rw, bs, int(depth), *(int(word) for word in rest))
    except (ValueError, TypeError):
        raise click.UsageError(f"job {text!r} is not RW:BS:DEPTH[:JOBS[:BATCH]]") from None


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        Console(width=None if known else 160).print(make_table(report))


if __name__ == "__main__":
    # As for Ctrl-C: what was mounted and added goes again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
