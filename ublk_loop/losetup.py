"""What ``ublk losetup`` shows of a device, in the formats of util-linux' losetup.

In: what the driver and the state file say of the devices that have a backing file. Out: text, or
what is printed as JSON. Nothing here prints, or talks to the driver; of a backing file it asks what
it is called now, and for the inode.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import sharing, uapi
from .errors import one_line

if TYPE_CHECKING:
    from .control import DevInfo
    from .params import Params
    from .state import DeviceState

# Name, whether it is aligned to the right, and what --help says of it.
COLUMNS = {
    "NAME": (False, "device name"),
    "AUTOCLEAR": (True, "always 0: a device stays until it is detached"),
    "BACK-FILE": (False, "backing file"),
    "BACK-INO": (True, "backing file's inode number"),
    "BACK-MAJ:MIN": (False, "device number of the disk that the backing file is on"),
    "MAJ:MIN": (False, "device number"),
    "OFFSET": (True, "where the device begins in the file, in bytes"),
    "PARTSCAN": (True, "whether partitions are looked for"),
    "RO": (True, "read-only"),
    "SIZELIMIT": (True, "the most bytes of the file that it has; 0: no limit"),
    "DIO": (True, "direct I/O on the backing file"),
    "LOG-SEC": (True, "logical block size in bytes"),
}
DEFAULT_COLUMNS = (
    *("NAME", "SIZELIMIT", "OFFSET", "AUTOCLEAR", "RO", "BACK-FILE", "DIO", "LOG-SEC"),
)

_NO_PARTITIONS = uapi.UBLK_F_NO_AUTO_PART_SCAN | uapi.UBLK_F_UNPRIVILEGED_DEV

Row = dict[str, "str | int | bool | None"]


def row(info: DevInfo, params: Params, known: DeviceState | None) -> Row | None:
    """Return a device's row, by column; None if it has no backing file, or is not ours."""
    if known is None or known.spec.type != "loop":
        return None
    spec, devt = known.spec, params.devt
    path, ino, dev = _backing_file(known)
    return {
        "NAME": f"/dev/ublkb{info.dev_id}",
        "AUTOCLEAR": False,
        "BACK-FILE": path,
        "BACK-INO": ino,
        "BACK-MAJ:MIN": None if dev is None else f"{os.major(dev)}:{os.minor(dev)}",
        "MAJ:MIN": f"{devt.disk_major}:{devt.disk_minor}" if devt else None,
        "OFFSET": spec.offset_bytes,
        # The driver looks for them as it does on any disk, but not on a plain user's.
        "PARTSCAN": not info.flags & _NO_PARTITIONS,
        "RO": spec.read_only,
        "SIZELIMIT": spec.limit_bytes or 0,
        "DIO": bool(spec.direct),
        "LOG-SEC": 1 << params.basic.logical_bs_shift if params.basic else 512,
    }


def _backing_file(known: DeviceState) -> tuple[str, int | None, int | None]:
    # As the server has it open: it may have been moved or removed, and another be at its path.
    path = str(known.target["backing_file"])
    opened = next(sharing.files_of(known.server_pid, known.dev_id), "")
    try:
        found = os.stat(opened or path)
        return os.readlink(opened) if opened else path, found.st_ino, found.st_dev
    except OSError:
        return path, None, None


def line(one: Row) -> str:
    """Return what losetup prints of a device without ``--list``."""
    where = "[]:"
    if one["BACK-MAJ:MIN"] is not None:
        dev = os.makedev(*map(int, str(one["BACK-MAJ:MIN"]).split(":")))
        where = f"[{dev:04d}]:{one['BACK-INO']}"
    text = f"{one['NAME']}: {where} ({one['BACK-FILE']})"
    for name in ("OFFSET", "SIZELIMIT"):
        text += f", {name.lower()} {one[name]}" if one[name] else ""
    return text


def parse_columns(text: str) -> tuple[str, ...]:
    """Return the columns of ``NAME,RO``. :raises ValueError: an unknown one, named."""
    names = tuple(name.strip().upper() for name in text.split(","))
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"unknown column {name!r}; there are {', '.join(COLUMNS)}")
    return names


def are_apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether parts of a file, offset and length (0: to its end), have none in common."""
    (first, nr_bytes), (second, _) = sorted((one, other))
    return 0 < nr_bytes <= second - first


def document(rows: Iterable[Row], columns: Sequence[str]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {"loopdevices": [{name.lower(): one[name] for name in columns} for one in rows]}


def raw(rows: Iterable[Row], columns: Sequence[str], *, headings: bool) -> str:
    """Return what ``--raw`` prints, with no newline at the end: no padding, blanks as ``\\x20``."""
    cells = _cells(rows, columns, headings)
    return "\n".join(" ".join(cell.replace(" ", "\\x20") for cell in each) for each in cells)


def table(rows: Iterable[Row], columns: Sequence[str], *, headings: bool) -> str:
    """Return what ``--list`` prints, with no newline at the end."""
    cells = _cells(rows, columns, headings)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for each in cells:
        padded = [
            cell.rjust(width) if COLUMNS[name][0] else cell.ljust(width)
            for name, cell, width in zip(columns, each, widths, strict=True)
        ]
        lines.append(" ".join(padded).rstrip())
    return "\n".join(lines)


def _cells(rows: Iterable[Row], columns: Sequence[str], headings: bool) -> list[list[str]]:
    lines = [list(columns)] if headings else []
    return lines + [[_cell(one[name]) for name in columns] for one in rows]


def _cell(value: str | int | bool | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else one_line(str(value))


__all__ = [
    "COLUMNS",
    "DEFAULT_COLUMNS",
    "Row",
    "are_apart",
    "document",
    "line",
    "parse_columns",
    "raw",
    "row",
    "table",
]
