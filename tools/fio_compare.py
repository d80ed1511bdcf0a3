#!/usr/bin/env python3
"""Compare block devices over one backing file by fio: ours, /dev/loop, the raw file, any peer.

In: subjects, and profiles (matrices of backings and fio jobs). Out: tables, JSON with everything
that was measured and the settings it was measured under, pictures, and the project's speed goals
with what was measured of each. This file only finds the environment; tools/compare/ does the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare.venv import use_venv

if __name__ == "__main__":
    use_venv("fio_compare")
    from compare.cli import main

    main()
