"""The replacement of a living server by a new one, with the device in use: ``ublk upgrade``.

In: a device of ours whose server lives. Out: the same device without one, ready to be recovered.
Runs in the new server, before it opens the backing file, which the old one has locked. What waits
has a deadline; a server that does not leave by then is killed, which is what recovery is for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import stat
import time

from . import sharing, uapi
from .control import Control, DevInfo
from .errors import DaemonError, DriverError
from .manage import served_here
from .process import ServerProcess
from .server import LEAVE_SIGNAL
from .state import DeviceState

QUIESCE_TIMEOUT_MS = 2000
LEAVE_TIMEOUT_S = 8.0
KILL_TIMEOUT_S = 10.0
QUIESCED_TIMEOUT_S = 20.0  # once its server is gone

_log = logging.getLogger(__name__)


def upgradable(dev_id: int, *, force: bool = False, verb: str = "upgrade") -> DeviceState:
    """Return the state of a device whose server can be replaced.

    :param force: though requests fail.
    :param verb: of the error.
    :raises DriverError: ENODEV.
    :raises DaemonError: ENOENT (not a device of ours); EINVAL (it was not added with recovery);
        EOPNOTSUPP (requests would fail); ENOENT, ..., ESTALE (one of its files is no more at the
        path where the next server opens it).
    """
    what = f"{verb} dev {dev_id}"
    with Control() as control:
        info, known = served_here(control, what, dev_id)
    can_recover = info.flags & uapi.UBLK_F_USER_RECOVERY
    if (hint := obstacle(info)) and not (force and can_recover):
        raise DaemonError(errno.EOPNOTSUPP if can_recover else errno.EINVAL, what, hint)
    _check_files(what, known)
    return known


def obstacle(info: DevInfo) -> str:
    """Return why no server of this device can be replaced, as it was added so; empty: it can be."""
    if not info.flags & uapi.UBLK_F_USER_RECOVERY:
        return "it was added without recovery (a ram device always is): see ublk add -h"
    if not _loses_nothing(info):
        return "requests would fail meanwhile: it was not added with --recovery reissue"
    return ""


def quiesce(dev_id: int, *, force: bool = False) -> bool:
    """Have a device's server leave it, and requests wait for a recovery; False if it was killed.

    :param force: though requests in flight fail, and new ones too where the device was added so.
    :raises DaemonError: as of :func:`upgradable` and :func:`take_from_server`; EINVAL (the daemon
        would replace the server); ETIMEDOUT (the driver keeps the device as it is).
    """
    what = f"quiesce dev {dev_id}"
    known = upgradable(dev_id, force=force, verb="quiesce")
    if known.options.recovery_deadline_s is not None:
        hint = "the daemon would replace its server at once: only for devices added with -r or -i"
        raise DaemonError(errno.EINVAL, what, hint)
    has_left = take_from_server(known)
    deadline = time.monotonic() + QUIESCED_TIMEOUT_S
    with Control() as control:
        while control.get_dev_info(dev_id).state == uapi.UBLK_S_DEV_LIVE:
            if time.monotonic() >= deadline:
                raise DaemonError(errno.ETIMEDOUT, what, "its server is gone, but it is in use yet")
            time.sleep(0.02)
    return has_left


def open_files(known: DeviceState) -> list[int]:
    """Return descriptors of what the device's server has open of its files, for us to close.

    As long as we have one, a loop device does not go that was detached while it was in use.
    """
    found = []
    for path in sharing.files_of(known.server_pid, known.dev_id):
        with contextlib.suppress(OSError):
            found.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    return found


def take_from_server(known: DeviceState) -> bool:
    """Have the device's server leave it; False if it had to be killed.

    The server finishes what is in flight, unless it hangs. What comes meanwhile waits in the
    driver, which issues anew what the server had no more begun. Where it may not do that
    (``--recovery fail_inflight``) it keeps new requests back first, by QUIESCE_DEV. If this fails
    for want of an idle tag the device is cancelling all the same, and only a recovery ends that.

    :raises DaemonError: ESRCH (it has no server any more); ETIMEDOUT (it cannot be killed).
    """
    what = f"upgrade dev {known.dev_id}"
    server = ServerProcess.find(known.server_pid, known.server_start_ticks)
    if server is None:
        raise DaemonError(errno.ESRCH, what, "its server is gone: see ublk recover")
    with server:
        if known.options.flags & uapi.UBLK_F_QUIESCE:
            _quiesce(known.dev_id)
        server.send(LEAVE_SIGNAL)
        if server.wait(LEAVE_TIMEOUT_S):
            return True
        _log.warning("%s: server %d does not leave: it is killed", what, server.pid)
        server.send(signal.SIGKILL)
        if not server.wait(KILL_TIMEOUT_S):
            raise DaemonError(errno.ETIMEDOUT, what, f"server {server.pid} does not end")
    return False


def _check_files(what: str, known: DeviceState) -> None:
    # A file that was removed is only there as long as its server.
    spec, is_open = known.spec, set()
    for file in sharing.files_of(known.server_pid, known.dev_id):
        with contextlib.suppress(OSError):
            is_open.add(_identity(os.stat(file)))
    if not is_open:
        return  # a server that has just ended
    for path in filter(None, (spec.path, *spec.stripe_paths, spec.metadata_path)):
        try:
            found = os.stat(path)
        except OSError as error:
            hint = f"{path}, which another server would have to open"
            raise DaemonError(error.errno or errno.EIO, what, hint) from None
        if _identity(found) not in is_open:
            hint = f"{path} is another file now than the one that is served"
            raise DaemonError(errno.ESTALE, what, hint)


def _identity(info: os.stat_result) -> tuple[int, int]:
    # A disk may have several nodes.
    return (info.st_rdev, 0) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)


def _loses_nothing(info: DevInfo) -> bool:
    # FAIL_IO would fail what comes while there is no server.
    if info.flags & uapi.UBLK_F_USER_RECOVERY_FAIL_IO:
        return False
    return bool(info.flags & (uapi.UBLK_F_USER_RECOVERY_REISSUE | uapi.UBLK_F_QUIESCE))


def _quiesce(dev_id: int) -> None:
    try:
        with Control() as control:
            control.quiesce_dev(dev_id, QUIESCE_TIMEOUT_MS)
    except DriverError as error:
        _log.warning("%s", error)


__all__ = ["obstacle", "open_files", "quiesce", "take_from_server", "upgradable"]
