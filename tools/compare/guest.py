"""Runs a profile here, or in a guest that runs this very program there (tools/vm.py).

A profile goes into the guest as options, and comes back as a JSON report in a shared folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .backings import Backing
from .errors import CompareError, no_deadlines
from .jobs import Job
from .profiles import Cells, Profile
from .progress import Progress
from .results import Report, environment, load, save
from .runner import Runner

TOOLS = Path(__file__).resolve().parents[1]
PROGRAM = TOOLS / "fio_compare.py"
BOOT_S = 30
ICOUNT_LIMIT_S = 1200
OVERRUN_S = 300  # what the first round of each cell, and taking down, may take beyond the budget
SPEC = "UBLK_LOOP_COMPARE"  # passed into the guest by tools/vm.py, as all of UBLK_LOOP_* is


@dataclass(frozen=True)
class Where:
    """What to measure on."""

    kernel: str = "7.3"
    nr_cpus: int = 2
    in_guest: bool = False


def host_has_ublk() -> bool:
    """Whether this machine's own kernel will do."""
    if os.geteuid() != 0:
        return False
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "ublk_drv"], check=False)
    return Path("/dev/ublk-control").exists()


def measure(
    profile: Profile,
    where: Where,
    budget_s: float,
    kublk: Path | None,
    progress: Progress,
) -> Report:
    """Measure a profile, in a guest if it is asked for or has to be.

    :raises CompareError: if that fails.
    """
    if where.in_guest or profile.icount:
        return _in_guest(profile, where, budget_s, kublk)
    return Runner(profile, budget_s, environment(False), kublk, progress).run()


def _in_guest(profile: Profile, where: Where, budget_s: float, kublk: Path | None) -> Report:
    machine = ["--icount"] if profile.icount else ["--cpus", str(where.nr_cpus)]
    # An instruction-counting guest's clock is no measure of a budget, but its rounds are fixed.
    inside_s = math.inf if profile.icount else budget_s
    spec = {"profile": asdict(profile), "budget_s": inside_s, "kublk": str(kublk or "")}
    with tempfile.TemporaryDirectory(prefix="ublk-compare-", dir="/var/tmp") as name:
        limit = ICOUNT_LIMIT_S if profile.icount else BOOT_S + budget_s + OVERRUN_S
        vm = [sys.executable, str(TOOLS / "vm.py"), "--vm", "--kernel", where.kernel, *machine]
        vm += ["--memory", f"{_memory_mib(profile)}M"]
        vm += ["--timeout", f"{limit:.0f}", "--shared", name]
        command = [*vm, "--", sys.executable, str(PROGRAM), "--guest", name]
        code = subprocess.call(command, env={**os.environ, SPEC: json.dumps(spec)})
        if code:
            raise CompareError(f"profile {profile.name}: the guest's exit code is {code}")
        return load(Path(name))


def _memory_mib(profile: Profile) -> int:
    # Every subject has a file of its own; a file of a disk is there twice, in the disk and cached.
    sizes = [
        len(part.subjects) * part.backing.nr_bytes * (1 if part.backing.name == "tmpfs" else 2)
        for part in profile.parts
    ]
    return max(2048, (max(sizes) >> 20) + 1024)


def serve_guest(directory: Path, progress: Progress) -> None:
    """Measure what the environment says, and write the report into the folder: inside the guest."""
    spec = json.loads(os.environ[SPEC])
    profile = _profile(spec["profile"])
    kublk = Path(spec["kublk"]) if spec["kublk"] else None
    if profile.icount:
        no_deadlines()
    here = environment(profile.icount)
    save(Runner(profile, spec["budget_s"], here, kublk, progress).run(), directory, profile.name)


def _profile(value: dict[str, Any]) -> Profile:
    parts = tuple(
        Cells(
            tuple(part["subjects"]),
            Backing(**part["backing"]),
            tuple(Job(**job) for job in part["jobs"]),
        )
        for part in value["parts"]
    )
    return Profile(**{**value, "parts": parts, "once": tuple(value["once"])})
