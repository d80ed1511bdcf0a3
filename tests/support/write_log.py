"""The log of dm-log-writes: what a disk was told, in the order in which it became durable.

The target logs a write only when a flush that began after the write's end has ended, or at its own
end if it has FUA; a mark, when it is sent. So the first n entries are what a disk with a volatile
cache holds for certain if the power goes then, and nothing besides them needs to be there.

In: the log device's path. Out: entries, and an image with the first n of them. The format is in
Documentation/admin-guide/device-mapper/log-writes.rst; the tool that replays it is in no Debian
package.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
END_MARK = "dm-log-writes-end"
SECTOR_BYTES = 512
DISCARD, MARK = 1 << 2, 1 << 3
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_DM_TARGET_MSG = 0xC138FD0E
_DM_IOCTL = struct.Struct("=3I II I i I I I Q 128s 129s 7s")


@dataclass(frozen=True)
class Entry:
    """One entry: a write of ``data``, a discard (no data), or a mark (``text``)."""

    offset: int
    nr_bytes: int
    is_discard: bool = False
    data_at: int = 0
    text: str | None = None


class WriteLog:
    """A finished log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries = list(self._read())

    def _read(self) -> Iterator[Entry]:
        with self._path.open("rb") as file:
            magic, version, nr_entries, block_bytes = _SUPER.unpack(file.read(_SUPER.size))
            assert (magic, version) == (MAGIC, 1), f"{self._path} is no write log"
            at = block_bytes
            for _ in range(nr_entries):
                file.seek(at)
                sector, nr_sectors, flags, text_bytes = _ENTRY.unpack(file.read(_ENTRY.size))
                text = file.read(text_bytes).rstrip(b"\0").decode() if flags & MARK else None
                at += block_bytes
                is_discard = bool(flags & DISCARD)
                yield Entry(sector * SECTOR_BYTES, nr_sectors * block_bytes, is_discard, at, text)
                if not is_discard:
                    at += nr_sectors * block_bytes

    def replay(self, image: Path, begin: int, end: int) -> None:
        """Apply the entries from ``begin`` up to ``end``, which is left out."""
        with self._path.open("rb") as log, image.open("r+b") as disk:
            for entry in self.entries[begin:end]:
                data = bytes(entry.nr_bytes)
                if not entry.is_discard:
                    log.seek(entry.data_at)
                    data = log.read(entry.nr_bytes)
                disk.seek(entry.offset)
                disk.write(data)

    def marks(self, end: int) -> list[str]:
        """Our marks among the first ``end`` entries; the target adds one at its end."""
        texts = (entry.text for entry in self.entries[:end])
        return [text for text in texts if text is not None and text != END_MARK]


def send_mark(name: str, text: str) -> None:
    """Put a mark into the log of the dm device ``name``; a process for each would be too slow."""
    message = struct.pack("=Q", 0) + f"mark {text}".encode() + b"\0"
    size = _DM_IOCTL.size + len(message)
    head = _DM_IOCTL.pack(4, 0, 0, size, _DM_IOCTL.size, 0, 0, 0, 0, 0, 0, name.encode(), b"", b"")
    fd = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _DM_TARGET_MSG, bytearray(head + message))
    finally:
        os.close(fd)
