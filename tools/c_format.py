#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Check that the C files are as clang-format would have them, or make them so.

    tools/c_format.py           name each place that is not, and exit 1
    tools/c_format.py --fix     change them

In: the C files of the checkout, and .clang-format. Blanks inside a line do not count: the tabs that
line up a struct's fields and the comments behind them are ours, and clang-format would undo them.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ublk_loop/csrc", "tests/csrc")
OLDEST = 18  # earlier ones break lines in other places


def find_clang_format() -> str:
    """Return the path of clang-format: the virtual environment's, or else the system's."""
    path = shutil.which("clang-format", path=str(Path(sys.executable).parent))
    path = path or shutil.which("clang-format")
    if path is None:
        raise SystemExit("c_format: clang-format is missing: pip install -e '.[dev]'")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"version (\d+)", version.stdout)
    if not match or int(match[1]) < OLDEST:
        raise SystemExit(f"c_format: clang-format {OLDEST} is needed: pip install -e '.[dev]'")
    return path


def significant(line: str) -> str:
    """Return a line with each run of blanks behind its indentation as one space."""
    return re.sub(r"(?<=\S)[ \t]+(?=\S)", " ", line)


def formatted(text: str, wanted: str) -> str:
    """Return ``text`` with the lines that differ from ``wanted`` in more than blanks replaced."""
    ours, theirs = text.splitlines(keepends=True), wanted.splitlines(keepends=True)
    matcher = difflib.SequenceMatcher(
        None, [*map(significant, ours)], [*map(significant, theirs)], autojunk=False
    )
    lines: list[str] = []
    for tag, begin, end, their_begin, their_end in matcher.get_opcodes():
        lines += ours[begin:end] if tag == "equal" else theirs[their_begin:their_end]
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fix", action="store_true", help="change the files")
    fix = parser.parse_args().fix
    clang_format = find_clang_format()
    nr_wrong = 0
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.[ch]")):
        text = path.read_text()
        done = subprocess.run(
            [clang_format, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        wanted = formatted(text, done.stdout)
        if wanted == text:
            continue
        nr_wrong += 1
        if fix:
            path.write_text(wanted)
            continue
        name = str(path.relative_to(ROOT))
        old, new = text.splitlines(keepends=True), wanted.splitlines(keepends=True)
        sys.stdout.writelines(difflib.unified_diff(old, new, name, "tools/c_format.py --fix", n=1))
    return 1 if nr_wrong and not fix else 0


if __name__ == "__main__":
    sys.exit(main())
