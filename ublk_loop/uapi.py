"""The ublk driver's constants, named and valued as the kernel names and values them.

Owns nothing and imports nothing of this package; csrc/ublk_abi.h is its C counterpart, and a unit
test holds the two equal. Source: include/uapi/linux/ublk_cmd.h up to Linux v7.3.
"""

from __future__ import annotations

from typing import Final

CONTROL_PATH: Final = "/dev/ublk-control"
CHAR_CLASS_PATH: Final = "/sys/class/ublk-char"

SECTOR_SHIFT: Final = 9
SECTOR_BYTES: Final = 1 << SECTOR_SHIFT

# ---- sizes of the structures that cross, in bytes ----

CTRL_CMD_BYTES: Final = 32
DEV_INFO_BYTES: Final = 64
IO_DESC_BYTES: Final = 24
IO_CMD_BYTES: Final = 16
PARAMS_BYTES: Final = 152
SHMEM_BUF_REG_BYTES: Final = 24
UBLK_FEATURES_LEN: Final = 8

# ---- limits ----

UBLK_MINORS: Final = 1 << 20
UBLK_MAX_QUEUE_DEPTH: Final = 4096
UBLK_MAX_NR_QUEUES: Final = 4096
UBLK_MAX_IO_BUF_BYTES: Final = 32 << 20
UBLK_MAX_IO_DESC_SIZE: Final = 256
UBLK_MIN_SEGMENT_SIZE: Final = 4096

# ---- opcodes: _IOR() and _IOWR() of linux/ioctl.h on type 'u' ----

_IOC_WRITE: Final = 1
_IOC_READ: Final = 2


def _ioc(direction: int, nr: int, nr_bytes: int) -> int:
    return direction << 30 | nr_bytes << 16 | ord("u") << 8 | nr


def _ior(nr: int, nr_bytes: int = CTRL_CMD_BYTES) -> int:
    return _ioc(_IOC_READ, nr, nr_bytes)


def _iowr(nr: int, nr_bytes: int = CTRL_CMD_BYTES) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, nr, nr_bytes)


UBLK_U_CMD_GET_QUEUE_AFFINITY: Final = _ior(0x01)
UBLK_U_CMD_GET_DEV_INFO: Final = _ior(0x02)
UBLK_U_CMD_ADD_DEV: Final = _iowr(0x04)
UBLK_U_CMD_DEL_DEV: Final = _iowr(0x05)
UBLK_U_CMD_START_DEV: Final = _iowr(0x06)
UBLK_U_CMD_STOP_DEV: Final = _iowr(0x07)
UBLK_U_CMD_SET_PARAMS: Final = _iowr(0x08)
UBLK_U_CMD_GET_PARAMS: Final = _ior(0x09)
UBLK_U_CMD_START_USER_RECOVERY: Final = _iowr(0x10)
UBLK_U_CMD_END_USER_RECOVERY: Final = _iowr(0x11)
UBLK_U_CMD_GET_DEV_INFO2: Final = _ior(0x12)
UBLK_U_CMD_GET_FEATURES: Final = _ior(0x13)
UBLK_U_CMD_DEL_DEV_ASYNC: Final = _ior(0x14)
UBLK_U_CMD_UPDATE_SIZE: Final = _iowr(0x15)
UBLK_U_CMD_QUIESCE_DEV: Final = _iowr(0x16)
UBLK_U_CMD_TRY_STOP_DEV: Final = _iowr(0x17)
UBLK_U_CMD_REG_BUF: Final = _iowr(0x18)
UBLK_U_CMD_UNREG_BUF: Final = _iowr(0x19)

UBLK_U_IO_FETCH_REQ: Final = _iowr(0x20, IO_CMD_BYTES)
UBLK_U_IO_COMMIT_AND_FETCH_REQ: Final = _iowr(0x21, IO_CMD_BYTES)
UBLK_U_IO_NEED_GET_DATA: Final = _iowr(0x22, IO_CMD_BYTES)
UBLK_U_IO_REGISTER_IO_BUF: Final = _iowr(0x23, IO_CMD_BYTES)
UBLK_U_IO_UNREGISTER_IO_BUF: Final = _iowr(0x24, IO_CMD_BYTES)
UBLK_U_IO_PREP_IO_CMDS: Final = _iowr(0x25, IO_CMD_BYTES)
UBLK_U_IO_COMMIT_IO_CMDS: Final = _iowr(0x26, IO_CMD_BYTES)
UBLK_U_IO_FETCH_IO_CMDS: Final = _iowr(0x27, IO_CMD_BYTES)

# ---- features: what GET_FEATURES offers, ADD_DEV asks for and grants ----

UBLK_F_SUPPORT_ZERO_COPY: Final = 1 << 0
UBLK_F_URING_CMD_COMP_IN_TASK: Final = 1 << 1
UBLK_F_NEED_GET_DATA: Final = 1 << 2
UBLK_F_USER_RECOVERY: Final = 1 << 3
UBLK_F_USER_RECOVERY_REISSUE: Final = 1 << 4
UBLK_F_UNPRIVILEGED_DEV: Final = 1 << 5
UBLK_F_CMD_IOCTL_ENCODE: Final = 1 << 6
UBLK_F_USER_COPY: Final = 1 << 7
UBLK_F_ZONED: Final = 1 << 8
UBLK_F_USER_RECOVERY_FAIL_IO: Final = 1 << 9
UBLK_F_UPDATE_SIZE: Final = 1 << 10
UBLK_F_AUTO_BUF_REG: Final = 1 << 11
UBLK_F_QUIESCE: Final = 1 << 12
UBLK_F_PER_IO_DAEMON: Final = 1 << 13
UBLK_F_BUF_REG_OFF_DAEMON: Final = 1 << 14
UBLK_F_BATCH_IO: Final = 1 << 15
UBLK_F_INTEGRITY: Final = 1 << 16
UBLK_F_SAFE_STOP_DEV: Final = 1 << 17
UBLK_F_NO_AUTO_PART_SCAN: Final = 1 << 18
UBLK_F_SHMEM_ZC: Final = 1 << 19
UBLK_F_IO_DESC_SIZE: Final = 1 << 20

# ---- device states ----

UBLK_S_DEV_DEAD: Final = 0
UBLK_S_DEV_LIVE: Final = 1
UBLK_S_DEV_QUIESCED: Final = 2
UBLK_S_DEV_FAIL_IO: Final = 3

# ---- requests ----

UBLK_IO_OP_READ: Final = 0
UBLK_IO_OP_WRITE: Final = 1
UBLK_IO_OP_FLUSH: Final = 2
UBLK_IO_OP_DISCARD: Final = 3
UBLK_IO_OP_WRITE_SAME: Final = 4
UBLK_IO_OP_WRITE_ZEROES: Final = 5
UBLK_IO_OP_ZONE_OPEN: Final = 10
UBLK_IO_OP_ZONE_CLOSE: Final = 11
UBLK_IO_OP_ZONE_FINISH: Final = 12
UBLK_IO_OP_ZONE_APPEND: Final = 13
UBLK_IO_OP_ZONE_RESET_ALL: Final = 14
UBLK_IO_OP_ZONE_RESET: Final = 15
UBLK_IO_OP_REPORT_ZONES: Final = 18

# Bits of op_flags as it stands in the io_desc, not of op_flags >> 8.
UBLK_IO_F_FAILFAST_DEV: Final = 1 << 8
UBLK_IO_F_FAILFAST_TRANSPORT: Final = 1 << 9
UBLK_IO_F_FAILFAST_DRIVER: Final = 1 << 10
UBLK_IO_F_META: Final = 1 << 11
UBLK_IO_F_FUA: Final = 1 << 13
UBLK_IO_F_NOUNMAP: Final = 1 << 15
UBLK_IO_F_SWAP: Final = 1 << 16
UBLK_IO_F_NEED_REG_BUF: Final = 1 << 17
UBLK_IO_F_INTEGRITY: Final = 1 << 18
UBLK_IO_F_SHMEM_ZC: Final = 1 << 19

# ---- parameters ----

UBLK_PARAM_TYPE_BASIC: Final = 1 << 0
UBLK_PARAM_TYPE_DISCARD: Final = 1 << 1
UBLK_PARAM_TYPE_DEVT: Final = 1 << 2
UBLK_PARAM_TYPE_ZONED: Final = 1 << 3
UBLK_PARAM_TYPE_DMA_ALIGN: Final = 1 << 4
UBLK_PARAM_TYPE_SEGMENT: Final = 1 << 5
UBLK_PARAM_TYPE_INTEGRITY: Final = 1 << 6

UBLK_ATTR_READ_ONLY: Final = 1 << 0
UBLK_ATTR_ROTATIONAL: Final = 1 << 1
UBLK_ATTR_VOLATILE_CACHE: Final = 1 << 2
UBLK_ATTR_FUA: Final = 1 << 3

# flags and csum_type of the integrity section, from include/uapi/linux/fs.h.
LBMD_PI_CAP_INTEGRITY: Final = 1 << 0
LBMD_PI_CAP_REFTAG: Final = 1 << 1
LBMD_PI_CSUM_NONE: Final = 0
LBMD_PI_CSUM_IP: Final = 1
LBMD_PI_CSUM_CRC16_T10DIF: Final = 2
LBMD_PI_CSUM_CRC64_NVME: Final = 4

# ---- shared-memory buffers ----

UBLK_SHMEM_BUF_READ_ONLY: Final = 1 << 0
