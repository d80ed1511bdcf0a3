// SPDX-License-Identifier: MIT
/*
 * reads.c - several reads at once by one thread.
 *
 * In: a list of requests, on a worker's thread. Out: each is ended and handed
 * back to its hctx, all that have come by then as one list. A blocking read each
 * would take a thread each, and two switches; here one submission starts all.
 *
 * The ring is the thread's own, made for the first list and gone with the
 * thread: with DEFER_TASKRUN nothing but this thread's waiting is interrupted,
 * and it is woken only when enough reads are over. It waits for a quarter of
 * those left, which keeps wake-ups few and none waiting long for the slowest.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <stdlib.h>

#include "hctx.h"
#include "reads.h"
#include "ring.h"

static pthread_key_t ring_key;
static pthread_once_t ring_key_once = PTHREAD_ONCE_INIT;

static void ring_free(void *ring)
{
	io_uring_queue_exit(ring);
	free(ring);
}

static void ring_key_make(void)
{
	/* Without it a ring would go with the process: harmless. */
	pthread_key_create(&ring_key, ring_free);
}

static struct io_uring *thread_ring(void)
{
	struct io_uring *ring;

	pthread_once(&ring_key_once, ring_key_make);
	ring = pthread_getspecific(ring_key);
	if (ring)
		return ring;
	ring = calloc(1, sizeof(*ring));
	if (!ring)
		return NULL;
	if (ul_uring_init(ring, UL_READS_MAX, false)) {
		free(ring);
		return NULL;
	}
	pthread_setspecific(ring_key, ring);
	return ring;
}

/* Lives as long as ul_reads_run(). */
struct read_run {
	struct ul_run	run;
	struct iovec	iov[UL_READS_MAX];
};

/* The first of the list, and those that follow it in the file.  Returns what is
 * left of the list. */
static struct ul_request *queue_run(struct io_uring *ring, int fd,
				    struct ul_request *first,
				    struct read_run *r)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct ul_request *next;

	ul_run_begin(&r->run, first);
	for (next = first->next; next && ul_run_takes(&r->run, next);
	     next = next->next)
		ul_run_extend(&r->run, next);
	ul_run_fill(&r->run, r->iov);
	io_uring_prep_readv(sqe, fd, r->iov, r->run.nr,
			    ul_target_pos(first->target, first));
	io_uring_sqe_set_data(sqe, &r->run);
	return next;
}

/* What several reads did as one is each one's only if it is all: else each is
 * undone. */
static int32_t read_result(const struct ul_run *run,
			   const struct ul_request *req, int32_t res)
{
	if (run->nr == 1)
		return res;
	return res == (int32_t)run->nr_bytes ? (int32_t)req->nr_bytes : -EAGAIN;
}

/* End all that have come, and hand them back; returns how many runs. */
static unsigned int reap_reads(struct io_uring *ring, ul_read_end end)
{
	struct ul_request *first = NULL, *last = NULL, *req, *next;
	struct io_uring_cqe *cqe;
	struct ul_run *run;
	unsigned int head, nr = 0;

	io_uring_for_each_cqe(ring, head, cqe) {
		run = io_uring_cqe_get_data(cqe);
		req = run->first;
		for (unsigned int i = 0; i < run->nr; i++, req = next) {
			next = req->next;
			end(req, read_result(run, req, cqe->res));
			req->next = first;
			first = req;
			if (!last)
				last = req;
		}
		nr++;
	}
	io_uring_cq_advance(ring, nr);
	if (nr)
		ul_hctx_complete_list(first, last);
	return nr;
}

int ul_reads_run(int fd, struct ul_request *first, ul_read_end end)
{
	struct io_uring *ring = thread_ring();
	struct read_run runs[UL_READS_MAX];
	struct ul_request *req = first;
	unsigned int nr_left = 0;

	if (!ring)
		return -ENOMEM;
	while (req)
		req = queue_run(ring, fd, req, &runs[nr_left++]);
	while (nr_left) {
		/* What interrupts (-EINTR) or is short (-EAGAIN) passes. */
		io_uring_submit_and_wait(ring, (nr_left + 3) / 4);
		nr_left -= reap_reads(ring, end);
	}
	return 0;
}
