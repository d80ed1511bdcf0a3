"""Devices of plain users: with the udev rules that are shipped, and out of other users' reach."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from click.testing import CliRunner
from servers import reap_children
from udev import running_udev

# What a command of a user imports: the files may be out of a plain user's reach.
from ublk_loop import (  # noqa: F401
    cli,
    holders,
    launch,
    lazy,
    listing,
    manage,
    sandbox,
    server,
    target,
    uapi,
)
from ublk_loop.control import Control

RULES = Path(__file__).parents[2] / "contrib/udev/60-ublk.rules"
OWNER, OTHER = 60001, 60002
PR_SET_DUMPABLE = 4
FILE_BYTES = 1 << 20


@pytest.fixture
def udev(leaves_nothing: object) -> Iterator[None]:
    """udev with our rules, and ``ublk`` where it is."""
    rules = RULES.read_text().replace("/usr/local/sbin/ublk", f"{sys.executable} -m ublk_loop")
    with running_udev(RULES.name, rules):
        yield


User = Callable[..., dict[str, Any]]


@pytest.fixture
def as_user(tmp_path: Path) -> User:
    """``as_user(uid, function)``: what it returns in a process of that user, with its own state."""
    tmp_path.chmod(0o755)
    for folder in list(tmp_path.parents)[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)

    def as_user(uid: int, function: Callable[[], Any]) -> Any:
        state_dir = tmp_path / f"state{uid}"
        if not state_dir.exists():
            state_dir.mkdir(mode=0o700)
            os.chown(state_dir, uid, uid)

        def become_user() -> Any:
            os.environ["UBLK_LOOP_STATE_DIR"] = str(state_dir)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as after exec
            return function()

        return in_child(become_user)

    return as_user


def _ublk(line: str, *words: object) -> Callable[[], tuple[int, str, str]]:
    def run() -> tuple[int, str, str]:
        words_ = [*line.split(), *map(str, words)]
        result = CliRunner().invoke(cli.cli, words_, prog_name="ublk")
        return result.exit_code, result.stdout, result.stderr

    return run


def _errno_of(attempt: Callable[[], object]) -> Callable[[], str]:
    def run() -> str:
        try:
            attempt()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    return run


def _control(name: str, *arguments: object) -> Callable[[], None]:
    def run() -> None:
        with Control() as control:
            getattr(control, name)(*arguments)

    return run


def test_users_have_devices_of_their_own_that_no_other_user_can_see_stop_or_read(
    udev: None,
    as_user: User,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    control: Control,
) -> None:
    data = pattern(FILE_BYTES)
    path = backing_file(FILE_BYTES, data)
    path.chmod(0o600)
    os.chown(path, OWNER, OWNER)
    refused = as_user(OWNER, _ublk("add -t loop -f", path))
    assert refused[0] == 1
    assert "--unprivileged" in refused[2]
    exit_code, text, words = as_user(OWNER, _ublk("add -t loop --unprivileged --json -f", path))
    assert (exit_code, words) == (0, ""), words
    device = json.loads(text)
    dev_id, block, char = device["dev_id"], device["block_device"], device["char_device"]
    assert (device["owner_uid"], device["flag_names"].count("UNPRIVILEGED_DEV")) == (OWNER, 1)
    try:
        for node in (block, char):
            found = os.stat(node)
            assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (OWNER, OWNER, 0o600)
        assert as_user(OWNER, lambda: Path(block).read_bytes() == data)
        listed = as_user(OWNER, _ublk("list --json"))
        assert [one["dev_id"] for one in json.loads(listed[1])] == [dev_id]

        assert as_user(OTHER, _ublk("list --json")) == [0, "[]\n", ""]
        attempts = {
            "read": lambda: os.open(block, os.O_RDONLY),
            "serve": lambda: os.open(char, os.O_RDWR),
            "ask": _control("get_dev_info", dev_id),
            "parameters": _control("get_params", dev_id),
            "stop": _control("stop_dev", dev_id),
            "delete": _control("del_dev", dev_id),
            "signal": lambda: os.kill(device["server_pid"], 9),
        }
        answers = {name: as_user(OTHER, _errno_of(call)) for name, call in attempts.items()}
        assert set(answers.values()) <= {"EACCES", "EPERM"}, answers
        assert as_user(OTHER, _ublk(f"del --force -n {dev_id}"))[0] == 1

        assert control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_LIVE
        assert as_user(OWNER, _ublk(f"del -n {dev_id}")) == [0, "", ""]
        assert not os.path.exists(char)
    finally:
        if os.path.exists(char):
            control.del_dev(dev_id)
        reap_children()


def test_nodes_of_roots_devices_stay_roots_and_owner_says_so(
    udev: None, add: Callable[..., dict[str, Any]], here: Callable[..., Any], run: Any
) -> None:
    device = add("-t null")
    run("udevadm", "settle")
    for node in (device["block_device"], device["char_device"]):
        found = os.stat(node)
        assert found.st_uid == 0
        assert found.st_mode & 0o007 == 0
    result = here("owner", device["block_device"])
    assert result.exit_code == 1
    assert "no unprivileged device" in result.stderr
