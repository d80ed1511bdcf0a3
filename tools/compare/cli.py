"""The command line of tools/fio_compare.py: the only place that prints."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from .backings import Backing
from .errors import CompareError
from .guest import Where, host_has_ublk, measure, serve_guest
from .jobs import Job, parse_job
from .pictures import NO_MATPLOTLIB, can_draw, draw
from .profiles import FULL, PATTERNS, PIECES, PROFILES, TMPFS, Cells, Profile, without_kublk
from .progress import shown
from .results import Report, load, merge, save, to_json
from .subjects import parse_subject
from .tables import all_tables, markdown

QUICK = "quick"
WIDTH = 200  # of a table that goes to a file
PIECE_S = 220.0
RAMP_S = 0.1
PIECE_NAMES = "\n".join(f"  {piece.name:<11} {piece.about}" for piece in PIECES)
EPILOG = f"""\b
Profiles: quick (ours beside /dev/loop, the four patterns), fairness (two devices of one kind at
once), full (all that follow, which makes the table of goals), or any of:
{PIECE_NAMES}

\b
Subjects: raw (the file itself), loop, loop-direct, ublk and ublk:OPTIONS (of `ublk add`), kublk and
kublk:OPTIONS (of `kublk add`), or NAME=ADD COMMAND;DELETE COMMAND with {{file}}, {{queues}},
{{node}}, {{id}} in them.

\b
Each run adds a file to --out. --draw FOLDER takes all that are there as one report, so a comparison
may be made piece by piece, and a piece repeated for narrower intervals.

\b
Examples:
  tools/fio_compare.py                              ours beside /dev/loop, two minutes
  tools/fio_compare.py --profile loop-mq            the 2014 table: base against 2014
  tools/fio_compare.py --profile full --out results --kublk "$(tools/build_kublk.py)"
  tools/fio_compare.py --profile tmpfs --profile depth1 --out results
  tools/fio_compare.py --subject loop --subject "ublk:-q 2" --job randread:4k:64:2 --backing ext4
  tools/fio_compare.py --draw results
"""


@click.command(epilog=EPILOG)
@click.option(
    "--profile", "names", multiple=True, type=click.Choice([*PROFILES, FULL]), help="Repeatable."
)
@click.option("--subject", "subjects", multiple=True, help="Repeatable; the first: the baseline.")
@click.option("--job", "jobs", multiple=True, help="RW:BS:DEPTH[:JOBS[:BATCH]]. Repeatable.")
@click.option(
    "--backing", "backings", multiple=True, help="tmpfs, ext4, xfs, btrfs, null_blk:USEC or none."
)
@click.option("--seconds", type=click.FloatRange(min=0.05), help="Length of one fio run.")
@click.option("--rounds", type=click.IntRange(min=1), help="Exactly so many rounds.")
@click.option(
    "--budget",
    type=float,
    default=PIECE_S,
    show_default=True,
    help="Seconds for each profile; each cell has one round in any case.",
)
@click.option("--kublk", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The kernel's test server, to compare with.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Save results here.")
@click.option("--draw", "saved", type=click.Path(exists=True, path_type=Path),
              help="Measure nothing: tables and pictures of a saved report or folder.")  # fmt: skip
@click.option("--kernel", default="7.3", show_default=True, help="Of a guest.")
@click.option("--cpus", type=int, default=2, show_default=True, help="Of a guest.")
@click.option("--icount", is_flag=True, help="Count instructions: in a guest, 1 CPU.")
@click.option("--vm", is_flag=True, help="In a guest even if this kernel has ublk_drv.")
@click.option("--here", is_flag=True, help="Never in a guest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of tables.")
@click.option("--guest", "shared", hidden=True, type=click.Path(path_type=Path))
def command(
    names: tuple[str, ...],
    subjects: tuple[str, ...],
    jobs: tuple[str, ...],
    backings: tuple[str, ...],
    seconds: float | None,
    rounds: int | None,
    budget: float,
    kublk: Path | None,
    out: Path | None,
    saved: Path | None,
    kernel: str,
    cpus: int,
    icount: bool,
    vm: bool,
    here: bool,
    as_json: bool,
    as_markdown: bool,
    shared: Path | None,
) -> None:
    """Compare block devices over one backing file by fio.

    Interleaved, in random order, repeated until the 95 % interval is narrow or the time is up. Runs
    as root on a kernel with ublk_drv; without one, in a guest (tools/vm.py).
    """
    console = Console(stderr=True, markup=False)
    if shared:
        with shown(console) as tell:
            serve_guest(shared, tell)
        return
    if saved:
        report = load(saved)
        _show(report, as_json, as_markdown)
        _draw(report, out or (saved if saved.is_dir() else saved.parent), console)
        return
    chosen = [
        _adjust(profile, subjects, jobs, backings, seconds, rounds, icount, kublk)
        for profile in _profiles(names)
    ]
    if out and not can_draw():
        console.print(NO_MATPLOTLIB)
    in_guest = not here and (vm or not host_has_ublk())
    where = Where(kernel, cpus, in_guest)
    kublk = kublk.resolve() if kublk else None
    report = _measure(chosen, where, budget, kublk, out, console)
    _show(report, as_json, as_markdown)
    if out:
        _draw(load(out), out, console)


def _measure(
    profiles: list[Profile],
    where: Where,
    budget: float,
    kublk: Path | None,
    out: Path | None,
    console: Console,
) -> Report:
    reports = []
    for number, profile in enumerate(profiles, 1):
        if len(profiles) > 1:
            left = (len(profiles) - number + 1) * budget / 60
            what = f"{number} of {len(profiles)}: {profile.name} ({profile.about})"
            console.print(f"{what}, at most {left:.0f} min left")
        with shown(console) as tell:
            report = measure(profile, where, budget, kublk, tell)
        if out:
            console.print(f"saved in {save(report, out, profile.name)}")
        reports.append(report)
    return merge(reports)


def _profiles(names: tuple[str, ...]) -> list[Profile]:
    chosen: dict[str, Profile] = {}
    for name in names or (QUICK,):
        wanted = PIECES if name == FULL else (PROFILES[name],)
        chosen.update({profile.name: profile for profile in wanted})
    return list(chosen.values())


def _adjust(
    profile: Profile,
    subjects: tuple[str, ...],
    jobs: tuple[str, ...],
    backings: tuple[str, ...],
    seconds: float | None,
    rounds: int | None,
    icount: bool,
    kublk: Path | None,
) -> Profile:
    try:
        wanted = tuple(_job(text) for text in jobs)
        places = tuple(Backing(text) for text in backings)
        for place in places:
            place.check()
        for text in subjects:
            parse_subject(text, kublk)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if wanted or places:
        wanted = wanted or tuple(Job(rw) for rw in PATTERNS)
        names = subjects or profile.parts[0].subjects
        parts = tuple(Cells(names, place, wanted) for place in places or (TMPFS,))
        profile = replace(profile, parts=parts)
    elif subjects:
        parts = tuple(replace(part, subjects=subjects) for part in profile.parts)
        profile = replace(profile, parts=parts)
    profile = profile if kublk else without_kublk(profile)
    if seconds:
        profile = replace(profile, seconds=seconds)
    if rounds:
        profile = replace(profile, nr_rounds_min=rounds, nr_rounds_max=rounds)
    if icount:
        profile = replace(profile, icount=True, ramp_s=RAMP_S)
    return profile


def _job(text: str) -> Job:
    try:
        return parse_job(text)
    except ValueError:
        raise ValueError(f"job {text!r} is not RW:BS:DEPTH[:JOBS[:BATCH]]") from None


def _show(report: Report, as_json: bool, as_markdown: bool) -> None:
    if as_json:
        print(to_json(report))
    elif as_markdown:
        print(markdown(report), end="")
    else:
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(width=None if known else WIDTH)
        for table in all_tables(report):
            console.print(table)


def _draw(report: Report, directory: Path, console: Console) -> None:
    if not can_draw():
        console.print(NO_MATPLOTLIB)
        return
    for path in draw(report, directory):
        if path.suffix == ".png":
            console.print(str(path))


def main() -> None:
    """Run the program; errors become one line on stderr."""
    # As for Ctrl-C: what was mounted and added goes again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except CompareError as error:
        print(f"fio_compare: {error}", file=sys.stderr)
        sys.exit(1)
