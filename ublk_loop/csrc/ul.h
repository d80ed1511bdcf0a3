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

/* keep_rights: commands have the rights that the caller has now, whoever sends
 * them and whatever it has given up; the ring can do nothing else. */
int ul_control_create(int32_t control_fd, int32_t keep_rights,
		      struct ul_control **control);
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

struct ul_pool;			/* the threads behind workqueues of one nice */
struct ul_worker;		/* one of them, or a workqueue's rescuer */
struct ul_workqueue;
struct ul_work;

enum {
	UL_WQ_RESCUER = 1,	/* WQ_MEM_RECLAIM */
};

enum {
	UL_WORK_BUSY_PENDING = 1,
	UL_WORK_BUSY_RUNNING = 2,
};

struct ul_pool_config {
	uint64_t	idle_timeout_ns;	/* then an idle worker leaves */
	uint64_t	create_cooldown_ns;	/* pause after a failure */
	uint64_t	mayday_initial_ns;	/* a stall before rescuers */
	uint64_t	mayday_interval_ns;	/* between calls for rescue */
	uint64_t	spin_ns;		/* 0 on a single CPU */
};

struct ul_pool_stats {
	uint64_t	nr_created;
	uint64_t	nr_culled;
	uint64_t	nr_create_failures;
	uint32_t	nr_workers;
	uint32_t	nr_idle;
	uint32_t	nr_waiting;	/* items that no worker took yet */
	uint32_t	is_io_flusher;	/* PR_SET_IO_FLUSHER was granted */
};

struct ul_workqueue_config {
	char		name[16];	/* of the rescuer's thread */
	uint32_t	flags;		/* UL_WQ_* */
	uint32_t	max_active;	/* at least 1; 1 is an ordered one */
};

struct ul_workqueue_stats {
	uint64_t	nr_started;
	uint64_t	nr_completed;
	uint64_t	cpu_time_ns;
	uint64_t	nr_cpu_hogs;	/* items of 10 ms CPU and more */
	uint64_t	nr_wakeups;	/* system calls to wake a thread */
	uint64_t	nr_maydays;
	uint64_t	nr_rescued;
	uint32_t	nr_active;
	uint32_t	nr_inactive;	/* held back by max_active */
};

int ul_pool_create(const struct ul_pool_config *config, struct ul_pool **pool);
/* For the manager's thread. 1: start a thread that calls ul_worker_run(), or
 * call ul_worker_not_started(). 0: the pool stops. */
int ul_pool_manager_wait(struct ul_pool *pool, struct ul_worker **worker);
void ul_pool_stop(struct ul_pool *pool);
void ul_pool_get_stats(struct ul_pool *pool, struct ul_pool_stats *stats);
/* After all its threads have ended; else -EBUSY. */
int ul_pool_destroy(struct ul_pool *pool);

/* 1: Python is needed for the work with this cookie; then call again, on the
 * same thread. 0: the worker is gone, end the thread. */
int ul_worker_run(struct ul_worker *worker, struct ul_work **work,
		  uint64_t *cookie);
void ul_worker_not_started(struct ul_worker *worker);

/* The rescuer, NULL without UL_WQ_RESCUER, is run as a worker is. */
int ul_workqueue_create(struct ul_pool *pool,
			const struct ul_workqueue_config *config,
			struct ul_workqueue **wq, struct ul_worker **rescuer);
void ul_workqueue_set_max_active(struct ul_workqueue *wq, uint32_t max_active);
void ul_workqueue_get_stats(struct ul_workqueue *wq,
			    struct ul_workqueue_stats *stats);
/* Until what was queued before is done. -EINTR: go round again, with the same
 * ticket (0 at first). -EDEADLK: called by one of the workqueue's own items. */
int ul_workqueue_flush_wait(struct ul_workqueue *wq, uint64_t *ticket);
/* Until empty, letting in only what its own items queue. With close nothing
 * gets in any more, timers are cancelled and the rescuer ends. */
int ul_workqueue_drain_wait(struct ul_workqueue *wq, int32_t close);
/* After a drain with close and the end of the rescuer; else -EBUSY. */
int ul_workqueue_destroy(struct ul_workqueue *wq);

/* An item that attends to Python, once each time that it was queued. */
int ul_work_create(uint64_t cookie, struct ul_work **work);
/* 1: accepted. 0: it was pending; with modify its time is set anew.
 * -ECANCELED: disabled. -ESHUTDOWN: draining. */
int ul_work_queue_delayed(struct ul_workqueue *wq, struct ul_work *work,
			  uint64_t delay_ns, int32_t modify);
/* From here on: not after its workqueue was destroyed, and not at the same time
 * as its first queueing.
 * 1: it was pending, and is not now. With disable it cannot be queued again
 * until ul_work_enable(), which returns how many disables are left. */
int ul_work_cancel(struct ul_work *work, int32_t disable);
int ul_work_enable(struct ul_work *work);
/* Until the last queueing has run; a delayed one is queued at once. 0: it was
 * idle, 1: waited. -EINTR, -EDEADLK as above. */
int ul_work_flush_wait(struct ul_work *work);
uint32_t ul_work_busy(struct ul_work *work);	/* UL_WORK_BUSY_* */
/* Only when it is neither pending nor running. */
void ul_work_destroy(struct ul_work *work);

/* ---- target.c: what a request does to the backing ---- */

struct ul_target;

enum {
	UL_TARGET_NULL = 0,
	UL_TARGET_LOOP = 1,
	UL_TARGET_PYTHON = 2,
	UL_TARGET_STRIPE = 3,
	UL_TARGET_INTEGRITY = 4,	/* data with metadata: always `base` */
};

enum {
	UL_POLICY_2014 = 0,	/* reads concurrently, writes in order */
	UL_POLICY_BASE = 1,	/* everything in order, one at a time */
	UL_POLICY_AUTO = 2,	/* inline if it cannot block, else as 2014 */
};

enum {
	UL_TARGET_READ_ONLY = 1,
	UL_TARGET_DIRECT = 2,	/* loop: fd is open for direct I/O */
	UL_TARGET_MAP = 4,	/* loop: map the file, serve what is resident */
};

enum {
	UL_STRIPE_MAX = 16,	/* files of a stripe */
};

struct ul_target_config {
	uint32_t	kind;		/* UL_TARGET_* */
	uint32_t	policy;		/* UL_POLICY_* */
	uint32_t	flags;		/* UL_TARGET_READ_ONLY */
	int32_t		fd;		/* loop: the backing file, borrowed */
	int32_t		direct_fd;	/* loop: the same, past the page cache,
					 * for reading; borrowed; or -1 */
	uint64_t	offset_bytes;	/* loop: the device's start in the file */
	uint64_t	dev_nr_bytes;	/* loop: how much of it is mapped */
	uint64_t	cookie;		/* python: handed out with each work */
	uint64_t	delay_ns;	/* null: how long each request takes */
	uint32_t	nr_parts;	/* stripe; integrity: 2, or 0 as null */
	uint32_t	chunk_bytes;	/* stripe: a power of 2; integrity: the
					 * data that metadata_bytes are for */
	uint32_t	metadata_bytes;	/* integrity: a block */
	struct ul_target *parts[UL_STRIPE_MAX];	/* stripe: loops, borrowed;
					 * integrity: of data, of metadata */
};

struct ul_request_info {
	uint32_t	op;		/* UBLK_IO_OP_*, no flags */
	uint32_t	op_flags;	/* UBLK_IO_F_* bits, unshifted */
	uint64_t	offset_bytes;	/* from the start of the device */
	uint64_t	nr_bytes;
	void		*buffer;	/* nr_bytes long for READ and WRITE */
};

enum {
	UL_SHMEM_MAX = 16,	/* buffers of a device */
};

int ul_target_create(const struct ul_target_config *config,
		     struct ul_target **target);
void ul_target_destroy(struct ul_target *target);
/* UBLK_F_SHMEM_ZC, loop: our mapping of what REG_BUF gave this index, borrowed
 * until it was unregistered. Any thread. Until then requests that lie in it are
 * copied. -EINVAL: index. */
int ul_target_set_shmem(struct ul_target *target, uint16_t index, void *bytes,
			uint64_t nr_bytes);
/* 1: a file whose page cache is all there is of it (tmpfs, ramfs), else 0. */
int ul_target_is_in_memory(int32_t fd);
/* 0 if holes can be punched in a file, else -errno (-EOPNOTSUPP). */
int ul_target_probe_punch(int32_t fd, uint64_t offset_bytes, uint64_t nr_bytes);
/* For a work that ul_worker_run() returned with a target's cookie: what to do,
 * and its result in bytes or -errno. The buffer is valid in between. */
void ul_request_get(struct ul_work *work, struct ul_request_info *info);
void ul_request_set_result(struct ul_work *work, int32_t result);

/* ---- iothread.c: the thread, and the ring, of one or more hctxs ---- */

struct ul_iothread;

struct ul_iothread_config {
	int32_t		cdev_fd;	/* /dev/ublkcN, borrowed */
	uint32_t	poll_us;	/* longest spin before sleeping; 0: none */
	uint32_t	watches;	/* the file's size, by inotify: see watch.c */
};

int ul_iothread_create(const struct ul_iothread_config *config,
		       struct ul_target *target, struct ul_iothread **thread);
/* Prepare and run on the same thread, once every hctx was created. Make the
 * ring, map the descriptors, fetch every tag. */
int ul_iothread_prepare(struct ul_iothread *thread);
/* Serve until the driver aborted every tag or ul_iothread_stop(); then 0. */
int ul_iothread_run(struct ul_iothread *thread);
/* Any thread: have the run end once nothing is in flight, and the ring and its
 * hold on ublkcN with destroy. */
void ul_iothread_stop(struct ul_iothread *thread);
/* After its hctxs. */
void ul_iothread_destroy(struct ul_iothread *thread);

/* ---- hctx.c: one hardware queue ---- */

struct ul_hctx;

struct ul_hctx_config {
	uint16_t	q_id;
	uint16_t	queue_depth;
	uint16_t	first_tag;	/* it serves nr_tags from here on; without */
	uint16_t	nr_tags;	/* BATCH_IO others may serve the rest */
	uint32_t	max_io_buf_bytes;
	uint64_t	dev_flags;	/* UBLK_F_*, as the driver granted them */
	uint32_t	io_desc_bytes;	/* from one descriptor to the next */
};

struct ul_hctx_stats {
	uint64_t	nr_reads;
	uint64_t	nr_writes;
	uint64_t	nr_flushes;
	uint64_t	nr_discards;	/* and write-zeroes */
	uint64_t	nr_errors;
	uint64_t	nr_batches;	/* its thread's rounds that reaped */
	uint64_t	nr_sleeps;	/* its thread's */
	uint64_t	nr_inline;	/* done on the hctx's thread at once */
	uint64_t	nr_async;	/* done by the hctx's own ring */
	uint64_t	nr_shared;	/* whose data lay in shared memory */
	uint64_t	read_bytes;
	uint64_t	write_bytes;
	uint32_t	nr_inflight;
	int32_t		tid;		/* its thread's; 0: not prepared yet */
};

/* Before the thread is prepared. */
int ul_hctx_create(const struct ul_hctx_config *config,
		   struct ul_iothread *thread, struct ul_target *target,
		   struct ul_workqueue *wq, struct ul_hctx **hctx);
void ul_hctx_get_stats(struct ul_hctx *hctx, struct ul_hctx_stats *stats);
void ul_hctx_destroy(struct ul_hctx *hctx);
