"""Any order of add, write, resize, recover, upgrade, delete and kill, against a model.

UBLK_LOOP_SOAK_LIVES is how many lives are tried, of UBLK_LOOP_SOAK_STEPS steps; by default few, and
always the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from lives import Lives, World

from ublk_loop import client

SOAK_LIVES = os.environ.get("UBLK_LOOP_SOAK_LIVES")
NR_LIVES = int(SOAK_LIVES or "3")
NR_STEPS = int(os.environ.get("UBLK_LOOP_SOAK_STEPS", "8"))
SEED = int(os.environ.get("UBLK_LOOP_SOAK_SEED", "1"))


@pytest.mark.deadline(200 + 120 * NR_LIVES)
def test_devices_are_what_the_model_says_after_any_order_of_steps(
    tmp_path: Path,
    state_dir: Path,
    features: int,
    open_block: Any,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("UBLK_LOOP_DAEMON")
    world = World(tmp_path, state_dir, features, open_block, wait_until)
    try:
        _run(world)
    finally:
        client.ask({"command": "stop"})
    print(f"{NR_LIVES} lives, {Lives.nr_steps} steps")


def _run(world: World) -> None:
    phases = [Phase.generate, Phase.shrink] if SOAK_LIVES else [Phase.generate]
    run_state_machine_as_test(
        seeded(SEED)(lambda: Lives(world)),
        settings=settings(
            max_examples=NR_LIVES,
            stateful_step_count=NR_STEPS,
            database=None,
            phases=phases,
            derandomize=not SOAK_LIVES,
            suppress_health_check=list(HealthCheck),
        ),
    )
