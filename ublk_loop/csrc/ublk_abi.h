/* SPDX-License-Identifier: MIT */
/*
 * ublk_abi.h - what the ublk driver and a server say to each other.
 *
 * Notes on the design: names, values and layouts are the kernel's
 * (include/uapi/linux/ublk_cmd.h up to v7.3), so that a reader can search for
 * them there; the text is the project's. <linux/ublk_cmd.h> itself is never
 * included: Debian 12's knows no ioctl-encoded opcode and no flag past bit 4,
 * and a build must not depend on the headers of the day. Control commands that
 * only Python sends are in uapi.py alone.
 */
#ifndef UBLK_LOOP_UBLK_ABI_H
#define UBLK_LOOP_UBLK_ABI_H

#ifdef USER_BLK_DRV_CMD_INC_H
#error "ublk_abi.h replaces <linux/ublk_cmd.h>: include only one of them"
#endif

#include <errno.h>
#include <liburing.h>
#include <linux/ioctl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- /dev/ublk-control ---- */

/* In sqe->cmd; every command's opcode carries this size. */
struct ublksrv_ctrl_cmd {
	uint32_t	dev_id;
	uint16_t	queue_id;	/* 0xffff: not about one queue */
	uint16_t	len;		/* of the buffer at addr, in bytes */
	uint64_t	addr;		/* command's buffer, in or out */
	uint64_t	data[1];	/* command's argument */
	uint16_t	dev_path_len;	/* of the path that opens the buffer */
	uint16_t	pad;
	uint32_t	reserved;
};

/* Buffer of ADD_DEV (in and out), GET_DEV_INFO and GET_DEV_INFO2 (out). */
struct ublksrv_ctrl_dev_info {
	uint16_t	nr_hw_queues;
	uint16_t	queue_depth;
	uint16_t	state;		/* UBLK_S_DEV_* */
	uint16_t	io_desc_size;	/* with UBLK_F_IO_DESC_SIZE, else 0 */
	uint32_t	max_io_buf_bytes;
	uint32_t	dev_id;
	int32_t		ublksrv_pid;
	uint32_t	pad1;
	uint64_t	flags;		/* UBLK_F_*: asked for, then granted */
	uint64_t	ublksrv_flags;	/* kept for the server, not read */
	uint32_t	owner_uid;
	uint32_t	owner_gid;
	uint64_t	reserved1;
	uint64_t	reserved2;
};

#define UBLK_S_DEV_DEAD			0
#define UBLK_S_DEV_LIVE			1
#define UBLK_S_DEV_QUIESCED		2
#define UBLK_S_DEV_FAIL_IO		3

#define UBLK_F_SUPPORT_ZERO_COPY	(1ULL << 0)
#define UBLK_F_URING_CMD_COMP_IN_TASK	(1ULL << 1)
#define UBLK_F_NEED_GET_DATA		(1ULL << 2)
#define UBLK_F_USER_RECOVERY		(1ULL << 3)
#define UBLK_F_USER_RECOVERY_REISSUE	(1ULL << 4)
#define UBLK_F_UNPRIVILEGED_DEV		(1ULL << 5)
#define UBLK_F_CMD_IOCTL_ENCODE		(1ULL << 6)
#define UBLK_F_USER_COPY		(1ULL << 7)
#define UBLK_F_ZONED			(1ULL << 8)
#define UBLK_F_USER_RECOVERY_FAIL_IO	(1ULL << 9)
#define UBLK_F_UPDATE_SIZE		(1ULL << 10)
#define UBLK_F_AUTO_BUF_REG		(1ULL << 11)
#define UBLK_F_QUIESCE			(1ULL << 12)
#define UBLK_F_PER_IO_DAEMON		(1ULL << 13)
#define UBLK_F_BUF_REG_OFF_DAEMON	(1ULL << 14)
#define UBLK_F_BATCH_IO			(1ULL << 15)
#define UBLK_F_INTEGRITY		(1ULL << 16)
#define UBLK_F_SAFE_STOP_DEV		(1ULL << 17)
#define UBLK_F_NO_AUTO_PART_SCAN	(1ULL << 18)
#define UBLK_F_SHMEM_ZC			(1ULL << 19)
#define UBLK_F_IO_DESC_SIZE		(1ULL << 20)

/* ---- /dev/ublkcN: limits and file positions ---- */

#define UBLK_MAX_QUEUE_DEPTH		4096
#define UBLK_MAX_NR_QUEUES		4096
#define UBLK_MAX_IO_BUF_BYTES		(32U << 20)

/*
 * mmap: queue q's descriptors begin at UBLKSRV_CMD_BUF_OFFSET + q * the room
 * of UBLK_MAX_QUEUE_DEPTH descriptors, rounded up to a page.
 * pread and pwrite (UBLK_F_USER_COPY): see ublk_user_copy_pos().
 */
#define UBLKSRV_CMD_BUF_OFFSET		0
#define UBLKSRV_IO_BUF_OFFSET		0x80000000ULL
#define UBLK_TAG_OFF			25
#define UBLK_QID_OFF			41
#define UBLKSRV_IO_INTEGRITY_FLAG	(1ULL << 62)

static inline uint64_t ublk_user_copy_pos(uint16_t q_id, uint16_t tag,
					  uint32_t offset_bytes)
{
	return UBLKSRV_IO_BUF_OFFSET + ((uint64_t)q_id << UBLK_QID_OFF |
					(uint64_t)tag << UBLK_TAG_OFF |
					offset_bytes);
}

/* ---- /dev/ublkcN: a request's description, read from the mapping ---- */

struct ublksrv_io_desc {
	uint32_t	op_flags;	/* UBLK_IO_OP_* | UBLK_IO_F_* */
	union {
		uint32_t	nr_sectors;
		uint32_t	nr_zones;	/* UBLK_IO_OP_REPORT_ZONES */
	};
	uint64_t	start_sector;
	uint64_t	addr;
};

#define UBLK_IO_OP_READ			0
#define UBLK_IO_OP_WRITE		1
#define UBLK_IO_OP_FLUSH		2
#define UBLK_IO_OP_DISCARD		3
#define UBLK_IO_OP_WRITE_SAME		4
#define UBLK_IO_OP_WRITE_ZEROES		5
#define UBLK_IO_OP_ZONE_OPEN		10
#define UBLK_IO_OP_ZONE_CLOSE		11
#define UBLK_IO_OP_ZONE_FINISH		12
#define UBLK_IO_OP_ZONE_APPEND		13
#define UBLK_IO_OP_ZONE_RESET_ALL	14
#define UBLK_IO_OP_ZONE_RESET		15
#define UBLK_IO_OP_REPORT_ZONES		18

/* Bits of op_flags as it stands: never of op_flags >> 8. */
#define UBLK_IO_F_FAILFAST_DEV		(1U << 8)
#define UBLK_IO_F_FAILFAST_TRANSPORT	(1U << 9)
#define UBLK_IO_F_FAILFAST_DRIVER	(1U << 10)
#define UBLK_IO_F_META			(1U << 11)
#define UBLK_IO_F_FUA			(1U << 13)
#define UBLK_IO_F_NOUNMAP		(1U << 15)
#define UBLK_IO_F_SWAP			(1U << 16)
#define UBLK_IO_F_NEED_REG_BUF		(1U << 17)
#define UBLK_IO_F_INTEGRITY		(1U << 18)
#define UBLK_IO_F_SHMEM_ZC		(1U << 19)

/* io_desc->addr with UBLK_IO_F_SHMEM_ZC: the index that REG_BUF gave, and where
 * in that buffer the data is. */
static inline uint16_t ublk_shmem_zc_index(uint64_t addr)
{
	return addr >> 32;
}

static inline uint32_t ublk_shmem_zc_offset(uint64_t addr)
{
	return addr;
}

static inline uint32_t ublk_io_desc_op(const struct ublksrv_io_desc *io_desc)
{
	return io_desc->op_flags & 0xff;
}

static inline uint32_t ublk_io_desc_flags(const struct ublksrv_io_desc *io_desc)
{
	return io_desc->op_flags & ~0xffU;
}

/* ---- /dev/ublkcN: fetch and commit, one tag a command ---- */

/* In sqe->cmd; 16 bytes, so a plain 64-byte sqe holds it. */
struct ublksrv_io_cmd {
	uint16_t	q_id;
	uint16_t	tag;
	int32_t		result;		/* commit: bytes or -errno */
	union {
		uint64_t	addr;	/* copy mode: the tag's buffer */
		uint64_t	zone_append_lba;
	};
};

#define UBLK_U_IO_FETCH_REQ _IOWR('u', 0x20, struct ublksrv_io_cmd)
#define UBLK_U_IO_COMMIT_AND_FETCH_REQ _IOWR('u', 0x21, struct ublksrv_io_cmd)
#define UBLK_U_IO_NEED_GET_DATA _IOWR('u', 0x22, struct ublksrv_io_cmd)
#define UBLK_U_IO_REGISTER_IO_BUF _IOWR('u', 0x23, struct ublksrv_io_cmd)
#define UBLK_U_IO_UNREGISTER_IO_BUF _IOWR('u', 0x24, struct ublksrv_io_cmd)

/* cqe->res of a fetch; ABORT says: do not fetch this tag again. */
#define UBLK_IO_RES_OK			0
#define UBLK_IO_RES_NEED_GET_DATA	1
#define UBLK_IO_RES_ABORT		(-ENODEV)

/* sqe->addr of a fetch with UBLK_F_AUTO_BUF_REG. */
struct ublk_auto_buf_reg {
	uint16_t	index;
	uint8_t		flags;		/* UBLK_AUTO_BUF_REG_* */
	uint8_t		reserved0;
	uint32_t	reserved1;
};

#define UBLK_AUTO_BUF_REG_FALLBACK	(1U << 0)
/* In no table: with FALLBACK, nothing is registered. */
#define UBLK_AUTO_BUF_REG_NONE		0xffff

static inline uint64_t ublk_auto_buf_reg_addr(uint16_t index, uint8_t flags)
{
	return index | (uint64_t)flags << 16;
}

/* ---- /dev/ublkcN: many tags a command (UBLK_F_BATCH_IO) ---- */

/* In sqe->cmd; sqe->addr and sqe->len are the buffer of the elements. */
struct ublk_batch_io {
	uint16_t	q_id;
	uint16_t	flags;		/* UBLK_BATCH_F_* */
	uint16_t	nr_elem;
	uint8_t		elem_bytes;	/* header and the optional words */
	uint8_t		reserved;
	uint64_t	reserved2;
};

/*
 * Begins each element. Then, in this order, one 64-bit word for each of
 * UBLK_BATCH_F_HAS_BUF_ADDR and UBLK_BATCH_F_HAS_ZONE_LBA that is set.
 */
struct ublk_elem_header {
	uint16_t	tag;
	uint16_t	buf_index;	/* with UBLK_F_AUTO_BUF_REG */
	int32_t		result;		/* commit: bytes or -errno */
};

#define UBLK_BATCH_F_HAS_ZONE_LBA		(1U << 0)
#define UBLK_BATCH_F_HAS_BUF_ADDR		(1U << 1)
#define UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK	(1U << 2)

#define UBLK_U_IO_PREP_IO_CMDS _IOWR('u', 0x25, struct ublk_batch_io)
/* cqe->res: bytes of the buffer that were taken; the rest is not committed. */
#define UBLK_U_IO_COMMIT_IO_CMDS _IOWR('u', 0x26, struct ublk_batch_io)
/* Multishot; fills provided buffers with 16-bit tags. */
#define UBLK_U_IO_FETCH_IO_CMDS _IOWR('u', 0x27, struct ublk_batch_io)

#define UBLK_URING_CMD_MULTISHOT	(1U << 1)	/* sqe->uring_cmd_flags */

/* ---- sizes and offsets, as the kernel asserts or relies on them ---- */

_Static_assert(sizeof(struct ublksrv_ctrl_cmd) == 32, "ublksrv_ctrl_cmd");
_Static_assert(offsetof(struct ublksrv_ctrl_cmd, addr) == 8, "addr");
_Static_assert(offsetof(struct ublksrv_ctrl_cmd, dev_path_len) == 24, "path");
_Static_assert(sizeof(struct ublksrv_ctrl_dev_info) == 64, "dev_info");
_Static_assert(offsetof(struct ublksrv_ctrl_dev_info, flags) == 24, "flags");
_Static_assert(sizeof(struct ublksrv_io_desc) == 24, "ublksrv_io_desc");
_Static_assert(sizeof(struct ublksrv_io_cmd) == 16, "ublksrv_io_cmd");
_Static_assert(sizeof(struct ublk_auto_buf_reg) == 8, "ublk_auto_buf_reg");
_Static_assert(sizeof(struct ublk_batch_io) == 16, "ublk_batch_io");
_Static_assert(sizeof(struct ublk_elem_header) == 8, "ublk_elem_header");
_Static_assert(UBLK_U_IO_FETCH_REQ == 0xc0107520, "FETCH_REQ");
_Static_assert(UBLK_U_IO_COMMIT_AND_FETCH_REQ == 0xc0107521, "COMMIT");
_Static_assert(UBLK_U_IO_FETCH_IO_CMDS == 0xc0107527, "FETCH_IO_CMDS");
_Static_assert(offsetof(struct io_uring_sqe, cmd) == 48, "sqe->cmd");

/* ---- the sqe: io_uring_prep_uring_cmd() came with liburing 2.6 ---- */

#define UBLK_SQE_CMD_BYTES	16
#define UBLK_SQE128_CMD_BYTES	80

/*
 * Make @sqe the command @cmd_op on @fd and return its payload, zeroed:
 * @cmd_nr_bytes is UBLK_SQE_CMD_BYTES, or UBLK_SQE128_CMD_BYTES on a ring with
 * IORING_SETUP_SQE128.
 */
static inline void *ublk_sqe_prep(struct io_uring_sqe *sqe, int fd,
				  uint32_t cmd_op, size_t cmd_nr_bytes)
{
	memset(sqe, 0, offsetof(struct io_uring_sqe, cmd) + cmd_nr_bytes);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = cmd_op;
	return sqe->cmd;
}

#endif /* UBLK_LOOP_UBLK_ABI_H */
