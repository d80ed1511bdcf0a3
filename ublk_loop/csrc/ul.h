/* SPDX-License-Identifier: MIT */
/*
 * ul.h - the boundary between Python and the data plane.
 *
 * Read twice: by the C compiler and, as it stands, by cffi's cdef. So there is
 * no preprocessor line in it. Every call returns 0, a count or -errno; a call
 * that ends in _run or _wait blocks, all drop the GIL. Python owns each handle
 * and destroys it once; "borrowed" handles must outlive the borrower.
 */

/* ---- control.c: one ring for /dev/ublk-control, one command at a time ---- */

struct ul_control;

struct ul_control_cmd {
	uint32_t	opcode;		/* ioctl-encoded, UBLK_U_CMD_* */
	uint32_t	dev_id;
	uint16_t	queue_id;	/* 0xffff: none */
	uint16_t	dev_path_len;	/* of the path that opens the payload */
	uint32_t	nr_bytes;	/* of the payload, below 64 KiB */
	uint64_t	data;		/* the command's data[0] */
};

int ul_control_create(int32_t control_fd, struct ul_control **control);
/* A command that still runs keeps its payload: it is leaked, for the kernel. */
void ul_control_destroy(struct ul_control *control);
/* Copies the payload. -EBUSY: the last command has not ended. After any other
 * error destroy the handle. */
int ul_control_submit(struct ul_control *control,
		      const struct ul_control_cmd *cmd, const void *payload);
/* 0: ended, payload copied out, *result set. -ETIME: not within timeout_ns.
 * -EINTR: a signal; let Python run its handlers, then wait again. */
int ul_control_wait(struct ul_control *control, uint64_t timeout_ns,
		    void *payload, int32_t *result);
/* Ask the kernel to interrupt the command; then wait for its end as before. */
int ul_control_cancel(struct ul_control *control);

/* ---- workqueue.c: the kernel's unbound workqueue ---- */

struct ul_workqueue;
struct ul_work;

/* ---- target.c: what a request does to the backing ---- */

struct ul_target;

enum {
	UL_TARGET_NULL = 0,
	UL_TARGET_LOOP = 1,
	UL_TARGET_PYTHON = 2,
};

enum {
	UL_POLICY_2014 = 0,	/* reads concurrently, writes in order */
	UL_POLICY_BASE = 1,	/* everything in order, one at a time */
};

enum {
	UL_TARGET_READ_ONLY = 1,
};

struct ul_target_config {
	uint32_t	kind;		/* UL_TARGET_* */
	uint32_t	policy;		/* UL_POLICY_* */
	uint32_t	flags;		/* UL_TARGET_READ_ONLY */
	int32_t		fd;		/* loop: the backing file, borrowed */
	uint64_t	offset_bytes;	/* loop: the device's start in the file */
	uint64_t	cookie;		/* python: handed out with each work */
};

struct ul_request_info {
	uint32_t	op;		/* UBLK_IO_OP_*, no flags */
	uint32_t	op_flags;	/* UBLK_IO_F_* bits, unshifted */
	uint64_t	offset_bytes;	/* from the start of the device */
	uint64_t	nr_bytes;
	void		*buffer;	/* nr_bytes long for READ and WRITE */
};

int ul_target_create(const struct ul_target_config *config,
		     struct ul_target **target);
void ul_target_destroy(struct ul_target *target);
/* 0 if holes can be punched in a file, else -errno (-EOPNOTSUPP). */
int ul_target_probe_punch(int32_t fd, uint64_t offset_bytes, uint64_t nr_bytes);
/* For a work that ul_worker_run() returned with a target's cookie: what to do,
 * and its result in bytes or -errno. The buffer is valid in between. */
void ul_request_get(struct ul_work *work, struct ul_request_info *info);
void ul_request_set_result(struct ul_work *work, int32_t result);

/* ---- hctx.c: one hardware queue; prepare and run on its own thread ---- */

struct ul_hctx;

struct ul_hctx_config {
	int32_t		cdev_fd;	/* /dev/ublkcN, borrowed */
	uint16_t	q_id;
	uint16_t	queue_depth;
	uint32_t	max_io_buf_bytes;
	uint64_t	dev_flags;	/* UBLK_F_*, as the driver granted them */
};

struct ul_hctx_stats {
	uint64_t	nr_reads;
	uint64_t	nr_writes;
	uint64_t	nr_flushes;
	uint64_t	nr_discards;	/* and write-zeroes */
	uint64_t	nr_errors;
	uint64_t	nr_batches;	/* rounds that reaped something */
	uint64_t	nr_sleeps;
	uint64_t	read_bytes;
	uint64_t	write_bytes;
	uint32_t	nr_inflight;
	int32_t		tid;		/* 0: not prepared yet */
};

int ul_hctx_create(const struct ul_hctx_config *config,
		   struct ul_target *target, struct ul_workqueue *wq,
		   struct ul_hctx **hctx);
/* Make the ring, map the descriptors, fetch every tag. */
int ul_hctx_prepare(struct ul_hctx *hctx);
/* Serve until the driver aborted every tag or ul_hctx_stop(); then 0. */
int ul_hctx_run(struct ul_hctx *hctx);
void ul_hctx_stop(struct ul_hctx *hctx);
void ul_hctx_get_stats(struct ul_hctx *hctx, struct ul_hctx_stats *stats);
void ul_hctx_destroy(struct ul_hctx *hctx);
