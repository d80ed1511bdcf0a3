"""The regression gate: instructions per I/O against a stored baseline.

In: the cells of profile ``gate``, measured now, and the figures in icount_baseline.json. Out: a
verdict for each cell. Counted instructions repeat to half a percent whatever else the machine
does, so 3 % is a change of the code, not of the weather. /dev/loop's figure stands beside ours to
tell a change of the kernel from one of ours; it decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from .errors import CompareError
from .jobs import Sample
from .results import Cell, Report
from .tables import label

BASELINE = Path(__file__).resolve().parents[1] / "icount_baseline.json"
TOLERANCE = 0.03
WORSE, BETTER, SAME, NEW, LOST = "WORSE", "better", "ok", "not in the baseline", "not measured"


@dataclass(frozen=True)
class Baseline:
    """What was recorded: instructions per I/O by cell, and with what they were measured."""

    date: str
    made_with: dict[str, str]  # what else the figures depend on: kernel, fio, compiler
    instructions: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """One cell now and then."""

    name: str
    now: float | None
    then: float | None
    loop: float | None
    spread: float  # of the runs now, relative

    @property
    def ratio(self) -> float | None:
        """Now over then; above 1 is worse."""
        return self.now / self.then if self.now and self.then else None

    @property
    def word(self) -> str:
        """The verdict."""
        if self.now is None:
            return LOST
        if self.ratio is None:
            return NEW
        if self.ratio > 1 + TOLERANCE:
            return WORSE
        return BETTER if self.ratio < 1 - TOLERANCE else SAME

    @property
    def fails(self) -> bool:
        """Whether it fails the gate."""
        return self.word in (WORSE, NEW, LOST)


def figures(report: Report) -> dict[str, list[float]]:
    """Return the instructions per I/O of every run of ours, by cell."""
    return {
        f"{cell.name}, {label(name)}": cell.values(name, _instructions)
        for cell in report.cells
        for name in cell.subjects
        if name != "loop"
    }


def judge(report: Report, baseline: Baseline) -> list[Verdict]:
    """Return a verdict for each cell of either."""
    loops = {
        f"{cell.name}, {label(name)}": _least(cell, "loop")
        for cell in report.cells
        for name in cell.subjects
    }
    now = figures(report)
    return [
        Verdict(
            name,
            min(now[name]) if now.get(name) else None,
            baseline.instructions.get(name),
            loops.get(name),
            _spread(now.get(name, [])),
        )
        for name in dict.fromkeys([*baseline.instructions, *now])
    ]


def gate_table(verdicts: list[Verdict], baseline: Baseline, report: Report) -> Table:
    """Return the table of the gate."""
    where = report.cells[0].environment.text
    title = f"Instructions per I/O, fio's included; baseline of {baseline.date}\n{where}"
    table = Table(title=title, title_justify="left")
    for column in ("cell", "now", "baseline", "ratio", "spread", "/dev/loop now", "verdict"):
        table.add_column(column, justify="left" if column in ("cell", "verdict") else "right")
    for verdict in verdicts:
        table.add_row(
            verdict.name,
            *(_number(value) for value in (verdict.now, verdict.then)),
            f"{verdict.ratio:.3f}" if verdict.ratio else "-",
            f"{verdict.spread * 100:.1f} %",
            _number(verdict.loop),
            verdict.word,
        )
    return table


def advice(verdicts: list[Verdict], baseline: Baseline, made_with: dict[str, str]) -> Iterator[str]:
    """Yield what to do about the verdicts."""
    record = "tools/icount_gate.py --record"
    words = {verdict.word for verdict in verdicts}
    changed = [
        f"{name} {baseline.made_with.get(name)} -> {value}"
        for name, value in made_with.items()
        if baseline.made_with.get(name) != value
    ]
    if WORSE in words:
        yield (
            f"more than {TOLERANCE:.0%} more instructions per I/O than recorded: find out what the "
            f"new ones are for; if they are worth it, `{record}`, and say why in the commit"
        )
        if changed:
            yield f"not only the code has changed since: {'; '.join(changed)}"
    if NEW in words or LOST in words:
        yield f"the cells have changed: `{record}`"
    if BETTER in words:
        yield f"more than {TOLERANCE:.0%} better than recorded: `{record}` to keep it so"


def load_baseline() -> Baseline:
    """Return the stored baseline.

    :raises CompareError: if there is none.
    """
    try:
        return Baseline(**json.loads(BASELINE.read_text()))
    except (OSError, ValueError, TypeError) as error:
        what = f"{BASELINE.name}: {error}"
        raise CompareError(f"{what}: tools/icount_gate.py --record makes it") from error


def store_baseline(report: Report, made_with: dict[str, str]) -> Baseline:
    """Store what was measured as the baseline, and return it."""
    instructions = {name: round(min(values)) for name, values in figures(report).items() if values}
    baseline = Baseline(report.dates[0], made_with, {**instructions})
    BASELINE.write_text(json.dumps(asdict(baseline), indent=2) + "\n")
    return baseline


def _least(cell: Cell, name: str) -> float | None:
    # Interrupts only ever add instructions.
    return min(cell.values(name, _instructions), default=None)


def _spread(values: list[float]) -> float:
    return max(values) / min(values) - 1 if values else 0.0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _instructions(sample: Sample) -> float:
    return 1e9 / sample.iops if sample.iops else 0.0
