// SPDX-License-Identifier: MIT
/*
 * workqueue_stress.c - csrc/workqueue.c on plain pthreads, for the sanitizers.
 *
 * usage: workqueue_stress stress|rescue|churn SEED NR_OPS
 *
 * What an item touches while it runs is plain memory on purpose: if it ran
 * twice at once, or a run did not see the one before or its queueing,
 * ThreadSanitizer says so. Exits 1 with a line that names the broken promise.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "workqueue.h"

#define NR_QUEUERS	4
#define NR_QUEUES	3
#define NR_ITEMS	24
#define NR_AT_ONCE	5
#define MS		1000000ull

#define ADD(word, n)	__atomic_add_fetch(&(word), n, __ATOMIC_RELAXED)
#define GET(word)	__atomic_load_n(&(word), __ATOMIC_ACQUIRE)
#define SET(word, n)	__atomic_store_n(&(word), n, __ATOMIC_RELEASE)
#define REQUIRE(what) \
	do { \
		if (!(what)) \
			broken(#what, __LINE__); \
	} while (0)

static void broken(const char *what, int line)
{
	fprintf(stderr, "broken, line %d: %s\n", line, what);
	exit(1);
}

/* What the manager does about a thread that is needed. */
enum {
	CREATE_WORKS,
	CREATE_FAILS,
	CREATE_HANGS
};
static int create_mode;

/* A pool with its threads, as Python's half would have them. */
struct host {
	struct ul_pool	*pool;
	pthread_t	manager;
	int		nr_attended;	/* atomic */
	int		nr_threads;	/* atomic */
};

struct queue {
	struct ul_workqueue *wq;
	struct ul_worker *rescuer;
	pthread_t	rescuer_thread;
	struct host	*host;
	int		max_active;	/* 0: it changes */
	int		nr_running;	/* atomic */
	long		in_order;	/* plain: an ordered queue's items */
};

/* An item that stays and is fought over. */
struct item {
	struct ul_work	work;
	struct queue	*queue;
	long		nr_runs;	/* plain */
	long		nr_accepted;	/* atomic */
	long		nr_cancelled;	/* atomic */
	int		is_running;	/* atomic */
	int		is_attended;	/* plain */
	unsigned int	seed;		/* plain: the function's own */
};

/* An item that its function frees. */
struct parcel {
	struct ul_work	work;
	struct queue	*queue;
	long		payload[4];
};

static struct queue queues[NR_QUEUES];
static struct item items[NR_ITEMS];
static long nr_parcels_sent, nr_parcels_received;	/* atomic */
static long nr_ops;

static void pause_ns(long ns)
{
	struct timespec ts = { .tv_nsec = ns };

	nanosleep(&ts, NULL);
}

/* ---- threads ---- */

struct lent {
	struct host	*host;
	struct ul_worker *worker;
};

static void *worker_main(void *arg)
{
	struct lent lent = *(struct lent *)arg;
	struct ul_work *work;
	uint64_t cookie;

	free(arg);
	while (ul_worker_run(lent.worker, &work, &cookie)) {
		struct item *item = (struct item *)work;

		REQUIRE(cookie == (uint64_t)(item - items));
		item->is_attended = 1;
		ADD(lent.host->nr_attended, 1);
	}
	ADD(lent.host->nr_threads, -1);
	return NULL;
}

static pthread_t lend_thread(struct host *host, struct ul_worker *worker)
{
	struct lent *lent = malloc(sizeof(*lent));
	pthread_t thread;

	*lent = (struct lent){ host, worker };
	ADD(host->nr_threads, 1);
	REQUIRE(!pthread_create(&thread, NULL, worker_main, lent));
	return thread;
}

static void *manager_main(void *arg)
{
	struct host *host = arg;
	struct ul_worker *worker;

	while (ul_pool_manager_wait(host->pool, &worker)) {
		while (GET(create_mode) == CREATE_HANGS)
			pause_ns(MS);
		if (GET(create_mode) == CREATE_FAILS)
			ul_worker_not_started(worker);
		else
			pthread_detach(lend_thread(host, worker));
	}
	return NULL;
}

static void host_start(struct host *host, uint64_t idle_ns, uint64_t spin_ns)
{
	struct ul_pool_config config = {
		.idle_timeout_ns = idle_ns,
		.create_cooldown_ns = 2 * MS,
		.mayday_initial_ns = MS / 2,
		.mayday_interval_ns = MS,
		.spin_ns = spin_ns,
	};

	memset(host, 0, sizeof(*host));
	REQUIRE(!ul_pool_create(&config, &host->pool));
	REQUIRE(!pthread_create(&host->manager, NULL, manager_main, host));
}

static void host_stop(struct host *host)
{
	ul_pool_stop(host->pool);
	REQUIRE(!pthread_join(host->manager, NULL));
	while (GET(host->nr_threads))
		sched_yield();
	REQUIRE(!ul_pool_destroy(host->pool));
}

static void queue_open(struct queue *queue, struct host *host, int max_active,
		       uint32_t flags)
{
	struct ul_workqueue_config config = {
		.name = "stress",
		.flags = flags,
		.max_active = max_active,
	};

	memset(queue, 0, sizeof(*queue));
	queue->host = host;
	queue->max_active = max_active;
	REQUIRE(!ul_workqueue_create(host->pool, &config, &queue->wq,
				     &queue->rescuer));
	if (queue->rescuer)
		queue->rescuer_thread = lend_thread(host, queue->rescuer);
}

static void queue_close(struct queue *queue)
{
	REQUIRE(!ul_workqueue_drain_wait(queue->wq, 1));
	if (queue->rescuer)
		REQUIRE(!pthread_join(queue->rescuer_thread, NULL));
	REQUIRE(!GET(queue->nr_running));
	REQUIRE(!ul_workqueue_destroy(queue->wq));
}

/* ---- what items do ---- */

/* By weight: a heavy item is several, but may always run alone. */
static void queue_enter(struct queue *queue, int weight)
{
	int nr_running = ADD(queue->nr_running, weight);

	if (queue->max_active)
		REQUIRE(nr_running <= queue->max_active ||
			nr_running == weight);
	if (queue->max_active == 1)
		queue->in_order++;
}

static void queue_leave(struct queue *queue, int weight)
{
	ADD(queue->nr_running, -weight);
}

static int parcel_run(struct ul_work *work)
{
	struct parcel *parcel = (struct parcel *)work;
	struct queue *queue = parcel->queue;

	queue_enter(queue, 1);
	for (int i = 0; i < 4; i++)
		REQUIRE(parcel->payload[i] == i + 1);
	memset(parcel, 0xff, sizeof(*parcel));
	free(parcel);
	ADD(nr_parcels_received, 1);
	queue_leave(queue, 1);
	return UL_WORK_DONE;
}

static struct parcel *parcel_make(struct queue *queue)
{
	struct parcel *parcel = malloc(sizeof(*parcel));

	ul_work_init(&parcel->work, parcel_run, 0);
	parcel->queue = queue;
	for (int i = 0; i < 4; i++)
		parcel->payload[i] = i + 1;
	return parcel;
}

static void parcel_send(struct queue *queue)
{
	struct parcel *parcel = parcel_make(queue);

	if (ul_queue_work(queue->wq, &parcel->work))
		ADD(nr_parcels_sent, 1);
	else		/* draining */
		free(parcel);
}

/* Several at once; from an item of the queue, or a drain would refuse them. */
static void parcels_send(struct queue *queue)
{
	struct ul_work *works[NR_AT_ONCE];

	for (int i = 0; i < NR_AT_ONCE; i++)
		works[i] = &parcel_make(queue)->work;
	ADD(nr_parcels_sent, NR_AT_ONCE);
	ul_queue_works(queue->wq, works, NR_AT_ONCE);
}

static int item_run(struct ul_work *work)
{
	struct item *item = (struct item *)work;
	unsigned int dice;

	if (item->is_attended) {
		item->is_attended = 0;
		goto end;
	}
	REQUIRE(!__atomic_exchange_n(&item->is_running, 1, __ATOMIC_RELAXED));
	queue_enter(item->queue, work->weight);
	item->nr_runs++;
	dice = rand_r(&item->seed) % 16;
	if (dice == 0)
		pause_ns(MS / 5);
	if (dice == 1)
		sched_yield();
	if (dice == 2 && ul_queue_work(item->queue->wq, work))
		ADD(item->nr_accepted, 1);
	if (dice == 3)
		parcels_send(item->queue);
	if (dice == 4)
		REQUIRE(ul_work_flush_wait(work) == -EDEADLK);
	if (dice < 8)
		return UL_WORK_ATTEND;
end:
	queue_leave(item->queue, work->weight);
	SET(item->is_running, 0);
	return UL_WORK_DONE;
}

/* ---- stress: everybody at once ---- */

static void item_cancel_sync(struct item *item)
{
	if (ul_work_cancel(&item->work, 1))
		ADD(item->nr_cancelled, 1);
	REQUIRE(ul_work_flush_wait(&item->work) >= 0);
	REQUIRE(!ul_work_busy(&item->work));
	ul_work_enable(&item->work);
}

static void op(unsigned int dice, struct item *item, uint64_t delay_ns)
{
	struct queue *queue = item->queue;
	struct ul_workqueue_stats stats;
	uint64_t ticket = 0;

	if (dice < 40) {
		if (ul_queue_work(queue->wq, &item->work))
			ADD(item->nr_accepted, 1);
	} else if (dice < 60) {
		parcel_send(queue);
	} else if (dice < 70) {
		if (ul_work_queue_delayed(queue->wq, &item->work, delay_ns,
					  dice & 1) == 1)
			ADD(item->nr_accepted, 1);
	} else if (dice < 80) {
		if (ul_work_cancel(&item->work, 0))
			ADD(item->nr_cancelled, 1);
	} else if (dice < 85) {
		item_cancel_sync(item);
	} else if (dice < 90) {
		REQUIRE(ul_work_flush_wait(&item->work) >= 0);
	} else if (dice < 94) {
		REQUIRE(!ul_workqueue_flush_wait(queue->wq, &ticket));
	} else if (dice < 95) {
		REQUIRE(!ul_workqueue_drain_wait(queue->wq, 0));
	} else if (dice < 97) {
		ul_workqueue_get_stats(queue->wq, &stats);
		REQUIRE(stats.nr_started >= stats.nr_completed);
	} else if (!queue->max_active) {
		ul_workqueue_set_max_active(queue->wq, 1 + dice % 7);
	}
}

static void *queuer_main(void *arg)
{
	unsigned int seed = (unsigned int)(uintptr_t)arg;

	for (long i = 0; i < nr_ops; i++) {
		unsigned int dice = rand_r(&seed) % 100;
		struct item *item = &items[rand_r(&seed) % NR_ITEMS];

		op(dice, item, (rand_r(&seed) % 3) * MS / 2);
		if (i % 500 == 499)
			SET(create_mode,
			    (i / 500) % 3 ? CREATE_WORKS : CREATE_FAILS);
	}
	return NULL;
}

static void items_init(unsigned int seed)
{
	for (int i = 0; i < NR_ITEMS; i++) {
		items[i] = (struct item){
			.queue = &queues[i % NR_QUEUES],
			.seed = seed + i,
		};
		ul_work_init(&items[i].work, item_run, i);
		items[i].work.weight = 1 + i / NR_QUEUES % 3;
		items[i].nr_accepted = 1;
		REQUIRE(ul_queue_work(items[i].queue->wq, &items[i].work));
	}
}

static void items_check(void)
{
	for (int i = 0; i < NR_ITEMS; i++) {
		item_cancel_sync(&items[i]);
		REQUIRE(items[i].nr_accepted ==
			items[i].nr_runs + items[i].nr_cancelled);
	}
}

/* What the run went through: a stress that reached nothing proves nothing. */
static void stress_report(struct host *host)
{
	struct ul_workqueue_stats stats;
	struct ul_pool_stats pool;
	long nr_runs = 0;

	for (int i = 0; i < NR_ITEMS; i++)
		nr_runs += items[i].nr_runs;
	ul_pool_get_stats(host->pool, &pool);
	printf("runs %ld parcels %ld attended %d created %llu culled %llu "
	       "failed %llu",
	       nr_runs, nr_parcels_received, host->nr_attended,
	       (unsigned long long)pool.nr_created,
	       (unsigned long long)pool.nr_culled,
	       (unsigned long long)pool.nr_create_failures);
	for (int i = 0; i < NR_QUEUES; i++) {
		ul_workqueue_get_stats(queues[i].wq, &stats);
		printf(" rescued %llu", (unsigned long long)stats.nr_rescued);
	}
	printf("\n");
}

static void stress(unsigned int seed)
{
	pthread_t queuers[NR_QUEUERS];
	struct host host;

	host_start(&host, MS, seed % 2 ? MS / 20 : 0);
	queue_open(&queues[0], &host, 3, 0);
	queue_open(&queues[1], &host, 1, UL_WQ_RESCUER);
	queue_open(&queues[2], &host, 16, UL_WQ_RESCUER);
	queues[2].max_active = 0;
	items_init(seed);
	for (long i = 0; i < NR_QUEUERS; i++)
		pthread_create(&queuers[i], NULL, queuer_main,
			       (void *)(uintptr_t)(seed * 16 + i));
	for (int i = 0; i < NR_QUEUERS; i++)
		pthread_join(queuers[i], NULL);
	SET(create_mode, CREATE_WORKS);
	for (int i = 0; i < NR_QUEUES; i++)
		REQUIRE(!ul_workqueue_drain_wait(queues[i].wq, 0));
	items_check();
	REQUIRE(GET(nr_parcels_sent) == GET(nr_parcels_received));
	stress_report(&host);
	for (int i = 0; i < NR_QUEUES; i++)
		queue_close(&queues[i]);
	host_stop(&host);
}

/* ---- rescue: no thread can be made, or none comes ---- */

static void rescue(unsigned int seed)
{
	struct ul_workqueue_stats stats;
	struct host host;
	uint64_t ticket = 0;

	SET(create_mode, seed % 2 ? CREATE_FAILS : CREATE_HANGS);
	host_start(&host, MS, 0);
	queue_open(&queues[0], &host, 4, 0);
	queue_open(&queues[1], &host, 4, UL_WQ_RESCUER);
	for (long i = 0; i < nr_ops; i++)
		parcel_send(&queues[1]);
	parcel_send(&queues[0]);
	REQUIRE(!ul_workqueue_flush_wait(queues[1].wq, &ticket));
	ul_workqueue_get_stats(queues[1].wq, &stats);
	REQUIRE(stats.nr_rescued == (uint64_t)nr_ops && stats.nr_maydays);
	ul_workqueue_get_stats(queues[0].wq, &stats);
	REQUIRE(!stats.nr_started);
	SET(create_mode, CREATE_WORKS);
	queue_close(&queues[0]);
	queue_close(&queues[1]);
	host_stop(&host);
	REQUIRE(GET(nr_parcels_received) == nr_ops + 1);
}

/* ---- churn: everything made and unmade, workers culled between ---- */

static void churn_once(void)
{
	struct ul_pool_stats stats;
	struct host host;

	host_start(&host, 0, 0);
	for (int i = 0; i < NR_QUEUES; i++)
		queue_open(&queues[i], &host, 8, i ? UL_WQ_RESCUER : 0);
	items_init(1);
	for (int i = 0; i < NR_ITEMS; i++) {
		struct item *item = &items[i];

		if (i % 4 == 0)		/* close cancels it */
			ul_work_queue_delayed(item->queue->wq, &item->work,
					      (i % 8 ? 1 : 1000) * MS, 1);
	}
	queue_close(&queues[0]);
	queue_close(&queues[1]);
	do	/* the last workqueue's items are done, so all are idle */
		ul_pool_get_stats(host.pool, &stats);
	while (stats.nr_workers > 2);
	queue_close(&queues[2]);
	host_stop(&host);
}

int main(int argc, char **argv)
{
	unsigned int seed = argc > 2 ? atoi(argv[2]) : 1;

	nr_ops = argc > 3 ? atol(argv[3]) : 1000;
	if (argc > 1 && !strcmp(argv[1], "stress"))
		stress(seed);
	else if (argc > 1 && !strcmp(argv[1], "rescue"))
		rescue(seed);
	else if (argc > 1 && !strcmp(argv[1], "churn"))
		for (long i = 0; i < nr_ops; i++)
			churn_once();
	else
		return 2;
	return 0;
}
