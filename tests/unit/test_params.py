"""Geometry becomes struct ublk_params, and nothing gets through that the driver would refuse."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_loop import uapi
from ublk_loop.params import (
    BasicParams,
    DevtParams,
    DiscardParams,
    DmaAlignParams,
    IntegrityParams,
    Params,
    Section,
    SegmentParams,
    ZonedParams,
    params_for,
)

PAGE = 4096
BUF = 512 << 10
MIB = 1 << 20


def unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


WIDTHS = {
    BasicParams: [32, 8, 8, 8, 8, 32, 32, 64, 64],
    DiscardParams: [32, 32, 32, 32, 16],
    DevtParams: [32, 32, 32, 32],
    ZonedParams: [32, 32, 32],
    DmaAlignParams: [32],
    SegmentParams: [64, 32, 16],
    IntegrityParams: [32, 16, 8, 8, 8, 8, 8],
}


def sections(kind: type[Section]) -> st.SearchStrategy[Section | None]:
    return st.none() | st.builds(kind, *map(unsigned, WIDTHS[kind]))


any_params = st.builds(
    Params,
    basic=sections(BasicParams),
    discard=sections(DiscardParams),
    devt=sections(DevtParams),
    zoned=sections(ZonedParams),
    dma=sections(DmaAlignParams),
    seg=sections(SegmentParams),
    integrity=sections(IntegrityParams),
)
powers = st.integers(0, 30).map(lambda shift: 1 << shift)


# ---- layout ----


@given(any_params)
def test_params_survive_packing(params: Params) -> None:
    data = params.pack()
    assert len(data) == uapi.PARAMS_BYTES
    assert struct.unpack_from("=II", data) == (uapi.PARAMS_BYTES, params.types)
    assert Params.unpack(data) == params


@pytest.mark.parametrize(
    ("section", "field", "offset", "format_"),
    [
        ("basic", "attrs", 8, "I"),
        ("basic", "logical_bs_shift", 12, "B"),
        ("basic", "physical_bs_shift", 13, "B"),
        ("basic", "io_opt_shift", 14, "B"),
        ("basic", "io_min_shift", 15, "B"),
        ("basic", "max_sectors", 16, "I"),
        ("basic", "chunk_sectors", 20, "I"),
        ("basic", "dev_sectors", 24, "Q"),
        ("basic", "virt_boundary_mask", 32, "Q"),
        ("discard", "discard_alignment", 40, "I"),
        ("discard", "discard_granularity", 44, "I"),
        ("discard", "max_discard_sectors", 48, "I"),
        ("discard", "max_write_zeroes_sectors", 52, "I"),
        ("discard", "max_discard_segments", 56, "H"),
        ("devt", "char_major", 60, "I"),
        ("devt", "disk_minor", 72, "I"),
        ("zoned", "max_open_zones", 76, "I"),
        ("zoned", "max_zone_append_sectors", 84, "I"),
        ("dma", "alignment", 108, "I"),
        ("seg", "seg_boundary_mask", 120, "Q"),
        ("seg", "max_segment_size", 128, "I"),
        ("seg", "max_segments", 132, "H"),
        ("integrity", "flags", 136, "I"),
        ("integrity", "max_integrity_segments", 140, "H"),
        ("integrity", "interval_exp", 142, "B"),
        ("integrity", "metadata_size", 143, "B"),
        ("integrity", "tag_size", 146, "B"),
    ],
)
def test_each_field_lies_where_the_kernel_has_it(
    section: str, field: str, offset: int, format_: str
) -> None:
    kinds = {"basic": BasicParams, "discard": DiscardParams, "devt": DevtParams}
    kinds |= {"zoned": ZonedParams, "dma": DmaAlignParams, "seg": SegmentParams}
    kinds["integrity"] = IntegrityParams
    kind = kinds[section]
    zeroes = kind(*[0] * len(dataclasses.fields(kind)))
    marked = dataclasses.replace(zeroes, **{field: 0x5A})
    data = Params(**{section: marked}).pack()
    assert struct.unpack_from(f"={format_}", data, offset) == (0x5A,)
    assert data[8:].count(0) == len(data) - 9


def test_packing_refuses_a_value_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="BasicParams"):
        Params(basic=BasicParams(max_sectors=1 << 32)).pack()


def test_unpacking_refuses_another_length() -> None:
    with pytest.raises(ValueError):
        Params.unpack(bytes(151))


def test_dev_nr_bytes_is_zero_before_any_parameters() -> None:
    assert Params.unpack(bytes(uapi.PARAMS_BYTES)).dev_nr_bytes == 0


# ---- geometry ----


def test_params_for_a_plain_device() -> None:
    params = params_for(dev_nr_bytes=MIB, max_io_buf_bytes=BUF, page_bytes=PAGE)
    assert params.basic == BasicParams(
        logical_bs_shift=9,
        physical_bs_shift=9,
        io_min_shift=9,
        io_opt_shift=12,
        max_sectors=1024,
        dev_sectors=2048,
    )
    assert params.dev_nr_bytes == MIB
    assert params.dma == DmaAlignParams(511)
    assert params.discard is None


def test_params_for_sets_the_attributes_asked_for() -> None:
    params = params_for(
        dev_nr_bytes=MIB,
        max_io_buf_bytes=BUF,
        read_only=True,
        rotational=True,
        volatile_cache=True,
        fua=True,
    )
    assert params.basic is not None
    assert params.basic.attrs == 0b1111


def test_params_for_a_target_that_discards_but_does_not_zero() -> None:
    params = params_for(
        dev_nr_bytes=MIB, max_io_buf_bytes=BUF, discard=True, discard_granularity=1 << 20
    )
    assert params.discard is not None
    assert params.discard.discard_granularity == 1 << 20
    assert params.discard.max_discard_segments == 1
    assert params.discard.max_discard_sectors == (0xFFFFFFFF >> 9) // 2048 * 2048
    assert params.discard.max_write_zeroes_sectors == 0


def test_params_for_a_target_that_zeroes_but_does_not_discard() -> None:
    params = params_for(dev_nr_bytes=MIB, max_io_buf_bytes=BUF, logical_bs=4096, write_zeroes=True)
    assert params.discard is not None
    assert params.discard.discard_granularity == 4096
    assert params.discard.max_discard_sectors == 0
    assert params.discard.max_write_zeroes_sectors == 0x7FFFF8


@pytest.mark.parametrize(
    "wrong",
    [
        {"dev_nr_bytes": 0},
        {"dev_nr_bytes": -512},
        {"dev_nr_bytes": 1000},
        {"dev_nr_bytes": 4096 + 512, "logical_bs": 4096},
        {"dev_nr_bytes": 1 << 63},
        {"logical_bs": 256},
        {"logical_bs": 1000},
        {"logical_bs": 8192, "physical_bs": 8192},
        {"logical_bs": 4096, "physical_bs": 512},
        {"physical_bs": 1 << 29},
        {"io_opt": 3000},
        {"io_opt": 1 << 29},
        {"max_io_buf_bytes": 2048},
        {"max_io_buf_bytes": 33 << 20},
        {"fua": True},
        {"discard": True, "discard_granularity": 768},
        {"discard": True, "discard_granularity": -4096},
        {"discard": True, "discard_granularity": 1 << 32},
        {"dma_alignment": 0},
        {"dma_alignment": 3},
        {"dma_alignment": 8192},
    ],
)
def test_params_for_refuses_a_geometry_that_the_driver_would(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError) as caught:
        params_for(
            **{"dev_nr_bytes": MIB, "max_io_buf_bytes": BUF, "page_bytes": PAGE, **wrong}  # type: ignore[arg-type]
        )
    assert "\n" not in str(caught.value)


@given(
    dev_nr_bytes=st.integers(1, 1 << 62),
    max_io_buf_bytes=st.integers(0, 40 << 20),
    logical_bs=powers,
    physical_bs=st.none() | powers,
    io_opt=st.none() | powers,
    discard=st.booleans(),
    write_zeroes=st.booleans(),
    discard_granularity=st.integers(0, 1 << 33),
    dma_alignment=st.integers(0, 8192),
    aligned=st.booleans(),
)
def test_whatever_params_for_returns_the_driver_would_take(
    dev_nr_bytes: int,
    max_io_buf_bytes: int,
    logical_bs: int,
    physical_bs: int | None,
    io_opt: int | None,
    discard: bool,
    write_zeroes: bool,
    discard_granularity: int,
    dma_alignment: int,
    aligned: bool,
) -> None:
    if aligned:  # or hardly any example is taken
        dev_nr_bytes = max(dev_nr_bytes // logical_bs, 1) * logical_bs
        discard_granularity = discard_granularity // logical_bs * logical_bs
        dma_alignment = 512
        max_io_buf_bytes = max(max_io_buf_bytes % (32 << 20), PAGE)
    try:
        params = params_for(
            dev_nr_bytes=dev_nr_bytes,
            max_io_buf_bytes=max_io_buf_bytes,
            logical_bs=logical_bs,
            physical_bs=physical_bs,
            io_opt=io_opt,
            discard=discard,
            write_zeroes=write_zeroes,
            discard_granularity=discard_granularity,
            dma_alignment=dma_alignment,
            page_bytes=PAGE,
        )
    except ValueError:
        return
    params.validate(max_io_buf_bytes=max_io_buf_bytes, page_bytes=PAGE)
    assert Params.unpack(params.pack()) == params
    basic = params.basic
    assert basic is not None
    assert params.dev_nr_bytes == dev_nr_bytes
    block_sectors = logical_bs >> 9
    assert basic.max_sectors % block_sectors == 0
    assert basic.logical_bs_shift <= basic.physical_bs_shift == basic.io_min_shift
    if params.discard is not None:
        granularity_sectors = params.discard.discard_granularity >> 9
        assert params.discard.max_discard_sectors % granularity_sectors == 0
        assert bool(params.discard.max_discard_sectors) == discard
        assert bool(params.discard.max_write_zeroes_sectors) == write_zeroes


# ---- what the driver checks ----

GOOD = params_for(dev_nr_bytes=MIB, max_io_buf_bytes=BUF, page_bytes=PAGE)


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({"basic": None}, 0),
        ({"basic": BasicParams(logical_bs_shift=8, max_sectors=8)}, 0),
        ({"basic": BasicParams(logical_bs_shift=13, physical_bs_shift=13, max_sectors=16)}, 0),
        ({"basic": BasicParams(logical_bs_shift=12, physical_bs_shift=11, max_sectors=8)}, 0),
        ({"basic": BasicParams(physical_bs_shift=29, max_sectors=8)}, 0),
        ({"basic": BasicParams(io_min_shift=29, max_sectors=8)}, 0),
        ({"basic": BasicParams(io_opt_shift=29, max_sectors=8)}, 0),
        ({"basic": BasicParams(max_sectors=7)}, 0),
        ({"basic": BasicParams(max_sectors=1025)}, 0),
        ({"discard": DiscardParams(discard_granularity=0)}, 0),
        ({"discard": DiscardParams(max_discard_sectors=8, max_discard_segments=2)}, 0),
        ({"devt": DevtParams()}, 0),
        ({"zoned": ZonedParams(max_zone_append_sectors=8)}, 0),
        ({}, uapi.UBLK_F_ZONED),
        ({"dma": DmaAlignParams(2)}, 0),
        ({"dma": DmaAlignParams(PAGE)}, 0),
        ({"seg": SegmentParams(seg_boundary_mask=4094)}, 0),
        ({"seg": SegmentParams(seg_boundary_mask=2047)}, 0),
        ({"seg": SegmentParams(seg_boundary_mask=(1 << 64) - 1)}, 0),
        ({"seg": SegmentParams(max_segment_size=4095)}, 0),
        ({"seg": SegmentParams(max_segments=0)}, 0),
        ({"integrity": IntegrityParams(metadata_size=8)}, 0),
        ({"integrity": IntegrityParams(metadata_size=0)}, uapi.UBLK_F_INTEGRITY),
        ({"integrity": IntegrityParams(metadata_size=8, flags=4)}, uapi.UBLK_F_INTEGRITY),
        ({"integrity": IntegrityParams(metadata_size=8, csum_type=3)}, uapi.UBLK_F_INTEGRITY),
        ({"integrity": IntegrityParams(metadata_size=8, csum_type=4)}, uapi.UBLK_F_INTEGRITY),
        ({"integrity": IntegrityParams(metadata_size=8, flags=2)}, uapi.UBLK_F_INTEGRITY),
        ({"integrity": IntegrityParams(metadata_size=8, interval_exp=12)}, uapi.UBLK_F_INTEGRITY),
    ],
)
def test_validate_refuses_what_the_driver_would(change: dict[str, Section], flags: int) -> None:
    params = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        params.validate(max_io_buf_bytes=BUF, flags=flags, page_bytes=PAGE)


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, 0),
        ({"seg": SegmentParams()}, 0),
        ({"seg": SegmentParams(seg_boundary_mask=4095, max_segment_size=4096)}, 0),
        ({"discard": DiscardParams(max_discard_segments=0)}, 0),
        ({"integrity": IntegrityParams(metadata_size=8, csum_type=2)}, uapi.UBLK_F_INTEGRITY),
        (
            {
                "basic": BasicParams(max_sectors=8, chunk_sectors=512, dev_sectors=2048),
                "zoned": ZonedParams(4, 4, 8),
            },
            uapi.UBLK_F_ZONED,
        ),
    ],
)
def test_validate_takes_what_the_driver_takes(change: dict[str, Section], flags: int) -> None:
    params = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    params.validate(max_io_buf_bytes=BUF, flags=flags, page_bytes=PAGE)
