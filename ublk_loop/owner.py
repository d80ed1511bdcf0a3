"""``ublk owner``: who owns an unprivileged device, for the rules of udev.

udev runs it for each node of a ublk device, so it imports as little as can be. In: the name of a
node. Out: the ids of the user and the group on stdout, or one line on stderr and exit code 1, which
for udev means that the rule does not apply. Asks the driver only.
"""

from __future__ import annotations

import errno
import re
import sys

from . import uapi
from .control import Control
from .errors import DaemonError, UblkLoopError


def owner_of(name: str) -> tuple[int, int]:
    """Return the ids of who added the device of node ``name``, such as ublkc0 or ublkb0p1.

    :raises ValueError: it is no such name.
    :raises DaemonError: EPERM if the device is not unprivileged.
    """
    match = re.fullmatch(r"(?:/dev/)?ublk[bc](\d{1,7})(?:p\d+)?", name)
    if match is None:
        raise ValueError(f"{name!r} is none of ublkcN, ublkbN")
    with Control() as control:
        info = control.get_dev_info(int(match[1]))
    if not info.flags & uapi.UBLK_F_UNPRIVILEGED_DEV:
        raise DaemonError(errno.EPERM, name, "it is no unprivileged device: root's")
    return info.owner_uid, info.owner_gid


def quick_owner(words: list[str]) -> int | None:
    """Do ``ublk owner WORDS`` and return the exit code; None: let the command say what is wrong."""
    try:
        [name] = words
        uid, gid = owner_of(name)
    except ValueError:
        return None
    except UblkLoopError as error:
        sys.stderr.write(f"ublk: {error}\n")
        return 1
    sys.stdout.write(f"{uid} {gid}\n")
    return 0
