// SPDX-License-Identifier: MIT
/*
 * folios.c - small folios where a file is written a little at a time.
 *
 * The page cache keeps a file that was copied, or read as a stream, in folios of
 * up to 2 MiB.  ext4 walks the buffer heads of a folio twice for each write
 * call, from its beginning to the place that is written: 4 KiB to a random place
 * took 17.7k instructions in large folios and 2.8k in small ones (Linux v7.3).  A
 * place that is written again and again by small calls is worth splitting, once.
 *
 * When is it worth that?  The walk costs 30k instructions in folios of 2 MiB and 2k
 * in those of 128 KiB, the split of either as much as 160 to 400 writes, and most
 * of a file may be written only once.  So both are timed: a region is split when
 * its small writes have taken as long as a split takes.  Then it cannot cost more
 * than twice what the better of the two ways would have.
 *
 * There is no system call for that, but MADV_COLD of one page of a folio that is
 * mapped splits it (mm/madvise.c, madvise_cold_or_pageout_pte_range), if it is
 * clean, as its buffer heads have to go first.  So the range is written back
 * before, and write_work does it, in the place of a write's turn: who writes
 * there meanwhile waits behind.  Whether anything was split shows in our page
 * table, which has lost the pages; if nothing is, time after time, the kernel
 * has no large folios here, and is not bothered again.
 *
 * Once they are small, a write by the mapping costs no more than a write call the
 * first time, when the file system is told of the page, and a fifth of it from
 * then on, until the page is written back (3.5k, 0.5k and 2.8k; the first time in a
 * large folio 76k).  So a split region is written so, by large writes too: page by
 * page a write call of 1 MiB costs 1.7 times what it does in large folios.
 *
 * That makes the split worth its cost for large writes alone, which are copied
 * twice otherwise, or wait for a thread of io_uring's, where they come to the same
 * place again and again: after so many passes as cost that much more, about.  Only
 * passes count that found the pages dirty still.  Where they are written back in
 * between, be it by a flush or as much is dirty, each write is the first time, and
 * two copies are cheaper.
 *
 * khugepaged would put them together again, as it does with the pages of any
 * mapping (where transparent huge pages are `always`): each of our writes then
 * dirtied, and each flush wrote, 2 MiB.  So the mapping refuses huge pages.
 *
 * The write-back is not by the target's descriptor: that would take note of an
 * error, and the next fdatasync(), which has to report it, would not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "clock.h"
#include "folios.h"

#define REGION_SHIFT	21
#define PAGE_SHIFT	12

/* What a split takes, until the first one was timed. */
#define SPLIT_US	2000

/* The most that a split, and a region's writes, are taken to cost. */
#define COST_MAX_US	60000

/* Of one write: if it took longer, it waited for something else. */
#define WRITE_MAX_NS	200000

/* So many pages of large writes to what was dirty: eight times the region. */
#define LARGE_PAGES	(8 << (REGION_SHIFT - PAGE_SHIFT))

/* Of a split region: after so many writes, its folios may have grown again. */
#define AGAIN		60000

/* Larger calls lose little. */
#define SMALL_BYTES	(32 * 1024)

/* One page of each folio of this size or more; what is smaller may stay. */
#define STEP_BYTES	(64 * 1024)

/* Regions without anything to split, one after another, that end the matter. */
#define VAIN_MAX	8

/* cachestat(2), which libraries from before v6.5 do not know. */
#define SYS_CACHESTAT	451

struct cache_range {
	uint64_t		offset_bytes;
	uint64_t		nr_bytes;
};

struct cache_stat {
	uint64_t		nr_cache;	/* pages, as all that follow */
	uint64_t		nr_dirty;
	uint64_t		nr_writeback;
	uint64_t		nr_evicted;
	uint64_t		nr_recently_evicted;
};

/* A: atomic, any thread; an addition lost to another one does not matter. */
struct folios_region {
	_Atomic uint16_t	cost_us;	/* A: of the small writes so far */
	_Atomic uint16_t	nr_mapped;	/* A: writes since it was split, and 1 */
	_Atomic uint16_t	nr_large;	/* A: pages of large writes so far */
};

/* From create to destroy.  I: set at create.  A: atomic, any thread.
 * W: the splitting thread's. */
struct ul_folios {
	struct ul_map		*map;		/* I: borrowed */
	int			sync_fd;	/* I: borrowed */
	uint64_t		offset_bytes;	/* I */
	uint64_t		nr_bytes;	/* I */
	unsigned int		nr_vain;	/* W */
	_Atomic unsigned int	split_us;	/* A: what a split takes */
	_Atomic unsigned int	nr_forgets;	/* A: the map's, as of regions */
	_Atomic bool		is_off;		/* A */
	struct folios_region	regions[];
};

/* Those with buffer heads. */
static bool fd_walks_buffers(int fd)
{
	struct statfs fs;

	return !fstatfs(fd, &fs) && fs.f_type == EXT4_SUPER_MAGIC;
}

int ul_folios_create(struct ul_map *map, int sync_fd, uint64_t offset_bytes,
		     uint64_t nr_bytes, struct ul_folios **folios)
{
	uint64_t nr_regions = (nr_bytes >> REGION_SHIFT) + 1;
	struct ul_folios *f;

	*folios = NULL;
	if (sync_fd < 0 || !fd_walks_buffers(sync_fd))
		return 0;
	f = calloc(1, sizeof(*f) + nr_regions * sizeof(f->regions[0]));
	if (!f)
		return -ENOMEM;
	f->map = map;
	f->sync_fd = sync_fd;
	f->offset_bytes = offset_bytes;
	f->nr_bytes = nr_bytes;
	f->split_us = SPLIT_US;
	ul_map_refuse_huge(map);
	*folios = f;
	return 0;
}

void ul_folios_destroy(struct ul_folios *f)
{
	free(f);
}

/* A device that has grown since has more than that: all behind is the last. */
static uint64_t folios_index(const struct ul_folios *f, uint64_t offset_bytes)
{
	if (offset_bytes > f->nr_bytes)
		offset_bytes = f->nr_bytes;
	return offset_bytes >> REGION_SHIFT;
}

static void region_begin_anew(struct folios_region *region)
{
	atomic_store_explicit(&region->cost_us, 0, memory_order_relaxed);
	atomic_store_explicit(&region->nr_mapped, 0, memory_order_relaxed);
}

/* Where a write goes.  If pages were reclaimed, all begins anew: what comes back
 * may come in large folios. */
static struct folios_region *folios_region(struct ul_folios *f,
					   uint64_t offset_bytes)
{
	unsigned int nr_forgets = ul_map_nr_forgets(f->map);

	if (nr_forgets !=
	    atomic_load_explicit(&f->nr_forgets, memory_order_relaxed)) {
		atomic_store(&f->nr_forgets, nr_forgets);
		for (uint64_t i = 0; i <= f->nr_bytes >> REGION_SHIFT; i++)
			region_begin_anew(&f->regions[i]);
	}
	return &f->regions[folios_index(f, offset_bytes)];
}

void ul_folios_note_write(struct ul_folios *f, uint64_t offset_bytes,
			  uint64_t nr_bytes, uint64_t nr_ns)
{
	struct folios_region *region = folios_region(f, offset_bytes);
	uint64_t cost_us;

	if (nr_bytes > SMALL_BYTES)
		return;
	if (nr_ns > WRITE_MAX_NS)
		nr_ns = WRITE_MAX_NS;
	cost_us = atomic_load_explicit(&region->cost_us, memory_order_relaxed) +
		  (nr_ns + 500) / 1000;
	if (cost_us > COST_MAX_US)
		cost_us = COST_MAX_US;
	atomic_store_explicit(&region->cost_us, cost_us, memory_order_relaxed);
}

/* Whether all of a range waits to be written back.  No, before v6.5, or where
 * libseccomp does not know the call, so that the sandbox refuses it. */
static bool folios_are_dirty(const struct ul_folios *f, uint64_t offset_bytes,
			     uint64_t nr_bytes)
{
	struct cache_range range = { f->offset_bytes + offset_bytes, nr_bytes };
	struct cache_stat stat;

	return !syscall(SYS_CACHESTAT, f->sync_fd, &range, &stat, 0) &&
	       stat.nr_dirty >= nr_bytes >> PAGE_SHIFT;
}

void ul_folios_note_large(struct ul_folios *f, uint64_t offset_bytes,
			  uint64_t nr_bytes)
{
	struct folios_region *region = folios_region(f, offset_bytes);
	uint64_t nr = 0;

	if (atomic_load_explicit(&f->is_off, memory_order_relaxed))
		return;
	/* A folio is dirty as a whole: only its first write finds it clean. */
	if (folios_are_dirty(f, offset_bytes, nr_bytes))
		nr = atomic_load_explicit(&region->nr_large,
					  memory_order_relaxed) +
		     (nr_bytes >> PAGE_SHIFT);
	if (nr >= LARGE_PAGES) {
		nr = 0;
		atomic_store_explicit(&region->cost_us, COST_MAX_US,
				      memory_order_relaxed);
	}
	atomic_store_explicit(&region->nr_large, nr, memory_order_relaxed);
}

bool ul_folios_are_due(const struct ul_folios *f, uint64_t offset_bytes)
{
	const struct folios_region *region =
		&f->regions[folios_index(f, offset_bytes)];

	return atomic_load_explicit(&region->cost_us, memory_order_relaxed) >=
		       atomic_load_explicit(&f->split_us,
					    memory_order_relaxed) &&
	       !atomic_load_explicit(&region->nr_mapped,
				     memory_order_relaxed) &&
	       !atomic_load_explicit(&f->is_off, memory_order_relaxed);
}

bool ul_folios_take_mapped(struct ul_folios *f, uint64_t offset_bytes,
			   uint64_t nr_bytes)
{
	struct folios_region *region = folios_region(f, offset_bytes);
	struct folios_region *last =
		&f->regions[folios_index(f, offset_bytes + nr_bytes - 1)];
	unsigned int nr =
		atomic_load_explicit(&region->nr_mapped, memory_order_relaxed);

	/* Of one that is larger than a region (--max_io_buf_bytes) what is
	 * between may be large folios: slow, no more. */
	if (!nr ||
	    !atomic_load_explicit(&last->nr_mapped, memory_order_relaxed))
		return false;
	if (nr == AGAIN)
		region_begin_anew(region);
	else
		atomic_store_explicit(&region->nr_mapped, nr + 1,
				      memory_order_relaxed);
	return true;
}

/* Put a page of each folio into our page table; how many were not. */
static long folios_touch(struct ul_folios *f, uint64_t begin, uint64_t end)
{
	struct rusage before, after;
	char byte, *data;

	getrusage(RUSAGE_THREAD, &before);
	for (uint64_t at = begin; at < end; at += STEP_BYTES) {
		data = ul_map_find(f->map, at, 1);
		if (data && !ul_map_copy(&byte, data, 1))
			break;
	}
	getrusage(RUSAGE_THREAD, &after);
	return after.ru_minflt - before.ru_minflt;
}

static void folios_make_cold(struct ul_folios *f, uint64_t begin, uint64_t end)
{
	uintptr_t page_bytes = sysconf(_SC_PAGESIZE);
	char *data;

	for (uint64_t at = begin; at < end; at += STEP_BYTES) {
		data = ul_map_find(f->map, at, 1);
		if (data)
			madvise(data - (uintptr_t)data % page_bytes, page_bytes,
				MADV_COLD);
	}
}

/* A mean of the last ones, which a disk's quick and slow moments sway little. */
static void folios_note_split(struct ul_folios *f, uint64_t nr_ns)
{
	unsigned int us = atomic_load(&f->split_us);
	uint64_t took_us = nr_ns / 1000;

	if (took_us > COST_MAX_US)
		took_us = COST_MAX_US;
	atomic_store(&f->split_us, (3 * us + took_us) / 4);
}

void ul_folios_split(struct ul_folios *f, uint64_t offset_bytes)
{
	uint64_t index = folios_index(f, offset_bytes);
	uint64_t begin = index << REGION_SHIFT;
	uint64_t end = begin + (1 << REGION_SHIFT);
	uint64_t begin_ns;

	if (!ul_folios_are_due(f, offset_bytes))
		return;
	begin_ns = now_ns();
	if (end > f->nr_bytes)
		end = f->nr_bytes;
	f->nr_vain++;
	if (!sync_file_range(f->sync_fd, f->offset_bytes + begin, end - begin,
			     SYNC_FILE_RANGE_WAIT_BEFORE |
				     SYNC_FILE_RANGE_WRITE |
				     SYNC_FILE_RANGE_WAIT_AFTER)) {
		folios_touch(f, begin, end);
		folios_make_cold(f, begin, end);
		if (folios_touch(f, begin, end))
			f->nr_vain = 0;
	}
	if (f->nr_vain == VAIN_MAX)
		atomic_store(&f->is_off, true);
	atomic_store_explicit(&f->regions[index].nr_mapped, 1,
			      memory_order_relaxed);
	folios_note_split(f, now_ns() - begin_ns);
}
