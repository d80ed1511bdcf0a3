#!/usr/bin/env python3
"""Fail if a 4 KiB request costs more instructions than recorded in tools/icount_baseline.json.

Measured in an emulated guest whose clock counts instructions, fio's own included: whatever else
this machine does, and however fast it is, figures repeat to half a percent. More than 3 % worse
fails; more than 3 % better asks to record. Takes about two minutes.

  tools/icount_gate.py               measure and compare
  tools/icount_gate.py --record      measure and store: commit the file with the change behind it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare.venv import use_venv


def main() -> int:
    """Run the program; errors become one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="store what is measured")
    arguments = parser.parse_args()
    use_venv("icount_gate")
    from compare.errors import CompareError

    try:
        return _gate(arguments.record)
    except CompareError as error:
        print(f"icount_gate: {error}", file=sys.stderr)
        return 1


def _gate(record: bool) -> int:
    from compare import gate
    from compare.guest import Where, measure
    from compare.profiles import GATE
    from compare.progress import silent
    from rich.console import Console

    baseline = None if record else gate.load_baseline()
    report = measure(GATE, Where(in_guest=True), 0, None, silent)
    made_with = _made_with(report.cells[0].environment.kernel)
    stored = baseline or gate.store_baseline(report, made_with)
    verdicts = gate.judge(report, stored)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(gate.gate_table(verdicts, stored, report))
    for line in gate.advice(verdicts, stored, made_with):
        print(f"icount_gate: {line}", file=sys.stderr)
    return 1 if any(verdict.fails for verdict in verdicts) else 0


def _made_with(kernel: str) -> dict[str, str]:
    # What the figures depend on beside this project's code.
    def first_line(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]

    compiler, fio = first_line("gcc", "--version"), first_line("fio", "--version")
    return {"kernel": kernel, "compiler": compiler, "fio": fio}


if __name__ == "__main__":
    sys.exit(main())
