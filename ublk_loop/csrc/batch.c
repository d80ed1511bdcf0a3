/* SPDX-License-Identifier: MIT */
/*
 * batch.c - UBLK_F_BATCH_IO: many tags a command.
 *
 * One multishot command fetches for all tags: the driver writes the numbers of
 * those that have a request into provided buffers.  Results are gathered in
 * elems and go to the driver in one command a round; elems must not change
 * before the kernel has read them, that is before the submit.
 */
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>

/* The driver fills one buffer a cqe, 128 tags at the most. */
#define FETCH_TAGS	128
#define FETCH_BUFS_MAX	256

/*
 * Where the provided buffers may lie: where no mapping of an x86-64 process is
 * unless it asks for the address (executable and heap begin at 0x55..., the
 * rest comes down from 0x7f...).
 */
#define BUFS_FROM	(UINT64_C(1) << 44)
#define BUFS_TO		(UINT64_C(1) << 46)
#define BUFS_ALIGN	(UINT64_C(1) << 16)	/* the largest page size */
#define BUFS_TRIES	16

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Of one element of PREP_IO_CMDS and COMMIT_IO_CMDS. */
struct batch_elem {
	struct ublk_elem_header	header;
	uint64_t		addr;		/* only in copy mode */
};

int ul_batch_init(struct ul_batch *b, unsigned int queue_depth)
{
	b->elem_bytes = b->flags & UBLK_BATCH_F_HAS_BUF_ADDR
				? sizeof(struct batch_elem)
				: sizeof(struct ublk_elem_header);
	b->nr_fetch_bufs = 1;
	while (b->nr_fetch_bufs < queue_depth &&
	       b->nr_fetch_bufs < FETCH_BUFS_MAX)
		b->nr_fetch_bufs *= 2;
	b->elems = calloc(queue_depth, b->elem_bytes);
	return b->elems ? 0 : -ENOMEM;
}

void ul_batch_exit(struct ul_batch *b)
{
	free(b->elems);
}

static size_t batch_ring_bytes(const struct ul_batch *b)
{
	return ul_page_round_up(b->nr_fetch_bufs * sizeof(struct io_uring_buf));
}

static size_t batch_fetch_bytes(const struct ul_batch *b)
{
	return batch_ring_bytes(b) +
	       b->nr_fetch_bufs * FETCH_TAGS * sizeof(uint16_t);
}

static void batch_provide(struct ul_batch *b, unsigned int index)
{
	io_uring_buf_ring_add(b->fetch_ring, b->fetch_bufs + index * FETCH_TAGS,
			      FETCH_TAGS * sizeof(uint16_t), index,
			      io_uring_buf_ring_mask(b->nr_fetch_bufs), 0);
	io_uring_buf_ring_advance(b->fetch_ring, 1);
}

/*
 * Memory at an address of its own: servers are forked from one process and
 * else have all their mappings at the same addresses.
 *
 * The driver (7.0 to 7.3) runs what is left of a killed server's fetch in a
 * kernel worker, and copies tags to the buffer's address there, in whichever
 * address space that CPU last had (docs/reliability.md).  Where nothing is at
 * that address the copy fails, and the requests are issued again.
 */
static void *batch_map_apart(size_t nr_bytes)
{
	const int prot = PROT_READ | PROT_WRITE;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	uint64_t where;
	void *memory;

	for (int i = 0; i < BUFS_TRIES; i++) {
		if (getrandom(&where, sizeof(where), 0) != sizeof(where))
			return MAP_FAILED;
		where = BUFS_FROM + where % (BUFS_TO - BUFS_FROM);
		where -= where % BUFS_ALIGN;
		memory = mmap((void *)(uintptr_t)where, nr_bytes, prot,
			      flags | MAP_FIXED_NOREPLACE, -1, 0);
		if (memory != MAP_FAILED)
			return memory;
	}
	/* A CPU whose address space ends before that. */
	return mmap(NULL, nr_bytes, prot, flags, -1, 0);
}

static int batch_make_bufs(struct ul_batch *b)
{
	struct io_uring_buf_reg reg = {
		.ring_entries = b->nr_fetch_bufs,
		.bgid = b->index,
	};
	void *memory = batch_map_apart(batch_fetch_bytes(b));
	int ret;

	if (memory == MAP_FAILED)
		return -errno;
	b->fetch_ring = memory;
	b->fetch_bufs = (void *)((char *)memory + batch_ring_bytes(b));
	reg.ring_addr = (uint64_t)(uintptr_t)memory;
	ret = io_uring_register_buf_ring(&b->ring->uring, &reg, 0);
	if (ret)
		return ret;
	io_uring_buf_ring_init(b->fetch_ring);
	for (unsigned int i = 0; i < b->nr_fetch_bufs; i++)
		batch_provide(b, i);
	return 0;
}

static struct io_uring_sqe *batch_get_sqe(struct ul_batch *b, uint32_t opcode,
					  unsigned int nr_elem,
					  unsigned int elem_bytes)
{
	struct io_uring_sqe *sqe = ul_get_sqe(b->ring);
	struct ublk_batch_io *cmd;

	cmd = ublk_sqe_prep(sqe, CDEV_INDEX, opcode, sizeof(*cmd));
	sqe->flags = IOSQE_FIXED_FILE;
	cmd->q_id = b->q_id;
	cmd->nr_elem = nr_elem;
	cmd->elem_bytes = elem_bytes;
	return sqe;
}

/* The kernel has yet to read the COMMIT that was queued last. */
static bool batch_is_queued(const struct ul_batch *b)
{
	unsigned int head = IO_URING_READ_ONCE(*b->ring->uring.sq.khead);

	return (int)(b->sq_tail - head) > 0;
}

void ul_batch_add(struct ul_batch *b, uint16_t tag, int32_t res,
		  uint16_t buf_index, uint64_t addr)
{
	struct batch_elem *elem;

	/* What was queued from elems must be in the kernel before it changes. */
	if (!b->nr_elems && batch_is_queued(b))
		io_uring_submit(&b->ring->uring);
	elem = (struct batch_elem *)(b->elems + b->nr_elems++ * b->elem_bytes);
	elem->header.tag = tag;
	elem->header.buf_index = buf_index;
	elem->header.result = res;
	if (b->elem_bytes == sizeof(*elem))
		elem->addr = addr;
}

/* PREP or COMMIT what is in elems. */
static void batch_queue_elems(struct ul_batch *b, uint32_t opcode)
{
	struct io_uring_sqe *sqe;

	sqe = batch_get_sqe(b, opcode, b->nr_elems, b->elem_bytes);
	((struct ublk_batch_io *)sqe->cmd)->flags = b->flags;
	sqe->addr = (uint64_t)(uintptr_t)b->elems;
	sqe->len = b->nr_elems * b->elem_bytes;
	sqe->user_data = UD(CQE_COMMIT, b->index, sqe->len);
	b->nr_elems = 0;
	b->ring->nr_commits++;
	b->sq_tail = b->ring->uring.sq.sqe_tail;
}

void ul_batch_queue_commit(struct ul_batch *b)
{
	if (b->nr_elems)
		batch_queue_elems(b, UBLK_U_IO_COMMIT_IO_CMDS);
}

int ul_batch_handle_commit(struct ul_batch *b, const struct io_uring_cqe *cqe)
{
	b->ring->nr_commits--;
	/* The driver takes every element that it gave us the tag of. */
	if (cqe->res == (int)UD_VALUE(cqe->user_data))
		return 0;
	return cqe->res < 0 ? cqe->res : -EPROTO;
}

static void batch_queue_fetch(struct ul_batch *b)
{
	struct io_uring_sqe *sqe;

	sqe = batch_get_sqe(b, UBLK_U_IO_FETCH_IO_CMDS, FETCH_TAGS,
			    sizeof(uint16_t));
	sqe->rw_flags = UBLK_URING_CMD_MULTISHOT;
	sqe->buf_group = b->index;
	sqe->flags |= IOSQE_BUFFER_SELECT;
	sqe->user_data = UD(CQE_FETCH, b->index, 0);
}

int ul_batch_prepare(struct ul_batch *b)
{
	struct io_uring *uring = &b->ring->uring;
	struct io_uring_cqe *cqe;
	int ret = batch_make_bufs(b);

	if (ret)
		return ret;
	batch_queue_elems(b, UBLK_U_IO_PREP_IO_CMDS);
	ret = io_uring_submit_and_wait(uring, 1);
	if (ret >= 0)
		ret = io_uring_peek_cqe(uring, &cqe);
	if (ret)
		return ret;
	ret = cqe->res;
	io_uring_cqe_seen(uring, cqe);
	b->ring->nr_commits = 0;
	if (!ret)
		batch_queue_fetch(b);
	return ret;
}

void ul_batch_unprepare(struct ul_batch *b)
{
	if (b->fetch_ring)
		munmap(b->fetch_ring, batch_fetch_bytes(b));
	b->fetch_ring = NULL;
}

const uint16_t *ul_batch_tags(const struct ul_batch *b,
			      const struct io_uring_cqe *cqe, int *nr_tags)
{
	unsigned int index = cqe->flags >> IORING_CQE_BUFFER_SHIFT;

	*nr_tags = cqe->res > 0 ? cqe->res / (int)sizeof(uint16_t) : 0;
	return b->fetch_bufs + index * FETCH_TAGS;
}

int ul_batch_end_fetch(struct ul_batch *b, const struct io_uring_cqe *cqe)
{
	if (cqe->flags & IORING_CQE_F_BUFFER)
		batch_provide(b, cqe->flags >> IORING_CQE_BUFFER_SHIFT);
	if (cqe->flags & IORING_CQE_F_MORE)
		return 0;
	if (cqe->res < 0 && cqe->res != -ENOBUFS)
		return cqe->res;
	batch_queue_fetch(b);
	return 0;
}
