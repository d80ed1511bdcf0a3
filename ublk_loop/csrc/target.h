/* SPDX-License-Identifier: MIT */
/*
 * target.h - a request, and what hctx.c asks of a target.
 */
#ifndef UL_TARGET_H
#define UL_TARGET_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "ublk_abi.h"
#include "workqueue.h"

/*
 * One tag of one hctx, from fetch cqe to commit sqe.  It belongs to the ring
 * thread, then to whoever runs its work, then (done list) to the ring thread
 * again; each hand-over is a release.
 * I: set at create.  R: set by the ring thread before it is queued.
 * W: owned by the worker that runs it.
 */
struct ul_request {
	struct ul_work		work;		/* a concurrent request's item */
	struct ul_request	*next;		/* plug, ordered, done list; the
						 * reads of one work item */
	struct ul_hctx		*hctx;		/* I: borrowed, outlives it */
	struct ul_target	*target;	/* I: borrowed, outlives it */
	void			*buffer;	/* R: of hctx's arena, or shared */
	uint64_t		offset_bytes;	/* R: in the device */
	uint64_t		nr_bytes;	/* R */
	uint32_t		op_flags;	/* R: UBLK_IO_F_* */
	int32_t			res;		/* W: bytes or -errno */
	uint16_t		tag;		/* I: of its hctx's */
	uint16_t		nr_joined;	/* R: the ring's reads, by next */
	uint8_t			op;		/* R: UBLK_IO_OP_* */
	bool			is_shared;	/* R: buffer is the client's */
	bool			past_cache;	/* R: read by direct_fd */
	bool			with_group;	/* R: read, and its group */
	bool			registers;	/* R: UL_RQ_ASYNC by its pages */
	bool			copied_in;	/* W: a WRITE's data is in buffer */
	bool			attending;	/* W: Python has it */
};

/* What became of a request that a target was given. */
enum ul_rq_status {
	UL_RQ_DONE,	/* req->res is set: commit it */
	UL_RQ_QUEUED,	/* with the workqueue: ul_hctx_complete() will come */
	UL_RQ_ASYNC,	/* buffer <-> file: the hctx's ring is to do it */
	UL_RQ_PLUGGED,	/* will be done inline, at the end of the batch at the
			 * latest; ul_hctx_complete() will come */
};

/* How many reads one work item may do at the most. */
#define UL_READS_MAX	16

/* Reads, or writes, that follow each other in the file, and are done as one: up
 * to so many and so much, as what a call costs does not weigh on more. */
#define UL_RUN_MAX		64
#define UL_RUN_BYTES_MAX	(256 * 1024)

struct ul_run {
	struct ul_request	*first;		/* linked by next; NULL: none */
	struct ul_request	*last;
	unsigned int		nr;
	uint64_t		nr_bytes;
	bool			is_fresh;	/* some of it may be new pages */
};

/* What a hctx and a target keep for the length of one batch: the writes that
 * are on their way to the ordered list, in order, reads for the workqueue, and
 * the writes that are done inline next; the file's size is kept for longer.
 */
struct ul_plug {
	struct ul_run		run;		/* policy auto: writes */
	struct ul_request	*head;
	struct ul_request	**tail;
	struct ul_request	*reads[UL_READS_MAX];
	unsigned int		nr_reads;
	uint64_t		file_bytes;	/* policy auto; 0: to be asked */
};

static inline void ul_run_begin(struct ul_run *run, struct ul_request *req)
{
	run->first = req;
	run->last = req;
	run->nr = 1;
	run->nr_bytes = req->nr_bytes;
	run->is_fresh = false;
}

/* Whether @req goes on where the run ends, and can be part of it. */
static inline bool ul_run_takes(const struct ul_run *run,
				const struct ul_request *req)
{
	const struct ul_request *last = run->last;

	return run->nr < UL_RUN_MAX && req->op == last->op &&
	       !((last->op_flags | req->op_flags) & UBLK_IO_F_FUA) &&
	       req->offset_bytes == last->offset_bytes + last->nr_bytes &&
	       run->nr_bytes + req->nr_bytes <= UL_RUN_BYTES_MAX &&
	       req->past_cache == last->past_cache && req->hctx == last->hctx;
}

/* @req is, or will be, linked behind the last one. */
static inline void ul_run_extend(struct ul_run *run, struct ul_request *req)
{
	run->last = req;
	run->nr++;
	run->nr_bytes += req->nr_bytes;
}

static inline void ul_run_fill(const struct ul_run *run, struct iovec *iov)
{
	struct ul_request *req = run->first;

	for (unsigned int i = 0; i < run->nr; i++, req = req->next) {
		iov[i].iov_base = req->buffer;
		iov[i].iov_len = req->nr_bytes;
	}
}

static inline bool ul_op_has_data(uint8_t op)
{
	return op == UBLK_IO_OP_READ || op == UBLK_IO_OP_WRITE;
}

/* For UL_RQ_ASYNC: the file, or -1 where a target never asks for it; and the
 * position in it. */
int ul_target_fd(const struct ul_target *target);
bool ul_target_has_map(const struct ul_target *target);
int ul_target_direct_fd(const struct ul_target *target);
uint64_t ul_target_pos(const struct ul_target *target,
		       const struct ul_request *req);

/* io_uring's answer was short, refused for now, for how the client's memory lies
 * (EINVAL), since its pages were not registered (EFAULT) or since there was no
 * memory for a thread (ECANCELED), or it fails as part of a folio only, perhaps
 * (EIO): the request is to be done again, from or to our buffer, by who may wait. */
static inline bool ul_request_is_undone(const struct ul_request *req,
					int32_t res)
{
	return res == -EAGAIN || res == -EINTR || res == -EINVAL ||
	       res == -EFAULT || res == -ECANCELED ||
	       (res == -EIO && req->op == UBLK_IO_OP_READ && !req->past_cache &&
		ul_target_direct_fd(req->target) >= 0) ||
	       (res >= 0 && res < (int32_t)req->nr_bytes);
}

/* UL_RQ_ASYNC did it. */
void ul_target_note_async(const struct ul_target *target,
			  const struct ul_request *req);

void ul_plug_init(struct ul_plug *plug);
void ul_request_init(struct ul_request *req);
enum ul_rq_status ul_target_queue_rq(struct ul_target *target,
				     struct ul_workqueue *wq,
				     struct ul_plug *plug,
				     struct ul_request *req);
/* As policy 2014 has it: what could not be done inline or by the ring. */
void ul_target_queue_work(struct ul_target *target, struct ul_workqueue *wq,
			  struct ul_plug *plug, struct ul_request *req);
/* Where in our memory a request's data is that lies in a shared buffer; @addr is
 * the io_desc's.  NULL: nowhere that we know of. */
char *ul_target_find_shmem(struct ul_target *target, uint64_t addr,
			   uint64_t nr_bytes);
/* The batch is over: let what was plugged begin. */
void ul_target_commit_rqs(struct ul_target *target, struct ul_workqueue *wq,
			  struct ul_plug *plug);

#endif
