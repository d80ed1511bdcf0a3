"""What /proc says of processes: their memory, and what their threads wait for."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def memory_kib(pid: int) -> dict[str, int]:
    """Return the memory of a process by kind, as smaps_rollup names it: Pss, Private_Dirty, ..."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.M)}


def thread_states(pid: int) -> list[str]:
    """Return the state of each thread of a process, as ps shows it: R, S, D, T, ..."""
    states = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
            states.append(stat.rpartition(") ")[2][0])
    return states


def nr_sleeping_on_disk() -> int:
    """How many threads of this process sit in the kernel and wait for a disk."""
    return thread_states(os.getpid()).count("D")


def has_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached all threads of a process: until then one may do some more."""
    return set(thread_states(pid)) == {"T"}
