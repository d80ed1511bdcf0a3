/* SPDX-License-Identifier: MIT */
/*
 * hctx.c - one ublk queue as a blk-mq hardware context: its ring and its tags.
 *
 * One thread prepares and runs a hctx: it made the ring, so by the driver's
 * rule (without BATCH_IO) it alone may commit what it fetched.  A round:
 *
 *   reap     every cqe that is there: a command's cqe is a request, io_desc
 *            [tag] says which; the target takes it (queue_rq, commit_rqs)
 *   collect  the done list, which workers fill, into commit sqes
 *   sleep    in io_uring_enter, which also submits those sqes
 *
 * Done list: workers push with one atomic exchange of the head and write
 * wake_fd only if `sleeping` is set; the ring thread sets `sleeping`, looks at
 * the list once more, then sleeps.  Both sides use sequentially consistent
 * accesses, so one of the two sees the other (Dekker).
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
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "hctx.h"

#define UD_WAKE		UINT64_MAX	/* user_data of the poll on wake_fd */
#define CDEV_INDEX	0		/* /dev/ublkcN in the file table */

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
	size_t			arena_bytes;	/* I */
	int			wake_fd;	/* I: owned eventfd */
	struct io_uring		ring;		/* P */
	bool			ring_made;	/* P */
	const struct ublksrv_io_desc *descs;	/* P: driver's, read-only */
	struct ul_plug		plug;		/* R: this batch's writes */
	unsigned int		nr_fetched;	/* R: tags not yet ended */
	int			fault;		/* R: first unexpected result */
	struct ul_hctx_stats	stats;		/* R, but read by all */
	_Atomic(struct ul_request *) done;	/* A: newest first */
	atomic_bool		sleeping;	/* A */
	atomic_bool		stopping;	/* A */
};

static size_t page_round_up(size_t nr_bytes)
{
	size_t page = sysconf(_SC_PAGESIZE);

	return (nr_bytes + page - 1) & ~(page - 1);
}

/* ---- create, destroy ---- */

static void hctx_init_requests(struct ul_hctx *h)
{
	size_t buffer_bytes = page_round_up(h->config.max_io_buf_bytes);
	struct ul_request *req;

	for (unsigned int tag = 0; tag < h->config.queue_depth; tag++) {
		req = &h->requests[tag];
		req->hctx = h;
		req->target = h->target;
		req->tag = tag;
		req->buffer = h->arena + tag * buffer_bytes;
		ul_request_init(req);
	}
}

int ul_hctx_create(const struct ul_hctx_config *config,
		   struct ul_target *target, struct ul_workqueue *wq,
		   struct ul_hctx **hctx)
{
	struct ul_hctx *h;
	int ret = -ENOMEM;

	if (!config->queue_depth || config->queue_depth > UBLK_MAX_QUEUE_DEPTH ||
	    !config->max_io_buf_bytes)
		return -EINVAL;
	h = calloc(1, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->config = *config;
	h->target = target;
	h->wq = wq;
	ul_plug_init(&h->plug);
	h->requests = calloc(config->queue_depth, sizeof(*h->requests));
	if (!h->requests)
		goto free_hctx;
	/* Pages come with the first request that touches them. */
	h->arena_bytes = page_round_up(config->max_io_buf_bytes) *
			 config->queue_depth;
	h->arena = mmap(NULL, h->arena_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->arena == MAP_FAILED)
		goto free_requests;
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
free_hctx:
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
	free(h);
}

/* ---- sqes ---- */

/* Never NULL once the ring is full: what is queued is submitted first. */
static struct io_uring_sqe *hctx_get_sqe(struct ul_hctx *h)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&h->ring);

	while (!sqe) {
		io_uring_submit(&h->ring);
		sqe = io_uring_get_sqe(&h->ring);
	}
	return sqe;
}

static uint64_t hctx_buffer_addr(const struct ul_hctx *h,
				 const struct ul_request *req)
{
	if (h->config.dev_flags & UBLK_F_USER_COPY)
		return 0;
	return (uint64_t)(uintptr_t)req->buffer;
}

static void hctx_queue_cmd(struct ul_hctx *h, struct ul_request *req,
			   uint32_t opcode)
{
	struct io_uring_sqe *sqe = hctx_get_sqe(h);
	struct ublksrv_io_cmd *cmd;

	cmd = ublk_sqe_prep(sqe, CDEV_INDEX, opcode, sizeof(*cmd));
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = req->tag;
	cmd->q_id = h->config.q_id;
	cmd->tag = req->tag;
	cmd->result = req->res;
	cmd->addr = hctx_buffer_addr(h, req);
}

static void hctx_poll_wake_fd(struct ul_hctx *h)
{
	struct io_uring_sqe *sqe = hctx_get_sqe(h);

	io_uring_prep_poll_multishot(sqe, h->wake_fd, POLLIN);
	sqe->user_data = UD_WAKE;
}

/* ---- prepare ---- */

static int hctx_make_ring(struct ul_hctx *h)
{
	/* Best first; a kernel that lacks a flag says -EINVAL. */
	static const unsigned int setups[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_COOP_TASKRUN,
		0,
	};
	unsigned int nr_entries = h->config.queue_depth + 1;
	int ret = -EINVAL;

	for (size_t i = 0; ret == -EINVAL && i < 3; i++) {
		struct io_uring_params p = {
			.flags = setups[i] | IORING_SETUP_CQSIZE,
			.cq_entries = nr_entries + 1,
		};

		ret = io_uring_queue_init_params(nr_entries, &h->ring, &p);
	}
	if (ret)
		return ret;
	h->ring_made = true;
	io_uring_register_ring_fd(&h->ring);	/* only saves time */
	return io_uring_register_files(&h->ring, &h->config.cdev_fd, 1);
}

static size_t hctx_descs_bytes(const struct ul_hctx *h)
{
	return page_round_up(h->config.queue_depth *
			     sizeof(struct ublksrv_io_desc));
}

static int hctx_map_descs(struct ul_hctx *h)
{
	off_t stride = page_round_up(UBLK_MAX_QUEUE_DEPTH *
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
}

static void hctx_init_thread(struct ul_hctx *h)
{
	sigset_t all;

	sigfillset(&all);
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
	hctx_poll_wake_fd(h);
	for (unsigned int tag = 0; tag < h->config.queue_depth; tag++)
		hctx_queue_cmd(h, &h->requests[tag], UBLK_U_IO_FETCH_REQ);
	ret = io_uring_submit(&h->ring);
	if (ret < 0)
		goto fail;
	h->nr_fetched = h->config.queue_depth;
	return 0;
fail:
	hctx_unprepare(h);
	return ret;
}

/* ---- the data of UBLK_F_USER_COPY ---- */

static int hctx_user_copy(struct ul_request *req, bool in)
{
	const struct ul_hctx *h = req->hctx;
	uint64_t pos = ublk_user_copy_pos(h->config.q_id, req->tag, 0);
	uint64_t done = 0;
	ssize_t n;

	while (done < req->nr_bytes) {
		if (in)
			n = pread(h->config.cdev_fd, (char *)req->buffer + done,
				  req->nr_bytes - done, pos + done);
		else
			n = pwrite(h->config.cdev_fd,
				   (char *)req->buffer + done,
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
	if (req->op != UBLK_IO_OP_WRITE ||
	    !(req->hctx->config.dev_flags & UBLK_F_USER_COPY))
		return 0;
	return hctx_user_copy(req, true);
}

int ul_hctx_copy_out(struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_READ ||
	    !(req->hctx->config.dev_flags & UBLK_F_USER_COPY))
		return 0;
	return hctx_user_copy(req, false);
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
	hctx_queue_cmd(h, req, UBLK_U_IO_COMMIT_AND_FETCH_REQ);
}

static void hctx_handle_request(struct ul_hctx *h, struct ul_request *req)
{
	const struct ublksrv_io_desc *desc = &h->descs[req->tag];

	req->op = ublk_io_desc_op(desc);
	req->op_flags = ublk_io_desc_flags(desc);
	req->nr_bytes = (uint64_t)desc->nr_sectors << 9;
	req->offset_bytes = desc->start_sector << 9;
	h->stats.nr_inflight++;
	hctx_count(h, req);
	if (ul_target_queue_rq(h->target, h->wq, &h->plug, req))
		hctx_commit(h, req);
}

static void hctx_handle_cqe(struct ul_hctx *h, const struct io_uring_cqe *cqe)
{
	struct ul_request *req;
	uint64_t count;

	if (cqe->user_data == UD_WAKE) {
		if (read(h->wake_fd, &count, sizeof(count)) < 0 &&
		    errno != EAGAIN)
			h->fault = -errno;
		if (!(cqe->flags & IORING_CQE_F_MORE))
			hctx_poll_wake_fd(h);
		return;
	}
	req = &h->requests[cqe->user_data];
	switch (cqe->res) {
	case UBLK_IO_RES_OK:
		hctx_handle_request(h, req);
		break;
	case UBLK_IO_RES_NEED_GET_DATA:
		hctx_queue_cmd(h, req, UBLK_U_IO_NEED_GET_DATA);
		break;
	default:
		h->nr_fetched--;
		if (cqe->res != UBLK_IO_RES_ABORT && !h->fault)
			h->fault = cqe->res;
	}
}

static unsigned int hctx_reap(struct ul_hctx *h)
{
	struct io_uring_cqe *cqe;
	unsigned int head, nr = 0;

	io_uring_for_each_cqe(&h->ring, head, cqe) {
		hctx_handle_cqe(h, cqe);
		nr++;
	}
	io_uring_cq_advance(&h->ring, nr);
	ul_target_commit_rqs(h->target, h->wq, &h->plug);
	if (nr)
		h->stats.nr_batches++;
	return nr;
}

static unsigned int hctx_collect(struct ul_hctx *h)
{
	struct ul_request *req = atomic_exchange(&h->done, NULL), *next;
	unsigned int nr = 0;

	for (; req; req = next, nr++) {
		next = req->next;
		hctx_commit(h, req);
	}
	return nr;
}

static int hctx_sleep(struct ul_hctx *h)
{
	int ret;

	atomic_store(&h->sleeping, true);
	if (atomic_load(&h->done)) {
		atomic_store(&h->sleeping, false);
		ret = io_uring_submit_and_get_events(&h->ring);
	} else {
		h->stats.nr_sleeps++;
		ret = io_uring_submit_and_wait(&h->ring, 1);
		atomic_store(&h->sleeping, false);
	}
	/* Signals are blocked, yet a freezer or a debugger interrupts; a full
	 * cq (-EBUSY) and short memory (-EAGAIN) pass once cqes are reaped. */
	if (ret == -EINTR || ret == -EBUSY || ret == -EAGAIN)
		return 0;
	return ret < 0 ? ret : 0;
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
		ret = hctx_sleep(h);
		if (ret && !h->fault)
			h->fault = ret;
		hctx_reap(h);
		hctx_collect(h);
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
