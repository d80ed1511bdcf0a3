/* SPDX-License-Identifier: MIT */
/*
 * hctx.c - one ublk queue as a blk-mq hardware context: its ring and its tags.
 *
 * One thread prepares and runs a hctx: it made the ring, so by the driver's
 * rule (without BATCH_IO) it alone may commit what it fetched.  A round:
 *
 *   reap     every cqe that is there.  A fetched tag is a request, io_desc
 *            [tag] says which; the target does it, queues it, or has it done by
 *            this ring (ul_target_queue_rq, then commit_rqs for the batch)
 *   collect  the done list, which workers fill
 *   wait     submit the commits and sleep in io_uring_enter, or spin before
 *
 * With UBLK_F_BATCH_IO (batch.c) one command fetches all tags and one a round
 * commits; without it each tag has a command of its own that does both.
 *
 * Done list: workers push with one atomic exchange of the head and write
 * wake_fd only if `sleeping` is set; the ring thread sets `sleeping`, looks at
 * the list once more, then sleeps.  Both sides use sequentially consistent
 * accesses, so one of the two sees the other (Dekker).
 *
 * Spinning: with IORING_SETUP_TASKRUN_FLAG the kernel says in shared memory
 * that something waits for us, so a spin spares us a sleep and the client a
 * wake-up.  Each wait is measured, slept or spun: as long as they are short,
 * the hctx spins.  Every spin ends in sleep, so an idle device costs nothing.
 *
 * A tag ends when its command completes with -ENODEV: the driver aborts, so it
 * is not fetched again.  The run is over when every tag has ended and every
 * request in flight was handed back, or on ul_hctx_stop().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "batch.h"
#include "hctx.h"
#include "ring.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED	24
#endif

/* A spin looks at the clock, and lets others run, once in so many pauses. */
#define SPIN_PAUSES	32
#define SPIN_NS_MIN	50000
/* A spin lasts so many of the mean wait. */
#define SPIN_WAITS	4
/* Short waits less the long ones, which count more; spinning pays above 0. */
#define SPIN_SCORE_MAX	8
#define SPIN_SCORE_LONG	4
/* So long without a request, and the memory of the buffers is given back. */
#define IDLE_NS		500000000

/* Lives from ul_hctx_create() to ul_hctx_destroy().
 * I: set at create.  P: set by prepare, undone as run returns.
 * R: ring thread only.  A: atomic, any thread.
 */
struct ul_hctx {
	struct ul_hctx_config	config;		/* I: cdev_fd borrowed */
	struct ul_target	*target;	/* I: borrowed */
	struct ul_workqueue	*wq;		/* I: borrowed */
	struct ul_request	*requests;	/* I: owned, [queue_depth] */
	char			*arena;		/* I: owned, a buffer a tag */
	size_t			buffer_bytes;	/* I: of one tag, whole pages */
	size_t			arena_bytes;	/* I */
	bool			arena_used;	/* R: may have pages */
	int			wake_fd;	/* I: owned eventfd */
	struct io_uring		ring;		/* P */
	bool			ring_made;	/* P */
	const struct ublksrv_io_desc *descs;	/* P: driver's, read-only */
	struct ul_plug		plug;		/* R: this batch's writes */
	unsigned int		nr_fetched;	/* R: commands that fetch */
	struct ul_batch		batch;		/* R: BATCH_IO */
	uint64_t		spin_ns;	/* I: longest spin; 0: none */
	uint64_t		wait_ns;	/* R: mean of waits up to spin_ns */
	int			spin_score;	/* R: see SPIN_SCORE_MAX */
	int			fault;		/* R: first unexpected result */
	struct ul_hctx_stats	stats;		/* R, but read by all */
	_Atomic(struct ul_request *) done;	/* A: newest first */
	atomic_bool		sleeping;	/* A */
	atomic_bool		stopping;	/* A */
};

static bool hctx_is_batch(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_BATCH_IO;
}

static bool hctx_is_user_copy(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_USER_COPY;
}

static bool hctx_is_zero_copy(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_AUTO_BUF_REG;
}

static uint16_t hctx_batch_flags(const struct ul_hctx *h)
{
	if (hctx_is_zero_copy(h))
		return UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK;
	return hctx_is_user_copy(h) ? 0 : UBLK_BATCH_F_HAS_BUF_ADDR;
}

/* ---- create, destroy ---- */

static char *hctx_buffer(const struct ul_hctx *h, uint16_t tag)
{
	return h->arena + tag * h->buffer_bytes;
}

static void hctx_init_requests(struct ul_hctx *h)
{
	struct ul_request *req;

	for (unsigned int tag = 0; tag < h->config.queue_depth; tag++) {
		req = &h->requests[tag];
		req->hctx = h;
		req->target = h->target;
		req->tag = tag;
		ul_request_init(req);
	}
}

int ul_hctx_create(const struct ul_hctx_config *config,
		   struct ul_target *target, struct ul_workqueue *wq,
		   struct ul_hctx **hctx)
{
	struct ul_hctx *h;
	int ret = -ENOMEM;

	if (!config->queue_depth ||
	    config->queue_depth > UBLK_MAX_QUEUE_DEPTH ||
	    !config->max_io_buf_bytes)
		return -EINVAL;
	h = calloc(1, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->config = *config;
	h->target = target;
	h->wq = wq;
	ul_plug_init(&h->plug);
	h->spin_ns = config->poll_us * 1000ULL;
	h->requests = calloc(config->queue_depth, sizeof(*h->requests));
	if (!h->requests ||
	    ul_batch_init(&h->batch, &h->ring, config->q_id,
			  config->queue_depth, hctx_batch_flags(h)))
		goto free_requests;
	/* Pages come with the first request that touches them, huge ones if
	 * there are any, and go once the device is idle. */
	h->buffer_bytes = ul_page_round_up(config->max_io_buf_bytes);
	h->arena_bytes = h->buffer_bytes * config->queue_depth;
	h->arena = mmap(NULL, h->arena_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->arena == MAP_FAILED)
		goto free_requests;
	madvise(h->arena, h->arena_bytes, MADV_HUGEPAGE); /* only saves time */
	h->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (h->wake_fd < 0) {
		ret = -errno;
		goto unmap_arena;
	}
	hctx_init_requests(h);
	*hctx = h;
	return 0;

unmap_arena:
	munmap(h->arena, h->arena_bytes);
free_requests:
	free(h->requests);
	ul_batch_exit(&h->batch);
	free(h);
	return ret;
}

void ul_hctx_destroy(struct ul_hctx *h)
{
	if (!h)
		return;
	close(h->wake_fd);
	munmap(h->arena, h->arena_bytes);
	free(h->requests);
	ul_batch_exit(&h->batch);
	free(h);
}

/* ---- sqes ---- */

static uint64_t hctx_buffer_addr(const struct ul_hctx *h,
				 const struct ul_request *req)
{
	if (hctx_is_user_copy(h))
		return 0;
	return (uint64_t)(uintptr_t)hctx_buffer(h, req->tag);
}

static void hctx_queue_cmd(struct ul_hctx *h, struct ul_request *req,
			   uint32_t opcode)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&h->ring);
	struct ublksrv_io_cmd *cmd;

	cmd = ublk_sqe_prep(sqe, CDEV_INDEX, opcode, sizeof(*cmd));
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = UD(CQE_CMD, req->tag);
	cmd->q_id = h->config.q_id;
	cmd->tag = req->tag;
	cmd->result = req->res;
	cmd->addr = hctx_buffer_addr(h, req);
	if (hctx_is_zero_copy(h))
		sqe->addr = ublk_auto_buf_reg_addr(req->tag,
						   UBLK_AUTO_BUF_REG_FALLBACK);
}

static void hctx_poll_wake_fd(struct ul_hctx *h)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&h->ring);

	io_uring_prep_poll_multishot(sqe, h->wake_fd, POLLIN);
	sqe->user_data = UD(CQE_WAKE, 0);
}

static void hctx_queue_async(struct ul_hctx *h, struct ul_request *req)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&h->ring);
	bool is_read = req->op == UBLK_IO_OP_READ;
	bool is_fixed = ul_hctx_is_registered(req);
	int op;

	if (is_fixed)
		op = is_read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
	else
		op = is_read ? IORING_OP_READ : IORING_OP_WRITE;
	/* A registered buffer's addresses begin at 0. */
	io_uring_prep_rw(op, sqe, BACKING_INDEX, is_fixed ? NULL : req->buffer,
			 req->nr_bytes, ul_target_pos(h->target, req));
	if (is_fixed)
		sqe->buf_index = req->tag;
	if (req->op_flags & UBLK_IO_F_FUA)
		sqe->rw_flags = RWF_DSYNC;
	sqe->flags |= IOSQE_FIXED_FILE;
	sqe->user_data = UD(CQE_ASYNC, req->tag);
	h->stats.nr_async++;
}

/* ---- prepare ---- */

static int hctx_make_ring(struct ul_hctx *h)
{
	/* Best first; a kernel that lacks a flag says -EINVAL. */
	static const unsigned int setups[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
			IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		0,
	};
	int files[] = { h->config.cdev_fd, ul_target_fd(h->target) };
	unsigned int nr_entries = h->config.queue_depth + 4;
	int ret = -EINVAL;

	for (size_t i = 0; ret == -EINVAL && i < 3; i++) {
		struct io_uring_params p = {
			.flags = setups[i] | IORING_SETUP_CQSIZE,
			.cq_entries = 2 * nr_entries,
		};

		ret = io_uring_queue_init_params(nr_entries, &h->ring, &p);
	}
	if (ret)
		return ret;
	h->ring_made = true;
	io_uring_register_ring_fd(&h->ring);	/* only saves time */
	ret = io_uring_register_files(&h->ring, files, 2);
	if (!ret && hctx_is_zero_copy(h))
		ret = io_uring_register_buffers_sparse(&h->ring,
						       h->config.queue_depth);
	return ret;
}

static size_t hctx_descs_bytes(const struct ul_hctx *h)
{
	return ul_page_round_up(h->config.queue_depth *
				sizeof(struct ublksrv_io_desc));
}

static int hctx_map_descs(struct ul_hctx *h)
{
	off_t stride = ul_page_round_up(UBLK_MAX_QUEUE_DEPTH *
					sizeof(struct ublksrv_io_desc));
	void *descs = mmap(NULL, hctx_descs_bytes(h), PROT_READ,
			   MAP_SHARED | MAP_POPULATE, h->config.cdev_fd,
			   UBLKSRV_CMD_BUF_OFFSET + h->config.q_id * stride);

	if (descs == MAP_FAILED)
		return -errno;
	h->descs = descs;
	return 0;
}

static void hctx_unprepare(struct ul_hctx *h)
{
	/* The mapping and the fixed file each hold a reference on ublkcN,
	 * and DEL_DEV waits for those. */
	if (h->descs)
		munmap((void *)h->descs, hctx_descs_bytes(h));
	h->descs = NULL;
	if (h->ring_made)
		io_uring_queue_exit(&h->ring);
	h->ring_made = false;
	ul_batch_unprepare(&h->batch);
}

/* Every tag is ours to serve from here on. */
static int hctx_fetch_all(struct ul_hctx *h)
{
	for (unsigned int tag = 0; tag < h->config.queue_depth; tag++) {
		struct ul_request *req = &h->requests[tag];

		if (hctx_is_batch(h))
			ul_batch_add(&h->batch, tag, 0,
				     hctx_buffer_addr(h, req));
		else
			hctx_queue_cmd(h, req, UBLK_U_IO_FETCH_REQ);
	}
	h->nr_fetched = hctx_is_batch(h) ? 1 : h->config.queue_depth;
	return hctx_is_batch(h) ? ul_batch_prepare(&h->batch) : 0;
}

static void hctx_init_thread(struct ul_hctx *h)
{
	sigset_t all;

	sigfillset(&all);
	sigdelset(&all, SIGBUS);	/* map.c takes it */
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	/* Or reclaim could wait for this very device.  Unprivileged: EPERM. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	h->stats.tid = gettid();
}

int ul_hctx_prepare(struct ul_hctx *h)
{
	int ret;

	hctx_init_thread(h);
	ret = hctx_make_ring(h);
	if (ret)
		goto fail;
	ret = hctx_map_descs(h);
	if (ret)
		goto fail;
	ret = hctx_fetch_all(h);
	if (ret)
		goto fail;
	hctx_poll_wake_fd(h);
	ret = io_uring_submit(&h->ring);
	if (ret < 0)
		goto fail;
	return 0;
fail:
	hctx_unprepare(h);
	return ret;
}

/* ---- the data of UBLK_F_USER_COPY and UBLK_F_AUTO_BUF_REG ---- */

bool ul_hctx_is_registered(const struct ul_request *req)
{
	return hctx_is_zero_copy(req->hctx) &&
	       !(req->op_flags & UBLK_IO_F_NEED_REG_BUF);
}

bool ul_hctx_is_user_copy(const struct ul_request *req)
{
	return hctx_is_user_copy(req->hctx) && !req->is_shared;
}

int ul_hctx_user_copy(struct ul_request *req, void *data)
{
	const struct ul_hctx *h = req->hctx;
	uint64_t pos = ublk_user_copy_pos(h->config.q_id, req->tag, 0);
	uint64_t done = 0;
	ssize_t n;

	while (done < req->nr_bytes) {
		if (req->op == UBLK_IO_OP_WRITE)
			n = pread(h->config.cdev_fd, (char *)data + done,
				  req->nr_bytes - done, pos + done);
		else
			n = pwrite(h->config.cdev_fd, (char *)data + done,
				   req->nr_bytes - done, pos + done);
		if (n > 0)
			done += n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int ul_hctx_copy_in(struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_WRITE || !ul_hctx_is_user_copy(req))
		return 0;
	return ul_hctx_user_copy(req, req->buffer);
}

int ul_hctx_copy_out(struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_READ || !ul_hctx_is_user_copy(req))
		return 0;
	return ul_hctx_user_copy(req, req->buffer);
}

/* ---- run ---- */

static void hctx_wake(struct ul_hctx *h)
{
	uint64_t one = 1;

	/* A full counter (-EAGAIN) has woken it already. */
	if (write(h->wake_fd, &one, sizeof(one)) < 0)
		return;
}

void ul_hctx_complete(struct ul_request *req)
{
	struct ul_hctx *h = req->hctx;
	struct ul_request *head = atomic_load(&h->done);

	do {
		req->next = head;
	} while (!atomic_compare_exchange_weak(&h->done, &head, req));
	if (atomic_load(&h->sleeping) && atomic_exchange(&h->sleeping, false))
		hctx_wake(h);
}

static void hctx_count(struct ul_hctx *h, const struct ul_request *req)
{
	switch (req->op) {
	case UBLK_IO_OP_READ:
		h->stats.nr_reads++;
		h->stats.read_bytes += req->nr_bytes;
		break;
	case UBLK_IO_OP_WRITE:
		h->stats.nr_writes++;
		h->stats.write_bytes += req->nr_bytes;
		break;
	case UBLK_IO_OP_FLUSH:
		h->stats.nr_flushes++;
		break;
	default:
		h->stats.nr_discards++;
	}
}

static void hctx_commit(struct ul_hctx *h, struct ul_request *req)
{
	h->stats.nr_inflight--;
	if (req->res < 0)
		h->stats.nr_errors++;
	if (hctx_is_batch(h))
		ul_batch_add(&h->batch, req->tag, req->res,
			     hctx_buffer_addr(h, req));
	else
		hctx_queue_cmd(h, req, UBLK_U_IO_COMMIT_AND_FETCH_REQ);
}

/* Where the data is, or goes to. */
static void hctx_set_buffer(struct ul_hctx *h, struct ul_request *req,
			    uint64_t desc_addr)
{
	char *shared = NULL;

	if (req->op_flags & UBLK_IO_F_SHMEM_ZC)
		shared = ul_target_find_shmem(h->target, desc_addr,
					      req->nr_bytes);
	req->is_shared = shared;
	h->arena_used |= !shared;
	h->stats.nr_shared += req->is_shared;
	req->buffer = shared ? shared : hctx_buffer(h, req->tag);
}

static void hctx_handle_request(struct ul_hctx *h, struct ul_request *req)
{
	const struct ublksrv_io_desc *desc = &h->descs[req->tag];

	req->op = ublk_io_desc_op(desc);
	req->op_flags = ublk_io_desc_flags(desc);
	req->nr_bytes = (uint64_t)desc->nr_sectors << 9;
	req->offset_bytes = desc->start_sector << 9;
	hctx_set_buffer(h, req, desc->addr);
	h->stats.nr_inflight++;
	hctx_count(h, req);
	switch (ul_target_queue_rq(h->target, h->wq, &h->plug, req)) {
	case UL_RQ_DONE:
		h->stats.nr_inline++;
		hctx_commit(h, req);
		break;
	case UL_RQ_ASYNC:
		hctx_queue_async(h, req);
		break;
	case UL_RQ_QUEUED:
		break;
	}
}

/* A tag's own command: its next request, or its end. */
static void hctx_handle_cmd(struct ul_hctx *h, struct ul_request *req, int res)
{
	switch (res) {
	case UBLK_IO_RES_OK:
		hctx_handle_request(h, req);
		break;
	case UBLK_IO_RES_NEED_GET_DATA:
		hctx_queue_cmd(h, req, UBLK_U_IO_NEED_GET_DATA);
		break;
	default:
		h->nr_fetched--;
		if (res != UBLK_IO_RES_ABORT && !h->fault)
			h->fault = res;
	}
}

static void hctx_handle_fetch(struct ul_hctx *h, const struct io_uring_cqe *cqe)
{
	int nr_tags, ret;
	const uint16_t *tags = ul_batch_tags(&h->batch, cqe, &nr_tags);

	for (int i = 0; i < nr_tags; i++)
		hctx_handle_request(h, &h->requests[tags[i]]);
	ret = ul_batch_end_fetch(&h->batch, cqe);
	if (!ret)
		return;
	h->nr_fetched--;
	if (ret != UBLK_IO_RES_ABORT && !h->fault)
		h->fault = ret;
}

/* Short, refused for now, or for how the client's memory lies (EINVAL): the
 * workqueue does all of it again, from or to our buffer, and waits. */
static void hctx_handle_async(struct ul_hctx *h, struct ul_request *req,
			      int res)
{
	if (res == -EAGAIN || res == -EINTR || res == -EINVAL ||
	    (res >= 0 && res < (int)req->nr_bytes)) {
		ul_target_queue_work(h->target, h->wq, &h->plug, req);
		return;
	}
	req->res = res;
	if (res >= 0 && !ul_hctx_is_registered(req)) {
		int ret = ul_hctx_copy_out(req);

		if (ret)
			req->res = ret;
	}
	hctx_commit(h, req);
}

static void hctx_handle_wake(struct ul_hctx *h, const struct io_uring_cqe *cqe)
{
	uint64_t count;

	if (read(h->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
		h->fault = -errno;
	if (!(cqe->flags & IORING_CQE_F_MORE))
		hctx_poll_wake_fd(h);
}

static void hctx_handle_cqe(struct ul_hctx *h, const struct io_uring_cqe *cqe)
{
	uint32_t value = cqe->user_data;
	int ret;

	switch ((enum hctx_cqe)(cqe->user_data >> 32)) {
	case CQE_CMD:
		hctx_handle_cmd(h, &h->requests[value], cqe->res);
		break;
	case CQE_ASYNC:
		hctx_handle_async(h, &h->requests[value], cqe->res);
		break;
	case CQE_WAKE:
		hctx_handle_wake(h, cqe);
		break;
	case CQE_FETCH:
		hctx_handle_fetch(h, cqe);
		break;
	case CQE_COMMIT:
		ret = ul_batch_handle_commit(&h->batch, cqe);
		if (ret && !h->fault)
			h->fault = ret;
	}
}

static void hctx_reap(struct ul_hctx *h)
{
	/* A batch is what is there now: targets ask some things once a batch. */
	unsigned int nr_ready = io_uring_cq_ready(&h->ring);
	struct io_uring_cqe *cqe;
	unsigned int head, nr = 0;

	io_uring_for_each_cqe(&h->ring, head, cqe) {
		if (nr == nr_ready)
			break;
		hctx_handle_cqe(h, cqe);
		nr++;
	}
	io_uring_cq_advance(&h->ring, nr);
	ul_target_commit_rqs(h->target, h->wq, &h->plug);
	if (nr)
		h->stats.nr_batches++;
}

static void hctx_collect(struct ul_hctx *h)
{
	struct ul_request *req = atomic_exchange(&h->done, NULL), *next;

	for (; req; req = next) {
		next = req->next;
		hctx_commit(h, req);
	}
}

/* Something besides the cqes that tell of commits: each is there as soon as
 * its command is submitted, and is not worth a round. */
static bool hctx_has_cqes(const struct ul_hctx *h)
{
	return io_uring_cq_ready(&h->ring) > h->batch.nr_commits;
}

static bool hctx_has_news(struct ul_hctx *h)
{
	return hctx_has_cqes(h) ||
	       IO_URING_READ_ONCE(*h->ring.sq.kflags) & IORING_SQ_TASKRUN ||
	       atomic_load_explicit(&h->done, memory_order_acquire);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* True: something came.  Whoever else wants this CPU, most likely the client,
 * gets it: else we would wait for what our waiting keeps from coming. */
static bool hctx_spin(struct ul_hctx *h, uint64_t until_ns)
{
	do {
		for (int i = 0; i < SPIN_PAUSES; i++) {
			if (hctx_has_news(h))
				return true;
			cpu_relax();
		}
		sched_yield();
	} while (now_ns() < until_ns);
	return false;
}

/* Only while nothing can be in the buffers, nor come: with DEFER_TASKRUN the
 * driver copies nothing there but in our own io_uring_enter(). */
static void hctx_give_back(struct ul_hctx *h)
{
	if (h->stats.nr_inflight || hctx_has_cqes(h) ||
	    !(h->ring.flags & IORING_SETUP_DEFER_TASKRUN))
		return;
	/* Locked memory is given back only if asked by this name (v5.18). */
	if (madvise(h->arena, h->arena_bytes, MADV_DONTNEED_LOCKED))
		madvise(h->arena, h->arena_bytes, MADV_DONTNEED);
	h->arena_used = false;
}

/* Submit, and sleep until something comes; once until the device is idle. */
static int hctx_submit_and_sleep(struct ul_hctx *h)
{
	struct __kernel_timespec idle = { .tv_nsec = IDLE_NS };
	unsigned int wait_nr = h->batch.nr_commits + 1;
	struct io_uring_cqe *cqe;
	int ret;

	if (!h->arena_used)
		return io_uring_submit_and_wait(&h->ring, wait_nr);
	ret = io_uring_submit_and_wait_timeout(&h->ring, &cqe, wait_nr, &idle,
					       NULL);
	if (ret == -ETIME) {
		hctx_give_back(h);
		return 0;
	}
	return ret;
}

static int hctx_sleep(struct ul_hctx *h)
{
	int ret;

	atomic_store(&h->sleeping, true);
	if (atomic_load(&h->done)) {
		ret = io_uring_submit_and_get_events(&h->ring);
	} else {
		h->stats.nr_sleeps++;
		ret = hctx_submit_and_sleep(h);
	}
	atomic_store(&h->sleeping, false);
	return ret;
}

/* A wait that a spin could have bridged speaks for spinning, a longer one
 * against it, whether we span or slept. */
static void hctx_note_wait(struct ul_hctx *h, uint64_t ns)
{
	if (ns > h->spin_ns) {
		h->spin_score -= SPIN_SCORE_LONG;
		if (h->spin_score < 0)
			h->spin_score = 0;
		return;
	}
	h->wait_ns += ((int64_t)ns - (int64_t)h->wait_ns) / 8;
	if (h->spin_score < SPIN_SCORE_MAX)
		h->spin_score++;
}

/* How long to spin: several times what is usual, which ends a burst early. */
static uint64_t hctx_spin_limit(const struct ul_hctx *h)
{
	uint64_t limit_ns = SPIN_WAITS * h->wait_ns;

	if (limit_ns < SPIN_NS_MIN)
		limit_ns = SPIN_NS_MIN;
	return limit_ns < h->spin_ns ? limit_ns : h->spin_ns;
}

/* Submit, then spin or sleep until there is something to reap or collect. */
static int hctx_wait(struct ul_hctx *h)
{
	uint64_t begin_ns;
	int ret = 0;

	if (!h->spin_ns)
		return hctx_sleep(h);
	if (io_uring_sq_ready(&h->ring))
		ret = io_uring_submit_and_get_events(&h->ring);
	if (ret < 0 || hctx_has_cqes(h))
		return ret;
	begin_ns = now_ns();
	if (h->spin_score > 0 && hctx_spin(h, begin_ns + hctx_spin_limit(h)))
		ret = io_uring_get_events(&h->ring);
	else
		ret = hctx_sleep(h);
	hctx_note_wait(h, now_ns() - begin_ns);
	return ret;
}

static bool hctx_is_over(const struct ul_hctx *h)
{
	if (h->stats.nr_inflight)
		return false;
	return !h->nr_fetched || h->fault || atomic_load(&h->stopping);
}

int ul_hctx_run(struct ul_hctx *h)
{
	int ret = 0;

	if (!h->ring_made)
		return -EINVAL;
	while (!hctx_is_over(h)) {
		ret = hctx_wait(h);
		/* Signals are blocked, yet a freezer or a debugger interrupts;
		 * a full cq (-EBUSY) and short memory (-EAGAIN) pass. */
		if (ret < 0 && ret != -EINTR && ret != -EBUSY &&
		    ret != -EAGAIN && !h->fault)
			h->fault = ret;
		hctx_reap(h);
		hctx_collect(h);
		ul_batch_queue_commit(&h->batch);
	}
	io_uring_submit(&h->ring);	/* the last commits */
	hctx_unprepare(h);
	return h->fault;
}

void ul_hctx_stop(struct ul_hctx *h)
{
	atomic_store(&h->stopping, true);
	hctx_wake(h);
}

/* Plain counters of one writer: a reader may see them a moment apart. */
void ul_hctx_get_stats(struct ul_hctx *h, struct ul_hctx_stats *stats)
{
	*stats = h->stats;
}
