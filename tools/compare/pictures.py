"""Pictures of a report, PNG and SVG: bars with intervals, latency percentiles, IOPS over depth.

One set a profile. matplotlib is needed only here, and only when something is drawn.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .jobs import IDLE, PERCENTILES, Sample
from .results import Cell, Report
from .tables import label

SUFFIXES = ("png", "svg")
NO_MATPLOTLIB = "no pictures without matplotlib: .venv/bin/pip install -e '.[bench]', then --draw"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, directory: Path) -> list[Path]:
    """Write all pictures that the report has something for; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    # Text as text, and the same file for the same figures.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ublk", "font.size": 9})
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for profile in dict.fromkeys(cell.profile for cell in report.cells):
        cells = [
            cell
            for cell in report.cells
            if cell.profile == profile and cell.rounds and cell.job.rw != IDLE
        ]
        if not cells:
            continue
        depths = {cell.job.iodepth for cell in cells}
        if len(depths) > 2:
            paths += _save(_over_depth(cells), directory / f"{profile}-depth")
        else:
            paths += _save(_bars(cells), directory / f"{profile}-iops")
        if not cells[0].environment.icount:
            paths += _save(_latency(cells), directory / f"{profile}-latency")
    return paths


def _save(figure: Any, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in SUFFIXES]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=100, metadata=metadata)
    plt.close(figure)
    return paths


def _subjects(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.subjects))


def _bars(cells: list[Cell]) -> Any:
    # Ratios to the baseline: cells of very different IOPS share one picture.
    import matplotlib.pyplot as plt

    names = _subjects(cells)
    figure, axes = plt.subplots(
        figsize=(max(7, 0.28 * len(cells) * len(names)), 4), layout="constrained"
    )
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places, heights, below, above = [], [], [], []
        for index, cell in enumerate(cells):
            ratio = cell.ratio(name, cell.baseline)
            if ratio is None:
                continue
            places.append(index + number * width)
            heights.append(ratio.median)
            below.append(ratio.median - ratio.low)
            above.append(ratio.high - ratio.median)
        axes.bar(places, heights, width, yerr=[below, above], capsize=2, label=label(name))
    axes.axhline(1, color="black", linewidth=0.8)
    ticks = [index + 0.4 - width / 2 for index in range(len(cells))]
    axes.set_xticks(ticks, [f"{cell.backing}\n{cell.job.name}" for cell in cells])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(f"IOPS, ratio to {label(cells[0].baseline)}")
    axes.set_title(_title(cells))
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.32))
    return figure


def _latency(cells: list[Cell]) -> Any:
    import matplotlib.pyplot as plt

    names = _subjects(cells)
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 2.6 * rows + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for place, axes in enumerate(grid.flat):
        if place >= len(cells):
            axes.set_visible(False)
            continue
        cell = cells[place]
        for name in names:
            points = [_percentile(cell, name, key) for key in PERCENTILES]
            if all(point is not None for point in points):
                axes.plot(PERCENTILES, points, marker="o", markersize=3, label=label(name))
        axes.set_yscale("log")
        axes.set_title(cell.name, fontsize=8)
        axes.set_ylabel("us" if place % columns == 0 else "")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"Completion latency by percentile. {_title(cells)}", fontsize=9)
    return figure


def _percentile(cell: Cell, name: str, key: str) -> float | None:
    def value(sample: Sample) -> float:
        return sample.latency_us.get(key, 0.0)

    middle = cell.middle(name, value)
    return middle.median if middle and middle.median else None


def _over_depth(cells: list[Cell]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    ordered = sorted(cells, key=lambda cell: cell.job.iodepth)
    for name in _subjects(cells):
        found = [(cell.job.iodepth, cell.middle(name, lambda s: s.iops)) for cell in ordered]
        known = [(depth, middle) for depth, middle in found if middle]
        depths = [depth for depth, _ in known]
        axes.plot(depths, [m.median for _, m in known], marker="o", label=label(name))
        axes.fill_between(depths, [m.low for _, m in known], [m.high for _, m in known], alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("iodepth")
    axes.set_ylabel("IOPS")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{cells[0].backing} {cells[0].job.rw} {cells[0].job.bs}. {_title(cells)}")
    axes.legend()
    return figure


def _title(cells: list[Cell]) -> str:
    environment = cells[0].environment
    clock = ", instructions as time" if environment.icount else ""
    return f"Linux {environment.kernel}, {environment.nr_cpus} CPU(s){clock}"
