/* SPDX-License-Identifier: MIT */
/*
 * hctx.c - one ublk queue as a blk-mq hardware context: its tags and buffers.
 *
 * Its iothread (iothread.c) gives it its completions.  A fetched tag is a
 * request, io_desc[tag] says which; the target does it, queues it, or has it
 * done by the thread's ring (ul_target_queue_rq, then commit_rqs for the
 * batch).  What is done is committed.
 *
 * Several may share a queue, with a part of its tags each, if every tag has a
 * command of its own (UBLK_F_PER_IO_DAEMON); each is on a thread of its own then.
 *
 * With UBLK_F_BATCH_IO (batch.c) one command fetches all tags and one a round
 * commits; without it each tag has a command of its own that does both.
 *
 * A tag ends when its command completes with -ENODEV: the driver aborts, so it
 * is not fetched again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "batch.h"
#include "hctx.h"
#include "iothread.h"
#include "ring.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED	24
#endif

/* A request of up to so much has a small buffer: all of them together are a huge
 * page at the default depth, where one large one is a quarter of one, which has to
 * be zeroed when it is first touched.  In copy mode the driver is told of a tag's
 * buffer before it has a request. */
#define SMALL_BYTES	(16 * 1024)

/* Lives from ul_hctx_create() to ul_hctx_destroy().
 * I: set at create.  P: set by prepare, undone as run returns.
 * R: its iothread only.
 */
struct ul_hctx {
	struct ul_hctx_config	config;		/* I */
	struct ul_iothread	*thread;	/* I: borrowed */
	uint16_t		index;		/* I: on its thread */
	uint16_t		buf_base;	/* I: tag 0 in the buffer table */
	struct ul_target	*target;	/* I: borrowed */
	struct ul_workqueue	*wq;		/* I: borrowed */
	struct ul_request	*requests;	/* I: owned, [nr_tags] */
	char			*arena;		/* I: owned, small and large
						 * buffers, one a tag each */
	size_t			buffer_bytes;	/* I: of a large one, whole
						 * pages */
	size_t			small_bytes;	/* I: of all small ones */
	size_t			arena_bytes;	/* I */
	const char		*descs;		/* P: driver's, read-only */
	struct ul_plug		plug;		/* R: this batch's writes */
	unsigned int		nr_fetched;	/* R: commands that fetch */
	struct ul_run		reads;		/* R: not yet given to the ring */
	bool			wants_pages;	/* R: the last read did */
	struct iovec		*iovs;		/* I: owned, [nr_tags], of the */
	unsigned int		nr_iovs;	/* R: sqes not yet submitted */
	struct ul_batch		batch;		/* R: BATCH_IO */
	struct ul_hctx_stats	stats;		/* R, but read by all */
};

static bool hctx_is_batch(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_BATCH_IO;
}

static bool hctx_is_user_copy(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_USER_COPY;
}

/* The driver puts a request's pages into the ring's buffer table before we have it. */
static bool hctx_is_auto_reg(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_AUTO_BUF_REG;
}

/* It does so where it is asked to, which takes two commands more.  With both, it is
 * told before each request whether to: see hctx_buf_index(). */
static bool hctx_can_register(const struct ul_hctx *h)
{
	return h->config.dev_flags & UBLK_F_SUPPORT_ZERO_COPY;
}

/* There may be something in the buffers that can be given back. */
static void hctx_note_buffer(struct ul_hctx *h)
{
	atomic_store_explicit(&h->thread->may_give_back, true,
			      memory_order_relaxed);
}

/* What the driver calls it: we count the tags that are ours. */
static uint16_t hctx_driver_tag(const struct ul_request *req)
{
	return req->hctx->config.first_tag + req->tag;
}

static uint16_t hctx_batch_flags(const struct ul_hctx *h)
{
	if (hctx_is_auto_reg(h))
		return UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK;
	return hctx_is_user_copy(h) ? 0 : UBLK_BATCH_F_HAS_BUF_ADDR;
}

/* ---- create, destroy ---- */

static char *hctx_buffer(const struct ul_hctx *h, uint16_t tag)
{
	return h->arena + h->small_bytes + tag * h->buffer_bytes;
}

static char *hctx_small_buffer(const struct ul_hctx *h, uint16_t tag)
{
	return h->arena + tag * SMALL_BYTES;
}

static void hctx_init_requests(struct ul_hctx *h)
{
	struct ul_request *req;

	for (unsigned int tag = 0; tag < h->config.nr_tags; tag++) {
		req = &h->requests[tag];
		req->hctx = h;
		req->target = h->target;
		req->tag = tag;
		ul_request_init(req);
	}
}

static int hctx_make_arena(struct ul_hctx *h)
{
	/* Pages come with the first request that touches them, huge ones if
	 * there are any, and go once the device is idle. */
	h->buffer_bytes = ul_page_round_up(h->config.max_io_buf_bytes);
	if (hctx_is_user_copy(h))
		h->small_bytes = SMALL_BYTES * h->config.nr_tags;
	h->arena_bytes = h->small_bytes + h->buffer_bytes * h->config.nr_tags;
	h->arena = mmap(NULL, h->arena_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->arena == MAP_FAILED)
		return -ENOMEM;
	madvise(h->arena, h->arena_bytes, MADV_HUGEPAGE); /* only saves time */
	return 0;
}

/* Its place among the thread's hctxs and tags. */
static int hctx_join_thread(struct ul_hctx *h)
{
	struct ul_iothread *t = h->thread;
	int ret;

	h->index = t->nr_hctxs;
	h->buf_base = t->nr_tags;
	h->batch.ring = &t->ring;
	h->batch.index = h->index;
	h->batch.q_id = h->config.q_id;
	h->batch.flags = hctx_batch_flags(h);
	ret = ul_batch_init(&h->batch, h->config.nr_tags);
	if (ret)
		return ret;
	ret = ul_iothread_add(t, h);
	if (ret) {
		ul_batch_exit(&h->batch);
		return ret;
	}
	t->nr_tags += h->config.nr_tags;
	t->has_buf_table |= hctx_is_auto_reg(h) || hctx_can_register(h);
	return 0;
}

int ul_hctx_create(const struct ul_hctx_config *config,
		   struct ul_iothread *thread, struct ul_target *target,
		   struct ul_workqueue *wq, struct ul_hctx **hctx)
{
	struct ul_hctx *h;
	int ret = -ENOMEM;

	if (!config->queue_depth ||
	    config->queue_depth > UBLK_MAX_QUEUE_DEPTH || !config->nr_tags ||
	    config->first_tag + config->nr_tags > config->queue_depth ||
	    (config->dev_flags & UBLK_F_BATCH_IO &&
	     config->nr_tags < config->queue_depth) ||
	    !config->max_io_buf_bytes ||
	    config->io_desc_bytes < sizeof(struct ublksrv_io_desc))
		return -EINVAL;
	h = calloc(1, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->config = *config;
	h->thread = thread;
	h->target = target;
	h->wq = wq;
	ul_plug_init(&h->plug);
	h->requests = calloc(config->nr_tags, sizeof(*h->requests));
	h->iovs = calloc(config->nr_tags, sizeof(*h->iovs));
	if (!h->requests || !h->iovs || hctx_make_arena(h))
		goto free_requests;
	hctx_init_requests(h);
	ret = hctx_join_thread(h);
	if (ret)
		goto unmap_arena;
	*hctx = h;
	return 0;

unmap_arena:
	munmap(h->arena, h->arena_bytes);
free_requests:
	free(h->iovs);
	free(h->requests);
	free(h);
	return ret;
}

void ul_hctx_destroy(struct ul_hctx *h)
{
	if (!h)
		return;
	ul_hctx_unprepare(h);
	munmap(h->arena, h->arena_bytes);
	free(h->iovs);
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

/* Of the pages of what a tag fetches next: they are worth it if that is a cold read,
 * as it most likely is where the last read was one. */
static uint16_t hctx_buf_index(const struct ul_hctx *h,
			       const struct ul_request *req)
{
	if (hctx_can_register(h) && !h->wants_pages)
		return UBLK_AUTO_BUF_REG_NONE;
	return h->buf_base + req->tag;
}

static void hctx_queue_cmd(struct ul_hctx *h, struct ul_request *req,
			   uint32_t opcode)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&h->thread->ring);
	struct ublksrv_io_cmd *cmd;

	cmd = ublk_sqe_prep(sqe, CDEV_INDEX, opcode, sizeof(*cmd));
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = UD(CQE_CMD, h->index, req->tag);
	cmd->q_id = h->config.q_id;
	cmd->tag = hctx_driver_tag(req);
	cmd->result = req->res;
	cmd->addr = hctx_buffer_addr(h, req);
	if (hctx_is_auto_reg(h))
		sqe->addr = ublk_auto_buf_reg_addr(hctx_buf_index(h, req),
						   UBLK_AUTO_BUF_REG_FALLBACK);
}

/* Into the ring's buffer table, at once, or out of it; only a failure is told. */
static void hctx_queue_buffer(struct ul_hctx *h, struct ul_request *req,
			      uint32_t opcode)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&h->thread->ring);
	struct ublksrv_io_cmd *cmd;

	cmd = ublk_sqe_prep(sqe, CDEV_INDEX, opcode, sizeof(*cmd));
	sqe->flags = IOSQE_FIXED_FILE | IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = UD(CQE_BUFFER, h->index, req->tag);
	cmd->q_id = h->config.q_id;
	cmd->tag = hctx_driver_tag(req);
	cmd->addr = h->buf_base + req->tag;
}

static void hctx_queue_async(struct ul_hctx *h, struct ul_request *req)
{
	struct io_uring_sqe *sqe;
	bool is_read = req->op == UBLK_IO_OP_READ;
	bool is_fixed = ul_hctx_is_registered(req);
	int file = req->past_cache ? DIRECT_INDEX : BACKING_INDEX;
	int op;

	if (req->registers)
		hctx_queue_buffer(h, req, UBLK_U_IO_REGISTER_IO_BUF);
	sqe = ul_get_sqe(&h->thread->ring);
	if (is_fixed)
		op = is_read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
	else
		op = is_read ? IORING_OP_READ : IORING_OP_WRITE;
	/* A registered buffer's addresses begin at 0. */
	io_uring_prep_rw(op, sqe, file, is_fixed ? NULL : req->buffer,
			 req->nr_bytes, ul_target_pos(h->target, req));
	if (is_fixed)
		sqe->buf_index = h->buf_base + req->tag;
	if (req->op_flags & UBLK_IO_F_FUA)
		sqe->rw_flags = RWF_DSYNC;
	sqe->flags |= IOSQE_FIXED_FILE;
	sqe->user_data = UD(CQE_ASYNC, h->index, req->tag);
	req->nr_joined = 1;
	h->stats.nr_async++;
}

/* One sqe for a run of reads; its iovs must not change before it is submitted. */
static void hctx_queue_joined(struct ul_hctx *h, const struct ul_run *run)
{
	struct ul_request *first = run->first;
	struct iovec *iov = h->iovs + h->nr_iovs;
	struct io_uring_sqe *sqe = ul_get_sqe(&h->thread->ring);

	ul_run_fill(run, iov);
	h->nr_iovs += run->nr;
	io_uring_prep_readv(sqe,
			    first->past_cache ? DIRECT_INDEX : BACKING_INDEX,
			    iov, run->nr, ul_target_pos(h->target, first));
	sqe->flags |= IOSQE_FIXED_FILE;
	sqe->user_data = UD(CQE_ASYNC, h->index, first->tag);
	first->nr_joined = run->nr;
	h->stats.nr_async += run->nr;
}

static void hctx_queue_reads(struct ul_hctx *h)
{
	struct ul_run run = h->reads;
	struct ul_request *req = run.first, *next;

	if (!req)
		return;
	h->reads.first = NULL;
	if (!io_uring_sq_ready(&h->thread->ring.uring))
		h->nr_iovs = 0;
	if (run.nr > 1 && h->nr_iovs + run.nr <= h->config.nr_tags) {
		hctx_queue_joined(h, &run);
		return;
	}
	for (; run.nr; run.nr--, req = next) {
		next = req->next;
		hctx_queue_async(h, req);
	}
}

/* A read waits for the end of the batch, or for one that does not follow it in
 * the file: they are one sqe then. */
static void hctx_plug_async(struct ul_hctx *h, struct ul_request *req)
{
	struct ul_run *run = &h->reads;

	if (req->op != UBLK_IO_OP_READ || ul_hctx_is_registered(req)) {
		hctx_queue_async(h, req);
		return;
	}
	if (run->first && ul_run_takes(run, req)) {
		run->last->next = req;
		ul_run_extend(run, req);
		return;
	}
	hctx_queue_reads(h);
	ul_run_begin(run, req);
}

/* ---- prepare ---- */

static size_t hctx_descs_bytes(const struct ul_hctx *h)
{
	return ul_page_round_up(h->config.queue_depth *
				h->config.io_desc_bytes);
}

static int hctx_map_descs(struct ul_hctx *h)
{
	off_t stride = ul_page_round_up(UBLK_MAX_QUEUE_DEPTH *
					h->config.io_desc_bytes);
	void *descs = mmap(NULL, hctx_descs_bytes(h), PROT_READ,
			   MAP_SHARED | MAP_POPULATE, h->thread->cdev_fd,
			   UBLKSRV_CMD_BUF_OFFSET + h->config.q_id * stride);

	if (descs == MAP_FAILED)
		return -errno;
	h->descs = descs;
	return 0;
}

/* Every tag is ours to serve from here on. */
static int hctx_fetch_all(struct ul_hctx *h)
{
	for (unsigned int tag = 0; tag < h->config.nr_tags; tag++) {
		struct ul_request *req = &h->requests[tag];

		if (hctx_is_batch(h))
			ul_batch_add(&h->batch, tag, 0, hctx_buf_index(h, req),
				     hctx_buffer_addr(h, req));
		else
			hctx_queue_cmd(h, req, UBLK_U_IO_FETCH_REQ);
	}
	h->nr_fetched = hctx_is_batch(h) ? 1 : h->config.nr_tags;
	return hctx_is_batch(h) ? ul_batch_prepare(&h->batch) : 0;
}

int ul_hctx_prepare(struct ul_hctx *h)
{
	int ret = hctx_map_descs(h);

	return ret ? ret : hctx_fetch_all(h);
}

void ul_hctx_unprepare(struct ul_hctx *h)
{
	if (h->descs)
		munmap((void *)h->descs, hctx_descs_bytes(h));
	h->descs = NULL;
	ul_batch_unprepare(&h->batch);
}

/* ---- the data of UBLK_F_USER_COPY and UBLK_F_AUTO_BUF_REG ---- */

bool ul_hctx_is_registered(const struct ul_request *req)
{
	return req->registers || (hctx_is_auto_reg(req->hctx) &&
				  !(req->op_flags & UBLK_IO_F_NEED_REG_BUF));
}

bool ul_hctx_can_register(const struct ul_request *req)
{
	return hctx_can_register(req->hctx) && !req->is_shared;
}

bool ul_hctx_is_user_copy(const struct ul_request *req)
{
	return hctx_is_user_copy(req->hctx) && !req->is_shared;
}

/* Drivers from before BATCH_IO (6.12, ublk_copy_user_pages()) pin the pages that
 * they copy to, and mark them dirty once more, without the page's lock. */
bool ul_hctx_pins_pages(const struct ul_request *req)
{
	return ul_hctx_is_user_copy(req) && !hctx_is_batch(req->hctx);
}

static int hctx_user_copy(struct ul_request *req, void *data, uint64_t pos,
			  uint64_t nr_bytes)
{
	int fd = req->hctx->thread->cdev_fd;
	uint64_t done = 0;
	ssize_t n;

	while (done < nr_bytes) {
		if (req->op == UBLK_IO_OP_WRITE)
			n = pread(fd, (char *)data + done, nr_bytes - done,
				  pos + done);
		else
			n = pwrite(fd, (char *)data + done, nr_bytes - done,
				   pos + done);
		if (n > 0)
			done += n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int ul_hctx_user_copy_part(struct ul_request *req, void *data,
			   uint64_t offset_bytes, uint64_t nr_bytes)
{
	return hctx_user_copy(req, data,
			      ublk_user_copy_pos(req->hctx->config.q_id,
						 hctx_driver_tag(req),
						 offset_bytes),
			      nr_bytes);
}

int ul_hctx_copy_metadata(struct ul_request *req, void *data,
			  uint64_t offset_bytes, uint64_t nr_bytes)
{
	uint64_t pos = ublk_user_copy_pos(req->hctx->config.q_id,
					  hctx_driver_tag(req), offset_bytes);

	return hctx_user_copy(req, data, pos | UBLKSRV_IO_INTEGRITY_FLAG,
			      nr_bytes);
}

int ul_hctx_user_copy(struct ul_request *req, void *data)
{
	return ul_hctx_user_copy_part(req, data, 0, req->nr_bytes);
}

int ul_hctx_copy_in(struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_WRITE || !ul_hctx_is_user_copy(req))
		return 0;
	hctx_note_buffer(req->hctx);
	return ul_hctx_user_copy(req, req->buffer);
}

int ul_hctx_copy_out(struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_READ || !ul_hctx_is_user_copy(req))
		return 0;
	hctx_note_buffer(req->hctx);
	return ul_hctx_user_copy(req, req->buffer);
}

void ul_hctx_end(struct ul_request *req, int32_t res)
{
	int ret = res < 0 ? 0 : ul_hctx_copy_out(req);

	req->res = ret ? ret : res;
}

/* ---- run ---- */

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

void ul_hctx_commit(struct ul_hctx *h, struct ul_request *req)
{
	h->stats.nr_inflight--;
	if (req->res < 0)
		h->stats.nr_errors++;
	if (hctx_is_batch(h))
		ul_batch_add(&h->batch, req->tag, req->res,
			     hctx_buf_index(h, req), hctx_buffer_addr(h, req));
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
	if (!shared && !hctx_is_user_copy(h))
		hctx_note_buffer(h);
	h->stats.nr_shared += req->is_shared;
	if (shared)
		req->buffer = shared;
	else if (h->small_bytes && req->nr_bytes <= SMALL_BYTES)
		req->buffer = hctx_small_buffer(h, req->tag);
	else
		req->buffer = hctx_buffer(h, req->tag);
}

/* Under load there is always a next request, and we would never be done.  With
 * REISSUE the driver takes back what we have and did not commit, and gives it
 * to the next server, which is the first to execute it. */
static bool hctx_leaves_to_next(const struct ul_hctx *h)
{
	return h->thread->leaving &&
	       h->config.dev_flags & UBLK_F_USER_RECOVERY_REISSUE;
}

static void hctx_handle_request(struct ul_hctx *h, struct ul_request *req)
{
	const struct ublksrv_io_desc *desc =
		(const void *)(h->descs + (size_t)hctx_driver_tag(req) *
						  h->config.io_desc_bytes);
	enum ul_rq_status status;

	if (hctx_leaves_to_next(h))
		return;
	req->op = ublk_io_desc_op(desc);
	req->op_flags = ublk_io_desc_flags(desc);
	req->nr_bytes = (uint64_t)desc->nr_sectors << 9;
	req->offset_bytes = desc->start_sector << 9;
	hctx_set_buffer(h, req, desc->addr);
	h->stats.nr_inflight++;
	h->thread->nr_requests++;
	hctx_count(h, req);
	status = ul_target_queue_rq(h->target, h->wq, &h->plug, req);
	if (req->op == UBLK_IO_OP_READ)
		h->wants_pages = req->past_cache;
	switch (status) {
	case UL_RQ_DONE:
		h->stats.nr_inline++;
		ul_hctx_commit(h, req);
		break;
	case UL_RQ_PLUGGED:
		h->stats.nr_inline++;
		break;
	case UL_RQ_ASYNC:
		hctx_plug_async(h, req);
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
		if (res != UBLK_IO_RES_ABORT)
			ul_iothread_set_fault(h->thread, res);
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
	if (ret != UBLK_IO_RES_ABORT)
		ul_iothread_set_fault(h->thread, ret);
}

/* What the ring left undone the workqueue does again, all of it. */
static void hctx_handle_async(struct ul_hctx *h, struct ul_request *req,
			      int res)
{
	if (req->registers)
		hctx_queue_buffer(h, req, UBLK_U_IO_UNREGISTER_IO_BUF);
	if (ul_request_is_undone(req, res)) {
		ul_target_queue_work(h->target, h->wq, &h->plug, req);
		return;
	}
	if (res >= 0)
		ul_target_note_async(h->target, req);
	if (ul_hctx_is_registered(req))
		req->res = res;
	else
		ul_hctx_end(req, res);
	ul_hctx_commit(h, req);
}

/* What several reads did as one is each one's only if it is all. */
static void hctx_handle_joined(struct ul_hctx *h, struct ul_request *req,
			       int res)
{
	unsigned int nr = req->nr_joined;
	struct ul_request *next = req;
	int64_t nr_bytes = 0;

	for (unsigned int i = 0; i < nr; i++, next = next->next)
		nr_bytes += next->nr_bytes;
	for (; nr; nr--, req = next) {
		next = req->next;
		if (res == nr_bytes)
			hctx_handle_async(h, req, req->nr_bytes);
		else
			hctx_queue_async(h, req);
	}
}

void ul_hctx_handle_cqe(struct ul_hctx *h, const struct io_uring_cqe *cqe)
{
	uint32_t value = UD_VALUE(cqe->user_data);
	int ret;

	switch (UD_KIND(cqe->user_data)) {
	case CQE_CMD:
		hctx_handle_cmd(h, &h->requests[value], cqe->res);
		break;
	case CQE_ASYNC:
		if (h->requests[value].nr_joined > 1)
			hctx_handle_joined(h, &h->requests[value], cqe->res);
		else
			hctx_handle_async(h, &h->requests[value], cqe->res);
		break;
	case CQE_FETCH:
		hctx_handle_fetch(h, cqe);
		break;
	case CQE_COMMIT:
		ret = ul_batch_handle_commit(&h->batch, cqe);
		if (ret)
			ul_iothread_set_fault(h->thread, ret);
		break;
	case CQE_BUFFER:	/* the write says what came of that */
	case CQE_WAKE:
	case CQE_WATCH:
		break;
	}
}

void ul_hctx_end_reap(struct ul_hctx *h)
{
	hctx_queue_reads(h);
	ul_target_commit_rqs(h->target, h->wq, &h->plug);
}

void ul_hctx_forget_size(struct ul_hctx *h)
{
	h->plug.file_bytes = 0;
}

void ul_hctx_end_round(struct ul_hctx *h)
{
	ul_batch_queue_commit(&h->batch);
}

void ul_hctx_complete_list(struct ul_request *first, struct ul_request *last)
{
	ul_iothread_hand_back(first->hctx->thread, first, last);
}

void ul_hctx_complete(struct ul_request *req)
{
	ul_hctx_complete_list(req, req);
}

bool ul_hctx_has_inflight(const struct ul_hctx *h)
{
	return h->stats.nr_inflight;
}

bool ul_hctx_is_alone(const struct ul_hctx *h)
{
	return h->stats.nr_inflight == 1;
}

bool ul_hctx_fetches(const struct ul_hctx *h)
{
	return h->nr_fetched;
}

void ul_hctx_give_back(struct ul_hctx *h)
{
	/* Locked memory is given back only if asked by this name (v5.18). */
	if (madvise(h->arena, h->arena_bytes, MADV_DONTNEED_LOCKED))
		madvise(h->arena, h->arena_bytes, MADV_DONTNEED);
}

/* Plain counters of one writer: a reader may see them a moment apart. */
void ul_hctx_get_stats(struct ul_hctx *h, struct ul_hctx_stats *stats)
{
	*stats = h->stats;
	stats->nr_batches = h->thread->nr_batches;
	stats->nr_sleeps = h->thread->nr_sleeps;
	stats->tid = h->thread->tid;
}
