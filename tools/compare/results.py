"""What was measured: cells of rounds of samples, with the settings they were measured under.

Owns the JSON format, and merges several files into one. A report of one run has one ``Environment``
and its cells; cells of the same place, job and environment from several files become one, with all
their rounds.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CompareError, run
from .jobs import Job, Sample
from .stats import Interval, interval

FORMAT = 2


@dataclass(frozen=True)
class Environment:
    """Where it was measured. ``icount``: one processor whose clock counts instructions."""

    kernel: str
    nr_cpus: int
    icount: bool
    fio: str

    @property
    def text(self) -> str:
        """One line for people."""
        cpus = "1 CPU" if self.nr_cpus == 1 else f"{self.nr_cpus} CPUs"
        clock = ", clock counts instructions" if self.icount else ""
        return f"Linux {self.kernel}, {cpus}{clock}, {self.fio}"


@dataclass
class Cell:
    """One backing and job: rounds, each a sample of every subject."""

    profile: str
    backing: str
    job: Job
    environment: Environment
    subjects: tuple[str, ...]  # the first: the baseline
    rounds: list[dict[str, Sample]] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by subject
    fio_command: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two cells the same one."""
        return self.profile, self.backing, self.job, self.environment

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.backing} {self.job.name}"

    @property
    def baseline(self) -> str:
        """The subject that ratios are of."""
        return self.subjects[0]

    def values(self, subject: str, value: Callable[[Sample], float]) -> list[float]:
        """Return one figure of every round that has the subject."""
        return [value(samples[subject]) for samples in self.rounds if subject in samples]

    def middle(self, subject: str, value: Callable[[Sample], float]) -> Interval | None:
        """Return the median of a figure, or None if it was not measured."""
        found = self.values(subject, value)
        return interval(found) if found else None

    def ratio(
        self, subject: str, baseline: str, value: Callable[[Sample], float] = lambda s: s.iops
    ) -> Interval | None:
        """Return the median ratio, round by round, or None if it was not measured."""
        pairs = [
            (value(samples[subject]), value(samples[baseline]))
            for samples in self.rounds
            if subject in samples and baseline in samples
        ]
        ratios = [ours / base for ours, base in pairs if base]
        return interval(ratios) if ratios else None

    def is_narrow(self, width: float) -> bool:
        """Whether every subject's ratio to the baseline is known to within ``width``."""
        found = [self.ratio(name, self.baseline) for name in self.subjects[1:]]
        found = found or [self.middle(self.baseline, lambda sample: sample.iops)]
        return all(ratio is not None and ratio.is_narrow(width) for ratio in found)


@dataclass
class Report:
    """All cells of one run or of several, and the dates of those."""

    cells: list[Cell] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # lengths of a fio run


def environment(icount: bool) -> Environment:
    """Return what this machine is."""
    version = run("fio", "--version").strip()
    return Environment(platform.release(), os.cpu_count() or 1, icount, version)


def today() -> str:
    """Return the date, for a report."""
    return time.strftime("%Y-%m-%d")


def merge(reports: Iterable[Report]) -> Report:
    """Return one report with the cells of all, in the order in which they first occur."""
    merged = Report()
    cells: dict[tuple[object, ...], Cell] = {}
    for report in reports:
        merged.dates += [date for date in report.dates if date not in merged.dates]
        merged.seconds += [value for value in report.seconds if value not in merged.seconds]
        for cell in report.cells:
            known = cells.setdefault(cell.key, replace(cell, rounds=[], settings={}))
            known.rounds += cell.rounds
            known.settings.update(cell.settings)
            known.subjects = tuple(dict.fromkeys((*known.subjects, *cell.subjects)))
    merged.cells = list(cells.values())
    return merged


def to_json(report: Report) -> str:
    """Return the report as JSON."""
    return json.dumps({"format": FORMAT, **asdict(report)}, indent=1)


def from_json(text: str) -> Report:
    """Return a report from its JSON.

    :raises CompareError: if it is none, or of another version.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise CompareError(f"format {document['format']} is not {FORMAT}: measure again")
        cells = [_cell(value) for value in document["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CompareError(f"this is no report of fio_compare: {error!r}") from error
    return Report(cells, document["dates"], document["seconds"])


def load(path: Path) -> Report:
    """Return the report in a file, or all of a folder as one.

    :raises CompareError: if there is none.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise CompareError(f"{path} holds no *.json")
    reports = []
    for file in files:
        try:
            reports.append(from_json(file.read_text()))
        except (CompareError, OSError) as error:
            raise CompareError(f"{file}: {error}") from error
    return merge(reports)


def save(report: Report, directory: Path, name: str) -> Path:
    """Write the report as a new file of the folder, whole or not at all; return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{time.strftime('%H%M%S')}.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(to_json(report))
    fresh.replace(path)
    return path


def _cell(value: dict[str, Any]) -> Cell:
    rounds = [
        {name: Sample(**sample) for name, sample in samples.items()} for samples in value["rounds"]
    ]
    return Cell(
        **{
            **value,
            "job": Job(**value["job"]),
            "environment": Environment(**value["environment"]),
            "subjects": tuple(value["subjects"]),
            "rounds": rounds,
        }
    )
