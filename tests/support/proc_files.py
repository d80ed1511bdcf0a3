"""What /proc says of processes: their memory, and whether their threads wait for a disk."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def memory_kib(pid: int) -> dict[str, int]:
    """Return the memory of a process by kind, as smaps_rollup names it: Pss, Private_Dirty, ..."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.M)}


def nr_sleeping_on_disk() -> int:
    """How many threads of this process sit in the kernel and wait for a disk."""
    nr = 0
    for tid in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            nr += Path("/proc/self/task", tid, "stat").read_text().rpartition(") ")[2][0] == "D"
    return nr
