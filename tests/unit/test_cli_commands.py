"""The ublk commands besides add: usage, refusals, help, and their errors without a driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from commands import assert_names_the_help

from ublk_loop import __version__, cli, control, daemon, manage, uapi

COMMANDS = ["add", "del", "stop", "list", "recover", "upgrade", "features", "set_affinity", "help"]


def ublk(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, list(arguments), prog_name="ublk")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(control.Control.__init__, "__defaults__", (str(tmp_path / "absent"),))
    monkeypatch.setattr(uapi, "CHAR_CLASS_PATH", str(tmp_path))


@pytest.mark.parametrize(
    "line",
    [
        "del",
        "del --async",
        "del -n 0 -a",
        "del -n 0 --lazy --force",
        "del -n -1",
        "del -n zero",
        "del 0",
        "stop",
        "stop -n 0 --safe --force",
        "list -n x",
        "recover",
        "recover -n",
        "recover -n 0 -a",
        "upgrade",
        "upgrade -n 0 -a",
        "set_affinity -n 0",
        "set_affinity -n 0 -q 0",
        "set_affinity -n 0 -q 0 --cpuset [a]",
        "set_affinity -n 0 -q -1 --cpuset [0]",
        "help -t nbd",
        "delete -n 0",
        "--numbr 0",
        "list -n 0 -a",
        "recover -a --die_during_fetch 1",
        "losetup -e -f /srv/d.img",
        "losetup -f /srv/d.img /srv/e.img",
    ],
)
@pytest.mark.usefixtures("no_driver")
def test_a_command_exits_with_2_and_says_one_line_when_the_usage_is_wrong(line: str) -> None:
    result = ublk(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert_names_the_help(result.stderr)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("add -t loop -f", "Option '-f' requires an argument: see ublk add --help"),
        ("del -n", "Option '-n' requires an argument: see ublk del --help"),
        ("--numbr 0", "No such option '--numbr': see ublk --help"),
        (
            "add -t loop -f d.img -o 1M",
            "Invalid value for '-o' / '--offset': '1M' is not a valid integer: see ublk add --help",
        ),
    ],
)
@pytest.mark.usefixtures("no_driver")
def test_wrong_usage_names_the_help_of_its_command(line: str, error: str) -> None:
    assert ublk(*line.split()).stderr == f"ublk: {error}\n"


def test_ublk_alone_exits_with_2_and_shows_the_help() -> None:
    result = ublk()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: ublk")


@pytest.mark.parametrize(
    "line",
    ["del -n 0", "list", "list -a", "list --json", "list -n 0 -v", "recover -n 0", "features"],
)
@pytest.mark.usefixtures("no_driver")
def test_a_command_says_how_to_load_the_driver_when_there_is_none(line: str) -> None:
    result = ublk(*line.split())
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ublk: open ")
    assert "modprobe ublk_drv" in result.stderr


@pytest.mark.usefixtures("no_driver")
def test_del_of_all_succeeds_when_there_is_no_device() -> None:
    assert ublk("del", "-a").exit_code == 0


def test_set_affinity_fails_when_the_device_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path))
    result = ublk("set_affinity", "-n", "5", "-q", "0", "--cpuset", "[0]")
    assert result.exit_code == 1
    assert result.stderr.startswith("ublk: set_affinity dev 5: ")


def test_version_is_printed_with_the_reference_servers_option() -> None:
    for option in ("-v", "--version"):
        assert ublk(option).stdout == f"ublk-loop {__version__}\n"
    for option in ("-V", "--version"):
        assert ublk("losetup", option).stdout == f"ublk losetup {__version__}\n"


def test_help_shows_every_command() -> None:
    for line in ("help", "-h", "--help"):
        result = ublk(line)
        assert result.exit_code == 0
        assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_help_of_a_command_is_what_the_command_says_of_itself() -> None:
    for name in COMMANDS:
        assert ublk("help", name).stdout == ublk(name, "--help").stdout
    assert ublk("add", "help").stdout == ublk("add", "--help").stdout
    assert ublk("help", "nothing").exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name: str) -> None:
    result = ublk(name, "--help")
    assert result.exit_code == 0
    assert f"  ublk {name}" in result.stdout


@pytest.mark.parametrize(
    ("kind", "option"), [("loop", "--buffered_io"), ("null", "--size"), ("ram", "--size")]
)
def test_help_of_a_type_shows_its_options(kind: str, option: str) -> None:
    result = ublk("help", "-t", kind)
    assert result.exit_code == 0
    assert option in result.stdout
    assert f"ublk add -t {kind}" in result.stdout


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("[7]", {7}),
        ("[0,2]", {0, 2}),
        ("0-3", {0, 1, 2, 3}),
        ("[0, 2-4 ]", {0, 2, 3, 4}),
        ("1,1", {1}),
    ],
)
def test_cpuset_is_read_as_the_reference_server_writes_it_and_as_ranges(
    monkeypatch: pytest.MonkeyPatch, text: str, cpus: set[int]
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(manage, "set_affinity", lambda *arguments: seen.append(arguments))
    assert ublk("set_affinity", "-n", "1", "-q", "2", "--cpuset", text).exit_code == 0
    assert seen == [(1, 2, cpus)]


@pytest.mark.parametrize("text", ["", "[]", "[", "a", "3-1", "1,", "-1", "[0][1]", "1" * 9])
def test_cpuset_is_refused_when_it_is_no_list(text: str) -> None:
    assert ublk("set_affinity", "-n", "0", "-q", "0", "--cpuset", text).exit_code == 2


def test_the_module_runs_as_a_program_and_imports_no_data_plane_for_its_help() -> None:
    code = "import sys, ublk_loop.cli; print('ublk_loop._uring' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    module = [sys.executable, "-m", "ublk_loop", "--version"]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    assert done.stdout == f"ublk-loop {__version__}\n"


def test_list_ends_quietly_when_nobody_reads_its_output() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    module = [sys.executable, "-m", "ublk_loop", "help"]
    done = subprocess.run(module, stdout=write_fd, stderr=subprocess.PIPE, text=True)
    os.close(write_fd)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "No such file or directory"),
        ("[device.0]\ntype = 'null'\nqueus = 2\n", "No such option"),
        ("[device.0\n", "Expected"),
    ],
)
def test_a_daemon_in_the_background_is_not_started_with_a_file_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, error: str
) -> None:
    monkeypatch.setattr(daemon, "main", lambda *_, **__: pytest.fail("it was started"))
    path = tmp_path / "ublk.toml"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    result = ublk("daemon", "--detach", "--config", str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ublk: {path}: ")
    assert error in line
