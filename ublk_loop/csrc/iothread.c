/* SPDX-License-Identifier: MIT */
/*
 * iothread.c - the thread that serves one or more hctxs of a device, its ring.
 *
 * It made the ring, so by the driver's rule (without BATCH_IO) it alone may
 * commit what it fetched.  A round:
 *
 *   reap     every cqe that is there; each goes to its hctx
 *   collect  the done list, which workers fill
 *   wait     submit the commits and sleep in io_uring_enter, or spin before
 *
 * Done list: workers push with one atomic exchange of the head and write
 * wake_fd only if `sleeping` is set; the thread sets `sleeping`, looks at the
 * list once more, then sleeps.  Both sides use sequentially consistent
 * accesses, so one of the two sees the other (Dekker).
 *
 * Spinning: with IORING_SETUP_TASKRUN_FLAG the kernel says in shared memory
 * that something waits for us, so a spin spares us a sleep and the client a
 * wake-up.  Whether that pays is measured (spin.c).  Every spin ends in sleep,
 * so an idle device costs nothing.
 *
 * The run is over when the driver has ended every fetch of every hctx and
 * every request in flight was handed back.  After ul_iothread_stop() it is over
 * as soon as nothing is in flight; what comes meanwhile is begun only if nobody
 * would do it after us (hctx_leaves_to_next).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "clock.h"
#include "hctx.h"
#include "iothread.h"
#include "watch.h"

/* A spin looks at the clock, and lets others run, once in so many pauses. */
#define SPIN_PAUSES	32
/* After word that the file was changed, what a batch learns of its size is not
 * kept for the next one for so many batches: our own writes are changes too. */
#define UNSURE_BATCHES	64
/* So long without a request, and the memory of the buffers is given back. */
#define IDLE_NS		500000000
/* io_uring's own limit is 32768; a full ring is submitted and filled again. */
#define ENTRIES_MAX	16384

/* ---- create, destroy ---- */

int ul_iothread_create(const struct ul_iothread_config *config,
		       struct ul_target *target, struct ul_iothread **thread)
{
	struct ul_iothread *t = calloc(1, sizeof(*t));

	if (!t)
		return -ENOMEM;
	t->cdev_fd = config->cdev_fd;
	t->target = target;
	t->spin.limit_ns = config->poll_us * 1000ULL;
	t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (t->wake_fd < 0) {
		free(t);
		return -errno;
	}
	t->watch_fd = config->watches && ul_target_has_map(target)
			      ? ul_watch_open(ul_target_fd(target))
			      : -EOPNOTSUPP;
	t->nr_unsure = UNSURE_BATCHES;
	*thread = t;
	return 0;
}

void ul_iothread_destroy(struct ul_iothread *t)
{
	if (!t)
		return;
	if (t->ring_made)
		io_uring_queue_exit(&t->ring.uring);
	close(t->wake_fd);
	if (t->watch_fd >= 0)
		close(t->watch_fd);
	free(t->hctxs);
	free(t);
}

int ul_iothread_add(struct ul_iothread *t, struct ul_hctx *h)
{
	size_t nr_bytes = (t->nr_hctxs + 1) * sizeof(*t->hctxs);
	struct ul_hctx **hctxs = realloc(t->hctxs, nr_bytes);

	if (!hctxs)
		return -ENOMEM;
	t->hctxs = hctxs;
	t->hctxs[t->nr_hctxs++] = h;
	return 0;
}

/* ---- prepare ---- */

static int iothread_make_ring(struct ul_iothread *t)
{
	int files[] = { t->cdev_fd, ul_target_fd(t->target),
			ul_target_direct_fd(t->target) };
	unsigned int nr_entries = t->nr_tags + 4 * t->nr_hctxs;
	int ret;

	if (nr_entries > ENTRIES_MAX)
		nr_entries = ENTRIES_MAX;
	ret = ul_uring_init(&t->ring.uring, nr_entries, true);
	if (ret)
		return ret;
	t->ring_made = true;
	ret = io_uring_register_files(&t->ring.uring, files, 3);
	if (!ret && t->has_buf_table)
		ret = io_uring_register_buffers_sparse(&t->ring.uring,
						       t->nr_tags);
	return ret;
}

static void iothread_poll(struct ul_iothread *t, int fd, enum hctx_cqe kind)
{
	struct io_uring_sqe *sqe = ul_get_sqe(&t->ring);

	io_uring_prep_poll_multishot(sqe, fd, POLLIN);
	sqe->user_data = UD(kind, 0, 0);
}

static void iothread_unprepare(struct ul_iothread *t)
{
	/* The mappings and the fixed file each hold a reference on ublkcN,
	 * and DEL_DEV waits for those. */
	if (t->ring_made)
		io_uring_queue_exit(&t->ring.uring);
	t->ring_made = false;
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		ul_hctx_unprepare(t->hctxs[i]);
}

static void iothread_init_thread(struct ul_iothread *t)
{
	sigset_t all;

	sigfillset(&all);
	sigdelset(&all, SIGBUS);	/* map.c takes it */
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	/* Or reclaim could wait for this very device.  Unprivileged: EPERM. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	t->tid = gettid();
}

int ul_iothread_prepare(struct ul_iothread *t)
{
	int ret;

	iothread_init_thread(t);
	ret = iothread_make_ring(t);
	for (unsigned int i = 0; !ret && i < t->nr_hctxs; i++)
		ret = ul_hctx_prepare(t->hctxs[i]);
	if (ret)
		goto fail;
	iothread_poll(t, t->wake_fd, CQE_WAKE);
	if (t->watch_fd >= 0)
		iothread_poll(t, t->watch_fd, CQE_WATCH);
	ret = io_uring_submit(&t->ring.uring);
	if (ret < 0)
		goto fail;
	return 0;
fail:
	iothread_unprepare(t);
	return ret;
}

/* ---- run ---- */

void ul_iothread_set_fault(struct ul_iothread *t, int fault)
{
	if (!t->fault)
		t->fault = fault;
}

static void iothread_wake(struct ul_iothread *t)
{
	uint64_t one = 1;

	/* A full counter (-EAGAIN) has woken it already. */
	if (write(t->wake_fd, &one, sizeof(one)) < 0)
		return;
}

void ul_iothread_hand_back(struct ul_iothread *t, struct ul_request *first,
			   struct ul_request *last)
{
	struct ul_request *head = atomic_load(&t->done);

	do {
		last->next = head;
	} while (!atomic_compare_exchange_weak(&t->done, &head, first));
	if (atomic_load(&t->sleeping) && atomic_exchange(&t->sleeping, false))
		iothread_wake(t);
}

static void iothread_handle_wake(struct ul_iothread *t,
				 const struct io_uring_cqe *cqe)
{
	uint64_t count;

	if (read(t->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
		ul_iothread_set_fault(t, -errno);
	t->leaving = atomic_load(&t->stopping);
	if (!(cqe->flags & IORING_CQE_F_MORE))
		iothread_poll(t, t->wake_fd, CQE_WAKE);
}

static void iothread_forget_size(struct ul_iothread *t)
{
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		ul_hctx_forget_size(t->hctxs[i]);
}

static void iothread_handle_watch(struct ul_iothread *t,
				  const struct io_uring_cqe *cqe)
{
	t->nr_unsure = UNSURE_BATCHES;
	iothread_forget_size(t);
	if (cqe->flags & IORING_CQE_F_MORE)
		return;
	if (cqe->res < 0) {	/* nobody will tell any more */
		close(t->watch_fd);
		t->watch_fd = cqe->res;
	} else {
		iothread_poll(t, t->watch_fd, CQE_WATCH);
	}
}

/* A batch is over.  The watch is cleared before the file is asked once more. */
static void iothread_end_batch(struct ul_iothread *t)
{
	t->nr_batches++;
	if (!t->nr_unsure)
		return;
	iothread_forget_size(t);
	if (t->watch_fd >= 0 && !--t->nr_unsure)
		ul_watch_clear(t->watch_fd);
}

static void iothread_handle_cqe(struct ul_iothread *t,
				const struct io_uring_cqe *cqe)
{
	switch (UD_KIND(cqe->user_data)) {
	case CQE_WAKE:
		iothread_handle_wake(t, cqe);
		break;
	case CQE_WATCH:
		iothread_handle_watch(t, cqe);
		break;
	default:
		ul_hctx_handle_cqe(t->hctxs[UD_HCTX(cqe->user_data)], cqe);
	}
}

static void iothread_reap(struct ul_iothread *t)
{
	/* A batch is what is there now: targets ask some things once a batch. */
	unsigned int nr_ready = io_uring_cq_ready(&t->ring.uring);
	struct io_uring_cqe *cqe;
	unsigned int head, nr = 0;

	io_uring_for_each_cqe(&t->ring.uring, head, cqe) {
		if (nr == nr_ready)
			break;
		iothread_handle_cqe(t, cqe);
		nr++;
	}
	io_uring_cq_advance(&t->ring.uring, nr);
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		ul_hctx_end_reap(t->hctxs[i]);
	if (nr)
		iothread_end_batch(t);
}

static void iothread_collect(struct ul_iothread *t)
{
	struct ul_request *req = atomic_exchange(&t->done, NULL), *next;

	for (; req; req = next) {
		next = req->next;
		ul_hctx_commit(req->hctx, req);
	}
}

static bool iothread_has_inflight(const struct ul_iothread *t)
{
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		if (ul_hctx_has_inflight(t->hctxs[i]))
			return true;
	return false;
}

/* Something besides the cqes that tell of commits: each is there as soon as
 * its command is submitted, and is not worth a round. */
static bool iothread_has_cqes(const struct ul_iothread *t)
{
	return io_uring_cq_ready(&t->ring.uring) > t->ring.nr_commits;
}

static bool iothread_has_news(struct ul_iothread *t)
{
	return iothread_has_cqes(t) ||
	       IO_URING_READ_ONCE(*t->ring.uring.sq.kflags) &
		       IORING_SQ_TASKRUN ||
	       atomic_load_explicit(&t->done, memory_order_acquire);
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
static bool iothread_spin(struct ul_iothread *t, uint64_t nr_ns)
{
	uint64_t until_ns = now_ns() + nr_ns;

	do {
		for (int i = 0; i < SPIN_PAUSES; i++) {
			if (iothread_has_news(t))
				return true;
			cpu_relax();
		}
		sched_yield();
	} while (now_ns() < until_ns);
	return false;
}

/* Only while nothing can be in the buffers, nor come: with DEFER_TASKRUN the
 * driver copies nothing there but in our own io_uring_enter(). */
static void iothread_give_back(struct ul_iothread *t)
{
	if (iothread_has_inflight(t) || iothread_has_cqes(t) ||
	    !(t->ring.uring.flags & IORING_SETUP_DEFER_TASKRUN))
		return;
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		ul_hctx_give_back(t->hctxs[i]);
	t->may_give_back = false;
}

/* Submit, and sleep until something comes; once until the device is idle. */
static int iothread_submit_and_sleep(struct ul_iothread *t)
{
	struct __kernel_timespec idle = { .tv_nsec = IDLE_NS };
	unsigned int wait_nr = t->ring.nr_commits + 1;
	struct io_uring_cqe *cqe;
	int ret;

	if (!t->may_give_back)
		return io_uring_submit_and_wait(&t->ring.uring, wait_nr);
	ret = io_uring_submit_and_wait_timeout(&t->ring.uring, &cqe, wait_nr,
					       &idle, NULL);
	if (ret == -ETIME) {
		iothread_give_back(t);
		return 0;
	}
	return ret;
}

static int iothread_sleep(struct ul_iothread *t)
{
	int ret;

	atomic_store(&t->sleeping, true);
	if (atomic_load(&t->done)) {
		ret = io_uring_submit_and_get_events(&t->ring.uring);
	} else {
		t->nr_sleeps++;
		ret = iothread_submit_and_sleep(t);
	}
	atomic_store(&t->sleeping, false);
	return ret;
}

/* Submit, then spin or sleep until there is something to reap or collect. */
static int iothread_wait(struct ul_iothread *t)
{
	uint64_t spin_ns;
	int ret = 0;

	if (!t->spin.limit_ns)
		return iothread_sleep(t);
	spin_ns = ul_spin_ns(&t->spin);
	if (!spin_ns) {
		ret = iothread_sleep(t);
	} else {
		if (io_uring_sq_ready(&t->ring.uring))
			ret = io_uring_submit_and_get_events(&t->ring.uring);
		if (ret < 0 || iothread_has_cqes(t))
			return ret;
		if (iothread_spin(t, spin_ns))
			ret = io_uring_get_events(&t->ring.uring);
		else
			ret = iothread_sleep(t);
	}
	ul_spin_note(&t->spin, now_ns(), t->nr_requests);
	t->nr_requests = 0;
	return ret;
}

static bool iothread_is_over(const struct ul_iothread *t)
{
	if (iothread_has_inflight(t))
		return false;
	if (t->fault || t->leaving)
		return true;
	for (unsigned int i = 0; i < t->nr_hctxs; i++)
		if (ul_hctx_fetches(t->hctxs[i]))
			return false;
	return true;
}

int ul_iothread_run(struct ul_iothread *t)
{
	int ret = 0;

	if (!t->ring_made)
		return -EINVAL;
	while (!iothread_is_over(t)) {
		ret = iothread_wait(t);
		/* Signals are blocked, yet a freezer or a debugger interrupts;
		 * a full cq (-EBUSY) and short memory (-EAGAIN) pass. */
		if (ret < 0 && ret != -EINTR && ret != -EBUSY && ret != -EAGAIN)
			ul_iothread_set_fault(t, ret);
		iothread_reap(t);
		iothread_collect(t);
		for (unsigned int i = 0; i < t->nr_hctxs; i++)
			ul_hctx_end_round(t->hctxs[i]);
	}
	io_uring_submit(&t->ring.uring);	/* the last commits */
	/* While this thread lives, the driver of v6.12 may lose requests that
	 * it sends to a ring which is being closed: it aborts those it finds,
	 * once, and waits for ever for what this thread is given after that.
	 * A thread that exits is given none. */
	if (!t->leaving)
		iothread_unprepare(t);
	return t->fault;
}

void ul_iothread_stop(struct ul_iothread *t)
{
	atomic_store(&t->stopping, true);
	iothread_wake(t);
}
