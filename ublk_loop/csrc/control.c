// SPDX-License-Identifier: MIT
/*
 * control.c - control commands, sent to /dev/ublk-control.
 *
 * Notes on the design
 *
 * A handle is one small ring and at most one command. The command is a
 * URING_CMD of 80 bytes, so the ring has 128-byte sqes. Sending and waiting are
 * two calls: the wait gives up on a signal, Python runs the signal's handler
 * and decides whether to wait again, cancel, or leave.
 *
 * A command that may sleep runs on an io-wq thread of the kernel and reads and
 * writes its payload there, whenever it gets to it. So the payload is never
 * Python's memory. It is allocated for each command and freed once the command
 * has ended; a command that survives even its cancellation (STOP_DEV of a
 * device whose requests hang, say) keeps its payload for the process's life.
 *
 * A ring that keeps rights sends each command with the credentials that its
 * creator had ("personality"), whatever its users have given up since. So it
 * can do nothing but send and cancel commands: no other operation, and no
 * change of the ring, for good.
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "ublk_abi.h"
#include "ul.h"

#define CONTROL_ENTRIES	4

enum {
	UD_COMMAND = 1,
	UD_CANCEL = 2,
};

/* From open to close of the Python object; used by one thread at a time. */
struct ul_control {
	struct io_uring	ring;		/* owned, SQE128 */
	int		control_fd;	/* borrowed */
	int		busy;		/* a command was sent, has not ended */
	uint16_t	personality;	/* 0: rights of who sends */
	uint32_t	nr_bytes;	/* of payload */
	void		*payload;	/* owned; the kernel's while busy */
};

/* liburing 2.3 declares the calls that do this, but has them not. */
static int control_register(struct ul_control *control, unsigned int opcode,
			    const void *argument, unsigned int nr)
{
	long ret;

	ret = syscall(__NR_io_uring_register, control->ring.ring_fd, opcode,
		      argument, nr);
	return ret < 0 ? -errno : 0;
}

static int control_keep_rights(struct ul_control *control)
{
	struct io_uring_restriction allowed[] = {
		{
			.opcode = IORING_RESTRICTION_SQE_OP,
			.sqe_op = IORING_OP_URING_CMD,
		},
		{
			.opcode = IORING_RESTRICTION_SQE_OP,
			.sqe_op = IORING_OP_ASYNC_CANCEL,
		},
	};
	int ret;

	ret = io_uring_register_personality(&control->ring);
	if (ret < 0)
		return ret;
	control->personality = ret;
	ret = control_register(control, IORING_REGISTER_RESTRICTIONS, allowed,
			       2);
	if (ret < 0)
		return ret;
	return control_register(control, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

int ul_control_create(int32_t control_fd, int32_t keep_rights,
		      struct ul_control **control)
{
	unsigned int flags = IORING_SETUP_SQE128;
	struct ul_control *c;
	int ret;

	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->control_fd = control_fd;
	if (keep_rights)
		flags |= IORING_SETUP_R_DISABLED;
	ret = io_uring_queue_init(CONTROL_ENTRIES, &c->ring, flags);
	if (ret < 0)
		goto free_control;
	if (keep_rights)
		ret = control_keep_rights(c);
	if (ret < 0)
		goto exit_ring;
	*control = c;
	return 0;

exit_ring:
	io_uring_queue_exit(&c->ring);
free_control:
	free(c);
	return ret;
}

void ul_control_destroy(struct ul_control *control)
{
	if (!control)
		return;
	io_uring_queue_exit(&control->ring);
	if (!control->busy)
		free(control->payload);
	free(control);
}

static void control_prep(struct ul_control *control, struct io_uring_sqe *sqe,
			 const struct ul_control_cmd *cmd)
{
	struct ublksrv_ctrl_cmd *ctrl_cmd;

	ctrl_cmd = ublk_sqe_prep(sqe, control->control_fd, cmd->opcode,
				 UBLK_SQE128_CMD_BYTES);
	sqe->user_data = UD_COMMAND;
	sqe->personality = control->personality;
	ctrl_cmd->dev_id = cmd->dev_id;
	ctrl_cmd->queue_id = cmd->queue_id;
	ctrl_cmd->len = control->nr_bytes;
	ctrl_cmd->addr = (uintptr_t)control->payload;
	ctrl_cmd->data[0] = cmd->data;
	ctrl_cmd->dev_path_len = cmd->dev_path_len;
}

static int control_enter(struct ul_control *control)
{
	int ret;

	do {
		ret = io_uring_submit(&control->ring);
	} while (ret == -EINTR);
	return ret < 0 ? ret : 0;
}

int ul_control_submit(struct ul_control *control,
		      const struct ul_control_cmd *cmd, const void *payload)
{
	struct io_uring_sqe *sqe;
	int ret;

	if (control->busy)
		return -EBUSY;
	if (cmd->nr_bytes > UINT16_MAX || cmd->dev_path_len > cmd->nr_bytes)
		return -EINVAL;

	free(control->payload);
	control->nr_bytes = cmd->nr_bytes;
	control->payload = malloc(cmd->nr_bytes ? cmd->nr_bytes : 1);
	if (!control->payload)
		return -ENOMEM;
	if (cmd->nr_bytes)
		memcpy(control->payload, payload, cmd->nr_bytes);

	sqe = io_uring_get_sqe(&control->ring);
	if (!sqe)
		return -EBUSY;
	control_prep(control, sqe, cmd);
	ret = control_enter(control);
	control->busy = ret == 0;
	return ret;
}

/* Whether @cqe ends the command; if so, the payload is ours again. */
static int control_reap(struct ul_control *control, struct io_uring_cqe *cqe,
			void *payload, int32_t *result)
{
	int ended = cqe->user_data == UD_COMMAND;

	if (ended) {
		*result = cqe->res;
		control->busy = 0;
		if (control->nr_bytes)
			memcpy(payload, control->payload, control->nr_bytes);
	}
	io_uring_cqe_seen(&control->ring, cqe);
	return ended;
}

int ul_control_wait(struct ul_control *control, uint64_t timeout_ns,
		    void *payload, int32_t *result)
{
	struct __kernel_timespec timeout = {
		.tv_sec = timeout_ns / NSEC_PER_SEC,
		.tv_nsec = timeout_ns % NSEC_PER_SEC,
	};
	struct io_uring_cqe *cqe;
	int ret;

	if (!control->busy)
		return -EINVAL;
	/* A cancel posts one cqe of its own, so this goes round twice at most
	 * for each cancel. */
	do {
		ret = io_uring_wait_cqe_timeout(&control->ring, &cqe, &timeout);
		if (ret < 0)
			return ret;
	} while (!control_reap(control, cqe, payload, result));
	return 0;
}

int ul_control_cancel(struct ul_control *control)
{
	struct io_uring_sqe *sqe;

	if (!control->busy)
		return -EINVAL;
	sqe = io_uring_get_sqe(&control->ring);
	if (!sqe)
		return -EBUSY;
	io_uring_prep_cancel64(sqe, UD_COMMAND, 0);
	sqe->user_data = UD_CANCEL;
	return control_enter(control);
}
