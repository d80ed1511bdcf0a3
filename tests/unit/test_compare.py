"""tools/compare without a device: parsing, statistics, merging, tables, goals, the gate."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path[:0] = [str(TOOLS)]

from compare import cli, gate, runner  # noqa: E402
from compare.errors import CompareError  # noqa: E402
from compare.goals import GOALS  # noqa: E402
from compare.jobs import Job, Sample, parse_job, parse_report  # noqa: E402
from compare.profiles import GATE, OUR_NULL, PIECES, PROFILES, without_kublk  # noqa: E402
from compare.results import (  # noqa: E402
    Cell,
    Environment,
    Report,
    from_json,
    load,
    merge,
    save,
    to_json,
)
from compare.runner import Group, Runner  # noqa: E402
from compare.stats import geometric_mean, interval  # noqa: E402
from compare.subjects import Served, node_of, parse_subject  # noqa: E402
from compare.tables import all_tables, markdown  # noqa: E402

TWO_CPUS = Environment("7.3.4", 2, False, "fio-3.33")
ICOUNT = Environment("7.3.4", 1, True, "fio-3.33")


def make_cell(profile: str = "tmpfs", *iops: tuple[float, float], **changes: object) -> Cell:
    """A cell of loop and ublk with a round for each pair of IOPS."""
    rounds = [{"loop": Sample(base), "ublk": Sample(ours)} for base, ours in iops]
    cell = Cell(profile, "tmpfs", Job("randread"), TWO_CPUS, ("loop", "ublk"), rounds)
    return replace(cell, **changes)  # type: ignore[arg-type]


def measured(number: str, *cells: Cell) -> tuple[str, bool | None]:
    goal = next(goal for goal in GOALS if goal.number == number)
    outcome = goal.check(Report(list(cells)))
    return outcome.measured, outcome.met


def test_job_parses_what_the_command_line_names() -> None:
    assert parse_job("randread:4k:64") == Job("randread")
    assert parse_job("write:1m:1:2:16") == Job("write", "1m", 1, numjobs=2, batch=16)
    for text in ("randread", "randread:4k", "randread:4k:x", "randread:4k:1:2:3:4"):
        with pytest.raises(ValueError, match=r".*"):
            parse_job(text)


def test_job_has_a_runtime_in_milliseconds_because_fio_takes_whole_seconds() -> None:
    assert "--runtime=300ms" in Job("read").command("/dev/x", 1 << 20, 0.3)


def test_report_of_fio_gives_figures_of_the_direction_that_ran() -> None:
    way = {"iops": 5.0, "bw_bytes": 20480, "clat_ns": {"percentile": {"99.900000": 3000}}}
    report = {"jobs": [{"error": 0, "read": {}, "write": way}]}
    sample = parse_report(f"note: something\n{json.dumps(report)}", "randwrite")
    assert sample == Sample(5.0, 20480, {"99.9": 3.0})


def test_job_beside_another_device_is_a_second_job_of_the_same_fio() -> None:
    words = Job("read", beside=8).command("/dev/x", 1 << 20, 1, other_path="/dev/y")
    assert words[words.index("--filename=/dev/x") :].count("--filename=/dev/y") == 1
    ways = [{"error": 0, "read": {"iops": iops, "bw_bytes": 0, "clat_ns": {}}} for iops in (5, 7)]
    sample = parse_report(json.dumps({"jobs": ways}), "read")
    assert (sample.iops, sample.beside_iops) == (5, 7)


def test_report_of_fio_raises_when_fio_met_an_error() -> None:
    with pytest.raises(CompareError, match="error 5"):
        parse_report(json.dumps({"jobs": [{"error": 5}]}), "read")


@pytest.mark.parametrize(
    ("output", "node"),
    [
        ('{\n "block_device": "/dev/ublkb3"}', "/dev/ublkb3"),
        ("dev id 4: nr_hw_queues 1 queue_depth 128\n\tmax rq size 1", "/dev/ublkb4"),
        ("/dev/loop7\n", "/dev/loop7"),
    ],
)
def test_node_is_found_in_what_an_add_command_prints(output: str, node: str) -> None:
    assert node_of(output) == node


def test_node_raises_when_an_add_command_names_none() -> None:
    for output in ("", "done"):
        with pytest.raises(CompareError):
            node_of(output)


def test_subject_has_the_queues_of_the_job_unless_it_says_otherwise() -> None:
    assert "-q {queues}" in parse_subject("ublk:--policy base").add
    assert "{queues}" not in parse_subject("ublk:-q 2").add
    assert "{file}" not in parse_subject("ublk:-t null").add


def test_subject_is_a_peer_when_it_has_two_commands() -> None:
    peer = parse_subject("qemu=connect {file};disconnect {node}")
    assert (peer.name, peer.add, peer.delete) == ("qemu", "connect {file}", "disconnect {node}")
    for text in ("nonsense", "a=b", "kublk"):
        with pytest.raises(ValueError, match=text):
            parse_subject(text)


def test_interval_holds_the_median_and_is_all_that_was_seen_when_that_is_little() -> None:
    assert interval([1.0, 3.0]) == interval([3.0, 1.0])
    assert (interval([1.0, 3.0]).low, interval([1.0, 3.0]).high) == (1.0, 3.0)
    assert not interval([1.0, 1.0]).is_narrow(0.1)
    wide = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert wide.low <= wide.median == 3.0 <= wide.high
    assert interval([2.0] * 5).is_narrow(0.01)


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_ratio_is_taken_round_by_round_so_a_slow_round_harms_neither() -> None:
    cell = make_cell("tmpfs", (100, 200), (10, 20), (50, 100))
    ratio = cell.ratio("ublk", "loop")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert make_cell("tmpfs").ratio("ublk", "loop") is None


def test_merge_joins_rounds_of_the_same_cell_and_keeps_other_environments_apart() -> None:
    once = Report([make_cell("tmpfs", (1, 2))], ["2026-01-01"], [2.0])
    peer = {"loop": Sample(1), "kublk": Sample(3)}
    other = make_cell("tmpfs", subjects=("loop", "kublk"), rounds=[peer])
    counted = make_cell("tmpfs", (1, 2), environment=ICOUNT)
    merged = merge([once, Report([other, counted], ["2026-01-02"], [2.0])])
    assert [len(cell.rounds) for cell in merged.cells] == [2, 1]
    assert merged.cells[0].subjects == ("loop", "ublk", "kublk")
    assert merged.dates == ["2026-01-01", "2026-01-02"]
    assert len(once.cells[0].rounds) == 1


def test_saved_reports_of_a_folder_are_loaded_as_one(tmp_path: Path) -> None:
    report = Report([make_cell("tmpfs", (1, 2), (3, 4))], ["2026-01-01"], [2.0])
    assert from_json(to_json(report)) == report
    save(report, tmp_path, "one")
    save(report, tmp_path, "two")
    assert len(load(tmp_path).cells[0].rounds) == 4


def test_redrawing_without_matplotlib_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "can_draw", lambda: False)
    save(Report([make_cell("tmpfs", (1, 2))], ["2026-01-01"], [2.0]), tmp_path, "one")
    done = CliRunner().invoke(cli.command, ["--draw", str(tmp_path)])
    assert done.exit_code == 0
    assert ".[bench]" in done.stderr


def test_load_names_the_file_that_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 1, "cells": []}')
    with pytest.raises(CompareError, match=r"x\.json"):
        load(tmp_path)
    (tmp_path / "x.json").unlink()
    with pytest.raises(CompareError, match="holds no"):
        load(tmp_path)
    with pytest.raises(CompareError, match="no report"):
        from_json("[]")


def test_tables_say_what_was_not_measured() -> None:
    report = Report([make_cell("loop-mq"), make_cell("idle", job=Job("idle"))], ["2026-01-01"])
    tables = list(all_tables(report))
    assert "not measured" in [cell for table in tables for cell in table.columns[-1].cells]
    assert "not measured" in markdown(report)


def test_goal_is_open_when_a_cell_was_not_measured_and_missed_when_one_fails() -> None:
    good, none = make_cell("depth1", (1, 4)), make_cell("depth1", job=Job("randwrite"))
    bad = make_cell("depth1", (1, 2), job=Job("read"))
    assert measured("4a", good)[1] is True
    assert measured("4a", good, none) == (
        "tmpfs randread 4.00; not measured: tmpfs randwrite",
        None,
    )
    assert measured("4a", good, none, bad)[1] is False
    assert measured("4a") == ("not measured", None)


def test_goal_on_instructions_is_met_when_ours_are_fewer() -> None:
    cell = make_cell("icount", (50_000, 70_000), environment=ICOUNT)
    assert measured("1", cell) == ("tmpfs randread 0.71", True)


def test_goal_against_kublk_is_by_its_best_mode() -> None:
    round_ = {name: Sample(iops) for name, iops in (("loop", 1), ("ublk", 6), ("kublk", 3))}
    modes = ("kublk:-u", "kublk:--auto_zc", "kublk:--batch", "kublk:--batch --auto_zc")
    round_ |= {mode: Sample(5) for mode in modes}
    cell = make_cell("tmpfs", subjects=tuple(round_), rounds=[round_])
    text, met = measured("3b", cell)
    assert (text.split()[0], met) == ("1.20", True)
    assert measured("3c", cell)[1] is True


def test_goal_on_idleness_is_missed_when_the_server_wakes_once() -> None:
    rounds = [{"ublk": Sample(wakeups=value)} for value in (0.0, 0.0, 0.5)]
    cell = make_cell("idle", job=Job("idle"), subjects=("ublk",), rounds=rounds)
    assert measured("12", cell)[1] is False


def test_profiles_without_the_peer_compare_the_rest() -> None:
    for profile in PIECES:
        names = {name for part in without_kublk(profile).parts for name in part.subjects}
        assert not any(name.startswith("kublk") for name in names)
    assert without_kublk(PROFILES["null"]).parts[0].subjects == (OUR_NULL,)


def baseline(**instructions: float) -> gate.Baseline:
    return gate.Baseline("2026-01-01", {"kernel": "7.3.4"}, instructions)


def words(iops: float, then: float | None) -> tuple[str, bool]:
    report = Report([make_cell("gate", (1, iops), environment=ICOUNT)], ["2026-01-02"])
    name = "tmpfs randread 4k qd64, ublk"
    stored = baseline(**({name: then} if then else {}))
    (verdict,) = gate.judge(report, stored)
    return verdict.word, verdict.fails


def test_gate_fails_when_a_request_costs_more_and_not_when_it_costs_less() -> None:
    assert words(100_000, 10_000) == (gate.SAME, False)
    assert words(100_000, 9_750) == (gate.SAME, False)
    assert words(100_000, 9_700) == (gate.WORSE, True)
    assert words(100_000, 10_400) == (gate.BETTER, False)
    assert words(100_000, None) == (gate.NEW, True)


def test_gate_fails_when_a_cell_of_the_baseline_was_not_measured() -> None:
    (verdict,) = gate.judge(Report([]), baseline(gone=1.0))
    assert (verdict.word, verdict.fails) == (gate.LOST, True)


def test_gate_says_what_else_has_changed_when_it_fails() -> None:
    report = Report([make_cell("gate", (1, 100_000), environment=ICOUNT)], ["2026-01-02"])
    stored = baseline(**{"tmpfs randread 4k qd64, ublk": 5_000})
    lines = list(gate.advice(gate.judge(report, stored), stored, {"kernel": "7.3.5"}))
    assert any("7.3.4 -> 7.3.5" in line for line in lines)
    assert any("--record" in line for line in lines)


def test_stored_baseline_has_the_cells_that_the_gate_measures() -> None:
    names = {
        f"{part.backing.name} {job.name}, {subject.replace(':', ' ')}"
        for part in GATE.parts
        for job in part.jobs
        for subject in part.subjects
        if subject != "loop"
    }
    assert set(gate.load_baseline().instructions) == names


def test_each_cell_has_one_round_however_short_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def served(_: Runner, group: Group) -> Iterator[tuple[dict[str, Served], dict[str, Served]]]:
        devices = {subject.name: Served("/dev/null", {}, 1) for subject in group.subjects}
        yield devices, {}

    monkeypatch.setattr(Runner, "_served", served)
    monkeypatch.setattr(Runner, "_sample", lambda *_: Sample(1.0))
    monkeypatch.setattr(runner, "run", lambda *_: None)
    profile = without_kublk(PROFILES["latency"])
    report = Runner(profile, 0, TWO_CPUS, None, lambda *_: None).run()
    assert len(report.cells) == 2  # of two disks
    assert [len(cell.rounds) for cell in report.cells] == [1, 1]
