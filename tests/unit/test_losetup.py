"""ublk losetup: its formats, and what it asks ``ublk add`` for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ublk_loop import cli, cli_losetup, losetup
from ublk_loop.control import DevInfo
from ublk_loop.losetup import DEFAULT_COLUMNS, Row
from ublk_loop.params import BasicParams, DevtParams, Params
from ublk_loop.state import DeviceOptions, DeviceState, QueueState, TargetSpec

Asked = list[list[str]]


def _row(dev_id: int, path: Path, **spec: Any) -> Row:
    known = DeviceState(
        dev_id=dev_id,
        sysfs_ino=0,
        server_pid=70,
        server_start_ticks=1,
        options=DeviceOptions(),
        spec=TargetSpec("loop", path=str(path), **spec),
        target={"name": "loop", "backing_file": str(path)},
        queues=(QueueState(0, 71, (0,)),),
    )
    params = Params(
        basic=BasicParams(logical_bs_shift=12, dev_sectors=8),
        devt=DevtParams(char_major=240, char_minor=1, disk_major=259, disk_minor=dev_id),
    )
    row = losetup.row(DevInfo(dev_id=dev_id), params, known)
    assert row is not None
    return row


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    path = tmp_path / "a file"
    path.touch()
    return [_row(0, path), _row(12, path, offset_bytes=512, limit_bytes=1 << 20, read_only=True)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> Asked:
    """The words that reached ``ublk add``; the devices that there are are ``rows``."""
    words: Asked = []

    def add_device(given: list[str]) -> dict[str, Any]:
        words.append(given)
        return {"block_device": "/dev/ublkb3"}

    monkeypatch.setattr(cli_losetup, "add_device", add_device)
    monkeypatch.setattr(cli_losetup, "_rows", lambda dev_id=None: rows)
    monkeypatch.setattr(cli_losetup, "_need_not_scan", lambda: False)
    return words


def _losetup(*words: object) -> Result:
    return CliRunner().invoke(cli.cli, ["losetup", *map(str, words)], prog_name="ublk")


def test_table_aligns_as_losetup_does(rows: list[Row], tmp_path: Path) -> None:
    assert losetup.table(rows, DEFAULT_COLUMNS, headings=True).splitlines() == [
        f"NAME         SIZELIMIT OFFSET AUTOCLEAR RO {'BACK-FILE':<{len(str(tmp_path)) + 7}}"
        " DIO LOG-SEC",
        f"/dev/ublkb0          0      0         0  0 {tmp_path}/a file   0    4096",
        f"/dev/ublkb12   1048576    512         0  1 {tmp_path}/a file   0    4096",
    ]


def test_raw_has_no_blank_inside_a_column(rows: list[Row], tmp_path: Path) -> None:
    text = losetup.raw(rows[:1], ("NAME", "BACK-FILE"), headings=False)
    assert text == f"/dev/ublkb0 {tmp_path}/a\\x20file"


def test_a_row_is_one_line_when_a_file_has_two_in_its_name(rows: list[Row]) -> None:
    row = {**rows[0], "BACK-FILE": "/srv/a\nb c"}
    assert losetup.table([row], ("BACK-FILE",), headings=False) == r"/srv/a\x0ab c"
    assert losetup.raw([row], ("BACK-FILE",), headings=False) == r"/srv/a\x0ab\x20c"


def test_old_format_names_inode_offset_and_limit(rows: list[Row], tmp_path: Path) -> None:
    found = (tmp_path / "a file").stat()
    where = f"[{found.st_dev:04d}]:{found.st_ino} ({tmp_path}/a file)"
    assert losetup.line(rows[0]) == f"/dev/ublkb0: {where}"
    assert losetup.line(rows[1]) == f"/dev/ublkb12: {where}, offset 512, sizelimit 1048576"


def test_a_backing_file_that_is_gone_is_shown_without_its_inode(tmp_path: Path) -> None:
    row = _row(0, tmp_path / "gone")
    assert losetup.line(row) == f"/dev/ublkb0: []: ({tmp_path}/gone)"
    assert losetup.raw([row], ("BACK-INO", "RO"), headings=False) == " 0"


def test_devices_without_a_backing_file_have_no_row() -> None:
    assert losetup.row(DevInfo(), Params(), None) is None


def test_options_of_a_new_device_reach_add(asked: Asked) -> None:
    line = "-f --show -o 1M --sizelimit 1000000 -b 4096 -P -r --direct-io disk.img"
    result = _losetup(*line.split())
    assert (result.exit_code, result.output) == (0, "/dev/ublkb3\n")
    words = "-t loop -f disk.img -o 2048 --sizelimit 999936 --sector_size 4096 --direct_io -R"
    assert asked == [words.split()]


def test_a_device_may_be_named_and_direct_io_switched_off(asked: Asked) -> None:
    result = _losetup("--direct-io=off", "/dev/ublkb7", "disk.img")
    assert (result.exit_code, result.output) == (0, "")
    assert asked == [["-t", "loop", "-f", "disk.img", "-n", "7", "--buffered_io"]]


def test_partitions_are_looked_for_if_asked_where_the_driver_can_leave_them(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_losetup, "_need_not_scan", lambda: True)
    assert _losetup("-f", "disk.img").exit_code == 0
    assert _losetup("-fP", "disk.img").exit_code == 0
    words = ["-t", "loop", "-f", "disk.img"]
    assert asked == [[*words, "--no_auto_part_scan"], words]


def test_nooverlap_uses_the_device_that_serves_the_same_part(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    assert _losetup("-L", "-f", "--show", path).output == "/dev/ublkb0\n"
    assert _losetup("-L", "-f", "--show", "-r", path).output == "/dev/ublkb0\n"
    for words in (["-f", "-o", "4096", path], ["/dev/ublkb3", path]):
        overlapping = _losetup("-L", *words)
        assert (overlapping.exit_code, overlapping.stdout) == (1, "")
        assert "/dev/ublkb0 has it, or a part of it" in overlapping.stderr
    assert asked == []


def test_nooverlap_adds_a_device_where_another_has_another_part(
    asked: Asked, rows: list[Row], tmp_path: Path
) -> None:
    del rows[0]  # the other one is read-only, and has 1 MiB from byte 512 on
    path = tmp_path / "a file"
    for words in ("--sizelimit 512", "-o 1049088"):
        assert _losetup("-L", "-f", "--show", *words.split(), path).output == "/dev/ublkb3\n"
    assert len(asked) == 2
    reads = _losetup("-L", "-f", "-o", "512", "--sizelimit", "1M", path)
    assert (reads.exit_code, reads.stdout) == (1, "")
    assert "/dev/ublkb12 has it, read-only" in reads.stderr
    assert len(asked) == 2


def test_shows_the_devices_of_a_file_and_an_offset(asked: Asked, tmp_path: Path) -> None:
    shown = _losetup("-j", tmp_path / "a file", "-o", "512", "-O", "name", "-n")
    assert shown.output == "/dev/ublkb12\n"
    (tmp_path / "other").touch()
    assert _losetup("-j", tmp_path / "other").output == ""
    assert json.loads(_losetup("-J", "-O", "NAME,RO").output) == {
        "loopdevices": [{"name": "/dev/ublkb0", "ro": False}, {"name": "/dev/ublkb12", "ro": True}]
    }


def test_a_file_alone_is_told_how_it_is_set_up(asked: Asked, tmp_path: Path) -> None:
    result = _losetup(tmp_path / "a file")
    assert (result.exit_code, result.stdout, asked) == (1, "", [])
    assert f"ublk losetup -f --show '{tmp_path}/a file' sets it up" in result.stderr


@pytest.mark.parametrize(
    ("words", "exit_code", "text"),
    [
        ("/dev/loop0 disk.img", 1, "a device is /dev/ublkbN here"),
        ("-d /dev/sda", 1, "a device is /dev/ublkbN here"),
        ("--direct-io=on /dev/ublkb0", 1, "detach it and set it up again"),
        ("-b 4096 /dev/ublkb0", 1, "detach it and set it up again"),
        ("-f -o 100 disk.img", 2, "not a multiple of 512"),
        ("-O NAME,COLOUR", 2, "unknown column 'COLOUR'"),
        ("-f /dev/ublkb0 disk.img", 2, "say -f FILE, or DEVICE FILE"),
        ("-f --sizelimit much disk.img", 2, "not a size"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    asked: Asked, words: str, exit_code: int, text: str
) -> None:
    result = _losetup(*words.split())
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert text in result.stderr
    assert asked == []
    if exit_code == 1:
        assert result.stderr.count("\n") == 1
