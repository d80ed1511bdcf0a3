/* SPDX-License-Identifier: MIT */
/*
 * workqueue.h - what C users of the workqueue see; Python's part, which they
 * may call too (cancel, flush, disable), is in ul.h.
 */
#ifndef UL_WORKQUEUE_H
#define UL_WORKQUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "ul.h"

/*
 * A work function returns 0 when its work is over: from then on the workqueue
 * does not touch the item, which may be freed or queued again by then. It
 * returns UL_WORK_ATTEND when Python is needed: ul_worker_run() hands item and
 * cookie to Python and, when Python comes back, calls the function again.
 */
enum {
	UL_WORK_DONE = 0,
	UL_WORK_ATTEND = 1
};

typedef int (*ul_work_func)(struct ul_work *work);

struct ul_list {
	struct ul_list		*next, *prev;
};

/*
 * Embedded by its user, who owns it; must stay while pending. It belongs to
 * the workqueue that it was last queued on, and may go to another one when it
 * is neither pending nor running.
 * I: set at init.  U: the user's own.  A: atomic.  L: under its pool's lock.
 */
struct ul_work {
	ul_work_func		func;		/* I */
	uint64_t		cookie;		/* I: names it to Python */
	void			*attend;	/* U: set by func before ATTEND */
	struct ul_workqueue	*wq;		/* A: borrowed; NULL: never queued */
	struct ul_list		node;		/* L: in the list of its state */
	struct ul_list		flushers;	/* L: who waits for this queueing */
	uint64_t		expires_ns;	/* L: WORK_DELAYED: when */
	uint16_t		nr_disables;	/* L */
	uint8_t			state;		/* L: enum work_state */
	uint8_t			color;		/* L: its epoch's slot */
	uint16_t		weight;		/* U: counts so many against
						 * max_active; set when idle */
};

void ul_work_init(struct ul_work *work, ul_work_func func, uint64_t cookie);
/* False if the item was pending already, or cannot be queued now. */
bool ul_queue_work(struct ul_workqueue *wq, struct ul_work *work);
/* The same for each of several: one lock, and one wake-up at the most. */
void ul_queue_works(struct ul_workqueue *wq, struct ul_work *const *works,
		    unsigned int nr_works);

#endif
