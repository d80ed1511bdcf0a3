"""``ublk set_params``: whether the driver takes parameters, by a device that is never started.

In: what the kernel's own test server calls its options. Out: nothing, or the driver's refusal with
what is wrong, as far as params.py knows. The device is deleted again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import state, uapi
from .cli_base import Integer
from .errors import DriverError
from .params import BasicParams, Params, ZonedParams

if TYPE_CHECKING:
    from .control import Control, DevInfo

MAX_IO_BUF_BYTES = 1 << 20
_SHIFT = Integer(0, 255)
_U32 = Integer(0, 0xFFFFFFFF)
_NR_SECTORS = Integer(0, (1 << 64) - 1)
_SECTIONS = ("basic", "zoned")
_Section = TypeVar("_Section", BasicParams, ZonedParams)


def _sections(_: click.Context, __: click.Parameter, text: str) -> frozenset[str]:
    names = frozenset(text.split(",")) - {"none"}
    if not names <= set(_SECTIONS):
        raise click.BadParameter(f"{text!r} is not none, or of {', '.join(_SECTIONS)}")
    return names


@click.command("set_params", short_help="Ask the driver whether it takes these parameters.")
@click.option("-n", "--number", "dev_id", type=Integer(-1, state.MAX_DEV_ID), default=-1)
@click.option("-q", "--queues", type=Integer(1, state.MAX_NR_HW_QUEUES), default=1)
@click.option("-d", "--depth", type=Integer(1, state.MAX_QUEUE_DEPTH), default=128)
@click.option("-u", "--user_copy", is_flag=True, help="Of a device with USER_COPY.")
@click.option("--zoned", is_flag=True, help="Of a zoned device; needs -u.")
@click.option(
    "--param_types",
    "sections",
    callback=_sections,
    default="basic",
    show_default=True,
    metavar="NAMES",
    help="The sections that are there: none, basic or basic,zoned.",
)
@click.option("--logical_bs_shift", type=_SHIFT, default=9, show_default=True)
@click.option("--physical_bs_shift", type=_SHIFT, default=12, show_default=True)
@click.option("--io_min_shift", type=_SHIFT, default=9, show_default=True)
@click.option("--io_opt_shift", type=_SHIFT, default=12, show_default=True)
@click.option("--max_sectors", type=_U32, default=MAX_IO_BUF_BYTES >> 9, show_default=True)
@click.option("--chunk_sectors", type=_U32, default=128, show_default=True)
@click.option("--dev_sectors", type=_NR_SECTORS, default=2048, show_default=True)
@click.option("--max_open_zones", type=_U32, default=0, show_default=True)
@click.option("--max_active_zones", type=_U32, default=0, show_default=True)
@click.option("--max_zone_append_sectors", type=_U32, default=8, show_default=True)
def set_params(
    dev_id: int, queues: int, depth: int, user_copy: bool, zoned: bool, **given: Any
) -> None:
    """Ask the driver whether it takes these parameters: add a device, set them, delete it.

    \b
    Example:
      ublk set_params --logical_bs_shift 12 --max_sectors 1024
    """
    from .control import Control, DevInfo

    wanted = uapi.UBLK_F_USER_COPY * user_copy | uapi.UBLK_F_ZONED * zoned
    info = DevInfo(
        nr_hw_queues=queues,
        queue_depth=depth,
        max_io_buf_bytes=MAX_IO_BUF_BYTES,
        dev_id=dev_id,
        flags=wanted,
    )
    with Control() as control:
        info = control.add_dev(info)
        try:
            if wanted & ~info.flags:
                hint = "the driver lacks what was asked for: see ublk features"
                raise DriverError(errno.EOPNOTSUPP, f"ADD_DEV dev {info.dev_id}", hint)
            _set(control, info, _params(given))
        finally:
            control.del_dev(info.dev_id)


def _params(given: dict[str, Any]) -> Params:
    def section(name: str, kind: type[_Section]) -> _Section | None:
        values = {key: given[key] for key in given if key in kind.__dataclass_fields__}
        return kind(**values) if name in given["sections"] else None

    return Params(basic=section("basic", BasicParams), zoned=section("zoned", ZonedParams))


def _set(control: Control, info: DevInfo, params: Params) -> None:
    try:
        control.set_params(info.dev_id, params)
    except DriverError as error:
        try:
            params.validate(max_io_buf_bytes=info.max_io_buf_bytes, flags=info.flags)
        except ValueError as reason:
            raise DriverError(error.errno, error.what, str(reason)) from None
        raise
