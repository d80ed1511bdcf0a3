/* SPDX-License-Identifier: MIT */
/*
 * ring.h - how rings are made, and what an iothread and the parts of its hctxs
 * agree on about theirs, and about memory.
 */
#ifndef UL_RING_H
#define UL_RING_H

#include <errno.h>
#include <liburing.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

/* The ring's file table. */
#define CDEV_INDEX	0		/* /dev/ublkcN */
#define BACKING_INDEX	1		/* the target's file, if it has one */
#define DIRECT_INDEX	2		/* the same, past the page cache */

/* user_data: what completed, of which hctx of the thread, and a value: mostly,
 * for which tag. */
enum hctx_cqe {
	CQE_CMD,			/* a tag's own fetch or commit */
	CQE_ASYNC,			/* I/O on the backing file */
	CQE_WAKE,			/* the poll on wake_fd */
	CQE_FETCH,			/* BATCH_IO: tags */
	CQE_COMMIT,			/* BATCH_IO: how much was committed */
	CQE_BUFFER,			/* pages were not (un)registered */
	CQE_WATCH,			/* the poll on watch_fd */
};
#define UD(kind, hctx, value) \
	((uint64_t)(kind) << 48 | (uint64_t)(hctx) << 32 | (value))
#define UD_KIND(user_data)	((enum hctx_cqe)((user_data) >> 48))
#define UD_HCTX(user_data)	((uint16_t)((user_data) >> 32))
#define UD_VALUE(user_data)	((uint32_t)(user_data))

/* P: for the iothread's own thread only. */
struct ul_ring {
	struct io_uring	uring;		/* P: owned by the iothread */
	unsigned int	nr_commits;	/* BATCH_IO: queued, cqe not yet seen */
};

/* A ring for one thread, the best that the kernel has: one that lacks a flag
 * says -EINVAL.  With @taskrun_flag it says in shared memory that something
 * waits.  There is room for twice @nr_entries cqes. */
static inline int ul_uring_init(struct io_uring *uring, unsigned int nr_entries,
				bool taskrun_flag)
{
	static const unsigned int setups[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_COOP_TASKRUN,
		0,
	};
	unsigned int flags;
	int ret = -EINVAL;

	for (size_t i = 0; ret == -EINVAL && i < 3; i++) {
		flags = setups[i];
		if (flags && taskrun_flag)
			flags |= IORING_SETUP_TASKRUN_FLAG;
		ret = io_uring_queue_init(nr_entries, uring, flags);
	}
	if (!ret)
		io_uring_register_ring_fd(uring);	/* only saves time */
	return ret;
}

static inline size_t ul_page_round_up(size_t nr_bytes)
{
	size_t page = sysconf(_SC_PAGESIZE);

	return (nr_bytes + page - 1) & ~(page - 1);
}

/* Never NULL once the ring is full: what is queued is submitted first. */
static inline struct io_uring_sqe *ul_get_sqe(struct ul_ring *ring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

	while (!sqe) {
		io_uring_submit(&ring->uring);
		sqe = io_uring_get_sqe(&ring->uring);
	}
	return sqe;
}

#endif
