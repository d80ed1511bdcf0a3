/* SPDX-License-Identifier: MIT */
/*
 * batch.h - UBLK_F_BATCH_IO: many tags a command.
 */
#ifndef UL_BATCH_H
#define UL_BATCH_H

#include "ring.h"
#include "ublk_abi.h"

/* Part of a hctx, and for its thread only.
 * I: set by init.  P: set by prepare.
 */
struct ul_batch {
	struct ul_ring		*ring;		/* I: borrowed */
	uint16_t		index;		/* I: of the hctx, on its thread */
	char			*elems;		/* I: owned, [queue_depth] */
	uint16_t		flags;		/* I: UBLK_BATCH_F_* */
	unsigned int		elem_bytes;	/* I: header, address if copied */
	uint16_t		q_id;		/* I */
	unsigned int		nr_elems;	/* in elems, not yet queued */
	unsigned int		sq_tail;	/* behind the last COMMIT */
	unsigned int		nr_fetch_bufs;	/* I: a power of two */
	struct io_uring_buf_ring *fetch_ring;	/* P: owned, see FETCH_TAGS */
	uint16_t		*fetch_bufs;	/* P: owned, behind fetch_ring */
};

/* What is I and not owned is set by the caller. */
int ul_batch_init(struct ul_batch *b, unsigned int queue_depth);
void ul_batch_exit(struct ul_batch *b);
/* PREP all tags, which were added, and queue the fetch; on a new ring. */
int ul_batch_prepare(struct ul_batch *b);
/* After the ring is gone. */
void ul_batch_unprepare(struct ul_batch *b);

/* Gather results, at most queue_depth, then queue one COMMIT of all.  buf_index, addr:
 * for what the tag fetches next, with UBLK_F_AUTO_BUF_REG and without. */
void ul_batch_add(struct ul_batch *b, uint16_t tag, int32_t res,
		  uint16_t buf_index, uint64_t addr);
void ul_batch_queue_commit(struct ul_batch *b);
/* 0, or what was wrong with the answer to a COMMIT. */
int ul_batch_handle_commit(struct ul_batch *b, const struct io_uring_cqe *cqe);

/* What a cqe of the fetch brought. */
const uint16_t *ul_batch_tags(const struct ul_batch *b,
			      const struct io_uring_cqe *cqe, int *nr_tags);
/* The tags were read.  0: more will come.  Else why none will. */
int ul_batch_end_fetch(struct ul_batch *b, const struct io_uring_cqe *cqe);

#endif
