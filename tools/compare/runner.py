"""Runs a profile's cells until they are narrow or the time is up.

The subjects of a cell are measured one after another, in random order, so that a noisy machine
harms all of a round alike; the cells of a group (same backing, queues and pinning, so the same
devices) are gone through in random order, round by round. The time is shared among groups by their
number of runs; what a group does not need is left to those after it. One thread; the only writer of
cells.
"""

from __future__ import annotations

import contextlib
import math
import random
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .backings import NONE, Backing, drop_caches, fill, no_writeback
from .errors import run
from .jobs import IDLE, Job, Sample, count_wakeups, run_fio
from .profiles import Profile
from .progress import Progress
from .results import Cell, Environment, Report, today
from .subjects import Served, Subject, daemon_of_its_own, parse_subject, workqueues_on_one_cpu

BUSY_S = 0.1  # how long a device works before its idleness is measured
NULL_BYTES = 1 << 30


@dataclass
class Group:
    """Cells that are measured on the same devices."""

    backing: Backing
    subjects: list[Subject]
    queues: int
    pin: str
    is_double: bool  # each subject has a second device, for what goes on beside a job
    cells: list[Cell]

    @property
    def nr_runs(self) -> int:
        """How many fio runs one round is."""
        return len(self.cells) * len(self.subjects)


class Runner:
    """Measures a profile.

    :param budget_s: how long that may take, but each cell has one round.
    :param progress: told of each run before it begins.
    """

    def __init__(
        self,
        profile: Profile,
        budget_s: float,
        where: Environment,
        kublk: Path | None,
        progress: Progress,
    ) -> None:
        self.profile = profile
        self.groups = _groups(profile, where, kublk)
        self._progress = progress
        self._deadline = time.monotonic() + budget_s
        self._run_s = profile.seconds + 1  # what a run takes; measured as we go
        self._nr_done = 0
        self._nr_expected = sum(
            len(group.cells) * (1 if subject.name in profile.once else profile.nr_rounds_min)
            for group in self.groups
            for subject in group.subjects
        )

    def run(self) -> Report:
        """Measure, and return what came out."""
        run("modprobe", "-q", "loop")  # without udev nothing loads it on demand
        for index, group in enumerate(self.groups):
            self._measure(group, self._deadline_of(index))
        cells = [cell for group in self.groups for cell in group.cells]
        return Report(cells, [today()], [self.profile.seconds])

    def _deadline_of(self, index: int) -> float:
        left = [group.nr_runs for group in self.groups[index:]]
        now = time.monotonic()
        return now + (self._deadline - now) * left[0] / sum(left)

    def _measure(self, group: Group, deadline: float) -> None:
        with self._served(group) as (served, others):
            for cell in group.cells:
                cell.settings = {name: device.settings for name, device in served.items()}
            cells = list(group.cells)
            nr_rounds = 0
            while cells and nr_rounds < self.profile.nr_rounds_max:
                random.shuffle(cells)
                for cell in cells:
                    if time.monotonic() + len(served) * self._run_s > deadline and cell.rounds:
                        return
                    self._measure_round(cell, group, served, others)
                nr_rounds += 1
                if nr_rounds >= self.profile.nr_rounds_min:
                    cells = [cell for cell in cells if not cell.is_narrow(self.profile.width)]

    def _measure_round(
        self, cell: Cell, group: Group, served: dict[str, Served], others: dict[str, Served]
    ) -> None:
        names = [name for name in served if not (cell.rounds and name in self.profile.once)]
        random.shuffle(names)
        samples = {}
        for name in names:
            self._tell(f"{cell.name} {name}")
            begin = time.monotonic()
            samples[name] = self._sample(
                cell.job, group.backing, served[name], others.get(name), self.profile.seconds
            )
            self._nr_done += 1
            self._run_s += (time.monotonic() - begin - self._run_s) / min(self._nr_done, 10)
        cell.rounds.append(samples)

    def _sample(
        self, job: Job, backing: Backing, device: Served, other: Served | None, seconds: float
    ) -> Sample:
        if job.rw == IDLE:
            run_fio(Job("randread"), device.path, backing.nr_bytes, BUSY_S)
            return count_wakeups(device.server_pid)
        if backing.is_cold:
            drop_caches()
        nr_bytes = NULL_BYTES if backing.name == NONE else backing.nr_bytes
        other_path = other.path if job.beside and other else ""
        return run_fio(job, device.path, nr_bytes, seconds, self.profile.ramp_s, other_path)

    def _tell(self, what: str) -> None:
        expected = max(self._nr_expected, self._nr_done)
        by_runs = (expected - self._nr_done) * self._run_s
        left = max(0.0, self._deadline - time.monotonic())
        if math.isinf(left):  # a clock that counts instructions tells nothing
            self._progress(what, self._nr_done, expected, None)
        else:
            self._progress(what, self._nr_done, expected, min(left, by_runs) if by_runs else left)

    @contextlib.contextmanager
    def _served(self, group: Group) -> Iterator[tuple[dict[str, Served], dict[str, Served]]]:
        with contextlib.ExitStack() as stack:
            if self.profile.icount:
                stack.enter_context(no_writeback())
            if group.pin:
                stack.enter_context(daemon_of_its_own())
            if group.pin == "all":
                stack.enter_context(workqueues_on_one_cpu())
            nr_devices = len(group.subjects) * (2 if group.is_double else 1)
            root = stack.enter_context(group.backing.directory(nr_devices))
            every: list[dict[str, Served]] = [{}, {}]
            for number in range(nr_devices):
                subject = group.subjects[number % len(group.subjects)]
                file = root / f"backing{number}"
                if group.backing.name != NONE:
                    fill(file, group.backing.nr_bytes, leave_dirty=self.profile.icount)
                device = stack.enter_context(subject.serve(file, group.queues, group.pin))
                every[number // len(group.subjects)][subject.name] = device
            yield every[0], every[1]


def _groups(profile: Profile, where: Environment, kublk: Path | None) -> list[Group]:
    groups: dict[tuple[object, ...], Group] = {}
    for part in profile.parts:
        subjects = [parse_subject(text, kublk) for text in part.subjects]
        names = tuple(subject.name for subject in subjects)
        for job in part.jobs:
            cell = Cell(profile.name, part.backing.name, job, where, names)
            cell.fio_command = shlex.join(
                job.command(
                    "DEVICE", part.backing.nr_bytes, profile.seconds, other_path="OTHER_DEVICE"
                )
            )
            key = (part.backing, names, job.queues, job.pin)
            empty = Group(part.backing, subjects, job.queues, job.pin, False, [])
            group = groups.setdefault(key, empty)
            group.cells.append(cell)
            group.is_double |= job.beside > 0
    return list(groups.values())
