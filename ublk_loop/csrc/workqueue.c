// SPDX-License-Identifier: MIT
/*
 * workqueue.c - the kernel's unbound workqueue, on threads that Python lends.
 *
 * A workqueue is a policy (max_active, order, rescuer) in front of a pool, and
 * a pool is a list of items and the threads that serve it. Every thread here
 * is somebody else's: ul_worker_run() makes the caller a worker or a rescuer,
 * ul_pool_manager_wait() makes it the manager, which says when another worker
 * is needed, and also ends the wait of delayed items and culls idle workers.
 *
 * The way of an item (enum work_state)
 *
 *	IDLE		not pending; func may be running
 *	  | queue_delayed_work
 *	DELAYED		until its time comes, in pool->timers
 *	  | queue_work, or the time
 *	INACTIVE	until max_active lets it in, in wq->inactive
 *	  | at once, if fewer than max_active are in
 *	WAITING		until a worker takes it, in pool->waiting
 *	  | only if func still runs on another worker, found in pool->busy
 *	SCHEDULED	until that worker ends func, in worker->scheduled
 *	  |
 *	IDLE		and func runs: worker->current
 *
 * It is pending in all states but IDLE, and IDLE before func runs, so func may
 * queue its own item; which never runs twice at once. Whatever is WAITING,
 * SCHEDULED or running counts as active, by its weight: an item that does the
 * work of several counts as several. An ordered workqueue is max_active 1.
 *
 * Locking: one mutex a pool, pool->lock, guards the pool, its workqueues and
 * their items. It is never held across func or a wait. All waits are futexes:
 *   worker->wake	a worker or rescuer; the last to sleep is woken first
 *   pool->wake		the manager
 *   waiter->done	a flush, on the stack of who waits
 * On the way of an item the wake-up is what pool_kick() returns, and sent after
 * unlocking. The thread may be gone by then: a futex_wake of a stale address
 * does no harm, since every sleeper looks at its reason again.
 *
 * Who is woken: nobody if a worker is on its way (nr_coming) or spins; else
 * the warmest idle worker; else the manager, to make one. A worker that takes
 * an item and leaves others behind kicks in turn, so wake-ups form a chain and
 * queueing costs no system call as long as one is under way. A batch of items
 * is queued under one lock, and wakes one worker, which begins that chain.
 *
 * Flush: each item carries the epoch of its queueing (modulo NR_COLORS); a
 * flush begins a new epoch and waits until all older ones have no item left.
 *
 * Rescue: from the moment that a worker is missing until one has come, the
 * rescuers of workqueues with items WAITING stand by on timers of their own, so
 * nothing that holds up the manager or the new thread holds them up.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "workqueue.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define NEVER			UINT64_MAX
#define NR_COLORS		16
#define NR_BUSY_BUCKETS		64
#define RESCUER_BATCH		16
/* A pool keeps this many idle workers, and a quarter of the busy ones. */
#define MIN_IDLE_WORKERS	2
#define IDLE_WORKERS_RATIO	4
#define CPU_HOG_NS		(10 * 1000 * 1000)

enum work_state {
	WORK_IDLE = 0,
	WORK_DELAYED,		/* in pool->timers */
	WORK_INACTIVE,		/* in wq->inactive */
	WORK_WAITING,		/* in pool->waiting */
	WORK_SCHEDULED,		/* in worker->scheduled */
};

/*
 * From pool create to destroy.
 * I: set at create.  L: under lock.  A: written under lock, atomic.
 */
struct ul_pool {
	pthread_mutex_t	lock;
	struct ul_pool_config config;	/* I */
	struct ul_list	waiting;	/* L: items, the first queued first */
	struct ul_list	timers;		/* L: delayed items, the next first */
	struct ul_list	idle;		/* L: workers, the last asleep first */
	struct ul_list	workers;	/* L: all, rescuers too */
	struct ul_list	rescued;	/* L: workqueues that have a rescuer */
	struct ul_list	busy[NR_BUSY_BUCKETS]; /* L: workers by their item */
	uint64_t	stalled_ns;	/* L: a worker is missing since; 0: no */
	uint64_t	retry_ns;	/* L: paused: until then */
	uint64_t	nr_created;	/* L */
	uint64_t	nr_culled;	/* L */
	uint64_t	nr_failures;	/* L: threads that could not be made */
	uint32_t	nr_waiting;	/* A: the length of waiting */
	uint32_t	nr_workers;	/* L: without rescuers */
	uint32_t	nr_idle;	/* L: asleep and not woken */
	uint32_t	nr_coming;	/* L: woken, not here yet */
	uint32_t	nr_workqueues;	/* L */
	uint32_t	wake;		/* A: the manager's futex */
	bool		spinning;	/* L: a worker polls nr_waiting */
	bool		creating;	/* L: a thread is being made */
	bool		paused;		/* L: after a failure */
	bool		cull_armed;	/* L: the manager's deadline covers it */
	bool		stopping;	/* A */
	bool		is_io_flusher;	/* L: the last worker got it */
	struct ul_worker *spare;	/* manager's own: for the next thread */
};

/*
 * From ul_pool_manager_wait() or workqueue create until ul_worker_run()
 * returns 0 and frees it.
 * I: set at create.  L: under pool->lock.  A: atomic.
 */
struct ul_worker {
	struct ul_pool	*pool;		/* I: borrowed */
	struct ul_workqueue *rescues;	/* I: borrowed; NULL for a worker */
	struct ul_list	all_node;	/* L: in pool->workers */
	struct ul_list	idle_node;	/* L: in pool->idle */
	struct ul_list	busy_node;	/* L: in pool->busy[] */
	struct ul_list	scheduled;	/* L: items requeued while running */
	struct ul_list	flushers;	/* L: who waits for current */
	struct ul_work	*current;	/* L: borrowed; NULL between items */
	ul_work_func	current_func;	/* L */
	struct ul_workqueue *current_wq; /* L: borrowed, lives with current */
	struct ul_workqueue *charged;	/* L: borrowed; who pays for its CPU */
	uint64_t	charged_ns;	/* L: CPU clock, up to then it is paid */
	uint64_t	tick_ns;	/* L: coarse time of the last charge */
	uint64_t	begin_ns;	/* L: coarse time of current's begin */
	uint64_t	begin_cpu_ns;	/* L: and CPU clock, a tick old at most */
	uint64_t	idle_ns;	/* L: idle since */
	uint64_t	mayday_ns;	/* L: rescuer: not called before */
	clockid_t	cpu_clock;	/* L: set on entry */
	uint32_t	wake;		/* A: futex */
	uint32_t	nr_turn;	/* L: rescuer: items left this turn */
	uint16_t	current_weight;	/* L */
	uint8_t		current_color;	/* L */
	bool		leave;		/* L: end */
	bool		standby;	/* L: rescuer: awake or about to be */
	char		name[16];	/* I: of the thread */
};

/*
 * From create to destroy, shorter than its pool.
 * I: set at create.  L: under pool->lock.
 */
struct ul_workqueue {
	struct ul_pool	*pool;		/* I: borrowed */
	struct ul_worker *rescuer;	/* L: NULL: none, or it has ended */
	struct ul_list	rescued_node;	/* L: in pool->rescued */
	struct ul_list	inactive;	/* L: items, the first queued first */
	struct ul_list	flushers;	/* L: who waits for an epoch */
	struct ul_list	drainers;	/* L: who waits for nr_inflight 0 */
	uint64_t	epoch;		/* L: what is queued now belongs to */
	uint64_t	done_epoch;	/* L: the oldest that has items left */
	uint32_t	nr_epoch[NR_COLORS]; /* L: in flight, by color */
	uint32_t	max_active;	/* L */
	uint32_t	nr_active;	/* L */
	uint32_t	nr_inactive;	/* L */
	uint32_t	nr_inflight;	/* L: both, and so all queued, not done */
	uint32_t	nr_waiting;	/* L: its share of pool->waiting */
	uint32_t	nr_draining;	/* L: drains under way */
	bool		closing;	/* L: the last drain has begun */
	bool		closed;		/* L: drained for the last time */
	struct ul_workqueue_stats stats; /* L: the counters among them */
};

/* On the stack of who waits for something. L: under lock.  A: atomic. */
struct waiter {
	struct ul_list	node;		/* L */
	uint64_t	epoch;		/* L: done_epoch must reach it */
	uint32_t	done;		/* A: futex */
};

/* The worker that this thread is; for chained queueing and self-flushes. */
static __thread struct ul_worker *this_worker;

/* ---- lists ---- */

#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))
#define list_first(list, type, member) container_of((list)->next, type, member)
#define list_last(list, type, member) container_of((list)->prev, type, member)

#define list_for_each(node, list) \
	for (node = (list)->next; node != (list); node = node->next)
/* The node may be deleted on the way. */
#define list_for_each_safe(node, after, list) \
	for (node = (list)->next, after = node->next; node != (list); \
	     node = after, after = node->next)

static void list_init(struct ul_list *list)
{
	list->next = list->prev = list;
}

static bool list_empty(const struct ul_list *list)
{
	return list->next == list;
}

/* Before pos: at the tail, if pos is a list's head. */
static void list_insert(struct ul_list *pos, struct ul_list *node)
{
	node->prev = pos->prev;
	node->next = pos;
	pos->prev->next = node;
	pos->prev = node;
}

static void list_del(struct ul_list *node)
{
	node->prev->next = node->next;
	node->next->prev = node->prev;
	list_init(node);
}

static void list_move_all(struct ul_list *from, struct ul_list *to)
{
	while (!list_empty(from)) {
		struct ul_list *node = from->next;

		list_del(node);
		list_insert(to, node);
	}
}

/* ---- time and futexes ---- */

/* Never a system call, whatever the clock source; up to a tick late. */
static uint64_t coarse_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC_COARSE);
}

static uint64_t later_ns(uint64_t from_ns, uint64_t delay_ns)
{
	return delay_ns < NEVER - from_ns ? from_ns + delay_ns : NEVER;
}

/* 0: woken, or *futex is not 0; else -EINTR or -ETIMEDOUT. */
static int futex_wait(uint32_t *futex, uint64_t deadline_ns)
{
	struct timespec ts = {
		.tv_sec = deadline_ns / NSEC_PER_SEC,
		.tv_nsec = deadline_ns % NSEC_PER_SEC,
	};

	if (!syscall(SYS_futex, futex, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG,
		     0, deadline_ns == NEVER ? NULL : &ts, NULL,
		     FUTEX_BITSET_MATCH_ANY) ||
	    errno == EAGAIN)
		return 0;
	return -errno;
}

static void futex_wake(uint32_t *futex)
{
	if (futex)
		syscall(SYS_futex, futex, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1);
}

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield" ::: "memory");
#endif
}

static uint32_t load(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* ---- waiters ---- */

static void waiter_wake(struct waiter *waiter)
{
	list_del(&waiter->node);
	store(&waiter->done, 1);
	futex_wake(&waiter->done);
}

static void waiters_wake(struct ul_list *waiters)
{
	while (!list_empty(waiters))
		waiter_wake(list_first(waiters, struct waiter, node));
}

/* Drops the lock while it waits. 0 or -EINTR. */
static int waiter_wait(struct ul_pool *pool, struct ul_list *waiters,
		       struct waiter *waiter)
{
	int ret = 0;

	waiter->done = 0;
	list_insert(waiters, &waiter->node);
	pthread_mutex_unlock(&pool->lock);
	while (!ret && !load(&waiter->done))
		ret = futex_wait(&waiter->done, NEVER);
	pthread_mutex_lock(&pool->lock);
	if (waiter->done)
		return 0;
	list_del(&waiter->node);
	return ret;
}

/* ---- pool: whom to wake ---- */

static bool pool_needs_worker(const struct ul_pool *pool)
{
	return pool->nr_waiting && !pool->nr_idle && !pool->nr_coming &&
	       !pool->spinning;
}

static bool pool_has_too_many(const struct ul_pool *pool)
{
	uint32_t nr_busy = pool->nr_workers - pool->nr_idle;

	return pool->nr_idle > MIN_IDLE_WORKERS &&
	       (pool->nr_idle - MIN_IDLE_WORKERS) * IDLE_WORKERS_RATIO >=
		       nr_busy;
}

/* Have the rescuers of what is waiting look at their clocks. */
static void pool_alert_rescuers(struct ul_pool *pool)
{
	struct ul_list *node;

	list_for_each(node, &pool->rescued) {
		struct ul_workqueue *wq =
			container_of(node, struct ul_workqueue, rescued_node);

		if (!wq->nr_waiting || !wq->rescuer || wq->rescuer->standby)
			continue;
		wq->rescuer->standby = true;
		store(&wq->rescuer->wake, 1);
		futex_wake(&wq->rescuer->wake);
	}
}

/* Items may be waiting: return whom to futex_wake(), or NULL. */
static uint32_t *pool_kick(struct ul_pool *pool)
{
	struct ul_worker *worker;

	if (!pool->nr_waiting || pool->nr_coming || pool->spinning)
		return NULL;
	if (pool->nr_idle) {
		worker = list_first(&pool->idle, struct ul_worker, idle_node);
		list_del(&worker->idle_node);
		pool->nr_idle--;
		pool->nr_coming++;
		store(&worker->wake, 1);
		return &worker->wake;
	}
	if (!pool->stalled_ns)
		pool->stalled_ns = now_ns();
	pool_alert_rescuers(pool);
	if (pool->creating || pool->paused || pool->wake)
		return NULL;
	store(&pool->wake, 1);
	return &pool->wake;
}

/* ---- workqueue: accounts of its items ---- */

/* Whatever its weight, an item may run alone. */
static bool wq_may_activate(const struct ul_workqueue *wq,
			    const struct ul_work *work)
{
	return !wq->nr_active || wq->nr_active + work->weight <= wq->max_active;
}

static void work_activate(struct ul_workqueue *wq, struct ul_work *work)
{
	struct ul_pool *pool = wq->pool;

	work->state = WORK_WAITING;
	list_insert(&pool->waiting, &work->node);
	wq->nr_active += work->weight;
	wq->nr_waiting++;
	store(&pool->nr_waiting, pool->nr_waiting + 1);
}

static void work_insert(struct ul_workqueue *wq, struct ul_work *work)
{
	work->color = wq->epoch % NR_COLORS;
	wq->nr_epoch[work->color]++;
	wq->nr_inflight++;
	/* None overtakes what is inactive, which may wait for its weight. */
	if (!wq->nr_inactive && wq_may_activate(wq, work)) {
		work_activate(wq, work);
		return;
	}
	work->state = WORK_INACTIVE;
	list_insert(&wq->inactive, &work->node);
	wq->nr_inactive++;
}

static void wq_activate_inactive(struct ul_workqueue *wq)
{
	struct ul_work *work;

	while (wq->nr_inactive) {
		work = list_first(&wq->inactive, struct ul_work, node);
		if (!wq_may_activate(wq, work))
			break;
		list_del(&work->node);
		wq->nr_inactive--;
		work_activate(wq, work);
	}
}

/* Let go of the epochs that have no item left, and of who waits for them. */
static void wq_advance(struct ul_workqueue *wq)
{
	struct ul_list *node, *next;

	while (wq->done_epoch < wq->epoch &&
	       !wq->nr_epoch[wq->done_epoch % NR_COLORS])
		wq->done_epoch++;
	list_for_each_safe(node, next, &wq->flushers) {
		struct waiter *waiter = container_of(node, struct waiter, node);

		if (waiter->epoch <= wq->done_epoch)
			waiter_wake(waiter);
	}
}

/* An item is over, run or cancelled. nr_active: its part in that. */
static void wq_put(struct ul_workqueue *wq, uint8_t color, uint32_t nr_active)
{
	wq->nr_inflight--;
	wq->nr_active -= nr_active;
	wq_activate_inactive(wq);
	if (!--wq->nr_epoch[color] && wq->done_epoch < wq->epoch)
		wq_advance(wq);
	if (!wq->nr_inflight)
		waiters_wake(&wq->drainers);
}

/* Out of pool->waiting. */
static void work_unwait(struct ul_workqueue *wq, struct ul_work *work)
{
	list_del(&work->node);
	wq->nr_waiting--;
	store(&wq->pool->nr_waiting, wq->pool->nr_waiting - 1);
}

/* Out of wherever it is pending. False: it is not. */
static bool work_grab(struct ul_work *work)
{
	struct ul_workqueue *wq = work->wq;
	enum work_state state = work->state;

	switch (state) {
	case WORK_IDLE:
		return false;
	case WORK_WAITING:
		work_unwait(wq, work);
		break;
	case WORK_INACTIVE:
		wq->nr_inactive--;
		/* fall through */
	default:
		list_del(&work->node);
	}
	work->state = WORK_IDLE;
	waiters_wake(&work->flushers);
	if (state != WORK_DELAYED)
		wq_put(wq, work->color,
		       state == WORK_INACTIVE ? 0 : work->weight);
	return true;
}

static struct ul_list *pool_bucket(struct ul_pool *pool,
				   const struct ul_work *work)
{
	return &pool->busy[((uintptr_t)work >> 6) * 0x9e3779b97f4a7c15ull >>
			   (64 - 6)];
}

/*
 * By address and function: an item may be freed while its function still
 * runs, and another one begin its life in the same place. If that has the same
 * function too, it waits for this run to end, which is harmless.
 */
static struct ul_worker *work_find_worker(struct ul_pool *pool,
					  struct ul_work *work)
{
	struct ul_list *bucket = pool_bucket(pool, work), *node;

	list_for_each(node, bucket) {
		struct ul_worker *worker =
			container_of(node, struct ul_worker, busy_node);

		if (worker->current == work &&
		    worker->current_func == work->func)
			return worker;
	}
	return NULL;
}

/* Delayed items whose time has come; ones that were let in before a drain. */
static void pool_expire(struct ul_pool *pool, uint64_t now)
{
	struct ul_work *work;

	while (!list_empty(&pool->timers)) {
		work = list_first(&pool->timers, struct ul_work, node);
		if (work->expires_ns > now)
			break;
		list_del(&work->node);
		work_insert(work->wq, work);
	}
}

/* ---- workers ---- */

/* The pool does not count on it any more. */
static void worker_dismiss(struct ul_worker *worker)
{
	worker->leave = true;
	worker->pool->nr_workers--;
}

static void thread_setup(void)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
}

static bool thread_become_io_flusher(void)
{
	/* Memory reclaim must not wait for I/O that this thread is to do. */
	return !prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
}

static void worker_enter(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;
	bool is_io_flusher = thread_become_io_flusher();

	thread_setup();
	pthread_setname_np(pthread_self(), worker->name);
	this_worker = worker;
	pthread_mutex_lock(&pool->lock);
	pthread_getcpuclockid(pthread_self(), &worker->cpu_clock);
	worker->charged_ns = clock_ns(worker->cpu_clock);
	list_insert(&pool->workers, &worker->all_node);
	pool->is_io_flusher = is_io_flusher;
	if (worker->rescues)
		return;
	pool->nr_created++;
	pool->nr_workers++;
	pool->creating = false;
	pool->stalled_ns = 0;
}

/* Unlocks. */
static void worker_exit(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;

	list_del(&worker->all_node);
	if (worker->rescues) {
		worker->rescues->rescuer = NULL;
		list_del(&worker->rescues->rescued_node);
	}
	pthread_mutex_unlock(&pool->lock);
	this_worker = NULL;
	free(worker);
}

/* Charge the CPU time since the last charge. */
static void worker_charge(struct ul_worker *worker)
{
	uint64_t cpu_ns = clock_ns(worker->cpu_clock);

	if (worker->charged)
		worker->charged->stats.cpu_time_ns +=
			cpu_ns - worker->charged_ns;
	worker->charged_ns = cpu_ns;
}

/*
 * The thread's CPU clock is a system call, so it is read only when another
 * workqueue begins to pay and once a tick at most; ul_workqueue_get_stats()
 * reads it too.
 */
static void worker_charge_to(struct ul_worker *worker, struct ul_workqueue *wq)
{
	uint64_t tick_ns = coarse_ns();

	if (worker->charged != wq || worker->tick_ns != tick_ns) {
		worker_charge(worker);
		worker->charged = wq;
		worker->tick_ns = tick_ns;
	}
	worker->begin_ns = tick_ns;
	worker->begin_cpu_ns = worker->charged_ns;
}

static bool worker_hogged_cpu(struct ul_worker *worker)
{
	if (coarse_ns() - worker->begin_ns < CPU_HOG_NS)
		return false;
	worker_charge(worker);
	return worker->charged_ns - worker->begin_cpu_ns >= CPU_HOG_NS;
}

static void worker_begin(struct ul_worker *worker, struct ul_work *work)
{
	struct ul_workqueue *wq = work->wq;

	worker->current = work;
	worker->current_func = work->func;
	worker->current_wq = wq;
	worker->current_color = work->color;
	worker->current_weight = work->weight;
	list_insert(pool_bucket(worker->pool, work), &worker->busy_node);
	list_move_all(&work->flushers, &worker->flushers);
	work->state = WORK_IDLE;
	wq->stats.nr_started++;
	if (worker->rescues)
		wq->stats.nr_rescued++;
	worker_charge_to(worker, wq);
}

/* The item may be gone: what is needed of it is in the worker. */
static void worker_end(struct ul_worker *worker)
{
	struct ul_workqueue *wq = worker->current_wq;

	worker->current = NULL;
	list_del(&worker->busy_node);
	wq->stats.nr_completed++;
	wq->stats.nr_cpu_hogs += worker_hogged_cpu(worker);
	waiters_wake(&worker->flushers);
	wq_put(wq, worker->current_color, worker->current_weight);
}

/*
 * Take an item that waits. NULL: it still runs elsewhere, and that worker will
 * run it next.
 */
static struct ul_work *worker_take(struct ul_worker *worker,
				   struct ul_work *work)
{
	struct ul_worker *other = work_find_worker(worker->pool, work);

	work_unwait(work->wq, work);
	if (!other)
		return work;
	work->state = WORK_SCHEDULED;
	list_insert(&other->scheduled, &work->node);
	return NULL;
}

static struct ul_work *worker_take_scheduled(struct ul_worker *worker)
{
	struct ul_work *work =
		list_first(&worker->scheduled, struct ul_work, node);

	list_del(&work->node);
	return work;
}

/* Poll for an item before sleeping; at most one worker of a pool does. */
static void worker_spin(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;
	uint64_t deadline_ns = now_ns() + pool->config.spin_ns;

	pool->spinning = true;
	pthread_mutex_unlock(&pool->lock);
	while (!load(&pool->nr_waiting) && now_ns() < deadline_ns &&
	       !__atomic_load_n(&pool->stopping, __ATOMIC_RELAXED))
		for (int i = 0; i < 32; i++)
			cpu_relax();
	pthread_mutex_lock(&pool->lock);
	pool->spinning = false;
}

static void worker_sleep(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;
	uint32_t *kick = NULL;

	worker->idle_ns = coarse_ns();
	worker->wake = 0;
	list_insert(pool->idle.next, &worker->idle_node);
	pool->nr_idle++;
	if (!pool->cull_armed && pool_has_too_many(pool)) {
		pool->cull_armed = true;
		store(&pool->wake, 1);
		kick = &pool->wake;
	}
	pthread_mutex_unlock(&pool->lock);
	futex_wake(kick);
	while (!load(&worker->wake))
		futex_wait(&worker->wake, NEVER);
	pthread_mutex_lock(&pool->lock);
	if (!worker->leave)
		pool->nr_coming--;
}

/* NULL: leave. */
static struct ul_work *worker_next(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;
	struct ul_work *work;

	for (;;) {
		if (!list_empty(&worker->scheduled))
			return worker_take_scheduled(worker);
		if (worker->leave)
			return NULL;
		if (pool->nr_waiting) {
			work = list_first(&pool->waiting, struct ul_work, node);
			work = worker_take(worker, work);
			if (work)
				return work;
		} else if (pool->stopping) {
			worker_dismiss(worker);
		} else {
			if (pool->config.spin_ns && !pool->spinning)
				worker_spin(worker);
			if (!pool->nr_waiting && !pool->stopping)
				worker_sleep(worker);
		}
	}
}

/* ---- the rescuer ---- */

/* The first item of its workqueue that waits. */
static struct ul_work *rescuer_take(struct ul_worker *rescuer)
{
	struct ul_pool *pool = rescuer->pool;
	struct ul_list *node;

	list_for_each(node, &pool->waiting) {
		struct ul_work *work = container_of(node, struct ul_work, node);

		if (work->wq == rescuer->rescues)
			return worker_take(rescuer, work);
	}
	return NULL;
}

static bool rescuer_is_called(const struct ul_worker *rescuer)
{
	const struct ul_pool *pool = rescuer->pool;

	return rescuer->rescues->nr_waiting && pool->stalled_ns &&
	       pool_needs_worker(pool);
}

static void rescuer_sleep(struct ul_worker *rescuer, uint64_t deadline_ns)
{
	struct ul_pool *pool = rescuer->pool;
	uint32_t *kick;

	rescuer->standby = deadline_ns != NEVER;
	rescuer->wake = 0;
	/* What its last item set free is not its own to run any more. */
	kick = pool_kick(pool);
	pthread_mutex_unlock(&pool->lock);
	futex_wake(kick);
	if (!load(&rescuer->wake))
		futex_wait(&rescuer->wake, deadline_ns);
	pthread_mutex_lock(&pool->lock);
}

/*
 * The first mayday comes mayday_initial_ns after the pool stalled, the next
 * ones mayday_interval_ns apart. Each is good for turns of RESCUER_BATCH items
 * until nothing waits or the pool has recovered.
 */
static struct ul_work *rescuer_next(struct ul_worker *rescuer)
{
	struct ul_pool *pool = rescuer->pool;
	struct ul_work *work;
	uint64_t now, due_ns;

	for (;;) {
		if (!list_empty(&rescuer->scheduled))
			return worker_take_scheduled(rescuer);
		if (rescuer->nr_turn && !rescuer->rescues->nr_waiting)
			rescuer->nr_turn = 0;
		if (rescuer->nr_turn) {
			if (!--rescuer->nr_turn && rescuer_is_called(rescuer))
				rescuer->nr_turn = RESCUER_BATCH;
			work = rescuer_take(rescuer);
			if (work)
				return work;
			continue;
		}
		if (rescuer->leave)
			return NULL;
		due_ns = NEVER;
		if (rescuer_is_called(rescuer)) {
			now = now_ns();
			due_ns = pool->stalled_ns +
				 pool->config.mayday_initial_ns;
			if (due_ns < rescuer->mayday_ns)
				due_ns = rescuer->mayday_ns;
			if (now >= due_ns) {
				rescuer->mayday_ns =
					now + pool->config.mayday_interval_ns;
				rescuer->nr_turn = RESCUER_BATCH;
				rescuer->rescues->stats.nr_maydays++;
				continue;
			}
		}
		rescuer_sleep(rescuer, due_ns);
	}
}

int ul_worker_run(struct ul_worker *worker, struct ul_work **attend,
		  uint64_t *cookie)
{
	struct ul_pool *pool = worker->pool;
	struct ul_work *work = worker->current;
	uint32_t *kick;

	if (!work) {
		worker_enter(worker);
		goto next;
	}
	for (;;) {
		if (work->func(work) == UL_WORK_ATTEND) {
			*attend = work;
			*cookie = work->cookie;
			return 1;
		}
		pthread_mutex_lock(&pool->lock);
		worker_end(worker);
next:
		work = worker->rescues ? rescuer_next(worker)
				       : worker_next(worker);
		if (!work)
			break;
		worker_begin(worker, work);
		kick = pool_kick(pool);
		if (kick)
			work->wq->stats.nr_wakeups++;
		pthread_mutex_unlock(&pool->lock);
		futex_wake(kick);
	}
	worker_exit(worker);
	return 0;
}

static struct ul_worker *worker_alloc(struct ul_pool *pool,
				      struct ul_workqueue *rescues)
{
	struct ul_worker *worker = calloc(1, sizeof(*worker));

	if (!worker)
		return NULL;
	worker->pool = pool;
	worker->rescues = rescues;
	list_init(&worker->all_node);
	list_init(&worker->idle_node);
	list_init(&worker->busy_node);
	list_init(&worker->scheduled);
	list_init(&worker->flushers);
	strcpy(worker->name, "ul-worker");
	return worker;
}

/* ---- the manager ---- */

static void pool_pause(struct ul_pool *pool)
{
	pool->creating = false;
	pool->paused = true;
	pool->retry_ns = later_ns(now_ns(), pool->config.create_cooldown_ns);
	pool->nr_failures++;
	store(&pool->wake, 1);
}

void ul_worker_not_started(struct ul_worker *worker)
{
	struct ul_pool *pool = worker->pool;

	pthread_mutex_lock(&pool->lock);
	if (worker->rescues) {
		worker->rescues->rescuer = NULL;
		list_del(&worker->rescues->rescued_node);
	} else {
		pool_pause(pool);
	}
	pthread_mutex_unlock(&pool->lock);
	futex_wake(&pool->wake);
	free(worker);
}

/* Let the longest idle ones go; returns when to look again. */
static uint64_t pool_cull(struct ul_pool *pool, uint64_t now)
{
	struct ul_worker *worker;
	uint64_t due_ns;

	while (pool_has_too_many(pool)) {
		worker = list_last(&pool->idle, struct ul_worker, idle_node);
		due_ns =
			later_ns(worker->idle_ns, pool->config.idle_timeout_ns);
		if (due_ns > now) {
			pool->cull_armed = true;
			return due_ns;
		}
		list_del(&worker->idle_node);
		pool->nr_idle--;
		pool->nr_culled++;
		worker_dismiss(worker);
		store(&worker->wake, 1);
		futex_wake(&worker->wake);
	}
	pool->cull_armed = false;
	return NEVER;
}

/* Is a thread to be made, and by which struct? NULL: no. */
static struct ul_worker *pool_begin_create(struct ul_pool *pool, uint64_t now)
{
	struct ul_worker *worker = pool->spare;

	if (pool->paused && now >= pool->retry_ns)
		pool->paused = false;
	if (!pool_needs_worker(pool)) {
		if (!pool->creating)
			pool->stalled_ns = 0;
		return NULL;
	}
	if (pool->creating || pool->paused)
		return NULL;
	if (worker) {
		pool->creating = true;
		pool->spare = NULL;
	} else {
		pool_pause(pool);
	}
	return worker;
}

static uint64_t pool_deadline(struct ul_pool *pool, uint64_t now)
{
	uint64_t deadline_ns = pool_cull(pool, now);
	struct ul_work *work;

	if (!list_empty(&pool->timers)) {
		work = list_first(&pool->timers, struct ul_work, node);
		if (work->expires_ns < deadline_ns)
			deadline_ns = work->expires_ns;
	}
	if (pool->paused && pool->retry_ns < deadline_ns)
		deadline_ns = pool->retry_ns;
	return deadline_ns;
}

int ul_pool_manager_wait(struct ul_pool *pool, struct ul_worker **worker)
{
	uint64_t now, deadline_ns;
	uint32_t *kick;

	*worker = NULL;
	thread_setup();
	for (;;) {
		/* Made before it is needed, and without the lock. */
		if (!pool->spare)
			pool->spare = worker_alloc(pool, NULL);
		pthread_mutex_lock(&pool->lock);
		store(&pool->wake, 0);
		if (pool->stopping)
			break;
		now = now_ns();
		pool_expire(pool, now);
		*worker = pool_begin_create(pool, now);
		if (*worker)
			break;
		kick = pool_kick(pool);
		deadline_ns = pool_deadline(pool, now);
		pthread_mutex_unlock(&pool->lock);
		futex_wake(kick);
		if (!load(&pool->wake))
			futex_wait(&pool->wake, deadline_ns);
	}
	pthread_mutex_unlock(&pool->lock);
	return *worker != NULL;
}

int ul_pool_create(const struct ul_pool_config *config, struct ul_pool **poolp)
{
	struct ul_pool *pool = calloc(1, sizeof(*pool));
	cpu_set_t cpus;

	if (!pool)
		return -ENOMEM;
	pthread_mutex_init(&pool->lock, NULL);
	pool->config = *config;
	if (sched_getaffinity(0, sizeof(cpus), &cpus) || CPU_COUNT(&cpus) < 2)
		pool->config.spin_ns = 0;
	list_init(&pool->waiting);
	list_init(&pool->timers);
	list_init(&pool->idle);
	list_init(&pool->workers);
	list_init(&pool->rescued);
	for (int i = 0; i < NR_BUSY_BUCKETS; i++)
		list_init(&pool->busy[i]);
	*poolp = pool;
	return 0;
}

int ul_pool_destroy(struct ul_pool *pool)
{
	bool busy;

	pthread_mutex_lock(&pool->lock);
	busy = !pool->stopping || pool->nr_workqueues ||
	       !list_empty(&pool->workers);
	pthread_mutex_unlock(&pool->lock);
	if (busy)
		return -EBUSY;
	free(pool->spare);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
	return 0;
}

void ul_pool_stop(struct ul_pool *pool)
{
	struct ul_worker *worker;

	pthread_mutex_lock(&pool->lock);
	__atomic_store_n(&pool->stopping, true, __ATOMIC_RELAXED);
	while (!list_empty(&pool->idle)) {
		worker = list_first(&pool->idle, struct ul_worker, idle_node);
		list_del(&worker->idle_node);
		pool->nr_idle--;
		worker_dismiss(worker);
		store(&worker->wake, 1);
		futex_wake(&worker->wake);
	}
	store(&pool->wake, 1);
	futex_wake(&pool->wake);
	pthread_mutex_unlock(&pool->lock);
}

void ul_pool_get_stats(struct ul_pool *pool, struct ul_pool_stats *stats)
{
	pthread_mutex_lock(&pool->lock);
	*stats = (struct ul_pool_stats){
		.nr_created = pool->nr_created,
		.nr_culled = pool->nr_culled,
		.nr_create_failures = pool->nr_failures,
		.nr_workers = pool->nr_workers,
		.nr_idle = pool->nr_idle,
		.nr_waiting = pool->nr_waiting,
		.is_io_flusher = pool->is_io_flusher,
	};
	pthread_mutex_unlock(&pool->lock);
}

/* ---- workqueues ---- */

int ul_workqueue_create(struct ul_pool *pool,
			const struct ul_workqueue_config *config,
			struct ul_workqueue **wqp, struct ul_worker **rescuer)
{
	struct ul_workqueue *wq;

	if (!config->max_active || memchr(config->name, 0, 16) == NULL)
		return -EINVAL;
	wq = calloc(1, sizeof(*wq));
	if (!wq)
		return -ENOMEM;
	wq->pool = pool;
	wq->max_active = config->max_active;
	list_init(&wq->inactive);
	list_init(&wq->flushers);
	list_init(&wq->drainers);
	list_init(&wq->rescued_node);
	if (config->flags & UL_WQ_RESCUER) {
		wq->rescuer = worker_alloc(pool, wq);
		if (!wq->rescuer) {
			free(wq);
			return -ENOMEM;
		}
		strcpy(wq->rescuer->name, config->name);
	}
	*rescuer = wq->rescuer;
	pthread_mutex_lock(&pool->lock);
	pool->nr_workqueues++;
	if (wq->rescuer)
		list_insert(&pool->rescued, &wq->rescued_node);
	pthread_mutex_unlock(&pool->lock);
	*wqp = wq;
	return 0;
}

/* Whoever paid nothing yet must not be charged for the dead. */
static void wq_forget(struct ul_workqueue *wq)
{
	struct ul_list *node;

	list_for_each(node, &wq->pool->workers) {
		struct ul_worker *worker =
			container_of(node, struct ul_worker, all_node);

		if (worker->charged == wq)
			worker->charged = NULL;
	}
}

int ul_workqueue_destroy(struct ul_workqueue *wq)
{
	struct ul_pool *pool = wq->pool;
	bool busy;

	pthread_mutex_lock(&pool->lock);
	busy = !wq->closed || wq->rescuer;
	if (!busy) {
		wq_forget(wq);
		pool->nr_workqueues--;
	}
	pthread_mutex_unlock(&pool->lock);
	if (busy)
		return -EBUSY;
	free(wq);
	return 0;
}

void ul_workqueue_set_max_active(struct ul_workqueue *wq, uint32_t max_active)
{
	struct ul_pool *pool = wq->pool;
	uint32_t *kick;

	pthread_mutex_lock(&pool->lock);
	wq->max_active = max_active ? max_active : 1;
	wq_activate_inactive(wq);
	kick = pool_kick(pool);
	pthread_mutex_unlock(&pool->lock);
	futex_wake(kick);
}

void ul_workqueue_get_stats(struct ul_workqueue *wq,
			    struct ul_workqueue_stats *stats)
{
	struct ul_pool *pool = wq->pool;
	struct ul_list *node;

	pthread_mutex_lock(&pool->lock);
	list_for_each(node, &pool->workers) {
		struct ul_worker *worker =
			container_of(node, struct ul_worker, all_node);

		if (worker->charged == wq)
			worker_charge(worker);
	}
	*stats = wq->stats;
	stats->nr_active = wq->nr_active;
	stats->nr_inactive = wq->nr_inactive;
	pthread_mutex_unlock(&pool->lock);
}

/* Is this thread running an item of the workqueue? */
static bool wq_is_current(const struct ul_workqueue *wq)
{
	return this_worker && this_worker->current &&
	       this_worker->current_wq == wq;
}

int ul_workqueue_flush_wait(struct ul_workqueue *wq, uint64_t *ticket)
{
	struct ul_pool *pool = wq->pool;
	struct waiter waiter;
	int ret = 0;

	if (wq_is_current(wq))
		return -EDEADLK;
	pthread_mutex_lock(&pool->lock);
	/* All colors in use: the oldest must go before an epoch can begin. */
	while (!ret && !*ticket &&
	       wq->epoch - wq->done_epoch == NR_COLORS - 1) {
		waiter.epoch = wq->done_epoch + 1;
		ret = waiter_wait(pool, &wq->flushers, &waiter);
	}
	if (!ret && !*ticket) {
		*ticket = ++wq->epoch;
		wq_advance(wq);
	}
	while (!ret && wq->done_epoch < *ticket) {
		waiter.epoch = *ticket;
		ret = waiter_wait(pool, &wq->flushers, &waiter);
	}
	pthread_mutex_unlock(&pool->lock);
	return ret;
}

static void wq_close(struct ul_workqueue *wq)
{
	struct ul_list *node, *next;

	wq->closed = true;
	list_for_each_safe(node, next, &wq->pool->timers) {
		struct ul_work *work = container_of(node, struct ul_work, node);

		if (work->wq == wq)
			work_grab(work);
	}
	if (wq->rescuer) {
		wq->rescuer->leave = true;
		wq->rescuer->standby = true;
		store(&wq->rescuer->wake, 1);
		futex_wake(&wq->rescuer->wake);
	}
}

int ul_workqueue_drain_wait(struct ul_workqueue *wq, int32_t close)
{
	struct ul_pool *pool = wq->pool;
	struct waiter waiter;
	int ret = 0;

	if (wq_is_current(wq))
		return -EDEADLK;
	pthread_mutex_lock(&pool->lock);
	if (close)
		wq->closing = true;
	wq->nr_draining++;
	while (!ret && wq->nr_inflight)
		ret = waiter_wait(pool, &wq->drainers, &waiter);
	wq->nr_draining--;
	if (!ret && close && !wq->closed)
		wq_close(wq);
	pthread_mutex_unlock(&pool->lock);
	return ret;
}

/* ---- items ---- */

void ul_work_init(struct ul_work *work, ul_work_func func, uint64_t cookie)
{
	memset(work, 0, sizeof(*work));
	work->func = func;
	work->cookie = cookie;
	work->weight = 1;
	list_init(&work->node);
	list_init(&work->flushers);
}

static struct ul_workqueue *work_wq(struct ul_work *work)
{
	return __atomic_load_n(&work->wq, __ATOMIC_ACQUIRE);
}

/* May it be queued, and if so as an item of wq? 0 or -errno. */
static int work_admit(struct ul_workqueue *wq, struct ul_work *work)
{
	if (work->nr_disables)
		return -ECANCELED;
	if (wq->closed)
		return -ESHUTDOWN;
	if ((wq->nr_draining || wq->closing) && !wq_is_current(wq))
		return -ESHUTDOWN;
	if (work->wq != wq)
		__atomic_store_n(&work->wq, wq, __ATOMIC_RELEASE);
	return 0;
}

static bool work_queue_locked(struct ul_workqueue *wq, struct ul_work *work)
{
	if (work->state != WORK_IDLE || work_admit(wq, work))
		return false;
	work_insert(wq, work);
	return true;
}

/* Unlocks. */
static void wq_unlock_and_kick(struct ul_workqueue *wq)
{
	uint32_t *kick = pool_kick(wq->pool);

	if (kick)
		wq->stats.nr_wakeups++;
	pthread_mutex_unlock(&wq->pool->lock);
	futex_wake(kick);
}

bool ul_queue_work(struct ul_workqueue *wq, struct ul_work *work)
{
	bool queued;

	pthread_mutex_lock(&wq->pool->lock);
	queued = work_queue_locked(wq, work);
	wq_unlock_and_kick(wq);
	return queued;
}

void ul_queue_works(struct ul_workqueue *wq, struct ul_work *const *works,
		    unsigned int nr_works)
{
	pthread_mutex_lock(&wq->pool->lock);
	for (unsigned int i = 0; i < nr_works; i++)
		work_queue_locked(wq, works[i]);
	wq_unlock_and_kick(wq);
}

/* Returns whom to wake. The list is short, and most go to its end. */
static uint32_t *work_insert_timer(struct ul_pool *pool, struct ul_work *work,
				   uint64_t delay_ns)
{
	struct ul_list *pos = &pool->timers;

	work->state = WORK_DELAYED;
	work->expires_ns = later_ns(now_ns(), delay_ns);
	while (pos->prev != &pool->timers &&
	       container_of(pos->prev, struct ul_work, node)->expires_ns >
		       work->expires_ns)
		pos = pos->prev;
	list_insert(pos, &work->node);
	if (pool->timers.next != &work->node || pool->wake)
		return NULL;
	store(&pool->wake, 1);
	return &pool->wake;
}

int ul_work_queue_delayed(struct ul_workqueue *wq, struct ul_work *work,
			  uint64_t delay_ns, int32_t modify)
{
	struct ul_pool *pool = wq->pool;
	uint32_t *kicks[2] = { NULL, NULL };
	bool grabbed = false;
	int ret;

	pthread_mutex_lock(&pool->lock);
	ret = work->state == WORK_IDLE || modify ? work_admit(wq, work) : 0;
	if (ret || (work->state != WORK_IDLE && !modify))
		goto unlock;
	grabbed = work_grab(work);
	if (delay_ns)
		kicks[0] = work_insert_timer(pool, work, delay_ns);
	else
		work_insert(wq, work);
	kicks[1] = pool_kick(pool);
	if (kicks[1])
		wq->stats.nr_wakeups++;
	ret = !grabbed;
unlock:
	pthread_mutex_unlock(&pool->lock);
	futex_wake(kicks[0]);
	futex_wake(kicks[1]);
	return ret;
}

int ul_work_cancel(struct ul_work *work, int32_t disable)
{
	struct ul_workqueue *wq = work_wq(work);
	uint32_t *kick;
	bool grabbed;

	if (!wq) {
		/* Nobody else knows it yet: what the caller sees to. */
		work->nr_disables += !!disable;
		return 0;
	}
	pthread_mutex_lock(&wq->pool->lock);
	work->nr_disables += !!disable;
	grabbed = work_grab(work);
	kick = pool_kick(wq->pool);
	pthread_mutex_unlock(&wq->pool->lock);
	futex_wake(kick);
	return grabbed;
}

int ul_work_enable(struct ul_work *work)
{
	struct ul_workqueue *wq = work_wq(work);
	int nr_disables;

	if (wq)
		pthread_mutex_lock(&wq->pool->lock);
	if (work->nr_disables)
		work->nr_disables--;
	nr_disables = work->nr_disables;
	if (wq)
		pthread_mutex_unlock(&wq->pool->lock);
	return nr_disables;
}

int ul_work_flush_wait(struct ul_work *work)
{
	struct ul_workqueue *wq = work_wq(work);
	struct ul_worker *worker;
	struct waiter waiter;
	uint32_t *kick = NULL;
	int ret = 0;

	if (!wq)
		return 0;
	pthread_mutex_lock(&wq->pool->lock);
	worker = work_find_worker(wq->pool, work);
	if (worker && worker == this_worker) {
		ret = -EDEADLK;
		goto unlock;
	}
	if (work->state == WORK_DELAYED) {
		list_del(&work->node);
		work_insert(wq, work);
		kick = pool_kick(wq->pool);
		futex_wake(kick);
	}
	if (work->state != WORK_IDLE)
		ret = waiter_wait(wq->pool, &work->flushers, &waiter) ?: 1;
	else if (worker)
		ret = waiter_wait(wq->pool, &worker->flushers, &waiter) ?: 1;
unlock:
	pthread_mutex_unlock(&wq->pool->lock);
	return ret;
}

uint32_t ul_work_busy(struct ul_work *work)
{
	struct ul_workqueue *wq = work_wq(work);
	uint32_t busy = 0;

	if (!wq)
		return 0;
	pthread_mutex_lock(&wq->pool->lock);
	if (work->state != WORK_IDLE)
		busy |= UL_WORK_BUSY_PENDING;
	if (work_find_worker(wq->pool, work))
		busy |= UL_WORK_BUSY_RUNNING;
	pthread_mutex_unlock(&wq->pool->lock);
	return busy;
}

/* ---- items of Python ---- */

/* One at a time: an item never runs twice at once. */
static int python_work_run(struct ul_work *work)
{
	work->attend = work->attend ? NULL : work;
	return work->attend ? UL_WORK_ATTEND : UL_WORK_DONE;
}

int ul_work_create(uint64_t cookie, struct ul_work **workp)
{
	struct ul_work *work = malloc(sizeof(*work));

	if (!work)
		return -ENOMEM;
	ul_work_init(work, python_work_run, cookie);
	*workp = work;
	return 0;
}

void ul_work_destroy(struct ul_work *work)
{
	free(work);
}
