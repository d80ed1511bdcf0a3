"""The driver's constants: Python's and C's are the same, and both are the kernel's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ublk_loop import uapi

ABI = Path(uapi.__file__).parent / "csrc" / "ublk_abi.h"


def c_constants() -> dict[str, int]:
    """Return the integer constants of ublk_abi.h; an opcode is computed as _IOWR() does."""
    text = re.sub(r"/\*.*?\*/", "", ABI.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    found = {}
    for name, value in re.findall(r"^#define[ \t]+(UBLK\w+)[ \t]+(\S.*?)[ \t]*$", text, re.M):
        if opcode := re.fullmatch(r"_IOWR\('u', (0x\w+), struct \w+\)", value):
            found[name] = 0xC0107500 | int(opcode[1], 16)
        elif re.fullmatch(r"[\w()<x ]+", value):
            found[name] = int(eval(re.sub(r"(?<=\d)U?L{0,2}\b", "", value)))
    return found


def test_constants_that_both_languages_have_are_equal() -> None:
    ours = {name: value for name, value in vars(uapi).items() if name.startswith("UBLK")}
    theirs = c_constants()
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert {name for name in theirs if "_F_" in name and "BATCH" not in name} <= ours.keys()
    assert {name for name in theirs if "_IO_OP_" in name or "_U_" in name} <= ours.keys()


@pytest.mark.parametrize(
    ("name", "opcode"),
    [
        ("ADD_DEV", 0xC0207504),
        ("SET_PARAMS", 0xC0207508),
        ("GET_PARAMS", 0x80207509),
        ("GET_QUEUE_AFFINITY", 0x80207501),
        ("START_DEV", 0xC0207506),
        ("STOP_DEV", 0xC0207507),
        ("DEL_DEV", 0xC0207505),
        ("GET_DEV_INFO", 0x80207502),
        ("GET_DEV_INFO2", 0x80207512),
        ("START_USER_RECOVERY", 0xC0207510),
        ("END_USER_RECOVERY", 0xC0207511),
        ("GET_FEATURES", 0x80207513),
        ("DEL_DEV_ASYNC", 0x80207514),
        ("UPDATE_SIZE", 0xC0207515),
        ("QUIESCE_DEV", 0xC0207516),
        ("TRY_STOP_DEV", 0xC0207517),
        ("REG_BUF", 0xC0207518),
        ("UNREG_BUF", 0xC0207519),
    ],
)
def test_control_opcodes_are_encoded_as_the_kernel_does(name: str, opcode: int) -> None:
    assert getattr(uapi, f"UBLK_U_CMD_{name}") == opcode


def test_feature_flags_are_distinct_bits() -> None:
    flags = [value for name, value in vars(uapi).items() if name.startswith("UBLK_F_")]
    assert sorted(flags) == [1 << bit for bit in range(len(flags))]
