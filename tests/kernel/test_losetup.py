"""ublk losetup on the real driver, beside losetup of util-linux on the kernel's loop device."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tables import one_partition

from ublk_loop import uapi
from ublk_loop.control import list_dev_ids

Here = Callable[..., Result]
WaitUntil = Callable[..., None]
MIB = 1 << 20
COLUMNS = "NAME,OFFSET,SIZELIMIT,RO,BACK-FILE,BACK-INO,AUTOCLEAR,LOG-SEC"
WITH_NUMBERS = f"-J -O {COLUMNS},BACK-MAJ:MIN"


@pytest.fixture
def losetup(here: Here) -> Callable[..., str]:
    """``losetup("-f --show", path)``: ublk losetup, which must succeed; its stdout."""

    def losetup(line: str, *words: object) -> str:
        result = here(f"losetup {line}", *words)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    return losetup


def _nr_bytes(device: str) -> int:
    return int(Path(f"/sys/block/{Path(device).name}/size").read_text()) * 512


def _values(text: str, device: str) -> dict[str, Any]:
    # Until version 2.39 losetup pads device numbers in JSON as well.
    [values] = json.loads(text.replace(device, "X"))["loopdevices"]
    return {
        key: value.strip() if isinstance(value, str) else value for key, value in values.items()
    }


def _shape(text: str) -> list[str]:
    # What differs between any two devices: the name, and the width of its column.
    return [re.sub(r"^/dev/\w+ *|^NAME *", "", line) for line in text.splitlines()]


@pytest.mark.parametrize("options", ["", "-o 4096 --sizelimit 1MiB -r -b 4096"])
def test_shows_a_device_as_losetup_shows_the_kernels_on_such_a_file(
    losetup: Callable[..., str],
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    options: str,
) -> None:
    path = backing_file(4 * MIB)
    device = losetup(f"-f --show {options}", path).strip()
    ours = {
        shown: losetup(shown)
        for shown in ("-l", f"-O {COLUMNS}", f"-n --raw -O {COLUMNS}", WITH_NUMBERS, "-a")
    }
    size = _nr_bytes(device)
    losetup("-d", device)
    loop = run("losetup", "-f", "--show", *options.split(), path).strip()
    try:
        assert size == _nr_bytes(loop)
        theirs = {shown: run("losetup", *shown.split(), loop) for shown in list(ours)[:-1]}
        theirs["-a"] = run("losetup", loop)
    finally:
        run("losetup", "-d", loop)
    assert _values(ours[WITH_NUMBERS], device) == _values(theirs[WITH_NUMBERS], loop)
    assert ours["-a"].replace(device, "X") == theirs["-a"].replace(loop, "X")
    for shown in list(ours)[:3]:
        assert _shape(ours[shown]) == _shape(theirs[shown])


@pytest.mark.parametrize("what", ["removed", "replaced", "moved"])
def test_shows_what_became_of_the_file_as_losetup_does(
    losetup: Callable[..., str],
    backing_file: Callable[..., Path],
    attach_loop: Any,
    run: Callable[..., str],
    what: str,
) -> None:
    # A bug: a file that was removed was shown as if it were there, and one in its place as it.
    path = backing_file(MIB)
    device = losetup("-f --show", path).strip()
    with attach_loop(path) as loop:
        path.rename(path.with_suffix(".moved"))
        if what != "moved":
            path.with_suffix(".moved").unlink()
        if what == "replaced":
            path.touch()
        theirs = [run("losetup", loop), run("losetup", *WITH_NUMBERS.split(), loop)]
    assert losetup(device).replace(device, "X") == theirs[0].replace(str(loop), "X")
    assert _values(losetup(WITH_NUMBERS), device) == _values(theirs[1], str(loop))
    if what == "replaced":
        assert losetup("-j", path) == ""
    losetup("-d", device)


def test_sets_up_what_was_asked_for_and_detaches_it(
    losetup: Callable[..., str],
    here: Here,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
) -> None:
    data = pattern(4 * MIB)
    path = backing_file(4 * MIB, data)
    assert losetup("-f") == "/dev/ublkb0\n"
    assert losetup("--show /dev/ublkb6 -r -o 1MiB --sizelimit 2M --direct-io=off", path) == (
        "/dev/ublkb6\n"
    )
    with open_block("/dev/ublkb6", read_only=True) as block:
        assert block.read(0, MIB) == data[MIB : 2 * MIB]
    assert _nr_bytes("/dev/ublkb6") == 2 * MIB
    assert losetup("-j", path, "-o", MIB, "-n", "-O", "NAME,DIO,RO").split() == (
        ["/dev/ublkb6", "0", "1"]
    )
    assert losetup("-L -f --show -r -o 1M --sizelimit 2M", path) == "/dev/ublkb6\n"
    taken = here("losetup -f --show", path)
    assert (taken.exit_code, taken.stdout) == (0, "/dev/ublkb0\n")
    assert f"dev 0 writes the same file as dev 6, {path}" in taken.stderr
    losetup("-d /dev/ublkb0")
    losetup("-d /dev/ublkb6")
    assert list_dev_ids() == []
    assert here("losetup -d /dev/ublkb6").exit_code == 1


def test_detach_of_a_device_in_use_happens_when_it_is_no_more(
    losetup: Callable[..., str],
    ublk: Callable[..., subprocess.CompletedProcess[str]],
    backing_file: Callable[..., Path],
    open_block: Any,
    state_dir: Path,
    wait_until: WaitUntil,
) -> None:
    first, second = (losetup("-f --show", backing_file(MIB)).strip() for _ in range(2))
    with open_block(first) as block:
        result = ublk("losetup", "-D")
        assert result.returncode == 0
        assert "is deleted once nobody uses it" in result.stderr
        assert not os.path.exists(second)
        block.write(0, bytes(4096))
    wait_until(lambda: os.listdir(state_dir) == [], timeout_s=30)
    assert list_dev_ids() == []


def test_capacity_follows_the_file_up_to_the_limit_where_the_driver_can(
    losetup: Callable[..., str],
    here: Here,
    backing_file: Callable[..., Path],
    pattern: Callable[..., bytes],
    open_block: Any,
    features: int,
) -> None:
    path, limited = backing_file(MIB), backing_file(MIB)
    device = losetup("-f --show -o 4096", path).strip()
    bounded = losetup("-f --show --sizelimit 2M", limited).strip()
    for each in (path, limited):
        os.truncate(each, 4 * MIB)
    if not features & uapi.UBLK_F_UPDATE_SIZE:
        result = here("losetup -c", device)
        assert result.exit_code == 1
        assert "does not offer it" in result.stderr
        assert _nr_bytes(device) == MIB - 4096
        return
    losetup("-c", device)
    losetup("-c", bounded)
    assert (_nr_bytes(device), _nr_bytes(bounded)) == (4 * MIB - 4096, 2 * MIB)
    data = pattern(MIB)
    with open_block(device) as block:
        block.write(3 * MIB - 4096, data)
        assert block.read(3 * MIB - 4096, MIB) == data
    assert path.read_bytes()[3 * MIB :] == data
    # A new server takes the new size.
    [shown] = json.loads(here("list --json -n", device.removeprefix("/dev/ublkb")).stdout)
    assert shown["target"]["dev_size"] == 4 * MIB - 4096


def test_file_that_cannot_be_written_is_set_up_read_only_as_by_losetup(
    losetup: Callable[..., str], run: Callable[..., str], tmp_path: Path
) -> None:
    # A bug: a file on a read-only file system was refused unless -r was said.
    folder = tmp_path / "read-only"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "none", folder)
    path = folder / "file"
    path.write_bytes(bytes(MIB))
    run("mount", "-o", "remount,ro", folder)
    try:
        device = losetup("-f --show", path).strip()
        loop = run("losetup", "-f", "--show", path).strip()
        shown = [losetup("-n -O RO", device), run("losetup", "-n", "-O", "RO", loop)]
        run("losetup", "-d", loop)
        losetup("-d", device)
    finally:
        run("umount", "--lazy", folder)
    assert [each.strip() for each in shown] == ["1", "1"]


@pytest.mark.parametrize("option", ["", "-P"])
def test_partitions_are_looked_for_where_losetup_looks_for_them(
    losetup: Callable[..., str],
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    features: int,
    option: str,
) -> None:
    # A bug: partx -a failed on a device that was set up without -P, as there were partitions.
    path = backing_file(4 * MIB, one_partition())
    device = losetup(f"-f --show {option}", path).strip()
    loop = run("losetup", "-f", "--show", *option.split(), path).strip()
    try:
        is_there = {one: Path(f"{one}p1").exists() for one in (device, loop)}
        shown = [losetup("-n -O PARTSCAN", device), run("losetup", "-n", "-O", "PARTSCAN", loop)]
        assert is_there[loop] == bool(option)
        if features & uapi.UBLK_F_NO_AUTO_PART_SCAN:
            assert is_there[device] == is_there[loop]
            assert shown[0].strip() == shown[1].strip()
        else:
            assert is_there[device]
            assert shown[0].strip() == "1"
        if not is_there[device]:
            run("partx", "-a", device)
            assert Path(f"{device}p1").exists()
    finally:
        run("losetup", "-d", loop)
        losetup("-d", device)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", "-f"),
        ("", "-f -r"),
        ("-r", "-f"),
        ("-r", "-f -r"),
        ("", "-f -o 4096"),
        ("--sizelimit 1M", "-f -o 1M"),
        ("-o 1M", "-f --sizelimit 1M"),
        ("-o 1M --sizelimit 2M", "-f -o 2M --sizelimit 1M"),
        ("", "DEVICE"),
        ("--sizelimit 1M", "DEVICE -o 1M"),
    ],
)
def test_nooverlap_takes_and_refuses_what_losetup_does(
    losetup: Callable[..., str],
    here: Here,
    backing_file: Callable[..., Path],
    first: str,
    second: str,
) -> None:
    # A bug: parts that have nothing in common were refused, and with a device's name all was taken.
    path = str(backing_file(4 * MIB))

    def theirs(line: str, *words: str) -> tuple[int, str]:
        done = subprocess.run(["losetup", *line.split(), *words], capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    def ours(line: str, *words: str) -> tuple[int, str]:
        result = here(f"losetup {line}", *words)
        return result.exit_code, result.stdout.strip()

    outcomes = []
    for run_losetup in (theirs, ours):
        exit_code, device = run_losetup(f"-L --show -f {first}", path)
        assert exit_code == 0
        _, free = run_losetup("-f")
        exit_code, other = run_losetup(f"-L --show {second.replace('DEVICE', free)}", path)
        outcomes.append((exit_code, other == device))
        for each in {device, other} - {""}:
            assert run_losetup("-d", each)[0] == 0
    assert outcomes[0] == outcomes[1]
