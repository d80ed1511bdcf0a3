"""What ``ublk list``, ``add``, ``recover`` and ``features`` show, as text and as JSON documents.

In: what the driver says of a device (DevInfo, Params) and, for a device of ours, its state file.
Out: strings and plain values. Pure: no driver, no files, no printing. Scripts parse the text as the
reference server (ublksrv) prints it, so its words, their order and even its blanks are kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from . import uapi
from .state import data_mode

if TYPE_CHECKING:
    from .control import DevInfo
    from .params import Params
    from .state import DeviceState

# As `ublk features` of the reference server names them; it leaves the later ones out.
FEATURES = {
    uapi.UBLK_F_SUPPORT_ZERO_COPY: "ZERO_COPY",
    uapi.UBLK_F_URING_CMD_COMP_IN_TASK: "COMP_IN_TASK",
    uapi.UBLK_F_NEED_GET_DATA: "GET_DATA",
    uapi.UBLK_F_USER_RECOVERY: "USER_RECOVERY",
    uapi.UBLK_F_USER_RECOVERY_REISSUE: "RECOVERY_REISSUE",
    uapi.UBLK_F_UNPRIVILEGED_DEV: "UNPRIVILEGED_DEV",
    uapi.UBLK_F_CMD_IOCTL_ENCODE: "CMD_IOCTL_ENCODE",
    uapi.UBLK_F_USER_COPY: "USER_COPY",
    uapi.UBLK_F_ZONED: "ZONED",
    uapi.UBLK_F_USER_RECOVERY_FAIL_IO: "RECOVERY_FAIL_IO",
    uapi.UBLK_F_UPDATE_SIZE: "UPDATE_SIZE",
    uapi.UBLK_F_AUTO_BUF_REG: "AUTO_ZC",
    uapi.UBLK_F_QUIESCE: "QUIESCE",
    uapi.UBLK_F_PER_IO_DAEMON: "PER_IO_DAEMON",
    uapi.UBLK_F_BUF_REG_OFF_DAEMON: "BUF_REG_OFF_DAEMON",
    uapi.UBLK_F_BATCH_IO: "BATCH_IO",
    uapi.UBLK_F_INTEGRITY: "INTEGRITY",
    uapi.UBLK_F_SAFE_STOP_DEV: "SAFE_STOP_DEV",
    uapi.UBLK_F_NO_AUTO_PART_SCAN: "NO_AUTO_PART_SCAN",
    uapi.UBLK_F_SHMEM_ZC: "SHMEM_ZC",
    uapi.UBLK_F_IO_DESC_SIZE: "IO_DESC_SIZE",
}


def flag_names(flags: int) -> list[str]:
    """Return the names of UBLK_F_* bits, lowest first; ``unknown`` for one without a name."""
    return [FEATURES.get(1 << bit, "unknown") for bit in range(64) if flags >> bit & 1]


def features_text(features: int) -> str:
    """Return what ``ublk features`` prints, with no newline at the end."""
    lines = [f"ublk_drv features: {features:#x}"]
    bits = [1 << bit for bit in range(64) if features >> bit & 1]
    # Behind them the driver's own names, which scripts for the kernel's test server look for.
    names = {value: name for name, value in vars(uapi).items() if name.startswith("UBLK_F_")}
    lines += [
        f"\t{FEATURES.get(bit, 'unknown'):<20}: {f'{bit:#x}':<9} {names.get(bit, '')}".rstrip()
        for bit in bits
    ]
    return "\n".join(lines)


def features_document(features: int) -> dict[str, Any]:
    """Return what ``ublk features --json`` prints."""
    return {"features": features, "names": flag_names(features)}


def device_text(
    info: DevInfo, params: Params, state: DeviceState | None, *, two_lines: bool = False
) -> str:
    """Return what ``ublk list`` prints of one device, with no newline at the end.

    :param two_lines: the flags on a line of their own, as the reference server has them since 2025.
    """
    head = f"\tmax rq size {info.max_io_buf_bytes} daemon pid {info.ublksrv_pid}"
    lines = [
        f"dev id {info.dev_id}: nr_hw_queues {info.nr_hw_queues} queue_depth {info.queue_depth}"
        f" block size {_block_bytes(params)} dev_capacity {_nr_sectors(params)}"
    ]
    if two_lines:
        names = "".join(f" {name}" for name in flag_names(info.flags))
        lines += [f"{head} state {info.state_name}", f"\tflags {info.flags:#x} [{names} ]"]
    else:
        lines += [f"{head} flags {info.flags:#x} state {info.state_name}"]
    char_dev, block_dev = _device_numbers(params)
    lines += [f"\tublkc: {char_dev} ublkb: {block_dev} owner: {info.owner_uid}:{info.owner_gid}"]
    if state is not None:
        for queue in state.queues:
            cpus = "".join(f"{cpu} " for cpu in queue.affinity)
            lines.append(f"\tqueue {queue.q_id}: tid {queue.tid} affinity({cpus})")
        lines.append(f"\ttarget {_compact(target_document(state))}")
    return "\n".join(lines)


def shown(
    info: DevInfo,
    params: Params,
    state: DeviceState | None,
    *,
    as_json: bool = False,
    two_lines: bool = False,
) -> str:
    """Return what ``ublk add`` and ``recover`` print of a device, with its newline."""
    if as_json:
        return json.dumps(device_document(info, params, state), indent=2) + "\n"
    return device_text(info, params, state, two_lines=two_lines) + "\n"


def device_document(info: DevInfo, params: Params, state: DeviceState | None) -> dict[str, Any]:
    """Return what ``ublk list --json`` prints of one device."""
    char_dev, block_dev = _device_numbers(params)
    return {
        "dev_id": info.dev_id,
        "state": info.state_name,
        "block_device": f"/dev/ublkb{info.dev_id}",
        "char_device": f"/dev/ublkc{info.dev_id}",
        "nr_hw_queues": info.nr_hw_queues,
        "queue_depth": info.queue_depth,
        "logical_block_bytes": _block_bytes(params),
        "nr_sectors": _nr_sectors(params),
        "max_io_buf_bytes": info.max_io_buf_bytes,
        # The driver's -1 is not for scripts, which may kill it.
        "server_pid": info.ublksrv_pid if info.ublksrv_pid > 0 else None,
        "flags": info.flags,
        "flag_names": flag_names(info.flags),
        "char_dev": char_dev,
        "block_dev": block_dev,
        "owner_uid": info.owner_uid,
        "owner_gid": info.owner_gid,
        "policy": state.options.policy if state else None,
        "data": data_mode(info.flags),
        "queues": [
            {"q_id": queue.q_id, "tid": queue.tid, "affinity": list(queue.affinity)}
            for queue in (state.queues if state else ())
        ],
        "target": target_document(state) if state else None,
    }


def verbose_text(info: DevInfo, params: Params, state: DeviceState | None) -> str:
    """Return what ``ublk list -v`` prints of one device: all that is known, as JSON."""
    document: dict[str, Any] = {"dev_info": _plain(info), "params": _plain(params)}
    if state is not None:
        document["queues"] = {
            str(queue.q_id): {
                "qid": queue.q_id,
                "tid": queue.tid,
                "affinity": "".join(f"{cpu} " for cpu in queue.affinity),
            }
            for queue in state.queues
        }
        document["target"] = target_document(state)
        document["policy"] = state.options.policy
        document["data"] = data_mode(info.flags)
    return json.dumps(document, indent=4, sort_keys=True)


def target_document(state: DeviceState) -> dict[str, Any]:
    """Return a target with the reference server's keys; its ``offset`` counts sectors."""
    document: dict[str, Any] = {"type": 0, **state.target}
    if "offset" in document:
        document["offset"] = state.spec.offset_bytes >> uapi.SECTOR_SHIFT
    if not document.get("read_only", True):
        del document["read_only"]
    return document


def state_of(info: DevInfo, state: DeviceState | None) -> DeviceState | None:
    """Return ``state`` if it is this device's; else None: the dev_id is another server's now."""
    if state is None or (info.ublksrv_pid > 0 and info.ublksrv_pid != state.server_pid):
        return None
    found = sysfs_ino(info.dev_id)
    return state if 0 in (found, state.sysfs_ino) or found == state.sysfs_ino else None


def sysfs_ino(dev_id: int) -> int:
    """Return the inode of the device in sysfs, which no later device will have; 0: unknown."""
    try:
        return os.stat(f"{uapi.CHAR_CLASS_PATH}/ublkc{dev_id}").st_ino
    except OSError:
        return 0


def _block_bytes(params: Params) -> int:
    # 1 for a device without parameters yet, as the reference server shows it.
    return 1 << params.basic.logical_bs_shift if params.basic else 1


def _nr_sectors(params: Params) -> int:
    return params.basic.dev_sectors if params.basic else 0


def _device_numbers(params: Params) -> tuple[str, str]:
    devt = params.devt
    if devt is None:
        return "0:0", "0:0"
    return f"{devt.char_major}:{devt.char_minor}", f"{devt.disk_major}:{devt.disk_minor}"


def _compact(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    return value
