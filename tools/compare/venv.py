"""Finds the project's virtual environment, so that the tools start from a fresh shell."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
NEEDED = ("click", "rich", "ublk_loop")


def use_venv(program: str) -> None:
    """Go on under .venv's interpreter, if there is one; else make sure that this one will do.

    Ends the program with one line if neither has what is needed.
    """
    python = VENV / "bin/python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), *sys.argv])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{program}: {', '.join(missing)} not found"
        sys.exit(f"{what}: run `tools/test.sh --quick` once, which builds {VENV}")


__all__ = ["use_venv"]
