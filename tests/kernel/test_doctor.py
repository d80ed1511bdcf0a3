"""``ublk doctor`` on the real driver: planted faults are found, and mended where it says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ublk_loop import cli, uapi
from ublk_loop.control import Control

WaitUntil = Callable[..., None]
pytestmark = pytest.mark.usefixtures("state_dir")


@pytest.fixture
def added(add: Callable[..., dict[str, Any]], wait_until: WaitUntil) -> dict[str, Any]:
    """A null device that outlives its server, and has its scheduler."""
    device = add("-t null -r 1")
    scheduler = Path(f"/sys/block/ublkb{device['dev_id']}/queue/scheduler")
    wait_until(lambda: "[none]" in scheduler.read_text())
    return device


def _run(line: str) -> Result:
    # Not the fixture `here`, which has the driver open: one test unloads it.
    return CliRunner().invoke(cli.cli, line.split(), prog_name="ublk")


def _found(*options: str) -> list[dict[str, Any]]:
    """What doctor says of devices, servers and state; what the guest is like is another matter."""
    result = _run(" ".join(["doctor", "--json", *options]))
    findings: list[dict[str, Any]] = json.loads(result.stdout)
    assert result.exit_code == any(one["severity"] == "problem" for one in findings)
    return [one for one in findings if one["topic"] in ("devices", "servers", "state", "driver")]


def _texts(*options: str) -> list[str]:
    return [one["text"] for one in _found(*options) if one["severity"] != "note"]


def test_doctor_finds_no_fault_in_a_device_that_has_none(added: dict[str, Any]) -> None:
    assert _texts() == []


def test_doctor_finds_and_mends_a_wrong_scheduler_and_what_is_left_over(
    added: dict[str, Any], state_dir: Path
) -> None:
    scheduler = Path(f"/sys/block/ublkb{added['dev_id']}/queue/scheduler")
    scheduler.write_text("mq-deadline")
    Path(f"/proc/{added['server_pid']}/oom_score_adj").write_text("0")
    stale = state_dir / "77.json"
    stale.write_text("{}")
    texts = _texts()
    assert len(texts) == 3
    for word in ("mq-deadline", "OOM", str(stale)):
        assert any(word in text for text in texts)
    assert _texts("--fix") == []
    assert "[none]" in scheduler.read_text()
    assert not stale.exists()


def test_doctor_finds_a_device_that_waits_and_one_that_is_dead(
    added: dict[str, Any],
    add: Callable[..., dict[str, Any]],
    control: Control,
    wait_until: WaitUntil,
    state_dir: Path,
) -> None:
    dead = add("-t null")
    for one, after in ((added, uapi.UBLK_S_DEV_QUIESCED), (dead, uapi.UBLK_S_DEV_DEAD)):
        os.kill(one["server_pid"], signal.SIGKILL)
        wait_until(
            lambda one=one, after=after: control.get_dev_info(one["dev_id"]).state == after,
            timeout_s=20,
        )
    fixes = {one["fix"]: one["can_fix"] for one in _found() if one["severity"] == "problem"}
    assert fixes == {
        f"ublk recover -n {added['dev_id']}": False,
        f"ublk del -n {dead['dev_id']}": True,
    }
    result = _run("doctor --fix")
    assert result.exit_code == 1  # the one that waits is for a person to decide
    assert not os.path.exists(f"/dev/ublkc{dead['dev_id']}")
    assert not (state_dir / f"{dead['dev_id']}.json").exists()
    assert _run(f"recover -n {added['dev_id']}").exit_code == 0
    assert _texts() == []


def test_doctor_loads_the_driver(run: Callable[..., str]) -> None:
    run("modprobe", "--remove", "ublk_drv")
    try:
        (finding,) = [one for one in _found() if one["severity"] == "problem"]
        assert "is not loaded" in finding["text"]
        assert finding["can_fix"]
        assert _texts("--fix") == []
        assert os.path.exists("/dev/ublk-control")
    finally:
        run("modprobe", "ublk_drv")
