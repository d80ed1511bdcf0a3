"""Cuts by killing the machine: what was synced through the device is there after the next boot.

A guest serves a file on its disk's ext4 as a device, and writes records with known fsync points to
it (tests/support/records.py), or to a file system on it. Its disk is an image that the host keeps.
The host hears of each acknowledged record by the guest's output, kills the virtual machine at a
random moment, boots the next one from the same image, and has it look for every record that was
acknowledged. One cut in ten comes while the last one is being recovered from.

    python tests/soak/machine_cuts.py raw                 on the device itself
    python tests/soak/machine_cuts.py ext4 --cuts 20      in a file system on it (direct I/O)
    python tests/soak/machine_cuts.py xfs --seed 7        the same (policy 2014)

All that the guest had in memory is lost: its page cache, the servers, what the kernel had queued.
What it had written to its disk is not, flushed or not: that the host keeps. So this finds a flush
that was left out above the disk, and tests/kernel/test_power_cut.py one that was left out at it.

Needs no root and no driver on the host. The first failure ends the run with exit code 1, says what
is lost, and leaves the image.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from records import Records  # noqa: E402

MIB = 1 << 20
DISK_BYTES = 448 * MIB
# Size of the device in MiB, and words for `ublk add`.
STACKS = {"raw": (8, ""), "ext4": (32, "--direct_io"), "xfs": (320, "--policy 2014")}
MACHINE = "tools/vm.py --vm --disk {image} --"
BOOT_TIMEOUT_S = 300.0
LONGEST_S = 3.0  # from the start of the load to the cut
LONGEST_RECOVERY_S = 0.5
CYCLE = 1 << 20  # numbers of records for each machine


# ---- in the guest ----


def guest(stack: str, disk: str, seed: int, nrs_acknowledged: list[int], last: bool) -> None:
    """Look for the records of the machines before this one, then write this one's for ever."""
    dev_mib, words = STACKS[stack]
    begin = CYCLE * len(nrs_acknowledged)
    if begin == 0:
        _make(stack, disk, dev_mib)
    print("recovers", flush=True)
    with _mounted(disk) as below:
        ublk = [sys.executable, "-m", "ublk_loop"]
        _run(*ublk, "add", "-n", "0", *words.split(), "-t", "loop", "-f", f"{below}/backing")
        dev = "/dev/ublkb0"
        with _mounted(dev) if stack != "raw" else contextlib.nullcontext(Path(dev)) as place:
            ranges = (range(CYCLE * i, CYCLE * i + nr) for i, nr in enumerate(nrs_acknowledged))
            Records(place, seed).check(itertools.chain.from_iterable(ranges), begin)
            print("checked", flush=True)
            if not last:
                acknowledge = partial(print, "acknowledged", flush=True)
                Records(place, seed).write(begin, begin + CYCLE, acknowledge)
        if stack != "raw":
            _run(*{"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[stack], dev)
        _run(*ublk, "del", "-n", "0")
    _run("e2fsck", "-fn", disk)


def _make(stack: str, disk: str, dev_mib: int) -> None:
    _run("mkfs.ext4", "-q", disk)
    with _mounted(disk) as below:
        path = below / "backing"
        path.touch()
        os.truncate(path, dev_mib * MIB)
        if stack != "raw":
            _run(f"mkfs.{stack}", "-q", path)


@contextlib.contextmanager
def _mounted(source: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    _run("mount", source, folder)
    yield folder
    _run("umount", folder)


def _run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


# ---- on the host ----


class Boot:
    """One virtual machine; ``run`` ends with its end, by a cut or by itself."""

    def __init__(self, command: list[str], image: Path) -> None:
        self.nr_acknowledged: int | None = None  # None: it has not checked what was before
        self._image = image
        self._last_words = ""
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def run(self, cut_after_s: Callable[[str], float | None]) -> int:
        """Return its exit code; ``cut_after_s(line)`` says when to cut, once it said ``line``."""
        assert self._process.stdout is not None
        timer = threading.Timer(BOOT_TIMEOUT_S, self._cut)
        timer.start()
        for line in self._process.stdout:
            delay_s = cut_after_s(line.strip())
            if delay_s is not None:
                timer.cancel()
                timer = threading.Timer(delay_s, self._cut)
                timer.start()
            self._hear(line)
        timer.cancel()
        code = self._process.wait()
        self._wait_for_image()
        return code

    def explain(self) -> str:
        """Return what it said last."""
        return self._last_words

    def _hear(self, line: str) -> None:
        words = line.split()
        if words == ["checked"]:
            self.nr_acknowledged = 0
        elif len(words) == 2 and words[0] == "acknowledged" and line.endswith("\n"):
            self.nr_acknowledged = int(words[1]) % CYCLE + 1
        else:
            self._last_words = (self._last_words + line)[-4096:]

    def _cut(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _wait_for_image(self) -> None:
        # The machine holds a lock on it, and is not our child.
        deadline = time.monotonic() + 30
        with self._image.open("r+b") as file:
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError:
                    if time.monotonic() > deadline:
                        sys.exit("the machine survived its cut")
                time.sleep(0.01)


def host(arguments: argparse.Namespace, image: Path) -> int:
    """Cut so often; return an exit code."""
    rng = random.Random(f"{arguments.stack} {arguments.seed}")
    begun = time.monotonic()
    machine = arguments.machine.format(image=image).split()
    words = [sys.executable, str(Path(__file__).resolve()), arguments.stack, "--guest"]
    nrs_acknowledged: list[int] = []  # by each machine
    nr_in_recovery = 0
    for nr_cuts in range(arguments.cuts + 1):
        last = nr_cuts == arguments.cuts
        in_recovery = bool(nrs_acknowledged) and rng.random() < 0.1
        delay_s = rng.random() * (LONGEST_RECOVERY_S if in_recovery else LONGEST_S)
        cue = "" if last else "recovers" if in_recovery else "checked"
        known = ",".join(map(str, nrs_acknowledged)) or "-"
        options = [arguments.disk, str(arguments.seed), known, str(int(last))]
        boot = Boot([*machine, *words, *options], image)
        code = boot.run(lambda line, cue=cue, s=delay_s: s if line == cue else None)  # type: ignore[misc]
        if code != (0 if last else -signal.SIGKILL):
            print(boot.explain(), f"after {nr_cuts} cuts: exit code {code}", file=sys.stderr)
            return 1
        nr_in_recovery += boot.nr_acknowledged is None
        nrs_acknowledged.append(boot.nr_acknowledged or 0)
    took_s = time.monotonic() - begun
    where = f"{nr_in_recovery} of them in recovery, {sum(nrs_acknowledged)} records acknowledged"
    print(
        f"{arguments.stack}, seed {arguments.seed}: {arguments.cuts} cuts, {where}, {took_s:.0f} s"
    )
    return 0


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stack", choices=STACKS)
    add("--cuts", type=int, default=100, metavar="N", help="default: 100")
    add("--seed", type=int, default=1, metavar="N", help="default: 1")
    add("--machine", default=MACHINE, metavar="COMMAND", help=f"default: {MACHINE}")
    add("--disk", default="/dev/vda", metavar="NODE", help="of {image} in it; default: /dev/vda")
    add("--guest", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.guest:
        disk, seed, known, last = arguments.guest
        nrs_acknowledged = [int(word) for word in known.split(",") if word != "-"]
        guest(arguments.stack, disk, int(seed), nrs_acknowledged, last == "1")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="machine-cuts-"))
    image = folder / "disk"
    image.touch()
    os.truncate(image, DISK_BYTES)
    code = host(arguments, image)
    if code == 0:
        image.unlink()
        folder.rmdir()
    else:
        print(f"the image: {image}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
