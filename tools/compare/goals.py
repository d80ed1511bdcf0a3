"""The project's speed goals, and whether a report meets them.

A goal is one or more checks; a check reads the cells of one profile and compares medians of paired
ratios with a bound. What was not measured is said to be so, never taken as met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .jobs import Sample
from .profiles import BASE, DIRECT, KUBLK_MODES, KUBLK_NULL, OUR_NULL, POLICY_2014
from .results import Cell, Report
from .stats import geometric_mean


@dataclass(frozen=True)
class Outcome:
    """What a check found. ``met`` is None if something it needs was not measured."""

    measured: str
    met: bool | None


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    number: str
    case: str
    goal: str
    check: Callable[[Report], Outcome]


def _iops(sample: Sample) -> float:
    return sample.iops


def _bandwidth(sample: Sample) -> float:
    return sample.bandwidth


def _instructions(sample: Sample) -> float:
    return 1e9 / sample.iops if sample.iops else 0.0


def _p50(sample: Sample) -> float:
    return sample.latency_us.get("50", 0.0)


NOT_MEASURED = Outcome("not measured", None)


def _cells(report: Report, profile: str) -> list[Cell]:
    return [cell for cell in report.cells if cell.profile == profile]


def _ratios(
    cells: Iterable[Cell], subject: str, baseline: str, value: Callable[[Sample], float]
) -> dict[str, float | None]:
    found = {}
    for cell in cells:
        ratio = cell.ratio(subject, baseline, value)
        found[cell.name] = ratio.median if ratio else None
    return found


def _short(name: str) -> str:
    return name.replace(" 4k", "").replace(" qd64", "").replace("null_blk:", "").strip()


def _text(ratios: dict[str, float]) -> str:
    return ", ".join(f"{_short(name)} {ratio:.2f}" for name, ratio in ratios.items())


def _each(
    ratios: dict[str, float | None], holds: Callable[[float], bool], unit: str = ""
) -> Outcome:
    """Every cell has to hold; any that was not measured leaves the outcome open."""
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not known:
        return NOT_MEASURED
    missing = [_short(name) for name in ratios if name not in known]
    said = f"{unit}{_text(known)}"
    said += f"; not measured: {', '.join(missing)}" if missing else ""
    failed = not all(holds(ratio) for ratio in known.values())
    return Outcome(said, False if failed else None if missing else True)


def _both(*outcomes: Outcome) -> Outcome:
    if all(outcome == NOT_MEASURED for outcome in outcomes):
        return NOT_MEASURED
    mets = [outcome.met for outcome in outcomes]
    met = False if False in mets else None if None in mets else True
    return Outcome("; ".join(outcome.measured for outcome in outcomes), met)


def _at_least(bound: float) -> Callable[[float], bool]:
    return lambda ratio: ratio >= bound


def _at_most(bound: float) -> Callable[[float], bool]:
    return lambda ratio: ratio <= bound


def _instruction_goal(words: tuple[str, ...], bound: float) -> Callable[[Report], Outcome]:
    def check(report: Report) -> Outcome:
        cells = [cell for cell in _cells(report, "icount") if cell.job.rw in words]
        return _each(_ratios(cells, "ublk", "loop", _instructions), _at_most(bound))

    return check


def _against(profile: str, bound: float) -> Callable[[Report], Outcome]:
    def check(report: Report) -> Outcome:
        return _each(_ratios(_cells(report, profile), "ublk", "loop", _iops), _at_least(bound))

    return check


def _depth64(report: Report) -> Outcome:
    cells = _cells(report, "tmpfs") + _cells(report, "ext4")
    outcome = _each(_ratios(cells, "ublk", "loop", _iops), _at_least(1.8))
    complete = {cell.profile for cell in cells} == {"tmpfs", "ext4"}
    return outcome if complete or outcome.met is False else Outcome(outcome.measured, None)


def _peer_mean(report: Report) -> Outcome:
    # Against the peer's best mode: the one that leaves us the smallest geometric mean.
    cells = _cells(report, "tmpfs") + _cells(report, "ext4")
    means = {}
    for mode in KUBLK_MODES:
        found = [value for value in _ratios(cells, "ublk", mode, _iops).values() if value]
        if found and len(found) == len(cells):
            means[mode] = geometric_mean(found)
    if not means:
        return NOT_MEASURED
    best = min(means, key=lambda mode: means[mode])
    return Outcome(f"{means[best]:.2f} against {best.replace(':', ' ')}", means[best] >= 1.2)


def _peer_cells(report: Report) -> Outcome:
    ratios: dict[str, float | None] = {}
    for cell in _cells(report, "tmpfs") + _cells(report, "ext4"):
        found = [cell.ratio("ublk", mode, _iops) for mode in KUBLK_MODES]
        known = [ratio.median for ratio in found if ratio]
        ratios[cell.name] = min(known) if len(known) == len(KUBLK_MODES) else None
    return _each(ratios, _at_least(1.0))


def _latency_p50(report: Report) -> Outcome:
    return _each(_ratios(_cells(report, "depth1"), "ublk", "loop", _p50), _at_most(0.35))


def _one_cpu(pin: str) -> Callable[[Report], Outcome]:
    def check(report: Report) -> Outcome:
        cells = [cell for cell in _cells(report, "one-cpu") if cell.job.pin == pin]
        return _each(_ratios(cells, "ublk", "loop", _iops), _at_least(1.0))

    return check


def _cold_disk(subject: str) -> Callable[[Report], Outcome]:
    def check(report: Report) -> Outcome:
        cells = _cells(report, "latency")
        return _both(
            _each(_ratios(cells, subject, "loop", _iops), _at_least(8), "buffered: "),
            _each(_ratios(cells, subject, "loop-direct", _iops), _at_least(1), "direct: "),
        )

    return check


def _loop_mq(report: Report) -> Outcome:
    bounds = {"randread": 14.55, "read": 1.226, "randwrite": 0.97, "write": 0.97}
    said, mets = [], []
    for cell in _cells(report, "loop-mq"):
        ratio = cell.ratio(POLICY_2014, BASE, _iops)
        mets.append(None if ratio is None else ratio.median >= bounds[cell.job.rw])
        change = "not measured" if ratio is None else f"{(ratio.median - 1) * 100:+.1f} %"
        said.append(f"{cell.job.rw} {change}")
    if len(mets) < len(bounds):
        return Outcome("; ".join(said) or "not measured", None)
    met = False if False in mets else None if None in mets else True
    return Outcome(", ".join(said), met)


def _sequential(report: Report) -> Outcome:
    cells = _cells(report, "sequential")
    return _each(_ratios(cells, "ublk", "loop-direct", _bandwidth), _at_least(1.0))


def _sequential_direct(report: Report) -> Outcome:
    cells = _cells(report, "sequential")
    return _each(_ratios(cells, DIRECT, "loop-direct", _bandwidth), _at_least(1.0))


def _null(iodepth: int, bound: float) -> Callable[[Report], Outcome]:
    def check(report: Report) -> Outcome:
        cells = [cell for cell in _cells(report, "null") if cell.job.iodepth == iodepth]
        return _each(_ratios(cells, OUR_NULL, KUBLK_NULL, _iops), _at_least(bound))

    return check


def _idle(report: Report) -> Outcome:
    said, most = [], 0.0
    for cell in _cells(report, "idle"):
        found = cell.middle("ublk", lambda sample: sample.wakeups or 0.0)
        if found:
            most = max(most, found.high)
            said.append(f"{cell.job.name} {found.median:.1f}/s")
    return Outcome(", ".join(said), most == 0) if said else NOT_MEASURED


GOALS = (
    Goal(
        "1",
        "instructions per I/O, depth 64, randread and randwrite",
        "at most 0.75 of /dev/loop's",
        _instruction_goal(("randread", "randwrite"), 0.75),
    ),
    Goal(
        "2",
        "instructions per I/O, depth 64, read and write",
        "at most 0.70 of /dev/loop's",
        _instruction_goal(("read", "write"), 0.70),
    ),
    Goal("3a", "depth 64, four patterns", "at least 1.8x /dev/loop", _depth64),
    Goal("3b", "the same, geometric mean", "at least 1.2x the best kublk mode", _peer_mean),
    Goal("3c", "the same, each", "at least 1.0x every kublk mode", _peer_cells),
    Goal("4a", "depth 1, IOPS", "at least 3x /dev/loop", _against("depth1", 3.0)),
    Goal("4b", "depth 1, p50", "at most 0.35 of /dev/loop's", _latency_p50),
    Goal("5", "fio batch 16", "at least 1.3x /dev/loop", _against("batch16", 1.3)),
    Goal("6", "all on one CPU", "at least 1.0x /dev/loop", _one_cpu("all")),
    Goal(
        "6'",
        "fio and server on one CPU, loop's kworkers on any",
        "at least 1.0x /dev/loop",
        _one_cpu("server"),
    ),
    Goal(
        "7a",
        "cold disk, policy 2014",
        "at least 8x /dev/loop buffered, 1.0x direct",
        _cold_disk(POLICY_2014),
    ),
    Goal("7b", "cold disk, policy auto", "the same", _cold_disk("ublk")),
    Goal(
        "8",
        "base against 2014, 500 us",
        "randread +1355 %, read +22.6 %, writes -3 % at worst",
        _loop_mq,
    ),
    Goal("9", "2 jobs, 2 queues", "at least 1.3x /dev/loop", _against("queues", 1.3)),
    Goal("10a", "large sequential, buffered", "at least 1.0x direct /dev/loop", _sequential),
    Goal("10b", "large sequential, direct", "at least 1.0x direct /dev/loop", _sequential_direct),
    Goal("11a", "null, depth 1", "at least 3x kublk's null", _null(1, 3.0)),
    Goal("11b", "null, depth 64", "at least 1.1x kublk's null", _null(64, 1.1)),
    Goal("12", "idle", "0 wake-ups a second", _idle),
)
