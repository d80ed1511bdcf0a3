"""/etc/ublk/ublk.toml: the devices that the daemon adds when it starts.

A table ``[device.N]`` is ``ublk add -n N`` with the table's keys for long options, and true for an
option without a value:

    [device.0]
    type = "loop"
    file = "/srv/disk.img"
    queues = 2
    direct_io = true

In: the file. Out: the words of ``ublk add``, checked by it, or one line that says what is wrong.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from . import state
from .errors import DaemonError

CONFIG_PATH = "/etc/ublk/ublk.toml"
MAX_NR_BYTES = 1 << 20
# Options that may be given more than once: a list.
_REPEATABLE = {"shmem", "file"}
_NOT_HERE = frozenset(("number", "json", "foreground", "help", "config"))


def read(path: str = CONFIG_PATH) -> dict[int, tuple[str, ...]]:
    """Return the words of ``ublk add`` of each device, by dev_id; empty if there is no such file.

    :raises DaemonError: EBADMSG with what is wrong and where; the errno of opening it.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                raise DaemonError(errno.EPERM, path, "another user could write it")
            data = file.read(MAX_NR_BYTES + 1)
    except FileNotFoundError:
        return {}
    except DaemonError:
        raise
    except OSError as error:
        raise DaemonError(error.errno or errno.EIO, path) from error
    try:
        return parse(data)
    except ValueError as error:
        raise DaemonError(errno.EBADMSG, path, str(error)) from error


def parse(data: bytes) -> dict[int, tuple[str, ...]]:
    """Return what ``data`` asks for, as :func:`read` does.

    :raises ValueError: what is wrong, for a person, in one line that any terminal may be sent.
    """
    try:
        return _parse(data)
    except ValueError as error:
        line = " ".join(str(error).split())
        shown = (char if char.isprintable() else repr(char)[1:-1] for char in line)
        raise ValueError("".join(shown)) from error


def _parse(data: bytes) -> dict[int, tuple[str, ...]]:
    if len(data) > MAX_NR_BYTES:
        raise ValueError(f"it is larger than {MAX_NR_BYTES} bytes")
    document = _load(data.decode("utf-8"))
    if unknown := sorted(set(document) - {"device"}):
        raise ValueError(f"unknown: {', '.join(unknown)}")
    tables = document.get("device", {})
    if not isinstance(tables, dict):
        raise ValueError("device is not a table")
    return {_dev_id(name): _words(name, table) for name, table in tables.items()}


def _load(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _dev_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and str(int(name)) == name):
        raise ValueError(f"device.{name}: {name!r} is not a device number")
    if int(name) > state.MAX_DEV_ID:
        raise ValueError(f"device.{name}: the highest number is {state.MAX_DEV_ID}")
    return int(name)


def _words(name: str, table: Any) -> tuple[str, ...]:
    from . import cli_add

    where = f"device.{name}"
    if not isinstance(table, dict):
        raise ValueError(f"{where} is not a table")
    words = ["-n", name]
    for key, value in table.items():
        is_list = key in _REPEATABLE and isinstance(value, list)
        for one in value if is_list else [value]:
            words += _option(where, key, one)
    try:
        cli_add.check_add(words)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for key in sorted(_REPEATABLE):
        paths = table.get(key, [])
        for path in paths if isinstance(paths, list) else [paths]:
            if not os.path.isabs(str(path)):  # a number names a file, too
                raise ValueError(f"{where}: {path} is not an absolute path")
    return tuple(words)


def _option(where: str, key: str, value: Any) -> list[str]:
    if not key.replace("_", "").isalnum() or not key.isascii() or key in _NOT_HERE or len(key) < 2:
        raise ValueError(f"{where}: {key!r} is not an option of a device")
    if value is True:
        return [f"--{key}"]
    if value is False:
        return []
    if not isinstance(value, str | int) or "\0" in str(value):
        raise ValueError(f"{where}: {key} is neither text, number, true nor false")
    return [f"--{key}={value}"]
