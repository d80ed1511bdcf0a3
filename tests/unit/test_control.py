"""The control plane without a driver: what it packs, what it refuses before any system call."""

from __future__ import annotations

import dataclasses
import errno
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_loop import control, uapi
from ublk_loop.control import Control, DevInfo, block_path, char_path, list_dev_ids
from ublk_loop.errors import DriverError

dev_infos = st.builds(
    DevInfo,
    nr_hw_queues=st.integers(0, 0xFFFF),
    queue_depth=st.integers(0, 0xFFFF),
    state=st.integers(0, 0xFFFF),
    max_io_buf_bytes=st.integers(0, 0xFFFFFFFF),
    dev_id=st.integers(-1, 0xFFFFFFFE),
    ublksrv_pid=st.integers(-1, (1 << 31) - 1),
    flags=st.integers(0, (1 << 64) - 1),
    ublksrv_flags=st.integers(0, (1 << 64) - 1),
    owner_uid=st.integers(0, 0xFFFFFFFF),
    owner_gid=st.integers(0, 0xFFFFFFFF),
    io_desc_size=st.integers(0, 0xFFFF),
)


# ---- DevInfo ----


@given(dev_infos)
def test_dev_info_survives_packing(info: DevInfo) -> None:
    data = info.pack()
    assert len(data) == uapi.DEV_INFO_BYTES
    assert DevInfo.unpack(data) == info


def test_dev_info_lies_as_the_kernel_has_it() -> None:
    info = DevInfo(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, io_desc_size=11)
    values = struct.unpack("=HHHHIIiIQQIIQQ", info.pack())
    assert values == (1, 2, 3, 11, 4, 5, 6, 0, 7, 8, 9, 10, 0, 0)


def test_dev_info_asks_the_driver_for_an_id_with_all_ones() -> None:
    assert struct.unpack_from("=I", DevInfo(dev_id=-1).pack(), 12) == (0xFFFFFFFF,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nr_hw_queues": 0},
        {"nr_hw_queues": 4097},
        {"queue_depth": 0},
        {"queue_depth": 4097},
        {"max_io_buf_bytes": 0},
        {"max_io_buf_bytes": (32 << 20) + 1},
        {"dev_id": -2},
        {"dev_id": 1 << 20},
    ],
)
def test_dev_info_is_refused_when_a_field_is_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(DevInfo(), **wrong).validate()  # type: ignore[arg-type]


def test_dev_info_is_refused_when_a_field_does_not_fit() -> None:
    with pytest.raises(ValueError):
        DevInfo(flags=1 << 64).pack()


@pytest.mark.parametrize(
    ("state", "name"), [(0, "DEAD"), (1, "LIVE"), (2, "QUIESCED"), (3, "FAIL_IO"), (9, "UNKNOWN")]
)
def test_dev_info_names_its_state(state: int, name: str) -> None:
    assert DevInfo(state=state).state_name == name


# ---- affinity, paths, ids ----


@given(st.frozensets(st.integers(0, 8 * control.AFFINITY_BYTES - 1), max_size=20))
def test_cpus_are_read_from_the_kernels_mask(cpus: frozenset[int]) -> None:
    words = [0] * (control.AFFINITY_BYTES // 8)
    for cpu in cpus:
        words[cpu // 64] |= 1 << cpu % 64
    assert control._cpus(struct.pack(f"={len(words)}Q", *words)) == cpus


def test_paths_are_those_of_the_driver() -> None:
    assert (char_path(7), block_path(7)) == ("/dev/ublkc7", "/dev/ublkb7")


def test_list_dev_ids_reads_the_drivers_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ublkc10", "ublkc2", "ublkc", "other", "ublkc3x"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(uapi, "CHAR_CLASS_PATH", str(tmp_path))
    assert list_dev_ids() == [2, 10]


def test_list_dev_ids_does_without_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uapi, "CHAR_CLASS_PATH", str(tmp_path / "none"))
    expected = sorted(int(path.name[5:]) for path in Path("/dev").glob("ublkc[0-9]*"))
    assert list_dev_ids() == expected


# ---- refusals before anything is sent ----


def test_control_says_enoent_and_how_to_load_the_driver_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DriverError) as caught:
        Control(str(tmp_path / "ublk-control"))
    assert caught.value.errno == errno.ENOENT
    assert "modprobe ublk_drv" in caught.value.hint


def test_every_hint_is_for_a_command_that_exists() -> None:
    commands = {name.removeprefix("UBLK_U_CMD_") for name in vars(uapi) if "_U_CMD_" in name}
    assert {command for command, _ in control._HINTS} <= commands | {control._ANY}
