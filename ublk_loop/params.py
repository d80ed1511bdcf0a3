"""The parameters of a device: struct ublk_params, and how a target's geometry becomes one.

In: sizes in bytes as a target knows them. Out: sections in the driver's units, packed for
SET_PARAMS or unpacked from GET_PARAMS. Pure arithmetic, any thread; it never opens, measures or
asks anything. A wrong value is a ValueError here, before the driver would answer a bare EINVAL.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from typing import ClassVar, TypeVar

from .uapi import (
    LBMD_PI_CAP_INTEGRITY,
    LBMD_PI_CAP_REFTAG,
    LBMD_PI_CSUM_CRC16_T10DIF,
    LBMD_PI_CSUM_CRC64_NVME,
    LBMD_PI_CSUM_IP,
    LBMD_PI_CSUM_NONE,
    PARAMS_BYTES,
    SECTOR_BYTES,
    SECTOR_SHIFT,
    UBLK_ATTR_FUA,
    UBLK_ATTR_READ_ONLY,
    UBLK_ATTR_ROTATIONAL,
    UBLK_ATTR_VOLATILE_CACHE,
    UBLK_F_INTEGRITY,
    UBLK_F_ZONED,
    UBLK_MAX_IO_BUF_BYTES,
    UBLK_MIN_SEGMENT_SIZE,
    UBLK_PARAM_TYPE_BASIC,
    UBLK_PARAM_TYPE_DEVT,
    UBLK_PARAM_TYPE_DISCARD,
    UBLK_PARAM_TYPE_DMA_ALIGN,
    UBLK_PARAM_TYPE_INTEGRITY,
    UBLK_PARAM_TYPE_SEGMENT,
    UBLK_PARAM_TYPE_ZONED,
)

PAGE_BYTES = mmap.PAGESIZE
MAX_BS_SHIFT = 28  # 256 MiB, the driver's bound for physical_bs, io_min and io_opt
MAX_REQUEST_SECTORS = 0xFFFFFFFF >> SECTOR_SHIFT  # a request's bytes are 32 bits wide
MAX_DEV_BYTES = (1 << 63) - 1  # loff_t of the backing file

_HEADER = struct.Struct("=II")  # len, types
_SectionT = TypeVar("_SectionT", bound="Section")


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of the sections; a dataclass below gives the fields in the order of its FORMAT."""

    TYPE: ClassVar[int]
    OFFSET: ClassVar[int]
    FORMAT: ClassVar[struct.Struct]

    def pack_into(self, buffer: bytearray) -> None:
        """Write the section at its place in ``buffer``, PARAMS_BYTES long."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        try:
            self.FORMAT.pack_into(buffer, self.OFFSET, *values)
        except struct.error as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    @classmethod
    def unpack_from(cls: type[_SectionT], buffer: bytes) -> _SectionT:
        """Read the section from its place in ``buffer``, PARAMS_BYTES long."""
        return cls(*cls.FORMAT.unpack_from(buffer, cls.OFFSET))


@dataclasses.dataclass(frozen=True)
class BasicParams(Section):
    """struct ublk_param_basic: the one section that every device has."""

    TYPE = UBLK_PARAM_TYPE_BASIC
    OFFSET = 8
    FORMAT = struct.Struct("=IBBBBIIQQ")

    attrs: int = 0  # UBLK_ATTR_*
    logical_bs_shift: int = SECTOR_SHIFT
    physical_bs_shift: int = SECTOR_SHIFT
    io_opt_shift: int = SECTOR_SHIFT
    io_min_shift: int = SECTOR_SHIFT
    max_sectors: int = 0
    chunk_sectors: int = 0
    dev_sectors: int = 0
    virt_boundary_mask: int = 0


@dataclasses.dataclass(frozen=True)
class DiscardParams(Section):
    """struct ublk_param_discard: DISCARD and WRITE_ZEROES; a limit of 0 turns one off."""

    TYPE = UBLK_PARAM_TYPE_DISCARD
    OFFSET = 40
    FORMAT = struct.Struct("=IIIIH2x")

    discard_alignment: int = 0  # bytes
    discard_granularity: int = SECTOR_BYTES  # bytes
    max_discard_sectors: int = 0
    max_write_zeroes_sectors: int = 0
    max_discard_segments: int = 1


@dataclasses.dataclass(frozen=True)
class DevtParams(Section):
    """struct ublk_param_devt: the device numbers; only the driver sets them."""

    TYPE = UBLK_PARAM_TYPE_DEVT
    OFFSET = 60
    FORMAT = struct.Struct("=IIII")

    char_major: int = 0
    char_minor: int = 0
    disk_major: int = 0
    disk_minor: int = 0


@dataclasses.dataclass(frozen=True)
class ZonedParams(Section):
    """struct ublk_param_zoned: only with UBLK_F_ZONED."""

    TYPE = UBLK_PARAM_TYPE_ZONED
    OFFSET = 76
    FORMAT = struct.Struct("=III20x")

    max_open_zones: int = 0
    max_active_zones: int = 0
    max_zone_append_sectors: int = 0


@dataclasses.dataclass(frozen=True)
class DmaAlignParams(Section):
    """struct ublk_param_dma_align: a mask, 2^n - 1; without this section it is 3."""

    TYPE = UBLK_PARAM_TYPE_DMA_ALIGN
    OFFSET = 108
    FORMAT = struct.Struct("=I4x")

    alignment: int = SECTOR_BYTES - 1


@dataclasses.dataclass(frozen=True)
class SegmentParams(Section):
    """struct ublk_param_segment: none of the three may be 0."""

    TYPE = UBLK_PARAM_TYPE_SEGMENT
    OFFSET = 120
    FORMAT = struct.Struct("=QIH2x")

    seg_boundary_mask: int = (1 << 32) - 1
    max_segment_size: int = 0xFFFFFFFF  # bytes
    max_segments: int = 0xFFFF


@dataclasses.dataclass(frozen=True)
class IntegrityParams(Section):
    """struct ublk_param_integrity: only with UBLK_F_INTEGRITY."""

    TYPE = UBLK_PARAM_TYPE_INTEGRITY
    OFFSET = 136
    FORMAT = struct.Struct("=IHBBBBB5x")

    flags: int = 0  # LBMD_PI_CAP_*
    max_integrity_segments: int = 0  # 0: no limit
    interval_exp: int = SECTOR_SHIFT
    metadata_size: int = 0  # bytes
    pi_offset: int = 0  # bytes
    csum_type: int = LBMD_PI_CSUM_NONE
    tag_size: int = 0  # bytes


@dataclasses.dataclass(frozen=True)
class Params:
    """struct ublk_params: the sections that are there; None is a section that is not."""

    basic: BasicParams | None = None
    discard: DiscardParams | None = None
    devt: DevtParams | None = None
    zoned: ZonedParams | None = None
    dma: DmaAlignParams | None = None
    seg: SegmentParams | None = None
    integrity: IntegrityParams | None = None

    @property
    def types(self) -> int:
        """UBLK_PARAM_TYPE_* of the sections that are there."""
        return sum(section.TYPE for section in self._sections())

    @property
    def dev_nr_bytes(self) -> int:
        """The device's size; 0 before its parameters are set."""
        return self.basic.dev_sectors << SECTOR_SHIFT if self.basic else 0

    def _sections(self) -> list[Section]:
        sections = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [section for section in sections if section is not None]

    def pack(self) -> bytes:
        """Return the PARAMS_BYTES that SET_PARAMS takes.

        A driver that knows fewer sections takes as many bytes as it knows and drops the rest of
        the types (seen in 6.12); GET_PARAMS tells which ones it kept.

        :raises ValueError: a field does not fit its width.
        Source: ublk_ctrl_set_params() in drivers/block/ublk_drv.c.
        """
        buffer = bytearray(PARAMS_BYTES)
        _HEADER.pack_into(buffer, 0, PARAMS_BYTES, self.types)
        for section in self._sections():
            section.pack_into(buffer)
        return bytes(buffer)

    @classmethod
    def unpack(cls, data: bytes) -> Params:
        """Return the sections that the types word of ``data`` names; the length word is not used.

        The driver hands back the length of the last SET_PARAMS there, 0 before any.

        :raises ValueError: ``data`` is not PARAMS_BYTES long.
        """
        if len(data) != PARAMS_BYTES:
            raise ValueError(f"struct ublk_params has {PARAMS_BYTES} bytes, not {len(data)}")
        _, types = _HEADER.unpack_from(data)

        def section(kind: type[_SectionT]) -> _SectionT | None:
            return kind.unpack_from(data) if types & kind.TYPE else None

        return cls(
            basic=section(BasicParams),
            discard=section(DiscardParams),
            devt=section(DevtParams),
            zoned=section(ZonedParams),
            dma=section(DmaAlignParams),
            seg=section(SegmentParams),
            integrity=section(IntegrityParams),
        )

    def validate(
        self, *, max_io_buf_bytes: int, flags: int = 0, page_bytes: int = PAGE_BYTES
    ) -> None:
        """Check what the driver would check at SET_PARAMS, and name what is wrong.

        :param max_io_buf_bytes: of the device, as ADD_DEV handed it back.
        :param flags: UBLK_F_* of the device, as ADD_DEV handed them back.
        :raises ValueError: the driver would refuse, with -EINVAL.
        Source: ublk_validate_params() in drivers/block/ublk_drv.c.
        """
        if self.basic is None:
            raise ValueError("the basic parameters are missing")
        _validate_basic(self.basic, max_io_buf_bytes, flags, page_bytes)
        if self.discard is not None:
            _validate_discard(self.discard)
        if self.devt is not None:
            raise ValueError("device numbers (devt) are read-only")
        _validate_zoned(self.zoned, self.basic, flags)
        if self.dma is not None:
            _validate_dma(self.dma, page_bytes)
        if self.seg is not None:
            _validate_segment(self.seg)
        if self.integrity is not None:
            _validate_integrity(self.integrity, self.basic, flags)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _validate_basic(basic: BasicParams, max_io_buf_bytes: int, flags: int, page_bytes: int) -> None:
    _require(
        SECTOR_BYTES <= 1 << basic.logical_bs_shift <= page_bytes,
        f"logical block size 2^{basic.logical_bs_shift} is not from 512 to {page_bytes}",
    )
    for name in ("physical_bs_shift", "io_min_shift", "io_opt_shift"):
        shift = getattr(basic, name)
        _require(shift <= MAX_BS_SHIFT, f"{name} {shift} is above {MAX_BS_SHIFT} (256 MiB)")
    _require(
        basic.logical_bs_shift <= basic.physical_bs_shift,
        f"logical block size 2^{basic.logical_bs_shift} is larger than "
        f"physical block size 2^{basic.physical_bs_shift}",
    )
    _require(
        page_bytes <= basic.max_sectors << SECTOR_SHIFT <= max_io_buf_bytes,
        f"max_sectors {basic.max_sectors} is not from a page ({page_bytes >> SECTOR_SHIFT}) "
        f"to the I/O buffer ({max_io_buf_bytes >> SECTOR_SHIFT})",
    )
    if flags & UBLK_F_ZONED:
        _require(
            _is_power_of_2(basic.chunk_sectors),
            f"chunk_sectors {basic.chunk_sectors} of a zoned device is not a power of two",
        )


def _validate_discard(discard: DiscardParams) -> None:
    _require(
        discard.max_discard_sectors == 0 or discard.max_discard_segments == 1,
        f"max_discard_segments is {discard.max_discard_segments}, not 1",
    )
    _require(discard.discard_granularity != 0, "discard_granularity is 0")


def _validate_zoned(zoned: ZonedParams | None, basic: BasicParams, flags: int) -> None:
    if zoned is None:
        _require(not flags & UBLK_F_ZONED, "the zoned parameters of a zoned device are missing")
        return
    _require(bool(flags & UBLK_F_ZONED), "zoned parameters, but the device is not zoned")
    _require(zoned.max_zone_append_sectors != 0, "max_zone_append_sectors is 0")
    nr_zones = basic.dev_sectors // basic.chunk_sectors
    for name in ("max_active_zones", "max_open_zones"):
        nr = getattr(zoned, name)
        _require(nr <= nr_zones, f"{name} {nr} is above the number of zones ({nr_zones})")


def _validate_dma(dma: DmaAlignParams, page_bytes: int) -> None:
    _require(
        dma.alignment < page_bytes and _is_power_of_2(dma.alignment + 1),
        f"dma alignment {dma.alignment:#x} is not 2^n - 1 below the page size",
    )


def _validate_segment(seg: SegmentParams) -> None:
    # The mask's type is 64 bits wide, so all ones wraps to 0 in the driver and is refused.
    boundary = (seg.seg_boundary_mask + 1) & ((1 << 64) - 1)
    _require(
        _is_power_of_2(boundary) and boundary >= UBLK_MIN_SEGMENT_SIZE,
        f"seg_boundary_mask {seg.seg_boundary_mask:#x} is not 2^n - 1 with 2^n at least "
        f"{UBLK_MIN_SEGMENT_SIZE}",
    )
    _require(
        seg.max_segment_size >= UBLK_MIN_SEGMENT_SIZE,
        f"max_segment_size {seg.max_segment_size} is below {UBLK_MIN_SEGMENT_SIZE}",
    )
    _require(seg.max_segments > 0, "max_segments is 0")


PI_TUPLE_BYTES = {
    LBMD_PI_CSUM_NONE: 0,
    LBMD_PI_CSUM_IP: 8,
    LBMD_PI_CSUM_CRC16_T10DIF: 8,
    LBMD_PI_CSUM_CRC64_NVME: 16,
}


def _validate_integrity(integrity: IntegrityParams, basic: BasicParams, flags: int) -> None:
    _require(bool(flags & UBLK_F_INTEGRITY), "integrity parameters, but the device has none")
    known = LBMD_PI_CAP_INTEGRITY | LBMD_PI_CAP_REFTAG
    _require(not integrity.flags & ~known, f"unknown integrity flags {integrity.flags:#x}")
    _require(integrity.csum_type in PI_TUPLE_BYTES, f"unknown csum_type {integrity.csum_type}")
    _require(integrity.metadata_size != 0, "metadata_size is 0")
    _require(
        integrity.csum_type != LBMD_PI_CSUM_NONE or not integrity.flags & LBMD_PI_CAP_REFTAG,
        "reference tags need a checksum",
    )
    tuple_end = integrity.pi_offset + PI_TUPLE_BYTES[integrity.csum_type]
    _require(
        tuple_end <= integrity.metadata_size,
        f"the protection tuple ends at {tuple_end}, after the metadata ({integrity.metadata_size})",
    )
    _require(
        SECTOR_SHIFT <= integrity.interval_exp <= basic.logical_bs_shift,
        f"interval_exp {integrity.interval_exp} is not from {SECTOR_SHIFT} to the logical "
        f"block size's {basic.logical_bs_shift}",
    )


def bs_shift(name: str, nr_bytes: int) -> int:
    """Return log2 of a block size.

    :param name: what to call it in the error.
    :raises ValueError: not a power of two of at least 512.
    """
    if nr_bytes < SECTOR_BYTES or not _is_power_of_2(nr_bytes):
        raise ValueError(f"{name} {nr_bytes} is not a power of two of at least 512")
    return nr_bytes.bit_length() - 1


def _attrs(*, read_only: bool, rotational: bool, volatile_cache: bool, fua: bool) -> int:
    if fua and not volatile_cache:
        raise ValueError("fua needs volatile_cache: the kernel ignores it without")
    return (
        UBLK_ATTR_READ_ONLY * read_only
        | UBLK_ATTR_ROTATIONAL * rotational
        | UBLK_ATTR_VOLATILE_CACHE * volatile_cache
        | UBLK_ATTR_FUA * fua
    )


def _discard_params(
    granularity: int, logical_bs: int, discard: bool, zeroes: bool
) -> DiscardParams:
    granularity = granularity or logical_bs
    if granularity % logical_bs or not 0 < granularity >> SECTOR_SHIFT <= MAX_REQUEST_SECTORS:
        raise ValueError(
            f"discard granularity {granularity} is not a multiple of the logical block size "
            f"{logical_bs} below 4 GiB"
        )
    granularity_sectors = granularity >> SECTOR_SHIFT
    block_sectors = logical_bs >> SECTOR_SHIFT
    return DiscardParams(
        discard_granularity=granularity,
        max_discard_sectors=_round_down(MAX_REQUEST_SECTORS, granularity_sectors) * discard,
        max_write_zeroes_sectors=_round_down(MAX_REQUEST_SECTORS, block_sectors) * zeroes,
    )


def _round_down(value: int, multiple: int) -> int:
    return value - value % multiple


def _dev_sectors(dev_nr_bytes: int, logical_bs: int) -> int:
    if not 0 < dev_nr_bytes <= MAX_DEV_BYTES:
        raise ValueError(f"a device of {dev_nr_bytes} bytes is not possible")
    if dev_nr_bytes % logical_bs:
        raise ValueError(
            f"a device of {dev_nr_bytes} bytes is not a multiple of the logical block size "
            f"{logical_bs}"
        )
    return dev_nr_bytes >> SECTOR_SHIFT


def params_for(
    *,
    dev_nr_bytes: int,
    max_io_buf_bytes: int,
    logical_bs: int = SECTOR_BYTES,
    physical_bs: int | None = None,
    io_opt: int | None = None,
    read_only: bool = False,
    rotational: bool = False,
    volatile_cache: bool = False,
    fua: bool = False,
    discard: bool = False,
    discard_granularity: int = 0,
    write_zeroes: bool = False,
    dma_alignment: int = SECTOR_BYTES,
    seg: SegmentParams | None = None,
    integrity: IntegrityParams | None = None,
    page_bytes: int = PAGE_BYTES,
) -> Params:
    """Return the parameters of a device with this geometry; all sizes are in bytes.

    :param dev_nr_bytes: a positive multiple of ``logical_bs``, below 2^63.
    :param max_io_buf_bytes: of the device, as ADD_DEV handed it back; a page to 32 MiB.
    :param logical_bs: a power of two, 512 to a page.
    :param physical_bs: a power of two, ``logical_bs`` (the default) to 256 MiB; also io_min.
    :param io_opt: a power of two up to 256 MiB; by default a page or ``physical_bs``, the larger.
    :param fua: the target writes through when told; needs ``volatile_cache``.
    :param discard_granularity: a multiple of ``logical_bs`` (the default).
    :param dma_alignment: of a request's memory; a power of two up to a page.
    :param seg: what the pieces of a request's memory may be; default: anything.
    :param integrity: of a device with UBLK_F_INTEGRITY.
    :raises ValueError: one of these does not hold.
    Source: ublk_validate_params() and ublk_ctrl_start_dev() in drivers/block/ublk_drv.c.
    """
    logical_bs_shift = bs_shift("logical block size", logical_bs)
    physical_bs = physical_bs or logical_bs
    io_opt = io_opt or max(physical_bs, page_bytes)
    if not page_bytes <= max_io_buf_bytes <= UBLK_MAX_IO_BUF_BYTES:
        raise ValueError(f"I/O buffer of {max_io_buf_bytes} bytes is not from a page to 32 MiB")
    # A request never holds part of a block.
    max_sectors = _round_down(max_io_buf_bytes, max(logical_bs, page_bytes)) >> SECTOR_SHIFT
    params = Params(
        basic=BasicParams(
            attrs=_attrs(
                read_only=read_only,
                rotational=rotational,
                volatile_cache=volatile_cache,
                fua=fua,
            ),
            logical_bs_shift=logical_bs_shift,
            physical_bs_shift=bs_shift("physical block size", physical_bs),
            io_opt_shift=bs_shift("io_opt", io_opt),
            io_min_shift=bs_shift("io_min", physical_bs),
            max_sectors=max_sectors,
            dev_sectors=_dev_sectors(dev_nr_bytes, logical_bs),
        ),
        discard=(
            _discard_params(discard_granularity, logical_bs, discard, write_zeroes)
            if discard or write_zeroes
            else None
        ),
        dma=DmaAlignParams(alignment=dma_alignment - 1),
        seg=seg,
        integrity=integrity,
    )
    flags = 0 if integrity is None else UBLK_F_INTEGRITY
    params.validate(max_io_buf_bytes=max_io_buf_bytes, flags=flags, page_bytes=page_bytes)
    return params


__all__ = [
    "BasicParams",
    "DevtParams",
    "DiscardParams",
    "DmaAlignParams",
    "IntegrityParams",
    "Params",
    "Section",
    "SegmentParams",
    "ZonedParams",
    "bs_shift",
    "params_for",
]
