"""csrc/workqueue.c on plain threads under ThreadSanitizer and AddressSanitizer.

The program is tests/csrc/workqueue_stress.c; what it promises to find is written there.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "ublk_loop" / "csrc"
SOURCES = [ROOT / "tests" / "csrc" / "workqueue_stress.c", CSRC / "workqueue.c"]
# What a sanitizer's exit code must not be mistaken for.
SANITIZER_EXIT_CODE = 66


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C compiler ({compiler[0]})")
    path = tmp_path_factory.mktemp("sanitizer") / "workqueue_stress"
    options = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"]
    sanitizers = [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    files = [f"-I{CSRC}", *map(str, SOURCES), "-pthread", "-o", str(path)]
    done = subprocess.run(
        [*compiler, *options, *sanitizers, *files], capture_output=True, text=True
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip(f"the runtime of -fsanitize={request.param} is not installed")
    assert done.returncode == 0, done.stderr
    return path


def run(program: Path, scenario: str, seed: int, nr_ops: int) -> str:
    command = [str(program), scenario, str(seed), str(nr_ops)]
    if shutil.which("setarch"):
        # ThreadSanitizer of gcc 12 cannot live with the many random bits that newer kernels put
        # into addresses.
        command = ["setarch", platform.machine(), "-R", *command]
    options = f"exitcode={SANITIZER_EXIT_CODE}:halt_on_error=1:abort_on_error=0"
    env = os.environ | {"TSAN_OPTIONS": options, "ASAN_OPTIONS": options}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_promise_is_broken_when_everybody_works_at_once(program: Path, seed: int) -> None:
    report = run(program, "stress", seed, 8000)
    counters = [int(number) for number in re.findall(r"\d+", report)]
    # The items, the frees, Python's turns, threads made, culled and missing, rescues: it was there.
    assert len(counters) == 9
    reached = dict(zip(("runs", "parcels", "attended", "created"), counters, strict=False))
    assert all(reached.values()), report
    assert sum(counters[4:]) > 0, report


@pytest.mark.parametrize("seed", [1, 2], ids=["fails", "hangs"])
def test_rescuers_finish_the_work_when_making_a_thread(program: Path, seed: int) -> None:
    run(program, "rescue", seed, 500)


def test_nothing_is_left_behind_when_workqueues_and_pools_come_and_go(program: Path) -> None:
    run(program, "churn", 1, 60)
