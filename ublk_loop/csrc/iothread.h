/* SPDX-License-Identifier: MIT */
/*
 * iothread.h - the thread behind one or more hctxs, as they see it.
 */
#ifndef UL_IOTHREAD_H
#define UL_IOTHREAD_H

#include <stdatomic.h>
#include <stdbool.h>

#include "ring.h"
#include "spin.h"
#include "target.h"

/* From ul_iothread_create() to ul_iothread_destroy(), which is after its hctxs'.
 * I: set at create, or as hctxs are added.  P: set by prepare, undone as run
 * returns.  R: its own thread only.  A: atomic, any thread.
 */
struct ul_iothread {
	int			cdev_fd;	/* I: /dev/ublkcN, borrowed */
	struct ul_target	*target;	/* I: borrowed */
	struct ul_hctx		**hctxs;	/* I: owned array, borrowed */
	unsigned int		nr_hctxs;	/* I: below 2^16 */
	unsigned int		nr_tags;	/* I: of all hctxs */
	bool			has_buf_table;	/* I: a hctx has AUTO_BUF_REG */
	int			wake_fd;	/* I: owned eventfd */
	int			watch_fd;	/* R: owned, watch.h; or -errno */
	unsigned int		nr_unsure;	/* R: see UNSURE_BATCHES */
	struct ul_ring		ring;		/* P */
	bool			ring_made;	/* P */
	int32_t			tid;		/* P */
	struct ul_spin		spin;		/* R, its limit I */
	uint64_t		nr_requests;	/* R: since the last wait */
	atomic_bool		may_give_back;	/* A: buffers may have pages */
	int			fault;		/* R: first unexpected result */
	bool			leaving;	/* R: has seen `stopping` */
	uint64_t		nr_batches;	/* R: see ul_hctx_stats */
	uint64_t		nr_sleeps;	/* R */
	_Atomic(struct ul_request *) done;	/* A: newest first */
	atomic_bool		sleeping;	/* A */
	atomic_bool		stopping;	/* A */
};

/* Take a hctx in, before prepare: 0 or -errno. */
int ul_iothread_add(struct ul_iothread *t, struct ul_hctx *h);
/* A worker is done with a list of requests; the thread commits them. */
void ul_iothread_hand_back(struct ul_iothread *t, struct ul_request *first,
			   struct ul_request *last);
/* It ends once nothing is in flight; what ends it first is what run returns. */
void ul_iothread_set_fault(struct ul_iothread *t, int fault);

#endif
