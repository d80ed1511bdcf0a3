"""Servers that are killed, stopped and replaced at any moment, while fio verifies what it wrote."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from loads import DEV_BYTES, nr_written
from servers import REISSUE

from ublk_loop import uapi
from ublk_loop.errors import DriverError

NR_KILLS = int(os.environ.get("UBLK_LOOP_SOAK_KILLS", "36"))  # in four kinds of device


@pytest.mark.deadline(240 + 6 * NR_KILLS)
@pytest.mark.parametrize(
    ("policy", "direct", "backing", "options"),
    [
        ("auto", True, "ext4", {"nr_hw_queues": 2}),
        ("auto", False, "tmpfs", {"flags": uapi.UBLK_F_USER_COPY}),
        ("auto", False, "ext4", {}),
        ("2014", False, "ext4", {"batch": False}),
    ],
    ids=["auto-direct", "auto-tmpfs-user_copy", "auto-ext4", "2014-no_batch"],
)
def test_kills_and_stops_at_any_moment_lose_nothing_and_show_no_error(
    verifying_load,
    apart,
    backing_file,
    backing_folder,
    wait_until,
    policy,
    direct,
    backing,
    options,
) -> None:
    rng = random.Random(f"{policy} {direct} {backing}")
    # In large folios, which are split under the load.
    path = backing_file(DEV_BYTES, bytes(DEV_BYTES), folder=backing_folder[backing])
    options = {**options, "flags": options.get("flags", 0) | REISSUE}
    dev = apart(path, direct=direct, policy=policy, **options)
    load = verifying_load(dev.block_path)
    for _ in range(NR_KILLS // 4):
        before = nr_written(dev.dev_id)
        wait_until(lambda before=before: nr_written(dev.dev_id) > before, timeout_s=30)
        time.sleep(rng.random() / 5)  # any moment: there is nothing to wait for
        if rng.random() < 0.3:
            dev.signal(signal.SIGSTOP)
            time.sleep(rng.random() / 10)
            if rng.random() < 0.5:
                dev.signal(signal.SIGCONT)
        dev.kill()
        dev.recover()
    before = nr_written(dev.dev_id)
    wait_until(lambda: nr_written(dev.dev_id) > before + 100, timeout_s=30)
    jobs = load.end()
    assert [job["error"] for job in jobs.values()] == [0, 0]
    assert all(job["read"]["total_ios"] > 0 for job in jobs.values())


@pytest.mark.parametrize(
    "options",
    [
        {"flags": REISSUE},
        {"flags": REISSUE, "batch": False, "data": "copy", "nr_hw_queues": 2},
        {"flags": uapi.UBLK_F_USER_RECOVERY},
        {"flags": uapi.UBLK_F_USER_RECOVERY, "data": "copy", "queue_depth": 2},
    ],
    ids=["reissue", "reissue-no_batch-copy-q2", "fail_inflight", "fail_inflight-copy-d2"],
)
def test_server_that_leaves_under_load_loses_nothing_and_shows_no_error(
    verifying_load, apart, backing_file, control, features, raises_errno, wait_until, options
) -> None:
    """With QUIESCE_DEV, a device with BATCH_IO failed what came before the next server."""
    dev = apart(backing_file(DEV_BYTES), **options)
    may_quiesce = options["flags"] == uapi.UBLK_F_USER_RECOVERY
    flags = control.get_dev_info(dev.dev_id).flags
    assert flags & uapi.UBLK_F_QUIESCE == (features & uapi.UBLK_F_QUIESCE if may_quiesce else 0)
    if may_quiesce and not flags & uapi.UBLK_F_QUIESCE:
        with raises_errno(errno.EOPNOTSUPP):  # nothing would keep requests back
            dev.hand_over()
        return
    load = verifying_load(dev.block_path)
    for _ in range(4):
        before = nr_written(dev.dev_id)
        wait_until(lambda before=before: nr_written(dev.dev_id) > before + 20, timeout_s=30)
        assert dev.hand_over()
        dev.recover()
    before = nr_written(dev.dev_id)
    wait_until(lambda: nr_written(dev.dev_id) > before + 100, timeout_s=30)
    assert [job["error"] for job in load.end().values()] == [0, 0]


def test_device_that_quiesce_dev_left_without_a_word_to_its_server_is_upgraded(
    suspendable, apart, control, features, run, raises_errno, wait_until
) -> None:
    """With every tag in flight nobody tells the server, and the device would wait for ever."""
    dev = apart(suspendable, queue_depth=1, flags=uapi.UBLK_F_USER_RECOVERY)
    if not features & uapi.UBLK_F_QUIESCE:
        with raises_errno(errno.EOPNOTSUPP):
            control.quiesce_dev(dev.dev_id, 100)
        return
    write = ["dd", "if=/dev/zero", f"of={dev.block_path}", "oflag=direct", "bs=4096", "count=1"]
    inflight = Path(f"/sys/block/ublkb{dev.dev_id}/inflight")
    run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
    try:
        writer = subprocess.Popen(write, stderr=subprocess.DEVNULL)
        wait_until(lambda: inflight.read_text().split()[1] != "0")
        with contextlib.suppress(DriverError):  # EBUSY, or nothing: see the driver's version
            control.quiesce_dev(dev.dev_id, 100)
    finally:
        run("dmsetup", "resume", suspendable)
    assert writer.wait(30) == 0
    waiter = subprocess.Popen(write, stderr=subprocess.DEVNULL)
    stat = Path(f"/proc/{waiter.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "D")
    assert dev.state() == uapi.UBLK_S_DEV_LIVE
    assert dev.hand_over()
    assert waiter.poll() is None
    dev.recover()
    assert waiter.wait(30) == 0


def test_server_that_was_stopped_for_a_while_goes_on(
    verifying_load, apart, backing_file, wait_until
) -> None:
    dev = apart(backing_file(DEV_BYTES))
    load = verifying_load(dev.block_path)
    wait_until(lambda: nr_written(dev.dev_id) > 100, timeout_s=30)
    for _ in range(5):
        dev.signal(signal.SIGSTOP)
        time.sleep(0.2)
        dev.signal(signal.SIGCONT)
        before = nr_written(dev.dev_id)
        wait_until(lambda before=before: nr_written(dev.dev_id) > before + 50, timeout_s=30)
    assert [job["error"] for job in load.end().values()] == [0, 0]


@pytest.mark.parametrize(
    ("policy", "direct"), [("auto", True), ("2014", True), ("2014", False)], ids=str
)
def test_no_new_server_while_a_write_of_the_dead_one_is_under_way(
    suspendable, apart, control, run, wait_until, pattern, tmp_path, policy, direct
) -> None:
    """A late write of the dead server would land on top of one that the new server did."""
    dev = apart(suspendable, direct=direct, policy=policy, flags=REISSUE)
    for seed in (1, 2):
        (tmp_path / f"data{seed}").write_bytes(pattern(4096, seed))
    write = ["dd", f"of={dev.block_path}", "oflag=direct,dsync", "bs=4096", "count=1"]
    run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
    try:
        writer = subprocess.Popen([*write, f"if={tmp_path}/data1"], stderr=subprocess.DEVNULL)
        inflight = Path(f"/sys/block/ublkb{dev.dev_id}/inflight")
        wait_until(lambda: inflight.read_text().split()[1] != "0")
        time.sleep(0.2)  # until it is in the disk below; too early only makes the test easier
        dev.signal(signal.SIGKILL)
        for _ in range(5):
            with pytest.raises(DriverError):
                control.start_user_recovery(dev.dev_id, timeout_s=0.2)
    finally:
        run("dmsetup", "resume", suspendable)
    os.waitpid(dev.pid, 0)
    dev.recover()
    assert writer.wait(30) == 0
    run(*write, f"if={tmp_path}/data2")
    dev.delete()
    assert suspendable.read_bytes()[:4096] == pattern(4096, 2)


def test_recover_waits_until_the_dead_server_has_let_go_of_the_file(
    suspendable, apart, run, wait_until, pattern, tmp_path
) -> None:
    """`ublk recover` right after a kill found the file locked: rings end after their process."""
    dev = apart(suspendable, direct=True, flags=REISSUE)
    (tmp_path / "data").write_bytes(pattern(4096))
    write = ["dd", f"of={dev.block_path}", "oflag=direct", "bs=4096", "count=1"]
    run("dmsetup", "suspend", "--noflush", "--nolockfs", suspendable)
    resume = threading.Timer(0.5, run, ("dmsetup", "resume", suspendable))
    try:
        writer = subprocess.Popen([*write, f"if={tmp_path}/data"], stderr=subprocess.DEVNULL)
        inflight = Path(f"/sys/block/ublkb{dev.dev_id}/inflight")
        wait_until(lambda: inflight.read_text().split()[1] != "0")
        dev.signal(signal.SIGKILL)
    finally:
        resume.start()
    os.waitpid(dev.pid, 0)
    dev.recover()
    resume.join()
    assert writer.wait(30) == 0
    dev.delete()
    assert suspendable.read_bytes()[:4096] == pattern(4096)
