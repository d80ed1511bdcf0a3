"""Tables of a report: the cells of each profile, the 2014 table, the goals."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from .goals import GOALS, NOT_MEASURED
from .jobs import IDLE, Sample
from .profiles import BASE, POLICY_2014
from .results import Cell, Report

VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}
LOOP_MQ = "loop-mq"


def all_tables(report: Report) -> Iterator[Table]:
    """Yield every table that the report has something for."""
    for profile in dict.fromkeys(cell.profile for cell in report.cells):
        cells = [cell for cell in report.cells if cell.profile == profile]
        for names in dict.fromkeys((cell.subjects, cell.environment) for cell in cells):
            alike = [cell for cell in cells if (cell.subjects, cell.environment) == names]
            yield cell_table(alike, report)
        if profile == LOOP_MQ:
            yield loop_mq_table(cells)
    if any(goal.check(report) != NOT_MEASURED for goal in GOALS):
        yield goal_table(report)


def cell_table(cells: list[Cell], report: Report) -> Table:
    """Return cells of the same subjects: medians, and ratios to the first with 95 % intervals."""
    first = cells[0]
    table = Table(title=_title(cells, report), title_justify="left")
    table.add_column("backing")
    table.add_column("job")
    table.add_column("rounds", justify="right")
    for name in first.subjects:
        table.add_column(label(name), justify="right")
    for cell in cells:
        texts = [_figure(cell, name) for name in cell.subjects]
        table.add_row(cell.backing, cell.job.name, str(len(cell.rounds)), *texts)
    return table


def loop_mq_table(cells: list[Cell]) -> Table:
    """Return the table as the loop driver's conversion to blk-mq had it."""
    table = Table(title="IOPS (medians): base, and policy 2014", title_justify="left")
    for column in ("", "base", LOOP_MQ, "delta"):
        table.add_column(column, justify="right" if column else "left")
    for cell in cells:
        base, ours = (cell.middle(name, _iops) for name in (BASE, POLICY_2014))
        ratio = cell.ratio(POLICY_2014, BASE)
        if base and ours and ratio:
            delta = f"{(ratio.median - 1) * 100:+.1f} %"
            table.add_row(cell.job.rw, f"{base.median:.0f}", f"{ours.median:.0f}", delta)
        else:
            table.add_row(cell.job.rw, "not measured", "", "")
    return table


def goal_table(report: Report) -> Table:
    """Return the goals, what was measured, and whether they are met."""
    table = Table(title="Goals", title_justify="left", show_lines=True)
    for column in ("#", "case", "goal", "measured", "met"):
        table.add_column(column)
    for goal in GOALS:
        outcome = goal.check(report)
        table.add_row(goal.number, goal.case, goal.goal, outcome.measured, VERDICTS[outcome.met])
    return table


def goal_lines(report: Report) -> list[str]:
    """Return the same as Markdown."""
    lines = ["| # | case | goal | measured | met |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "-"}
    for goal in GOALS:
        outcome = goal.check(report)
        row = (goal.number, goal.case, goal.goal, outcome.measured, words[outcome.met])
        lines.append(f"| {' | '.join(row)} |")
    return lines


def cell_lines(cells: list[Cell], report: Report) -> list[str]:
    """Return cells of the same subjects as Markdown."""
    lines = [_title(cells, report).replace("\n", ". ") + ".", ""]
    lines.append(f"| | {' | '.join(label(name) for name in cells[0].subjects)} |")
    lines.append("|---" * (1 + len(cells[0].subjects)) + "|")
    for cell in cells:
        texts = [_figure(cell, name) for name in cell.subjects]
        lines.append(f"| {cell.name} | {' | '.join(texts)} |")
    return lines


def markdown(report: Report) -> str:
    """Return all tables as Markdown."""
    blocks = []
    for profile in dict.fromkeys(cell.profile for cell in report.cells):
        cells = [cell for cell in report.cells if cell.profile == profile]
        for names in dict.fromkeys((cell.subjects, cell.environment) for cell in cells):
            alike = [cell for cell in cells if (cell.subjects, cell.environment) == names]
            blocks.append("\n".join([f"### {profile}", "", *cell_lines(alike, report)]))
    blocks.append("\n".join(["### Goals", "", *goal_lines(report)]))
    return "\n\n".join(blocks) + "\n"


def label(subject: str) -> str:
    """Return how tables and pictures name a subject."""
    return subject.replace(":", " ")


def _title(cells: list[Cell], report: Report) -> str:
    environment = cells[0].environment
    first = label(cells[0].baseline)
    if cells[0].job.rw == IDLE:
        what = "Wake-ups of the server's threads, a second"
    elif environment.icount:
        what = f"Instructions per I/O (medians), and ratio to {first} (95 % interval)"
    else:
        what = f"IOPS (medians), and ratio to {first} (95 % interval)"
    date = " ".join(report.dates)
    return f"{what}\n{environment.text}, scheduler {_schedulers(cells)}, {date}"


def _schedulers(cells: list[Cell]) -> str:
    # As it was read back; more than one would be a fault worth seeing.
    found = {
        settings["scheduler"]
        for cell in cells
        for settings in cell.settings.values()
        if "scheduler" in settings
    }
    return "/".join(sorted(found)) or "unknown"


def _figure(cell: Cell, name: str) -> str:
    if cell.job.rw == IDLE:
        wakeups = cell.middle(name, lambda sample: sample.wakeups or 0.0)
        return f"{wakeups.median:.1f}" if wakeups else "not measured"
    value = _instructions if cell.environment.icount else _iops
    middle, ratio = cell.middle(name, value), cell.ratio(name, cell.baseline, value)
    if middle is None:
        return "not measured"
    text = f"{middle.median / 1000:.1f}k"
    beside = cell.middle(name, lambda sample: sample.beside_iops or 0.0)
    if cell.job.beside and beside:
        text += f" beside {beside.median / 1000:.1f}k"
    if ratio and name != cell.baseline:
        text += f"  {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
    return text


def _iops(sample: Sample) -> float:
    return sample.iops


def _instructions(sample: Sample) -> float:
    return 1e9 / sample.iops if sample.iops else 0.0
