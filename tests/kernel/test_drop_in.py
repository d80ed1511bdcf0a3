"""``ublk`` in scripts written for the reference server, or for the kernel's test server.

They name devices, grep, kill and delete. One shell script does what such scripts do, with their
greps, on commands that are processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tables import one_partition

from ublk_loop import uapi

SCRIPT = r"""
set -eu
field() { grep "$1" "$OUT" | awk "{print \$$2}"; }

$UBLK features >"$OUT"
grep -q "CMD_IOCTL_ENCODE" "$OUT"
! grep -q unknown "$OUT"

# added with a number, found by it, written to, its server killed by a queue's thread id
$UBLK add -t loop -q 2 -d 64 -u 1 -f "$FILE" -n 7 >/dev/null
[ -c /dev/ublkc7 ] && [ -b /dev/ublkb7 ]
$UBLK list >"$OUT"
[ "$(field state 11)" = LIVE ]
kill -0 "$(field pid 7)"
[ "$(field loop 2 | awk -F , '{print $1}' | awk -F : '{print $2}')" = "\"$FILE\"" ]
fio --name=job --filename=/dev/ublkb7 --ioengine=libaio --direct=1 --rw=randwrite --bs=4k \
    --iodepth=32 --size=1M --verify=crc32c --verify_state_save=0 >/dev/null
kill -9 "$(field "queue 0" 4)"
until [ "$(field state 11)" = DEAD ]; do $UBLK list -n 7 >"$OUT"; done
$UBLK del -n 7

# deleted in the middle of I/O: fio ends with errors, del well
$UBLK add -t null -q 2 -r 0 -n 7 | grep -q "dev id 7: "
fio --name=job --filename=/dev/ublkb7 --ioengine=libaio --direct=1 --rw=randrw --bs=4k \
    --iodepth=64 --time_based --runtime=100 --size=64M >/dev/null 2>&1 &
until [ "$(awk '{print $1 + $5}' /sys/block/ublkb7/stat)" -gt 500 ]; do sleep 0.1; done
$UBLK del -n 7
! wait $!
[ ! -e /dev/ublkc7 ] && [ ! -e /dev/ublkb7 ]

# every device goes at once
$UBLK add -t null >/dev/null
$UBLK list -a | grep -q LIVE
$UBLK del -a
[ -z "$($UBLK list)" ]
"""


@pytest.mark.deadline(240)
def test_a_script_for_the_reference_server_runs_with_ublk_in_its_place(
    leaves_nothing: object, tmp_path: Path, backing_file: Callable[..., Path]
) -> None:
    environment = {
        **os.environ,
        "UBLK": f"{sys.executable} -m ublk_loop",
        "UBLK_LOOP_DEL_FORCE": "1",
        "UBLK_LOOP_STATE_DIR": str(tmp_path / "state"),
        "FILE": str(backing_file(4 << 20)),
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(
        ["bash", "-x", "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_words_of_the_kernels_test_server_are_taken(
    here: Callable[..., Result],
    state_dir: Path,
    backing_file: Callable[..., Path],
    open_block: Any,
    pattern: Callable[..., bytes],
    features: int,
) -> None:
    data = pattern(4096)
    path = backing_file(1 << 20, data)
    words = f"-t loop -q 2 -u -r 1 -i 1 {path}"
    added = json.loads(here(f"add --json {words}").stdout)
    dev_id = added["dev_id"]
    assert added["flags"] & uapi.UBLK_F_USER_COPY
    assert json.loads(here("add --json -t null -g").stdout)["flags"] & uapi.UBLK_F_NEED_GET_DATA
    if features & uapi.UBLK_F_AUTO_BUF_REG:
        assert (
            here("add -t loop --auto_zc --auto_zc_fallback", backing_file(1 << 20)).exit_code == 0
        )

    assert here("quiesce -n", dev_id).exit_code == 0
    [shown] = json.loads(here("list --json -n", dev_id).stdout)
    assert shown["state"] == "QUIESCED"
    other = here(f"recover -n {dev_id} -t loop -q 2", backing_file(1 << 20))
    assert (other.exit_code, other.stdout) == (1, "")
    assert f"it is loop {path}" in other.stderr
    assert here("recover -t nothing -n", dev_id).exit_code == 2
    assert "state LIVE" in here(f"recover -n {dev_id} {words}").stdout
    with open_block(added["block_device"]) as client:
        assert client.read(0, 4096) == data
    here("del -a --force")


def test_words_of_rublk_are_taken(here: Callable[..., Result], state_dir: Path) -> None:
    assert "dev id 7: " in here("add null --logical-block-size 4096 --read-only -r -n 7").stdout
    queue = Path("/sys/block/ublkb7/queue")
    assert (queue / "logical_block_size").read_text() == "4096\n"
    assert (queue / "discard_max_bytes").read_text() == "0\n"
    assert (queue / "../ro").read_text() == "1\n"
    assert here("del -n 7").exit_code == 0


@pytest.mark.parametrize("options", ["-r 1", "-r 1 -q 2 -d 2", "-i 1"])
def test_device_is_recovered_or_deleted_after_a_server_died_while_it_fetched(
    add: Callable[..., dict[str, Any]],
    here: Callable[..., Result],
    ublk: Callable[..., subprocess.CompletedProcess[str]],
    open_block: Any,
    features: int,
    options: str,
) -> None:
    if not features & uapi.UBLK_F_QUIESCE:
        return  # Linux 6.12 warns, and refuses the next START_USER_RECOVERY with EINVAL
    added = add(f"-t fault_inject {options}")
    dev_id = added["dev_id"]
    dies = f"recover -n {dev_id} --foreground -t fault_inject --die_during_fetch 1".split()
    assert ublk(*dies).returncode == 1  # its server lives
    os.kill(added["server_pid"], signal.SIGKILL)
    for _ in range(2):
        assert ublk(*dies).returncode == -signal.SIGKILL
    assert "state LIVE" in here("recover -n", dev_id).stdout
    with open_block(added["block_device"]) as client:
        assert client.read(0, 4096) == bytes(4096)
    [shown] = json.loads(here("list --json -n", dev_id).stdout)
    os.kill(shown["server_pid"], signal.SIGKILL)
    assert ublk(*dies).returncode == -signal.SIGKILL
    assert here("del -n", dev_id).exit_code == 0


def test_server_leaves_by_force_where_requests_in_flight_would_fail(
    here: Callable[..., Result],
    add: Callable[..., dict[str, Any]],
    backing_file: Callable[..., Path],
    open_block: Any,
    pattern: Callable[..., bytes],
    features: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = "-b" if features & uapi.UBLK_F_BATCH_IO else ""
    added = add(f"-t loop -r 1 {batch} -f", backing_file(1 << 20, pattern(1 << 20)))
    dev_id = added["dev_id"]
    refused = here("quiesce -n", dev_id)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"ublk: quiesce dev {dev_id}: ")  # a bug: "upgrade dev"
    assert "requests would fail" in refused.stderr
    assert here("quiesce --force -n", dev_id).exit_code == 0
    assert here("recover -n", dev_id).exit_code == 0
    monkeypatch.setenv("UBLK_LOOP_DEL_FORCE", "1")
    assert here("quiesce -n", dev_id).exit_code == 0
    [shown] = json.loads(here("list --json -n", dev_id).stdout)
    assert shown["state"] == "QUIESCED"
    assert here("recover -n", dev_id).exit_code == 0
    with open_block(added["block_device"]) as client:
        assert client.read(0, 1 << 20) == pattern(1 << 20)


def test_partitions_are_looked_for_only_when_asked_if_so_told(
    here: Callable[..., Result],
    state_dir: Path,
    backing_file: Callable[..., Path],
    run: Callable[..., str],
    features: int,
) -> None:
    path = backing_file(4 << 20, one_partition())
    if not features & uapi.UBLK_F_NO_AUTO_PART_SCAN:
        refused = here("add -t loop --no_auto_part_scan", path)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "does not offer it" in refused.stderr
        return
    device = json.loads(here("add --json -t loop --no_auto_part_scan", path).stdout)
    sysfs = Path("/sys/block", f"ublkb{device['dev_id']}")
    assert not (sysfs / f"{sysfs.name}p1").exists()
    run("blockdev", "--rereadpt", device["block_device"])
    assert (sysfs / f"{sysfs.name}p1").exists()
