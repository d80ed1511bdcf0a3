"""The exceptions of ublk_loop; each is an OSError with errno set.

Raised on any thread; only the cli modules turn them into text for a person. A failed *request* is
none of these: it is a negative errno, committed for its tag. Bad arguments are ValueError.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .holders import Holder

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F)}


def one_line(text: str) -> str:
    """Return ``text`` with each newline, which a file's name may have, or its like as ``\\x0a``."""
    return text.translate(_CONTROLS)


class UblkLoopError(OSError):
    """Base of all errors here; ``errno`` is always set.

    :param errno: a positive errno.
    :param what: what was attempted and on what, such as ``START_DEV dev 3``.
    :param hint: what the user may do about it, one sentence, or empty.
    """

    errno: int
    strerror: str

    def __init__(self, errno: int, what: str, hint: str = "") -> None:
        super().__init__(errno, os.strerror(errno))
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.what}: {self.strerror}"
        return one_line(f"{text}: {self.hint}" if self.hint else text)

    # OSError's own would call us with its two arguments and lose the text.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.what, self.hint)


class DriverError(UblkLoopError):
    """The driver or io_uring refused a command."""


class BusyError(DriverError):
    """A device is in use, and was left as it is; ``holders`` are those that could be seen."""

    def __init__(self, what: str, holders: Sequence[Holder]) -> None:
        first = str(holders[0]) if holders else "in use by the kernel, or by what you may not see"
        more = f", and {len(holders) - 1} more" if len(holders) > 1 else ""
        ways = "--lazy or --force" if what.startswith("del ") else "--force"
        hint = f"{first}{more}: unmount or close it first, or use {ways}"
        super().__init__(errno.EBUSY, what, hint)
        self.holders = tuple(holders)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.holders)


class BackingFileError(UblkLoopError):
    """The backing file cannot be opened, sized or locked."""


class DaemonError(UblkLoopError):
    """A server process is absent, or refused or failed a request."""


def check(result: int, what: str, hint: str = "") -> int:
    """Return ``result`` of a call into C, or raise it as DriverError if it is -errno."""
    if result < 0:
        raise DriverError(-result, what, hint)
    return result


__all__ = [
    "BackingFileError",
    "BusyError",
    "DaemonError",
    "DriverError",
    "UblkLoopError",
    "check",
    "one_line",
]
