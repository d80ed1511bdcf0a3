"""Shows how far a comparison is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

# What runs now, runs done, runs expected, seconds left (None: nobody knows).
Progress = Callable[[str, int, int, "float | None"], None]


def silent(what: str, done: int, expected: int, left_s: float | None) -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """Yield a function that shows progress on the console while the block runs."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()]
    with Bar(*columns, TextColumn("{task.fields[left]}"), console=console) as bar:
        task = bar.add_task("starting", total=None, left="")

        def tell(what: str, done: int, expected: int, left_s: float | None) -> None:
            bar.update(task, description=what, completed=done, total=expected, left=_left(left_s))

        yield tell


def _lines(console: Console) -> Progress:
    # A line for every tenth of the runs.
    told = set()

    def tell(what: str, done: int, expected: int, left_s: float | None) -> None:
        tenth = 10 * done // max(expected, 1)
        if tenth not in told:
            told.add(tenth)
            console.print(f"{done} of {expected} runs {_left(left_s)}: {what}")

    return tell


def _left(left_s: float | None) -> str:
    if left_s is None:
        return ""
    minutes, seconds = divmod(round(left_s), 60)
    return f"({minutes}:{seconds:02} left)"
