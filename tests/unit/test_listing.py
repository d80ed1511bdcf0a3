"""What ublk list and features print: the lines that scripts parse, and the JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest

from ublk_loop import listing, state, uapi
from ublk_loop.control import DevInfo
from ublk_loop.params import BasicParams, DevtParams, Params
from ublk_loop.state import DeviceOptions, DeviceState, QueueState, TargetSpec

INFO = DevInfo(
    nr_hw_queues=2,
    queue_depth=64,
    state=uapi.UBLK_S_DEV_LIVE,
    max_io_buf_bytes=524288,
    dev_id=3,
    ublksrv_pid=1234,
    flags=uapi.UBLK_F_CMD_IOCTL_ENCODE | uapi.UBLK_F_USER_RECOVERY,
    owner_uid=1000,
    owner_gid=100,
)
PARAMS = Params(
    basic=BasicParams(logical_bs_shift=12, dev_sectors=2048),
    devt=DevtParams(char_major=237, char_minor=3, disk_major=259, disk_minor=7),
)
STATE = DeviceState(
    dev_id=3,
    sysfs_ino=0,
    server_pid=1234,
    server_start_ticks=1,
    options=DeviceOptions(nr_hw_queues=2, queue_depth=64),
    spec=TargetSpec("loop", path="/srv/d.img", offset_bytes=4096, nr_bytes=1 << 20, direct=True),
    target={
        "name": "loop",
        "backing_file": "/srv/d.img",
        "dev_size": 1 << 20,
        "offset": 4096,
        "direct_io": 1,
        "read_only": False,
    },
    queues=(QueueState(0, 1235, (0, 2)), QueueState(1, 1236, (1, 3))),
)


def _awk(text: str, pattern: str, field: int) -> str:
    # What `grep PATTERN | awk '{print $FIELD}'` prints.
    rows = [line.split() for line in text.splitlines() if pattern in line]
    return " ".join(row[field - 1] for row in rows if len(row) >= field)


def test_device_is_shown_as_text_or_as_json() -> None:
    text = listing.device_text(INFO, PARAMS, STATE, two_lines=True)
    assert listing.shown(INFO, PARAMS, STATE, two_lines=True) == text + "\n"
    document = json.loads(listing.shown(INFO, PARAMS, STATE, as_json=True))
    assert document == listing.device_document(INFO, PARAMS, STATE)


def test_device_text_is_what_the_reference_server_prints() -> None:
    assert listing.device_text(INFO, PARAMS, STATE).splitlines() == [
        "dev id 3: nr_hw_queues 2 queue_depth 64 block size 4096 dev_capacity 2048",
        "\tmax rq size 524288 daemon pid 1234 flags 0x48 state LIVE",
        "\tublkc: 237:3 ublkb: 259:7 owner: 1000:100",
        "\tqueue 0: tid 1235 affinity(0 2 )",
        "\tqueue 1: tid 1236 affinity(1 3 )",
        '\ttarget {"backing_file":"/srv/d.img","dev_size":1048576,"direct_io":1,'
        '"name":"loop","offset":8,"type":0}',
    ]


def test_device_text_answers_the_greps_of_the_reference_servers_test_suite() -> None:
    text = listing.device_text(INFO, PARAMS, STATE)
    assert _awk(text, "pid", 7) == "1234"
    assert _awk(text, "state", 11) == "LIVE"
    assert _awk(text, "queue 1", 4) == "1236"
    assert re.split("[,:]", _awk(text, "loop", 2))[1].strip('"') == "/srv/d.img"


def test_device_text_answers_the_greps_of_the_newer_suite_when_flags_have_their_own_line() -> None:
    text = listing.device_text(INFO, PARAMS, STATE, two_lines=True)
    assert _awk(text, "pid", 7) == "1234"
    assert _awk(text, "state", 9) == "LIVE"
    assert "\tflags 0x48 [ USER_RECOVERY CMD_IOCTL_ENCODE ]" in text.splitlines()


@pytest.mark.parametrize(
    ("number", "name"), [(0, "DEAD"), (1, "LIVE"), (2, "QUIESCED"), (3, "FAIL_IO"), (9, "UNKNOWN")]
)
def test_device_text_names_the_state(number: int, name: str) -> None:
    text = listing.device_text(dataclasses.replace(INFO, state=number), PARAMS, None)
    assert _awk(text, "state", 11) == name


def test_device_text_has_the_drivers_lines_only_when_the_device_is_not_ours() -> None:
    text = listing.device_text(INFO, Params(), None)
    assert text.splitlines() == [
        "dev id 3: nr_hw_queues 2 queue_depth 64 block size 1 dev_capacity 0",
        "\tmax rq size 524288 daemon pid 1234 flags 0x48 state LIVE",
        "\tublkc: 0:0 ublkb: 0:0 owner: 1000:100",
    ]


def test_target_says_read_only_only_when_it_is() -> None:
    state = dataclasses.replace(STATE, target={**STATE.target, "read_only": True})
    assert listing.target_document(state)["read_only"] is True
    assert "read_only" not in listing.target_document(STATE)


def test_device_document_is_json_and_holds_what_the_text_holds() -> None:
    document = json.loads(json.dumps(listing.device_document(INFO, PARAMS, STATE)))
    assert document["dev_id"] == 3
    assert document["state"] == "LIVE"
    assert document["block_device"] == "/dev/ublkb3"
    assert document["logical_block_bytes"] == 4096
    assert document["nr_sectors"] == 2048
    assert document["flag_names"] == ["USER_RECOVERY", "CMD_IOCTL_ENCODE"]
    assert document["queues"][1] == {"q_id": 1, "tid": 1236, "affinity": [1, 3]}
    assert document["target"]["backing_file"] == "/srv/d.img"
    assert document["policy"] == "auto"


def test_device_document_names_no_process_when_there_is_no_server() -> None:
    # A bug: -1, which kill(1) takes for every process.
    gone = dataclasses.replace(INFO, ublksrv_pid=-1)
    assert listing.device_document(gone, PARAMS, STATE)["server_pid"] is None
    assert listing.device_document(INFO, PARAMS, STATE)["server_pid"] == 1234


def test_device_document_of_another_server_has_no_queues_and_no_target() -> None:
    document = listing.device_document(INFO, PARAMS, None)
    assert document["queues"] == []
    assert document["target"] is None


def test_verbose_text_has_the_reference_servers_sections() -> None:
    document = json.loads(listing.verbose_text(INFO, PARAMS, STATE))
    assert document["dev_info"]["ublksrv_pid"] == 1234
    assert document["params"]["basic"]["dev_sectors"] == 2048
    assert document["queues"]["1"] == {"qid": 1, "tid": 1236, "affinity": "1 3 "}
    assert document["target"]["name"] == "loop"


def test_features_text_names_each_bit_and_keeps_one_that_is_new() -> None:
    assert listing.features_text(0x9 | 1 << 40).splitlines() == [
        "ublk_drv features: 0x10000000009",
        "\tZERO_COPY           : 0x1       UBLK_F_SUPPORT_ZERO_COPY",
        "\tUSER_RECOVERY       : 0x8       UBLK_F_USER_RECOVERY",
        "\tunknown             : 0x10000000000",
    ]


def test_every_feature_of_the_driver_has_a_name() -> None:
    bits = {value for name, value in vars(uapi).items() if name.startswith("UBLK_F_")}
    assert set(listing.FEATURES) == bits
    assert len(set(listing.FEATURES.values())) == len(bits)


def test_state_belongs_to_the_device_when_the_server_is_the_same_or_gone() -> None:
    assert listing.state_of(INFO, STATE) is STATE
    assert listing.state_of(dataclasses.replace(INFO, ublksrv_pid=-1), STATE) is STATE
    assert listing.state_of(INFO, None) is None


def test_state_does_not_belong_to_a_device_of_another_server() -> None:
    assert listing.state_of(dataclasses.replace(INFO, ublksrv_pid=77), STATE) is None


def test_state_does_not_belong_to_a_later_device_with_the_same_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.setattr(uapi, "CHAR_CLASS_PATH", str(tmp_path))
    os.mkdir(f"{tmp_path}/ublkc3")
    ino = os.stat(f"{tmp_path}/ublkc3").st_ino
    gone = dataclasses.replace(INFO, ublksrv_pid=-1)
    assert listing.state_of(gone, dataclasses.replace(STATE, sysfs_ino=ino)) is not None
    assert listing.state_of(gone, dataclasses.replace(STATE, sysfs_ino=ino + 1)) is None


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (uapi.UBLK_F_CMD_IOCTL_ENCODE, "copy"),
        (uapi.UBLK_F_USER_COPY, "usercopy"),
        (uapi.UBLK_F_USER_COPY | uapi.UBLK_F_AUTO_BUF_REG, "zerocopy"),
        (uapi.UBLK_F_USER_COPY | uapi.UBLK_F_SUPPORT_ZERO_COPY, "usercopy"),
        (
            uapi.UBLK_F_USER_COPY | uapi.UBLK_F_SUPPORT_ZERO_COPY | uapi.UBLK_F_AUTO_BUF_REG,
            "usercopy",
        ),
    ],
)
def test_data_mode_is_told_from_what_the_driver_granted(flags: int, mode: str) -> None:
    assert state.data_mode(flags) == mode
