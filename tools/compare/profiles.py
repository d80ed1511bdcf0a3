"""The matrices that can be measured by name.

``full`` is every piece below, each of which fits in about four minutes on two emulated CPUs; the
table of goals (goals.py) is read off all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .backings import NONE, Backing
from .jobs import IDLE, Job

PATTERNS = ("randread", "read", "randwrite", "write")
RANDOM = ("randread", "randwrite")
SEQUENTIAL = ("read", "write")
TMPFS, EXT4, NO_BACKING = Backing("tmpfs"), Backing("ext4"), Backing(NONE)
# Where instructions are counted random writes have a file of their own, as it changes, and of this
# size soon all of it: csrc/folios.c.
NOT_RANDWRITE = ("randread", "read", "write")
EXT4_OWN = Backing("ext4", 64 << 20)

# Ours under each policy, and the peer in every stock mode.
BASE, POLICY_2014, DIRECT = "ublk:--policy base", "ublk:--policy 2014", "ublk:--direct_io"
KUBLK_MODES = (
    "kublk",
    "kublk:-u",
    "kublk:--auto_zc",
    "kublk:--batch",
    "kublk:--batch --auto_zc",
)
OUR_NULL, KUBLK_NULL, KUBLK_NULL_BATCH = "ublk:-t null", "kublk:-t null", "kublk:-t null --batch"


@dataclass(frozen=True)
class Cells:
    """Jobs on one backing, on one set of subjects; the first subject is the baseline."""

    subjects: tuple[str, ...]
    backing: Backing
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Profile:
    """What to measure, for how long a run, and how often."""

    name: str
    about: str
    parts: tuple[Cells, ...]
    seconds: float = 2.0
    nr_rounds_min: int = 3
    nr_rounds_max: int = 15
    width: float = 0.1  # an interval no wider, relative to its median, is narrow
    icount: bool = False
    ramp_s: float = 0.0  # how long fio runs before it counts
    once: tuple[str, ...] = ()  # subjects of the first round only


def _jobs(patterns: tuple[str, ...], **settings: int | str) -> tuple[Job, ...]:
    return tuple(replace(Job(rw), **settings) for rw in patterns)  # type: ignore[arg-type]


def _part(backing: Backing, jobs: tuple[Job, ...], *subjects: str) -> Cells:
    return Cells(subjects, backing, jobs)


_ALL = ("loop", "ublk", *KUBLK_MODES)
_DEPTHS = tuple(Job("randread", iodepth=1 << power) for power in range(0, 9, 2))

PIECES = (
    Profile(
        "icount",
        "goals 1 and 2: instructions per I/O",
        (
            _part(TMPFS, _jobs(PATTERNS), "loop", "ublk", POLICY_2014, *KUBLK_MODES),
            _part(EXT4, _jobs(NOT_RANDWRITE), "loop", "ublk", POLICY_2014, *KUBLK_MODES),
            _part(EXT4_OWN, _jobs(("randwrite",)), "loop", "ublk", POLICY_2014, *KUBLK_MODES),
        ),
        seconds=0.2,
        nr_rounds_min=3,
        nr_rounds_max=3,
        icount=True,
        ramp_s=0.1,
    ),
    Profile("tmpfs", "goal 3 on tmpfs", (_part(TMPFS, _jobs(PATTERNS), *_ALL),)),
    # kublk's file is open for direct I/O, which bypasses the page cache here, as ours is if asked.
    Profile("ext4", "goal 3 on ext4", (_part(EXT4, _jobs(PATTERNS), *_ALL, DIRECT),)),
    Profile(
        "depth1",
        "goal 4: latency",
        (_part(TMPFS, _jobs(RANDOM, iodepth=1), "loop", "ublk", *KUBLK_MODES),),
    ),
    Profile(
        "batch16",
        "goal 5: fio submits and reaps 16 at a time",
        (_part(TMPFS, _jobs(RANDOM, batch=16), *_ALL),),
    ),
    Profile(
        "one-cpu",
        "goal 6: fio and server share a CPU",
        (
            _part(TMPFS, _jobs(RANDOM, pin="all"), "loop", "ublk", "kublk", "kublk:--batch"),
            _part(TMPFS, _jobs(RANDOM, pin="server"), "loop", "ublk", "kublk", "kublk:--batch"),
        ),
    ),
    Profile(
        "latency",
        "goal 7: a cold disk with latency",
        tuple(
            _part(
                Backing(f"null_blk:{usec}"),
                _jobs(("randread",)),
                *("loop", "loop-direct", "ublk", POLICY_2014, "kublk"),
            )
            for usec in (100, 1000)
        ),
    ),
    Profile(
        "loop-mq",
        "goal 8: the table of the loop driver's conversion to blk-mq",
        (_part(Backing("null_blk:500"), _jobs(PATTERNS), BASE, POLICY_2014),),
    ),
    Profile(
        "queues",
        "goal 9: 2 jobs on 2 queues",
        (_part(TMPFS, _jobs(RANDOM, numjobs=2, queues=2), *_ALL),),
    ),
    Profile(
        "sequential",
        "goal 10: large sequential requests",
        tuple(
            _part(
                backing,
                tuple(Job(rw, bs, 16) for bs in ("64k", "1m") for rw in SEQUENTIAL),
                *("loop-direct", "loop", "ublk", DIRECT),
            )
            for backing in (TMPFS, EXT4)
        ),
        seconds=1.5,
    ),
    Profile(
        "null",
        "goal 11: null targets",
        (
            _part(
                NO_BACKING,
                (Job("randread", iodepth=1), Job("randread")),
                *(KUBLK_NULL, KUBLK_NULL_BATCH, OUR_NULL),
            ),
        ),
    ),
    Profile(
        "idle",
        "goal 12: wake-ups of an idle server",
        (_part(TMPFS, (Job(IDLE),), "ublk"), _part(TMPFS, (Job(IDLE, queues=2),), "ublk")),
        nr_rounds_max=3,
    ),
    Profile(
        "depths",
        "IOPS over depth",
        (_part(TMPFS, _DEPTHS, "loop", "ublk", "kublk", "kublk:--batch"),),
        seconds=1.5,
    ),
)
FAIRNESS = Profile(
    "fairness",
    "a job alone, and beside a busy device of the same kind",
    (
        _part(
            TMPFS,
            (
                *(Job("randread", iodepth=1), Job("randread", iodepth=1, beside=64)),
                *(Job("randread"), Job("randread", beside=64)),
            ),
            *("loop", "ublk", "kublk", "kublk:--batch"),
        ),
    ),
    seconds=1.5,
)
QUICK = Profile(
    "quick",
    "ours beside /dev/loop, four patterns",
    (_part(TMPFS, _jobs(PATTERNS), "loop", "ublk"),),
    seconds=3,
    nr_rounds_max=3,
)
# Short runs: counted instructions repeat to 0.5 % once a run is warm.
GATE = Profile(
    "gate",
    "instructions per I/O, for tools/icount_gate.py",
    (
        _part(TMPFS, _jobs(PATTERNS), "loop", "ublk"),
        _part(TMPFS, _jobs(("randread",)), "loop", POLICY_2014),
        _part(EXT4, _jobs(NOT_RANDWRITE), "loop", "ublk"),
        _part(EXT4_OWN, _jobs(("randwrite",)), "loop", "ublk"),
        _part(NO_BACKING, _jobs(("randread",)), OUR_NULL),
    ),
    seconds=0.2,
    nr_rounds_min=2,
    nr_rounds_max=2,
    icount=True,
    ramp_s=0.1,
    once=("loop",),
)
PROFILES = {profile.name: profile for profile in (QUICK, FAIRNESS, *PIECES)}
FULL = "full"


def without_kublk(profile: Profile) -> Profile:
    """Return the profile with what needs no kublk: a comparison where there is none."""
    parts = []
    for part in profile.parts:
        subjects = tuple(name for name in part.subjects if name.partition(":")[0] != "kublk")
        parts += [replace(part, subjects=subjects)] if subjects else []
    return replace(profile, parts=tuple(parts))
