"""What ``ublk add`` was told, as the request that a server is started with.

In: the values of its options. Out: a :class:`server.Request`, or a usage error for what does not go
together. Asks neither driver nor file: what they refuse is found later, by who serves.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from . import state, uapi
from .params import PI_TUPLE_BYTES
from .state import DeviceOptions, Metadata, TargetSpec

if TYPE_CHECKING:
    from .server import Request

NULL_NR_BYTES = 250 << 30  # as the reference server's null device
PAGE_BYTES = 4096
DEADLINE_S = 60
RECOVERIES = {
    "none": 0,
    "reissue": uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_REISSUE,
    "fail_inflight": uapi.UBLK_F_USER_RECOVERY,
    "fail_all": uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_FAIL_IO,
}
_RAM_IS_LOST = "a ram device cannot be recovered: its data dies with its server"
_BY_HAND = ("user_recovery", "user_recovery_reissue", "user_recovery_fail_io")


def current_dir() -> str:
    """Return the current directory; one that was removed ends in `` (deleted)``."""
    return os.readlink("/proc/self/cwd")


def request_of(
    given: dict[str, Any], *, cwd: str | None = None, supervised: bool = False
) -> Request:
    """Return the request that the options ``given`` stand for, as click names them.

    :param cwd: where relative paths begin; default: where this process is.
    :param supervised: the daemon would replace its server.
    :raises click.UsageError: options that do not go together.
    """
    from . import server

    cwd = current_dir() if cwd is None else cwd
    flags, deadline_s = _recovery(given, supervised)
    return server.Request(
        options=DeviceOptions(
            nr_hw_queues=given["queues"],
            queue_depth=given["depth"],
            max_io_buf_bytes=_whole_pages(given["max_io_buf_bytes"]),
            flags=_flags(given) | flags,
            policy=given["policy"],
            batch=given["batch"],
            data=_data(given),
            poll_us=given["poll_us"],
            nr_threads=_nr_threads(given),
            recovery_deadline_s=deadline_s,
            shared_files=tuple(
                state.SharedFile(_absolute(path, cwd), read_only=given["shmem_read_only"])
                for path in given["shmem"]
            ),
            io_desc_bytes=_io_desc_bytes(given["io_desc_bytes"]),
        ),
        spec=_target_spec(given, cwd),
        dev_id=given["dev_id"],
    )


def _recovery(given: dict[str, Any], supervised: bool) -> tuple[int, int | None]:
    # The flags, and the deadline of a recovery by the daemon. The reference server's options mean
    # what they mean there: the device waits for `ublk recover`.
    chosen = given["recovery"]
    by_hand = [name for name in _BY_HAND if given[name] is not None]
    if by_hand and (chosen or given["recovery_deadline"]):
        raise click.UsageError("-r, -i and -e are recovery by hand: not with --recovery")
    if chosen is None:
        # A plain user's device has no recovery in the driver.
        can = supervised and not by_hand and given["kind"] != "ram" and not given["unprivileged"]
        chosen = "reissue" if can else "none"
    if chosen == "none":
        if given["recovery_deadline"]:
            raise click.UsageError("--recovery_deadline is for a device with recovery")
        return 0, None
    if given["kind"] == "ram":
        raise click.UsageError(_RAM_IS_LOST)
    return RECOVERIES[chosen], given["recovery_deadline"] or DEADLINE_S


def _whole_pages(nr_bytes: int) -> int:
    if nr_bytes % PAGE_BYTES:
        raise click.UsageError(f"--max_io_buf_bytes {nr_bytes} is not a multiple of {PAGE_BYTES}")
    return nr_bytes


def _nr_threads(given: dict[str, Any]) -> int | None:
    in_all: int | None = given["nthreads"]
    a_queue: int = given["threads_a_queue"] or 1
    if a_queue == 1:
        return in_all
    if in_all or given["batch"]:
        raise click.UsageError("-T excludes --nthreads and -b")
    nr_queues: int = given["queues"] or 1
    return min(a_queue * nr_queues, state.MAX_NR_THREADS)


def _io_desc_bytes(nr_bytes: int | None) -> int | None:
    if nr_bytes is not None and nr_bytes % 8:
        raise click.UsageError(f"--io_desc_size {nr_bytes} is not a multiple of 8")
    return nr_bytes


def _flags(given: dict[str, Any]) -> int:
    recovery = uapi.UBLK_F_USER_RECOVERY
    modes = {
        "uring_comp": uapi.UBLK_F_URING_CMD_COMP_IN_TASK,
        "need_get_data": uapi.UBLK_F_NEED_GET_DATA,
        "user_recovery": recovery,
        "user_recovery_reissue": recovery | uapi.UBLK_F_USER_RECOVERY_REISSUE,
        "user_recovery_fail_io": recovery | uapi.UBLK_F_USER_RECOVERY_FAIL_IO,
        "no_auto_part_scan": uapi.UBLK_F_NO_AUTO_PART_SCAN,
        "unprivileged": uapi.UBLK_F_UNPRIVILEGED_DEV,
    }
    if _is_on(given["user_recovery_reissue"]) and _is_on(given["user_recovery_fail_io"]):
        raise click.UsageError("-i and -e exclude each other")
    flags = 0
    for name, bits in modes.items():
        flags |= bits if _is_on(given[name]) else 0
    if given["batch"] and flags & uapi.UBLK_F_NEED_GET_DATA:
        raise click.UsageError("-b and -g exclude each other")
    if flags & recovery and given["kind"] == "ram":
        raise click.UsageError(_RAM_IS_LOST)
    return flags


def _data(given: dict[str, Any]) -> str:
    named = [name for name in ("usercopy", "zerocopy") if given[name]]
    if given["data"] != "auto":
        named.append(given["data"])
    if len(set(named)) > 1:
        raise click.UsageError("--data, --usercopy and --zerocopy exclude each other")
    return named[0] if named else "auto"


def _is_on(value: bool | str) -> bool:
    return value in (True, "1")


_PI_CAPS = ("integrity_capable", "integrity_reftag")
# The options that only some types have.
_TYPES_OF = {
    "path": (("loop", "stripe"), "-f"),
    "buffered_io": (("loop", "stripe"), "--buffered_io"),
    "direct_io": (("loop", "stripe"), "--direct_io"),
    "chunk_bytes": (("stripe",), "--chunk_size"),
    "nr_bytes": (("loop", "null", "ram"), "--size"),
    "offset": (("loop",), "-o"),
    "read_only": (("loop", "null"), "-R"),
    "delay_us": (("null",), "--delay_us"),
    "shmem": (("loop", "null"), "--shmem"),
    "metadata_bytes": (("loop", "null"), "--metadata_size"),
    "limit_bytes": (("loop",), "--sizelimit"),
    "logical_bs": (("loop", "null"), "--sector_size"),
}


def _target_spec(given: dict[str, Any], cwd: str) -> TargetSpec:
    given = {**given, "path": given["path"] + given["files"]}
    kind, nr_bytes = given["kind"], given["nr_bytes"]
    for name, (kinds, option) in _TYPES_OF.items():
        if kind not in kinds and given[name] not in (None, False, ()):
            raise click.UsageError(f"{option} is for -t {' and '.join(kinds)} only")
    metadata = _metadata(given)
    logical_bs = int(given["logical_bs"]) if given["logical_bs"] else None
    if kind in ("null", "ram"):
        if kind == "ram" and nr_bytes is None:
            raise click.UsageError("-t ram needs --size")
        if (nr_bytes or 0) % (logical_bs or uapi.SECTOR_BYTES):
            raise click.UsageError(f"--size {nr_bytes} is not a multiple of --sector_size")
        if given["delay_us"] and metadata is not None:
            raise click.UsageError("--delay_us and --metadata_size exclude each other")
        return TargetSpec(
            kind,
            nr_bytes=NULL_NR_BYTES if nr_bytes is None else nr_bytes,
            read_only=given["read_only"],
            logical_bs=logical_bs,
            delay_us=given["delay_us"] or 0,
            metadata=metadata,
        )
    if given["buffered_io"] and given["direct_io"]:
        raise click.UsageError("--buffered_io and --direct_io exclude each other")
    direct = True if given["direct_io"] else False if given["buffered_io"] else None
    paths = tuple(_absolute(path, cwd) for path in given["path"])
    if kind == "stripe":
        if not 1 <= len(paths) <= state.MAX_STRIPE_FILES:
            raise click.UsageError(f"-t stripe needs 1 to {state.MAX_STRIPE_FILES} files")
        return TargetSpec(
            kind, stripe_paths=paths, direct=direct, chunk_bytes=_chunk_bytes(given["chunk_bytes"])
        )
    if metadata is not None and len(paths) != 2:
        raise click.UsageError("--metadata_size needs two files: of the data, of the metadata")
    if metadata is None and len(paths) != 1:
        raise click.UsageError("-t loop needs -f FILE" + (", and only one" if paths else ""))
    offset_bytes = (given["offset"] or 0) << uapi.SECTOR_SHIFT
    if offset_bytes >= 1 << 63:
        raise click.UsageError("-o is beyond any file")
    return TargetSpec(
        "loop",
        path=paths[0],
        offset_bytes=offset_bytes,
        nr_bytes=nr_bytes,
        direct=direct,
        read_only=given["read_only"],
        limit_bytes=given["limit_bytes"] or nr_bytes,
        logical_bs=logical_bs,
        metadata=metadata,
        metadata_path=paths[1] if metadata is not None else "",
    )


def _metadata(given: dict[str, Any]) -> Metadata | None:
    nr_bytes = given["metadata_bytes"]
    if nr_bytes is None:
        for name in ("pi_offset", "csum_type", "tag_size", *_PI_CAPS):
            if given[name]:
                raise click.UsageError(f"--{name} needs --metadata_size")
        return None
    is_capable, has_reftag = (given[name] for name in _PI_CAPS)
    csum = given["csum_type"] or "none"
    if has_reftag and csum == "none":
        raise click.UsageError("--integrity_reftag needs --csum_type")
    pi_offset = given["pi_offset"] or 0
    tuple_bytes = PI_TUPLE_BYTES[state.CSUM_TYPES[csum]]
    if pi_offset + tuple_bytes > nr_bytes:
        text = f"{tuple_bytes} bytes of {csum} at {pi_offset} do not fit --metadata_size"
        raise click.UsageError(f"{text} {nr_bytes}")
    return Metadata(nr_bytes, pi_offset, csum, given["tag_size"] or 0, is_capable, has_reftag)


def _chunk_bytes(nr_bytes: int | None) -> int:
    if nr_bytes is None:
        return state.CHUNK_BYTES
    if not state.is_chunk(nr_bytes):
        raise click.UsageError("--chunk_size is a power of 2 from 4096 to 524288")
    return nr_bytes


def _absolute(path: str, cwd: str) -> str:
    if not path:
        raise click.UsageError("the name of a file is empty")
    return os.path.normpath(os.path.join(cwd, path))
