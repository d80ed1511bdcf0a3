/* SPDX-License-Identifier: MIT */
/*
 * target.c - what a request does to the backing, and in which order.
 *
 * The order is the 2014 loop-mq commit's: queue_rq gives each READ a work item
 * of its own, so reads run concurrently; everything that writes is appended to
 * one list of the device, and the device's one write_work takes it from there
 * in order of arrival.  Writes to one file exclude each other anyway (inode
 * lock), so running them concurrently would only cost switches.  Policy `base`
 * sends reads down the same list: the loop driver before that commit.
 *
 * The reads of one batch, up to UL_READS_MAX, are one work item, whose weight is
 * their number: its worker starts them all at once by a ring of its own (reads.c)
 * if the file system needs no thread for that, or does them one by one if none
 * waits (tmpfs). Else each is an item.
 *
 * Policy `auto` asks first what can be done without blocking.  What is resident
 * of a file of the page cache is copied from or to its mapping (map.c).  A cold
 * read, and direct I/O, is the hctx's ring's (UL_RQ_ASYNC), but only where the
 * file system can do that without one of io_uring's own threads; in memory
 * (tmpfs) it is done inline.  The first reads of a cold page go past the page
 * cache, which they need not evict anything from.  A write is copied to the
 * mapping in memory, and on a disk where folios are known to be small; else
 * there it is an inline pwrite if it overwrites resident pages, or whole ones,
 * together with its neighbours in the batch.  Everything else
 * goes the way of 2014: writes that must read first, or may wait, flushes,
 * discards (but of a file in memory), all of a network file system; and the write
 * in whose turn the folios of its place are split (folios.c), with those that
 * follow it there.  A flush, or a small FUA write, that is alone is done inline
 * where the last ones were quick (auto_is_quick).
 *
 * A stripe is several files, of each of which it has a loop target that nobody
 * else uses; its requests are done by those, piece by piece, by the works.  A
 * target with metadata has one for the data and one for that.
 *
 * A target in Python runs by the same works: request_run() stops half-way with
 * UL_WORK_ATTEND, Python does the request, and the second call ends it.
 *
 * Locking: ordered_lock guards the ordered list and write_started; the list
 * that write_work took from it, and `current`, belong to write_work alone,
 * which the workqueue never runs twice at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "clock.h"
#include "folios.h"
#include "hctx.h"
#include "map.h"
#include "reads.h"
#include "target.h"

#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))

#define ZEROES_BYTES	(64 * 1024)

/* For file systems without FALLOC_FL_ZERO_RANGE, and for holes; aligned for
 * O_DIRECT. */
static char zeroes[ZEROES_BYTES] __attribute__((aligned(4096)));

/* Who does what is not resident, or is direct. */
enum target_cold {
	COLD_WORKER = 0,
	COLD_INLINE,
	COLD_ASYNC,
};

/* Memory that a client shares with us.  A: atomic, any thread. */
struct shmem_buffer {
	_Atomic(char *)		bytes;		/* A: borrowed; NULL: none */
	_Atomic uint64_t	nr_bytes;	/* A: set before bytes */
};

/* An inline write that is larger than this goes by chunks; smaller ones may be
 * joined. */
#define JOINED_MAX	(32 * 1024)
#define CHUNK_BYTES	(128 * 1024)
/* A discard, or zeroes, of a file in memory that is larger than this is for a
 * worker: it would keep the hctx. */
#define INLINE_MAX	(1024 * 1024)

/* A flush, or a write with FUA, is done inline if it is alone and the last such
 * calls took no longer than this.  After one that did so many have to be fast
 * again; nor is one tried that has more than so much to write back. */
#define QUICK_NS	200000
#define QUICK_AGAIN	16
#define QUICK_DIRTY	(1024 * 1024)

/* A write of whole pages that may be new, to the file or to memory, is done
 * inline unless one took longer than this, as what is dirty is written back first:
 * then write_work has so many. */
#define FRESH_NS	4000000
#define FRESH_AGAIN	64

/* Whether what may have to wait is done inline, by how long it took. */
struct inline_guard {
	uint64_t		limit_ns;	/* I: longer is too long */
	unsigned int		nr_again;	/* I: so many are a worker's then */
	_Atomic unsigned int	nr_to_worker;	/* A: the next ones; a lost update
						 * does not matter */
};

static __thread char chunk[CHUNK_BYTES] __attribute__((aligned(4096)));

/* Lives from before its hctxs to after them.
 * I: set at create.  O: under ordered_lock.  W: write_work's own.
 */
struct ul_target {
	struct ul_target_config	config;		/* I: fd borrowed */
	struct ul_work		write_work;
	pthread_mutex_t		ordered_lock;
	struct ul_plug		ordered;	/* O: borrowed requests */
	bool			write_started;	/* O */
	struct ul_request	*writing;	/* W: taken, not yet run */
	struct ul_request	*current;	/* W: Python has it */
	struct ul_map		*map;		/* I: owned; NULL: not mapped */
	struct ul_folios	*folios;	/* I: owned; NULL: any size will do */
	enum target_cold	cold;		/* I: loop */
	bool			has_mtime;	/* I: direct writes change it */
	_Atomic uint64_t	touched_ns;	/* A: when mtime was set last */
	struct inline_guard	sync;		/* flushes and FUA writes */
	struct inline_guard	fresh;		/* writes of new pages */
	_Atomic uint64_t	dirty_bytes;	/* A: written since a flush, or about */
	struct shmem_buffer	shmem[UL_SHMEM_MAX];
};

static int target_write_work(struct ul_work *work);

/* Whether the file system can say -EAGAIN (FMODE_NOWAIT). */
static bool fd_has_nowait(int fd)
{
	char page[4096] __attribute__((aligned(4096)));
	struct iovec iov = { page, sizeof(page) };

	return preadv2(fd, &iov, 1, 0, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP;
}

static bool fd_is_regular(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && S_ISREG(st.st_mode);
}

/* A block device is not, though its node in /dev is. */
static bool fd_is_in_memory(int fd)
{
	struct statfs fs;

	return fd_is_regular(fd) && !fstatfs(fd, &fs) &&
	       (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

static int target_make_map(struct ul_target *t)
{
	const struct ul_target_config *config = &t->config;
	bool read_only = config->flags & UL_TARGET_READ_ONLY;
	int ret;

	ret = ul_map_create(config->fd, config->offset_bytes,
			    config->dev_nr_bytes, read_only,
			    t->cold == COLD_INLINE, &t->map);
	if (ret || read_only)
		return ret == -EOPNOTSUPP ? 0 : ret;
	ret = ul_folios_create(t->map, config->direct_fd, config->offset_bytes,
			       config->dev_nr_bytes, &t->folios);
	if (ret) {
		ul_map_destroy(t->map);
		t->map = NULL;
	}
	return ret;
}

static int target_init_loop(struct ul_target *t)
{
	int fd = t->config.fd;

	if (fd_is_in_memory(fd))
		t->cold = COLD_INLINE;
	else if (fd_has_nowait(fd))
		t->cold = COLD_ASYNC;
	t->has_mtime = fd_is_regular(fd);
	if (t->config.policy != UL_POLICY_AUTO ||
	    !(t->config.flags & UL_TARGET_MAP))
		return 0;
	return target_make_map(t);
}

int ul_target_create(const struct ul_target_config *config,
		     struct ul_target **target)
{
	struct ul_target *t;
	int ret;

	if (config->kind > UL_TARGET_INTEGRITY ||
	    config->policy > UL_POLICY_AUTO)
		return -EINVAL;
	t = calloc(1, sizeof(*t));
	if (!t)
		return -ENOMEM;
	t->config = *config;
	/* A read beside a write of the same block would find the data of one
	 * and the metadata of the other. */
	if (config->kind == UL_TARGET_INTEGRITY)
		t->config.policy = UL_POLICY_BASE;
	if (config->kind == UL_TARGET_LOOP) {
		ret = target_init_loop(t);
		if (ret) {
			free(t);
			return ret;
		}
	}
	t->sync = (struct inline_guard){ QUICK_NS, QUICK_AGAIN, 1 };
	t->fresh = (struct inline_guard){ FRESH_NS, FRESH_AGAIN, 0 };
	pthread_mutex_init(&t->ordered_lock, NULL);
	ul_plug_init(&t->ordered);
	ul_work_init(&t->write_work, target_write_work, config->cookie);
	*target = t;
	return 0;
}

void ul_target_destroy(struct ul_target *t)
{
	if (!t)
		return;
	ul_folios_destroy(t->folios);
	ul_map_destroy(t->map);
	pthread_mutex_destroy(&t->ordered_lock);
	free(t);
}

int ul_target_set_shmem(struct ul_target *t, uint16_t index, void *bytes,
			uint64_t nr_bytes)
{
	if (index >= UL_SHMEM_MAX)
		return -EINVAL;
	atomic_store(&t->shmem[index].nr_bytes, nr_bytes);
	atomic_store(&t->shmem[index].bytes, bytes);
	return 0;
}

char *ul_target_find_shmem(struct ul_target *t, uint64_t addr,
			   uint64_t nr_bytes)
{
	uint16_t index = ublk_shmem_zc_index(addr);
	uint64_t offset = ublk_shmem_zc_offset(addr);
	struct shmem_buffer *buffer = &t->shmem[index % UL_SHMEM_MAX];
	char *bytes;

	/* Python would touch memory that its owner may cut short. */
	if (t->config.kind != UL_TARGET_LOOP || index >= UL_SHMEM_MAX)
		return NULL;
	bytes = atomic_load(&buffer->bytes);
	if (!bytes || offset + nr_bytes > atomic_load(&buffer->nr_bytes))
		return NULL;
	return bytes + offset;
}

int ul_target_is_in_memory(int32_t fd)
{
	return fd_is_in_memory(fd);
}

int ul_target_probe_punch(int32_t fd, uint64_t offset_bytes, uint64_t nr_bytes)
{
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      offset_bytes, nr_bytes))
		return -errno;
	return 0;
}

void ul_plug_init(struct ul_plug *plug)
{
	plug->head = NULL;
	plug->tail = &plug->head;
	plug->nr_reads = 0;
	plug->file_bytes = 0;
	plug->run.first = NULL;
}

static void plug_add(struct ul_plug *plug, struct ul_request *req)
{
	req->next = NULL;
	*plug->tail = req;
	plug->tail = &req->next;
}

/* ---- what a request does to a file ---- */

static ssize_t loop_pread(const struct ul_target *t, char *data,
			  uint64_t nr_bytes, uint64_t pos)
{
	ssize_t n = pread(t->config.fd, data, nr_bytes, pos);

	/* The page cache reads, and fails, a folio: with one bad sector that is
	 * up to 2 MiB of good ones.  Past it each is read for itself. */
	if (n < 0 && errno == EIO && t->config.direct_fd >= 0) {
		n = pread(t->config.direct_fd, data, nr_bytes, pos);
		errno = EIO;
	}
	return n;
}

/* All of it or an errno: to the driver (v7.3) any result >= 0 of a WRITE
 * means the whole of it.  Zero bytes means that the file ended early.
 */
static int32_t loop_read_to(const struct ul_target *t, char *data,
			    uint64_t offset_bytes, uint64_t nr_bytes)
{
	uint64_t pos = t->config.offset_bytes + offset_bytes;
	uint64_t done = 0;
	ssize_t n;

	while (done < nr_bytes) {
		n = loop_pread(t, data + done, nr_bytes - done, pos + done);
		if (n > 0)
			done += n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int32_t loop_read(const struct ul_target *t, struct ul_request *req)
{
	int32_t res =
		loop_read_to(t, req->buffer, req->offset_bytes, req->nr_bytes);

	return res ? res : (int32_t)req->nr_bytes;
}

static int32_t loop_write_from(const struct ul_target *t, const char *data,
			       uint64_t data_bytes, uint64_t offset_bytes,
			       uint64_t nr_bytes, int rwf)
{
	uint64_t pos = t->config.offset_bytes + offset_bytes;
	uint64_t done = 0;
	struct iovec iov;
	ssize_t n;

	while (done < nr_bytes) {
		/* `data` may be shorter than the range: it repeats. */
		iov.iov_base = (char *)data + done % data_bytes;
		iov.iov_len = data_bytes - done % data_bytes;
		if (iov.iov_len > nr_bytes - done)
			iov.iov_len = nr_bytes - done;
		n = pwritev2(t->config.fd, &iov, 1, pos + done, rwf);
		if (n > 0)
			done += n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	if (t->map)
		ul_map_note_resident(t->map, offset_bytes, nr_bytes);
	return 0;
}

static int32_t loop_write(const struct ul_target *t, struct ul_request *req)
{
	int rwf = req->op_flags & UBLK_IO_F_FUA ? RWF_DSYNC : 0;
	int32_t res;

	res = loop_write_from(t, req->buffer, req->nr_bytes, req->offset_bytes,
			      req->nr_bytes, rwf);
	return res ? res : (int32_t)req->nr_bytes;
}

/* ---- neighbouring writes ---- */

static bool run_write_as_one(const struct ul_target *t,
			     const struct ul_run *run)
{
	struct iovec iov[UL_RUN_MAX];

	ul_run_fill(run, iov);
	if (pwritev2(t->config.fd, iov, run->nr, ul_target_pos(t, run->first),
		     0) != (ssize_t)run->nr_bytes)
		return false;
	if (t->map)
		ul_map_note_resident(t->map, run->first->offset_bytes,
				     run->nr_bytes);
	return true;
}

/* Write it, and hand it back.  If not all went, each is written by itself: it
 * has to have its own result. */
static void run_execute(const struct ul_target *t, struct ul_run *run)
{
	bool is_done = run->nr > 1 && run_write_as_one(t, run);

	for (struct ul_request *req = run->first; req; req = req->next)
		req->res = is_done ? (int32_t)req->nr_bytes
				   : loop_write(t, req);
	ul_hctx_complete_list(run->first, run->last);
	run->first = NULL;
}

static int32_t loop_flush(const struct ul_target *t)
{
	while (fdatasync(t->config.fd)) {
		if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int32_t loop_fallocate(const struct ul_target *t, int mode,
			      const struct ul_request *req)
{
	off_t pos = t->config.offset_bytes + req->offset_bytes;

	while (fallocate(t->config.fd, mode | FALLOC_FL_KEEP_SIZE, pos,
			 req->nr_bytes)) {
		if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int32_t loop_discard(const struct ul_target *t,
			    const struct ul_request *req)
{
	int32_t res = loop_fallocate(t, FALLOC_FL_PUNCH_HOLE, req);

	if (t->map)
		ul_map_forget(t->map, req->offset_bytes, req->nr_bytes);
	return res;
}

static int32_t loop_write_zeroes(const struct ul_target *t,
				 const struct ul_request *req)
{
	bool keep = req->op_flags & UBLK_IO_F_NOUNMAP;
	int32_t res;

	res = loop_fallocate(
		t, keep ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE, req);
	if (res == -EOPNOTSUPP)
		res = loop_write_from(t, zeroes, ZEROES_BYTES,
				      req->offset_bytes, req->nr_bytes, 0);
	if (t->map)
		ul_map_forget(t->map, req->offset_bytes, req->nr_bytes);
	if (!res && req->op_flags & UBLK_IO_F_FUA)
		res = loop_flush(t);
	return res;
}

static int32_t loop_execute(const struct ul_target *t, struct ul_request *req)
{
	switch (req->op) {
	case UBLK_IO_OP_READ:
		return loop_read(t, req);
	case UBLK_IO_OP_WRITE:
		return loop_write(t, req);
	case UBLK_IO_OP_FLUSH:
		return loop_flush(t);
	case UBLK_IO_OP_DISCARD:
		return loop_discard(t, req);
	case UBLK_IO_OP_WRITE_ZEROES:
		return loop_write_zeroes(t, req);
	default:
		return -EOPNOTSUPP;
	}
}

/* A discard's length may not fit a result; 0 says as much. */
static int32_t null_execute(const struct ul_request *req)
{
	return ul_op_has_data(req->op) ? req->nr_bytes : 0;
}

/* ---- what a request does to the files of a stripe ---- */

/* A request's data: chunk by chunk, from one file to the next. */
static int32_t stripe_transfer(const struct ul_target_config *config,
			       const struct ul_request *req)
{
	uint64_t chunk_bytes = config->chunk_bytes, done = 0, offset;
	struct ul_request piece = *req;
	int32_t res;

	for (; done < req->nr_bytes; done += piece.nr_bytes) {
		offset = req->offset_bytes + done;
		piece.offset_bytes =
			offset / chunk_bytes / config->nr_parts * chunk_bytes +
			offset % chunk_bytes;
		piece.nr_bytes = chunk_bytes - offset % chunk_bytes;
		if (piece.nr_bytes > req->nr_bytes - done)
			piece.nr_bytes = req->nr_bytes - done;
		piece.buffer = (char *)req->buffer + done;
		res = loop_execute(
			config->parts[offset / chunk_bytes % config->nr_parts],
			&piece);
		if (res < 0)
			return res;
	}
	return done;
}

/* How much of what lies in front of @offset_bytes is in one of the files. */
static uint64_t stripe_bytes_before(const struct ul_target_config *config,
				    uint32_t part, uint64_t offset_bytes)
{
	uint64_t chunk_bytes = config->chunk_bytes;
	uint64_t row_bytes = chunk_bytes * config->nr_parts;
	uint64_t before = offset_bytes / row_bytes * chunk_bytes;
	uint64_t first = part * chunk_bytes, end = offset_bytes % row_bytes;

	if (end <= first)
		return before;
	return before + (end - first < chunk_bytes ? end - first : chunk_bytes);
}

/* Without data a range is one range of each file; a flush is for all of them. */
static int32_t stripe_each(const struct ul_target_config *config,
			   const struct ul_request *req)
{
	uint64_t end = req->offset_bytes + req->nr_bytes;
	struct ul_request piece = *req;
	int32_t res;

	for (uint32_t i = 0; i < config->nr_parts; i++) {
		piece.offset_bytes =
			stripe_bytes_before(config, i, req->offset_bytes);
		piece.nr_bytes = stripe_bytes_before(config, i, end) -
				 piece.offset_bytes;
		if (!piece.nr_bytes && req->op != UBLK_IO_OP_FLUSH)
			continue;
		res = loop_execute(config->parts[i], &piece);
		if (res < 0)
			return res;
	}
	return 0;
}

/* ---- data with metadata (UBLK_F_INTEGRITY) ---- */

/* What was never written, or without metadata, has these bytes for it, which
 * turn the kernel's checks of a block off. */
#define METADATA_NONE	0xff

/* The next piece of a request's metadata: to the file, from the request or, of
 * one without, METADATA_NONE; or from the file to the request. */
static int32_t metadata_piece(const struct ul_target *file,
			      struct ul_request *req, uint64_t pos,
			      uint64_t done, uint64_t nr_bytes)
{
	bool has_metadata = req->op_flags & UBLK_IO_F_INTEGRITY;
	struct ul_request piece = { .buffer = chunk,
				    .offset_bytes = pos + done,
				    .nr_bytes = nr_bytes,
				    .op_flags = req->op_flags };
	int32_t res = 0;

	if (!has_metadata || !file)
		memset(chunk, METADATA_NONE, nr_bytes);
	if (req->op != UBLK_IO_OP_READ) {
		if (has_metadata)
			res = ul_hctx_copy_metadata(req, chunk, done, nr_bytes);
		return res ? res : loop_write(file, &piece);
	}
	if (file)
		res = loop_read(file, &piece);
	return res < 0 ? res
		       : ul_hctx_copy_metadata(req, chunk, done, nr_bytes);
}

static int32_t metadata_transfer(const struct ul_target_config *config,
				 struct ul_request *req)
{
	const struct ul_target *file = config->nr_parts ? config->parts[1]
							: NULL;
	uint64_t per_block = config->metadata_bytes;
	uint64_t pos = req->offset_bytes / config->chunk_bytes * per_block;
	uint64_t nr_bytes = req->nr_bytes / config->chunk_bytes * per_block, n;
	int32_t res;

	if (req->op == UBLK_IO_OP_READ ? !(req->op_flags & UBLK_IO_F_INTEGRITY)
				       : !file)
		return 0;
	for (uint64_t done = 0; done < nr_bytes; done += n) {
		n = nr_bytes - done < CHUNK_BYTES ? nr_bytes - done
						  : CHUNK_BYTES;
		res = metadata_piece(file, req, pos, done, n);
		if (res < 0)
			return res;
	}
	return 0;
}

/* The data first: a write that is cut off between the two does not pass the
 * check, and one that fails leaves what was there. */
static int32_t integrity_execute(const struct ul_target_config *config,
				 struct ul_request *req)
{
	int32_t res = null_execute(req), ret;

	if (config->nr_parts)
		res = loop_execute(config->parts[0], req);
	if (res < 0)
		return res;
	if (req->op != UBLK_IO_OP_FLUSH)
		ret = metadata_transfer(config, req);
	else
		ret = config->nr_parts ? loop_flush(config->parts[1]) : 0;
	return ret < 0 ? ret : res;
}

static int32_t target_execute(const struct ul_target *t, struct ul_request *req)
{
	if (t->config.kind == UL_TARGET_INTEGRITY)
		return integrity_execute(&t->config, req);
	if (t->config.kind == UL_TARGET_NULL)
		return null_execute(req);
	if (t->config.kind != UL_TARGET_STRIPE)
		return loop_execute(t, req);
	if (ul_op_has_data(req->op))
		return stripe_transfer(&t->config, req);
	return stripe_each(&t->config, req);
}

/* ---- how long that takes ---- */

/* Whether the next one is done inline; asked once for each. */
static bool guard_allows(struct inline_guard *guard)
{
	unsigned int nr = atomic_load_explicit(&guard->nr_to_worker,
					       memory_order_relaxed);

	if (nr)
		atomic_store_explicit(&guard->nr_to_worker, nr - 1,
				      memory_order_relaxed);
	return !nr;
}

static void guard_note(struct inline_guard *guard, uint64_t nr_ns)
{
	if (nr_ns > guard->limit_ns)
		atomic_store_explicit(&guard->nr_to_worker, guard->nr_again,
				      memory_order_relaxed);
}

static void target_note_dirty(struct ul_target *t, const struct ul_request *req)
{
	uint64_t n =
		atomic_load_explicit(&t->dirty_bytes, memory_order_relaxed);

	if (req->op == UBLK_IO_OP_FLUSH)
		n = 0;
	else if (req->op == UBLK_IO_OP_WRITE)
		n += req->nr_bytes;
	else
		return;
	atomic_store_explicit(&t->dirty_bytes, n, memory_order_relaxed);
}

/* It ends once something is on the disk; a write that does not says nothing of
 * how long that takes. */
static bool request_is_sync(const struct ul_request *req)
{
	return req->op == UBLK_IO_OP_FLUSH ||
	       (req->op == UBLK_IO_OP_WRITE && req->op_flags & UBLK_IO_F_FUA);
}

static int32_t target_execute_timed(struct ul_target *t, struct ul_request *req)
{
	uint64_t begin_ns;
	int32_t res;

	if (t->config.policy != UL_POLICY_AUTO || !request_is_sync(req))
		return target_execute(t, req);
	begin_ns = now_ns();
	res = target_execute(t, req);
	guard_note(&t->sync, now_ns() - begin_ns);
	return res;
}

/* ---- the works ---- */

/* Start a request, or end one that Python was given. */
static int request_run(struct ul_target *t, struct ul_request *req,
		       struct ul_work *work)
{
	int ret;

	if (!req->attending) {
		ret = req->copied_in ? 0 : ul_hctx_copy_in(req);
		if (ret) {
			req->res = ret;
		} else if (t->config.kind == UL_TARGET_PYTHON) {
			req->attending = true;
			req->res = -EIO;	/* should Python not say */
			work->attend = req;
			return UL_WORK_ATTEND;
		} else {
			req->res = target_execute_timed(t, req);
		}
	}
	req->attending = false;
	ul_hctx_end(req, req->res);
	ul_hctx_complete(req);
	return UL_WORK_DONE;
}

/* A read that the ring of its worker has done; again if that must wait. */
static void read_end(struct ul_request *req, int32_t res)
{
	if (ul_request_is_undone(req, res))
		res = loop_read(req->target, req);
	ul_hctx_end(req, res);
}

/* The first of the list, and those that follow it in the file, by one call; what
 * was not read whole is read by itself.  Returns the last of them. */
static struct ul_request *reads_run_one(struct ul_request *first)
{
	const struct ul_target *t = first->target;
	struct iovec iov[UL_RUN_MAX];
	struct ul_request *req = first;
	struct ul_run run;
	bool is_done;

	ul_run_begin(&run, first);
	while (run.last->next && ul_run_takes(&run, run.last->next))
		ul_run_extend(&run, run.last->next);
	ul_run_fill(&run, iov);
	is_done = run.nr > 1 &&
		  preadv(t->config.fd, iov, run.nr, ul_target_pos(t, first)) ==
			  (ssize_t)run.nr_bytes;
	for (unsigned int i = 0; i < run.nr; i++, req = req->next)
		read_end(req,
			 is_done ? (int32_t)req->nr_bytes : loop_read(t, req));
	return run.last;
}

/* One after another, as none waits; handed back as one. */
static void reads_run_in_order(struct ul_request *first)
{
	struct ul_request *req = first, *last = first;

	for (; req; req = last->next)
		last = reads_run_one(req);
	ul_hctx_complete_list(first, last);
}

static int target_read_work(struct ul_work *work)
{
	struct ul_request *req = container_of(work, struct ul_request, work);
	const struct ul_target *t = req->target;

	if (work->weight == 1)
		return request_run(req->target, req, work);
	if (t->cold != COLD_ASYNC || ul_reads_run(t->config.fd, req, read_end))
		reads_run_in_order(req);
	return UL_WORK_DONE;
}

/* The next request in order; NULL ends this turn of write_work. */
static struct ul_request *target_next_ordered(struct ul_target *t)
{
	struct ul_request *req;

	if (!t->writing) {
		pthread_mutex_lock(&t->ordered_lock);
		t->writing = t->ordered.head;
		ul_plug_init(&t->ordered);
		if (!t->writing)
			t->write_started = false;
		pthread_mutex_unlock(&t->ordered_lock);
	}
	req = t->writing;
	if (req)
		t->writing = req->next;
	return req;
}

/* Do the request and those that follow it as one; false: there are none, or a
 * copy failed, which is then the way to tell why. */
static bool ordered_run(struct ul_target *t, struct ul_request *req)
{
	struct ul_run run;
	struct ul_request *next;

	if (t->config.kind != UL_TARGET_LOOP ||
	    t->config.policy == UL_POLICY_BASE || req->op != UBLK_IO_OP_WRITE)
		return false;
	ul_run_begin(&run, req);
	for (next = req->next; next && ul_run_takes(&run, next);
	     next = next->next)
		ul_run_extend(&run, next);
	if (run.nr == 1)
		return false;
	for (; req != next; req = req->next) {
		if (!req->copied_in && ul_hctx_copy_in(req))
			return false;
		req->copied_in = true;
	}
	run.last->next = NULL;
	t->writing = next;
	run_execute(t, &run);
	return true;
}

static int target_write_work(struct ul_work *work)
{
	struct ul_target *t = container_of(work, struct ul_target, write_work);
	struct ul_request *req = t->current;

	t->current = NULL;
	if (!req)
		req = target_next_ordered(t);
	while (req) {
		if (t->folios && req->op == UBLK_IO_OP_WRITE)
			ul_folios_split(t->folios, req->offset_bytes);
		if (!ordered_run(t, req) &&
		    request_run(t, req, work) == UL_WORK_ATTEND) {
			t->current = req;
			return UL_WORK_ATTEND;
		}
		req = target_next_ordered(t);
	}
	return UL_WORK_DONE;
}

void ul_request_init(struct ul_request *req)
{
	ul_work_init(&req->work, target_read_work, req->target->config.cookie);
}

static bool target_refuses(const struct ul_target *t,
			   const struct ul_request *req)
{
	return t->config.flags & UL_TARGET_READ_ONLY &&
	       req->op != UBLK_IO_OP_READ && req->op != UBLK_IO_OP_FLUSH;
}

/* Of what is cold under `auto`, its ring could not do more. */
static bool target_joins_reads(const struct ul_target *t)
{
	return t->config.kind == UL_TARGET_LOOP &&
	       t->config.policy == UL_POLICY_2014 && t->cold != COLD_WORKER;
}

static void plug_queue_reads(struct ul_target *t, struct ul_workqueue *wq,
			     struct ul_plug *plug)
{
	struct ul_work *works[UL_READS_MAX];
	unsigned int nr = plug->nr_reads;
	bool join = target_joins_reads(t);

	plug->nr_reads = 0;
	for (unsigned int i = 0; i < nr; i++) {
		works[i] = &plug->reads[i]->work;
		works[i]->weight = join ? nr : 1;
		plug->reads[i]->next = i + 1 < nr ? plug->reads[i + 1] : NULL;
	}
	if (nr)
		ul_queue_works(wq, works, join ? 1 : nr);
}

void ul_target_queue_work(struct ul_target *t, struct ul_workqueue *wq,
			  struct ul_plug *plug, struct ul_request *req)
{
	if (req->op != UBLK_IO_OP_READ || t->config.policy == UL_POLICY_BASE) {
		plug_add(plug, req);
		return;
	}
	plug->reads[plug->nr_reads++] = req;
	if (plug->nr_reads == UL_READS_MAX)
		plug_queue_reads(t, wq, plug);
}

int ul_target_fd(const struct ul_target *t)
{
	return t->config.kind == UL_TARGET_LOOP ? t->config.fd : -1;
}

bool ul_target_has_map(const struct ul_target *t)
{
	return t->map;
}

void ul_target_note_async(const struct ul_target *t,
			  const struct ul_request *req)
{
	if (!t->map || req->past_cache)
		return;
	ul_map_note_resident(t->map, req->offset_bytes, req->nr_bytes);
	if (req->with_group)
		ul_map_ask_group(t->map, req->offset_bytes);
}

int ul_target_direct_fd(const struct ul_target *t)
{
	return t->config.kind == UL_TARGET_LOOP ? t->config.direct_fd : -1;
}

uint64_t ul_target_pos(const struct ul_target *t, const struct ul_request *req)
{
	return t->config.offset_bytes + req->offset_bytes;
}

/* ---- policy auto ---- */

/*
 * Whether the mapping may serve a request: not behind the end of a file that
 * was cut inside a page, where memory takes a write and the file does not.
 * Asked once a batch: its requests were all sent before, so a cut that comes
 * later than the question comes after them.  The iothread keeps the answer for
 * later batches as long as it would hear of a cut (watch.h).
 */
static bool auto_may_map(const struct ul_target *t, struct ul_plug *plug,
			 const struct ul_request *req)
{
	if (!t->map)
		return false;
	if (!plug->file_bytes) {
		off_t end = lseek(t->config.fd, 0, SEEK_END);

		plug->file_bytes = end > 0 ? end : 0;
	}
	return ul_target_pos(t, req) + req->nr_bytes <= plug->file_bytes;
}

/* What a file in memory has not, and has not swapped out either, is zeroes that
 * nobody needs to make. */
static bool auto_read_hole(const struct ul_target *t, struct ul_request *req)
{
	uint64_t pos = ul_target_pos(t, req), n;
	off_t data;

	if (t->cold != COLD_INLINE || req->op != UBLK_IO_OP_READ ||
	    !ul_hctx_is_user_copy(req))
		return false;
	data = lseek(t->config.fd, pos, SEEK_DATA);
	if (data < 0 ? errno != ENXIO : (uint64_t)data < pos + req->nr_bytes)
		return false;
	for (uint64_t done = 0; done < req->nr_bytes; done += n) {
		n = req->nr_bytes - done;
		if (n > ZEROES_BYTES)
			n = ZEROES_BYTES;
		if (ul_hctx_user_copy_part(req, zeroes, done, n))
			return false;
	}
	return true;
}

/* The data, between the driver's pages, or the buffer they were copied to, and
 * the file's.  False: not done, or not all of it. */
static bool auto_use_map(struct ul_target *t, struct ul_plug *plug,
			 struct ul_request *req)
{
	char *data;

	if (!auto_may_map(t, plug, req))
		return false;
	data = ul_map_find(t->map, req->offset_bytes, req->nr_bytes);
	if (!data)
		return auto_read_hole(t, req);
	if (t->cold == COLD_INLINE && req->op == UBLK_IO_OP_WRITE &&
	    req->nr_bytes > JOINED_MAX)
		ul_map_touch(t->map, req->offset_bytes, req->nr_bytes);
	if (ul_hctx_is_user_copy(req))
		return !ul_hctx_user_copy(req, data);
	if (req->op == UBLK_IO_OP_READ)
		return ul_map_copy(req->buffer, data, req->nr_bytes);
	return ul_map_copy(data, req->buffer, req->nr_bytes);
}

/* Between the request's pages and the file's, by way of one small buffer: it stays
 * in the CPU's cache, where a buffer a tag would not. */
static int32_t auto_move_by_chunks(const struct ul_target *t,
				   struct ul_request *req)
{
	bool is_read = req->op == UBLK_IO_OP_READ;
	uint64_t n, offset;
	int32_t ret;

	for (uint64_t done = 0; done < req->nr_bytes; done += n) {
		n = req->nr_bytes - done;
		if (n > CHUNK_BYTES)
			n = CHUNK_BYTES;
		offset = req->offset_bytes + done;
		ret = is_read ? loop_read_to(t, chunk, offset, n) : 0;
		if (!ret)
			ret = ul_hctx_user_copy_part(req, chunk, done, n);
		if (!ret && !is_read)
			ret = loop_write_from(t, chunk, n, offset, n, 0);
		if (ret)
			return ret;
	}
	return req->nr_bytes;
}

/* Of a file in memory. */
static int32_t auto_read_inline(const struct ul_target *t,
				struct ul_request *req)
{
	if (ul_hctx_is_user_copy(req))
		return auto_move_by_chunks(t, req);
	return loop_read(t, req);
}

/*
 * What is read for the first or the second time goes past the page cache, which is
 * cheaper and evicts nothing; what is read more often, or is part of a stream, comes
 * to it.
 * Pages that are dirty are resident, so not asked for here; one that became so
 * meanwhile the file system writes out before it reads the disk.
 */
static bool auto_reads_past_cache(struct ul_target *t,
				  const struct ul_request *req)
{
	return !req->with_group && t->config.direct_fd >= 0 && t->map &&
	       !req->is_shared &&
	       ul_map_is_rarely_read(t->map, req->offset_bytes, req->nr_bytes);
}

/*
 * To read a page by way of the page cache costs more than to read it directly, and
 * 16 at once far less than one by one.  So where some of these were read, and now
 * one for the second time, the page cache reads all of them: this starts it.
 */
static bool auto_reads_group(const struct ul_target *t,
			     const struct ul_request *req)
{
	return t->config.direct_fd >= 0 && t->map &&
	       ul_map_wants_group(t->map, req->offset_bytes, req->nr_bytes) &&
	       ul_map_read_group(t->map, t->config.fd, t->config.offset_bytes,
				 req->offset_bytes);
}

/* To have its pages registered costs a read two commands, and saves it a copy by
 * a system call.  What is small and comes from the page cache may be joined. */
static bool auto_read_registers(const struct ul_request *req)
{
	return (req->past_cache || req->nr_bytes > JOINED_MAX) &&
	       ul_hctx_is_user_copy(req) && !ul_hctx_is_registered(req) &&
	       ul_hctx_can_register(req);
}

static enum ul_rq_status auto_read(struct ul_target *t, struct ul_plug *plug,
				   struct ul_request *req)
{
	if (auto_use_map(t, plug, req)) {
		req->res = req->nr_bytes;
		return UL_RQ_DONE;
	}
	switch (t->cold) {
	case COLD_INLINE:
		req->res = auto_read_inline(t, req);
		return UL_RQ_DONE;
	case COLD_ASYNC:
		req->with_group = auto_reads_group(t, req);
		req->past_cache = auto_reads_past_cache(t, req);
		req->registers = auto_read_registers(req);
		return UL_RQ_ASYNC;
	default:
		return UL_RQ_QUEUED;
	}
}

/* A mapped write would make a disk's file system prepare all of a large folio
 * for each page (ext4, v7.3): there, overwrite resident pages by pwrite, unless
 * folios.c has made them small. */
static bool auto_write_by_map(struct ul_target *t, struct ul_plug *plug,
			      struct ul_request *req)
{
	if (t->cold == COLD_INLINE)
		return auto_use_map(t, plug, req);
	/* Of a page without buffers that becomes dirty ext4 drops the data. */
	return t->folios && !ul_hctx_pins_pages(req) &&
	       ul_folios_take_mapped(t->folios, req->offset_bytes,
				     req->nr_bytes) &&
	       auto_use_map(t, plug, req);
}

static bool target_writes_in_order(struct ul_target *t)
{
	bool is_started;

	pthread_mutex_lock(&t->ordered_lock);
	is_started = t->write_started;
	pthread_mutex_unlock(&t->ordered_lock);
	return is_started;
}

/* Whether a write of new pages is done inline: such writes have not waited
 * lately, and none is with write_work, where it may be waiting now. */
static bool auto_is_fresh_quick(struct ul_target *t, const struct ul_plug *plug)
{
	return !plug->head && !target_writes_in_order(t) &&
	       guard_allows(&t->fresh);
}

/* Whether a write is done by an inline pwrite: it has not to be read first, and
 * is not expected to wait. */
static bool auto_may_pwrite(struct ul_target *t, struct ul_plug *plug,
			    const struct ul_request *req, bool *is_fresh)
{
	uint64_t offset_bytes = req->offset_bytes, nr_bytes = req->nr_bytes;

	*is_fresh = false;
	if (t->cold == COLD_INLINE)
		return true;
	if (!t->map)
		return false;
	/* Behind the end of a file that was cut a pwrite makes it grow again. */
	if (ul_map_is_whole(t->map, offset_bytes, nr_bytes)) {
		if (!ul_map_is_new(t->map, offset_bytes, nr_bytes))
			return true;
		*is_fresh = auto_is_fresh_quick(t, plug);
	}
	return *is_fresh || ul_map_find(t->map, offset_bytes, nr_bytes);
}

static void auto_execute_run(struct ul_target *t, struct ul_run *run)
{
	uint64_t offset_bytes = run->first->offset_bytes;
	uint64_t begin_ns, nr_ns;

	if (!run->is_fresh && !t->folios) {
		run_execute(t, run);
		return;
	}
	begin_ns = now_ns();
	run_execute(t, run);
	nr_ns = now_ns() - begin_ns;
	/* New pages come in folios no larger than the write. */
	if (run->is_fresh)
		guard_note(&t->fresh, nr_ns);
	else
		ul_folios_note_write(t->folios, offset_bytes, run->nr_bytes,
				     nr_ns);
}

static void auto_plug_write(struct ul_target *t, struct ul_plug *plug,
			    struct ul_request *req, bool is_fresh)
{
	struct ul_run *run = &plug->run;

	req->next = NULL;
	if (run->first && ul_run_takes(run, req)) {
		run->last->next = req;
		ul_run_extend(run, req);
	} else {
		if (run->first)
			auto_execute_run(t, run);
		ul_run_begin(run, req);
	}
	run->is_fresh |= is_fresh;
}

/* Of more than a chunk, a copy saved is worth the thread of io_uring's that then
 * writes the page cache of ext4 (others take it without waiting). */
static bool auto_writes_from_pages(const struct ul_target *t,
				   const struct ul_request *req)
{
	return t->cold == COLD_ASYNC && req->nr_bytes > CHUNK_BYTES &&
	       ul_hctx_can_register(req);
}

/*
 * A write has to set the file's mtime to the tick of the clock in which it is,
 * which a file system does not do without waiting: the first ones of each tick
 * would go to a thread of io_uring's (kiocb_modified() in v7.3).  So we set it,
 * once a tick, as an inline pwrite would.  Where that is refused they do go there.
 */
static void auto_touch(struct ul_target *t)
{
	static const struct timespec times[] = { { .tv_nsec = UTIME_OMIT },
						 { .tv_nsec = UTIME_NOW } };
	uint64_t tick_ns;

	if (!t->has_mtime)
		return;
	tick_ns = clock_ns(CLOCK_REALTIME_COARSE);
	if (atomic_exchange_explicit(&t->touched_ns, tick_ns,
				     memory_order_relaxed) != tick_ns)
		futimens(t->config.fd, times);
}

static int32_t auto_write_by_chunks(struct ul_target *t, struct ul_request *req,
				    bool is_fresh)
{
	uint64_t begin_ns = is_fresh ? now_ns() : 0;
	int32_t res = auto_move_by_chunks(t, req);

	if (begin_ns)
		guard_note(&t->fresh, now_ns() - begin_ns);
	return res;
}

static enum ul_rq_status auto_write(struct ul_target *t, struct ul_plug *plug,
				    struct ul_request *req)
{
	bool is_fresh;
	bool is_async = t->cold == COLD_ASYNC &&
			t->config.flags & UL_TARGET_DIRECT;

	if (req->op_flags & UBLK_IO_F_FUA && !is_async &&
	    t->cold != COLD_INLINE)
		return UL_RQ_QUEUED;
	if (t->folios && ul_folios_are_due(t->folios, req->offset_bytes))
		return UL_RQ_QUEUED;
	if (is_async)
		auto_touch(t);
	if (is_async && ul_hctx_is_registered(req))
		return UL_RQ_ASYNC;
	if (auto_write_by_map(t, plug, req)) {
		req->res = req->nr_bytes;
		return UL_RQ_DONE;
	}
	if (req->nr_bytes > JOINED_MAX && ul_hctx_is_user_copy(req) &&
	    auto_may_pwrite(t, plug, req, &is_fresh)) {
		/* Split and not mapped, they would only be slower. */
		if (t->folios && !is_fresh && !ul_hctx_pins_pages(req))
			ul_folios_note_large(t->folios, req->offset_bytes,
					     req->nr_bytes);
		if (auto_writes_from_pages(t, req)) {
			req->registers = !ul_hctx_is_registered(req);
			return UL_RQ_ASYNC;
		}
		req->res = auto_write_by_chunks(t, req, is_fresh);
		return UL_RQ_DONE;
	}
	req->res = ul_hctx_copy_in(req);
	if (req->res)
		return UL_RQ_DONE;
	req->copied_in = true;
	if (auto_may_pwrite(t, plug, req, &is_fresh)) {
		auto_plug_write(t, plug, req, is_fresh);
		return UL_RQ_PLUGGED;
	}
	return is_async ? UL_RQ_ASYNC : UL_RQ_QUEUED;
}

/* A file in memory has nothing to flush, and gives up a few pages at once. */
static enum ul_rq_status auto_other(struct ul_target *t, struct ul_request *req)
{
	if (t->cold != COLD_INLINE || req->nr_bytes > INLINE_MAX)
		return UL_RQ_QUEUED;
	req->res = loop_execute(t, req);
	return UL_RQ_DONE;
}

/* Nothing else is in flight in the hctx, nor on its way in order. */
static bool target_is_alone(struct ul_target *t, const struct ul_request *req)
{
	return ul_hctx_is_alone(req->hctx) && !target_writes_in_order(t);
}

/*
 * The way through write_work costs two wake-ups, as much as a flush of a fast
 * disk.  So one that is alone is done here where that has been quick: who comes
 * meanwhile waits.  What was written before it has ended, so a flush covers it.
 */
static bool auto_is_quick(struct ul_target *t, const struct ul_request *req)
{
	return t->cold == COLD_ASYNC && request_is_sync(req) &&
	       req->nr_bytes <= JOINED_MAX &&
	       atomic_load_explicit(&t->dirty_bytes, memory_order_relaxed) <=
		       QUICK_DIRTY &&
	       !(t->folios && req->op == UBLK_IO_OP_WRITE &&
		 ul_folios_are_due(t->folios, req->offset_bytes)) &&
	       target_is_alone(t, req) && guard_allows(&t->sync);
}

static enum ul_rq_status auto_ordered(struct ul_target *t,
				      struct ul_request *req)
{
	bool is_quick = auto_is_quick(t, req);

	target_note_dirty(t, req);
	if (!is_quick)
		return UL_RQ_QUEUED;
	req->res = req->copied_in ? 0 : ul_hctx_copy_in(req);
	if (!req->res)
		req->res = target_execute_timed(t, req);
	return UL_RQ_DONE;
}

static enum ul_rq_status target_queue_auto(struct ul_target *t,
					   struct ul_plug *plug,
					   struct ul_request *req)
{
	enum ul_rq_status status;

	if (t->config.kind != UL_TARGET_LOOP)
		return UL_RQ_QUEUED;
	switch (req->op) {
	case UBLK_IO_OP_READ:
		return auto_read(t, plug, req);
	case UBLK_IO_OP_WRITE:
		status = auto_write(t, plug, req);
		break;
	default:
		status = auto_other(t, req);
	}
	if (status == UL_RQ_QUEUED)
		return auto_ordered(t, req);
	target_note_dirty(t, req);
	return status;
}

static enum ul_rq_status target_queue_null(const struct ul_target *t,
					   struct ul_workqueue *wq,
					   struct ul_request *req)
{
	if (t->config.delay_ns) {
		ul_work_queue_delayed(wq, &req->work, t->config.delay_ns, 0);
		return UL_RQ_QUEUED;
	}
	ul_hctx_end(req, null_execute(req));
	return UL_RQ_DONE;
}

enum ul_rq_status ul_target_queue_rq(struct ul_target *t,
				     struct ul_workqueue *wq,
				     struct ul_plug *plug,
				     struct ul_request *req)
{
	enum ul_rq_status status = UL_RQ_QUEUED;

	req->copied_in = false;
	req->past_cache = false;
	req->with_group = false;
	req->registers = false;
	if (target_refuses(t, req)) {
		req->res = -EIO;
		return UL_RQ_DONE;
	}
	if (t->config.kind == UL_TARGET_NULL)
		return target_queue_null(t, wq, req);
	if (t->config.policy == UL_POLICY_AUTO)
		status = target_queue_auto(t, plug, req);
	if (status == UL_RQ_QUEUED)
		ul_target_queue_work(t, wq, plug, req);
	return status;
}

void ul_target_commit_rqs(struct ul_target *t, struct ul_workqueue *wq,
			  struct ul_plug *plug)
{
	bool start;

	if (plug->run.first)
		auto_execute_run(t, &plug->run);
	plug_queue_reads(t, wq, plug);
	if (!plug->head)
		return;
	pthread_mutex_lock(&t->ordered_lock);
	*t->ordered.tail = plug->head;
	t->ordered.tail = plug->tail;
	start = !t->write_started;
	t->write_started = true;
	pthread_mutex_unlock(&t->ordered_lock);
	ul_plug_init(plug);
	if (start)
		ul_queue_work(wq, &t->write_work);
}

/* ---- for targets in Python ---- */

void ul_request_get(struct ul_work *work, struct ul_request_info *info)
{
	struct ul_request *req = work->attend;

	info->op = req->op;
	info->op_flags = req->op_flags;
	info->offset_bytes = req->offset_bytes;
	info->nr_bytes = req->nr_bytes;
	info->buffer = req->buffer;
}

void ul_request_set_result(struct ul_work *work, int32_t result)
{
	struct ul_request *req = work->attend;

	req->res = result;
}
