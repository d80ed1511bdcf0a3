"""``ublk losetup``: the losetup command of util-linux, for devices that ublk_loop serves.

In: losetup's command line. Out: what ``add``, ``del`` and ``list`` do, and text in
losetup's formats (losetup.py). What a ublk device cannot do is refused with one line that says what
can be done instead. Runs in the CLI.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

import click

from . import __version__, uapi
from . import losetup as formats
from .cli_add import add_device, parse_bytes
from .cli_base import CONTEXT, exit_if_failed
from .cli_del import delete_one
from .cli_list import known_devices
from .errors import BackingFileError, DaemonError, UblkLoopError

_SECTOR_SIZES = click.Choice(["512", "1024", "2048", "4096"])
_COLUMN_HELP = "\n".join(f"  {name:<12}  {text}" for name, (_, text) in formats.COLUMNS.items())


class _Command(click.Command):
    """A command whose --direct-io may stand without a value, which is then ``on``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        bare = ("--direct-io", "--direct_io")
        return super().parse_args(ctx, [f"{arg}=on" if arg in bare else arg for arg in args])


def _offset(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    nr_bytes = parse_bytes(text)
    if nr_bytes % uapi.SECTOR_BYTES or nr_bytes >= 1 << 63:
        raise click.BadParameter(f"{text!r} is not a multiple of 512 bytes below 8E")
    return nr_bytes


def _sizelimit(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    # As the loop driver, which counts whole sectors.
    return parse_bytes(text) // uapi.SECTOR_BYTES * uapi.SECTOR_BYTES or None


def _columns(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    try:
        return None if text is None else formats.parse_columns(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(
    "losetup",
    cls=_Command,
    context_settings=CONTEXT,
    short_help="The same as losetup of util-linux.",
    epilog="\b\nColumns:\n" + _COLUMN_HELP,
)
@click.option("-a", "--all", "everything", is_flag=True, help="Show all devices.")
@click.option("-d", "--detach", multiple=True, metavar="DEVICE", help="Detach devices.")
@click.option("-D", "--detach-all", is_flag=True, help="Detach all devices.")
@click.option("-f", "--find", is_flag=True, help="Use, or print, the first free device.")
@click.option("-c", "--set-capacity", metavar="DEVICE", help="Take the file's size anew.")
@click.option("-j", "--associated", metavar="FILE", help="Show the devices of a file.")
@click.option(
    "-L", "--nooverlap", is_flag=True, help="No second device on a part; with -f: use the first."
)
@click.option("-o", "--offset", callback=_offset, metavar="BYTES", help="Begin there in the file.")
@click.option("--sizelimit", callback=_sizelimit, metavar="BYTES", help="At most so much of it.")
@click.option("-b", "--sector-size", type=_SECTOR_SIZES, help="Logical block size.")
@click.option("-P", "--partscan", is_flag=True, help="Look for partitions.")
@click.option("-r", "--read-only", is_flag=True, help="A read-only device.")
@click.option(
    "--direct-io", type=click.Choice(["on", "off"]), help="[=on|off] Past the page cache."
)
@click.option("--show", is_flag=True, help="Print the new device's name.")
@click.option("-l", "--list", "as_table", is_flag=True, help="Show as a table.")
@click.option("-O", "--output", "columns", callback=_columns, metavar="COLUMNS", help="Which ones.")
@click.option("--output-all", is_flag=True, help="All columns.")
@click.option("-n", "--noheadings", is_flag=True, help="Without headings.")
@click.option("--raw", is_flag=True, help="Columns without padding.")
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Without effect.")
@click.version_option(__version__, "-V", "--version", message="ublk losetup %(version)s")
@click.argument("names", nargs=-1, metavar="[DEVICE] [FILE]")
def losetup(names: tuple[str, ...], **given: Any) -> None:
    """Set up and control devices with the command line of losetup(8).

    \b
    Examples:
      ublk losetup -f --show disk.img
      ublk losetup /dev/ublkb7 disk.img -r
      ublk losetup -l
      ublk losetup -d /dev/ublkb7
    """
    if given["detach"] or given["detach_all"]:
        _detach([*given["detach"], *names], everything=given["detach_all"])
    elif given["set_capacity"]:
        _set_capacity(given["set_capacity"])
    elif given["find"] and not names:
        click.echo(f"/dev/ublkb{_first_free()}")
    elif len(names) > 2 or (given["find"] and len(names) == 2):
        raise click.UsageError("say -f FILE, or DEVICE FILE")
    elif given["find"]:
        _attach(None, names[0], given)
    elif len(names) == 2:
        _attach(_dev_id(names[0]), names[1], given)
    else:
        _show(names, given)


# ---- attach ----


def _attach(dev_id: int | None, path: str, given: dict[str, Any]) -> None:
    name = _same_device(dev_id, path, given) if given["nooverlap"] else None
    if name is None:
        name = add_device(_add_words(dev_id, path, given))["block_device"]
    if given["show"]:
        click.echo(name)


def _add_words(dev_id: int | None, path: str, given: dict[str, Any]) -> list[str]:
    words = ["-t", "loop", "-f", path]
    if dev_id is not None:
        words += ["-n", str(dev_id)]
    if given["offset"]:
        words += ["-o", str(given["offset"] >> uapi.SECTOR_SHIFT)]
    if given["sizelimit"]:
        words += ["--sizelimit", str(given["sizelimit"])]
    if given["sector_size"]:
        words += ["--sector_size", given["sector_size"]]
    if given["direct_io"]:
        words += ["--direct_io" if given["direct_io"] == "on" else "--buffered_io"]
    if not given["partscan"] and _need_not_scan():
        words.append("--no_auto_part_scan")
    return words + ["-R"] * (given["read_only"] or _is_write_protected(path))


def _is_write_protected(path: str) -> bool:
    # losetup serves such a file read-only, without being told to.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.EROFS, errno.EACCES)
    return False


def _need_not_scan() -> bool:
    from .control import Control

    try:
        with Control() as control:
            return bool(control.get_features() & uapi.UBLK_F_NO_AUTO_PART_SCAN)
    except UblkLoopError:
        return False  # ublk add says what is wrong with the driver, after what is with the words


def _same_device(dev_id: int | None, path: str, given: dict[str, Any]) -> str | None:
    part = (given["offset"] or 0, given["sizelimit"] or 0)
    for one in _rows_of_file(path):
        theirs = (int(one["OFFSET"] or 0), int(one["SIZELIMIT"] or 0))
        if formats.are_apart(part, theirs):
            continue
        may_be_used = given["read_only"] or not one["RO"]
        if dev_id is None and part == theirs and may_be_used:
            return str(one["NAME"])
        has = "it, or a part of it" if may_be_used else "it, read-only"
        raise BackingFileError(errno.EBUSY, path, f"{one['NAME']} has {has}")
    return None


def _first_free() -> int:
    from .control import list_dev_ids

    taken = set(list_dev_ids())
    return next(dev_id for dev_id in range(len(taken) + 1) if dev_id not in taken)


def _dev_id(name: str) -> int:
    match = re.fullmatch(r"(?:/dev/)?ublkb(\d{1,7})", name)
    if match is None:
        hint = "a device is /dev/ublkbN here; losetup without ublk has /dev/loopN"
        if os.path.isfile(name):
            hint = f"it is a file: ublk losetup -f --show {shlex.quote(name)} sets it up"
        raise DaemonError(errno.ENODEV, name, hint)
    return int(match[1])


# ---- detach, capacity ----


def _detach(names: Sequence[str], *, everything: bool) -> None:
    dev_ids = [_dev_id(name) for name in names]
    if everything:
        dev_ids = [_dev_id(str(one["NAME"])) for one in _rows()]
    # As the loop driver does: one that is in use goes when its last user does.
    done = [delete_one(each, no_wait=False, force=False, lazy=True) for each in dev_ids]
    exit_if_failed(done)


def _set_capacity(name: str) -> None:
    from . import manage

    manage.resize(_dev_id(name))


# ---- show ----


def _show(names: Sequence[str], given: dict[str, Any]) -> None:
    for option, what in (("direct_io", "--direct-io"), ("sector_size", "-b")):
        if given[option]:
            hint = "it is chosen when a device is set up: detach it and set it up again"
            raise DaemonError(errno.EOPNOTSUPP, f"losetup {what}", hint)
    if names and not given["associated"]:
        rows = _rows(_dev_id(names[0]))
        if not rows:
            raise DaemonError(errno.ENXIO, names[0], "it has no backing file: see ublk list")
    else:
        rows = _rows_of_file(given["associated"]) if given["associated"] else _rows()
    if given["associated"] and given["offset"] is not None:
        rows = [one for one in rows if one["OFFSET"] == given["offset"]]
    _print(rows, given, as_line=bool(names or given["everything"] or given["associated"]))


def _print(rows: list[formats.Row], given: dict[str, Any], *, as_line: bool) -> None:
    columns = given["columns"] or formats.DEFAULT_COLUMNS
    if given["output_all"]:
        columns = tuple(formats.COLUMNS)
    said = ("as_table", "columns", "output_all", "noheadings", "raw", "as_json")
    headings = not given["noheadings"]
    if as_line and not any(given[name] for name in said):
        click.echo("".join(f"{formats.line(one)}\n" for one in rows), nl=False)
    elif given["as_json"]:
        click.echo(json.dumps(formats.document(rows, columns), indent=3))
    elif rows:
        show = formats.raw if given["raw"] else formats.table
        click.echo(show(rows, columns, headings=headings))


def _rows(dev_id: int | None = None) -> list[formats.Row]:
    found = (formats.row(*one) for one in known_devices(dev_id))
    return [one for one in found if one is not None]


def _rows_of_file(path: str) -> list[formats.Row]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise BackingFileError(error.errno or errno.EIO, path) from None
    where = (found.st_ino, f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}")
    return [one for one in _rows() if (one["BACK-INO"], one["BACK-MAJ:MIN"]) == where]


__all__ = ["losetup"]
