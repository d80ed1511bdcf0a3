"""``ublk`` in scripts written for the reference server: they name devices, grep, kill and delete.

One shell script does what such scripts do, with their greps, on commands that are processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
