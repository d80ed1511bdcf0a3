/* SPDX-License-Identifier: MIT */
/*
 * workqueue.h - what C users of the workqueue see; Python's part is in ul.h.
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
enum { UL_WORK_DONE = 0, UL_WORK_ATTEND = 1 };

typedef int (*ul_work_func)(struct ul_work *work);

struct ul_work {
	ul_work_func		func;
	uint64_t		cookie;		/* I: names it to Python */
	void			*attend;	/* set by func before ATTEND */
};

void ul_work_init(struct ul_work *work, ul_work_func func, uint64_t cookie);
/* False if the item was pending already. */
bool ul_queue_work(struct ul_workqueue *wq, struct ul_work *work);

#endif
