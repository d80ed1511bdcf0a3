// SPDX-License-Identifier: MIT
/*
 * map.c - the resident part of a backing file, as memory.
 *
 * A file of the page cache is mapped, and a request whose pages are resident is
 * one memcpy: no system call, where a pread costs four times the copy (2.0k
 * against 0.5k instructions for 4 KiB of tmpfs, Linux 7.3, 2026-11-23).
 *
 * What must not happen is I/O in that memcpy, on the thread that serves a whole
 * queue. mincore() tells, but costs as much as the pread, so its answers are
 * kept: `resident` has a bit a page. They go stale as the kernel reclaims pages
 * and then a copy blocks in a major fault; the thread's count of these is looked
 * at every so often, and a few are enough to forget all answers. Holes are never
 * resident, so a read of one does not allocate it (tmpfs would).
 *
 * A fault that cannot be served (the file was cut, the disk is full, the disk
 * is broken) is SIGBUS. Its handler leaves the memcpy, and the request goes the
 * way of pread and pwrite, which say what is wrong. So we touch nothing of the
 * mapping outside of ul_map_copy(). The kernel may, for a system call that we
 * give the address: it says EFAULT.
 *
 * Durability is the file's: fdatasync() writes pages dirtied by mapping too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "map.h"

#define COPIES_PER_CHECK	64
/* A fault on the page at which the kernel begins to read ahead counts as major, and
 * waits for nothing: a stream has two of these in so many copies, more as it begins. */
#define FAULTS_PER_CHECK	8
#define WORD_BITS		64
/* Of so many bytes the kernel maps the pages that are there at one read fault
 * (fault_around_bytes). */
#define TOUCH_BYTES		(64 * 1024)
/* After so many pages that were not resident, one of so many is asked about. */
#define COLD_ANSWERS		16
#define COLD_PER_CHECK		8
/* After so many it is one of more. */
#define COLD_FOR_LONG		1024
#define COLD_PER_RARE_CHECK	64
/* A read is part of a stream if so many pages before it were read. */
#define STREAM_PAGES		8
/* A page that is read again brings all of its group to the page cache, if so many
 * pages of that were read before.  A word has whole groups. */
#define GROUP_PAGES		16ULL
#define GROUP_READ		12

/* From create to destroy.  I: set at create.  A: atomic, any thread. */
struct ul_map {
	char			*bytes;		/* I: owned; from map_lead on */
	uint64_t		lead_bytes;	/* I: mapped before byte 0 */
	uint64_t		nr_bytes;	/* I: from byte 0 */
	uint64_t		nr_pages;	/* I: of bytes */
	unsigned int		page_shift;	/* I */
	_Atomic unsigned int	nr_forgets;	/* A */
	_Atomic unsigned int	nr_cold;	/* A: since a page asked about was
						 * resident; may lose some */
	_Atomic uint64_t	*read;		/* I: owned, behind resident; a
						 * bit a page, A: read cold */
	_Atomic uint64_t	*again;		/* I: owned, behind read; a bit
						 * a page, A: and once more */
	_Atomic uint64_t	*asked;		/* I: owned, behind again; a bit
						 * a word, A */
	bool			in_memory;	/* I: a hole stays one */
	_Atomic uint64_t	resident[];	/* A: a bit a page of bytes */
};

/* ---- a memcpy that survives SIGBUS ---- */

static __thread sigjmp_buf *volatile copy_escape;
static struct sigaction previous_action;
static pthread_once_t handler_once = PTHREAD_ONCE_INIT;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	sigjmp_buf *escape = copy_escape;

	(void)sig, (void)info, (void)context;
	if (escape)
		siglongjmp(*escape, 1);
	/* Not ours: whoever was here before gets it, as it happens again. */
	sigaction(SIGBUS, &previous_action, NULL);
}

static void install_handler(void)
{
	/* NODEFER: siglongjmp() leaves the mask as it is in the handler. */
	struct sigaction action = {
		.sa_sigaction = on_sigbus,
		.sa_flags = SA_SIGINFO | SA_NODEFER,
	};

	sigaction(SIGBUS, &action, &previous_action);
}

bool ul_map_copy(void *to, const void *from, uint64_t nr_bytes)
{
	sigjmp_buf escape;
	volatile bool is_whole = false;

	if (!sigsetjmp(escape, 0)) {
		copy_escape = &escape;
		atomic_signal_fence(memory_order_seq_cst);
		memcpy(to, from, nr_bytes);
		atomic_signal_fence(memory_order_seq_cst);
		is_whole = true;
	}
	copy_escape = NULL;
	return is_whole;
}

/* ---- which pages are resident ---- */

static uint64_t map_page(const struct ul_map *m, uint64_t offset_bytes)
{
	return (m->lead_bytes + offset_bytes) >> m->page_shift;
}

static bool bits_have(const _Atomic uint64_t *bits, uint64_t page)
{
	return atomic_load_explicit(&bits[page / WORD_BITS],
				    memory_order_relaxed) >>
		       page % WORD_BITS &
	       1;
}

/* The bits of a word, whose first one is @page's, that are those of a range. */
static uint64_t word_mask(uint64_t page, uint64_t begin, uint64_t end)
{
	uint64_t mask = ~0ULL;

	if (begin > page)
		mask <<= begin - page;
	if (end < page + WORD_BITS)
		mask &= ~(~0ULL << (end - page));
	return mask;
}

static bool map_knows(const struct ul_map *m, uint64_t page)
{
	return bits_have(m->resident, page);
}

static void map_forget_all(struct ul_map *m)
{
	atomic_fetch_add(&m->nr_forgets, 1);
	atomic_store_explicit(&m->nr_cold, 0, memory_order_relaxed);
	for (uint64_t word = 0; word * WORD_BITS < m->nr_pages; word++) {
		atomic_store_explicit(&m->resident[word], 0,
				      memory_order_relaxed);
		atomic_store_explicit(&m->read[word], 0, memory_order_relaxed);
		atomic_store_explicit(&m->again[word], 0, memory_order_relaxed);
		atomic_store_explicit(&m->asked[word / WORD_BITS], 0,
				      memory_order_relaxed);
	}
}

static void bits_set(_Atomic uint64_t *bits, uint64_t page)
{
	atomic_fetch_or_explicit(&bits[page / WORD_BITS],
				 1ULL << page % WORD_BITS,
				 memory_order_relaxed);
}

static void bits_clear(_Atomic uint64_t *bits, uint64_t page)
{
	atomic_fetch_and_explicit(&bits[page / WORD_BITS],
				  ~(1ULL << page % WORD_BITS),
				  memory_order_relaxed);
}

/* Ask the kernel about pages of one word. */
static void map_ask(struct ul_map *m, uint64_t page, uint64_t nr_pages)
{
	unsigned char answers[WORD_BITS];
	uint64_t bits = 0;

	if (mincore(m->bytes + (page << m->page_shift),
		    nr_pages << m->page_shift, answers))
		return;
	for (uint64_t i = 0; i < nr_pages; i++)
		bits |= (uint64_t)(answers[i] & 1) << i;
	atomic_fetch_or_explicit(&m->resident[page / WORD_BITS],
				 bits << page % WORD_BITS,
				 memory_order_relaxed);
}

static void map_ask_word(struct ul_map *m, uint64_t word)
{
	uint64_t page = word * WORD_BITS;
	uint64_t nr_pages = m->nr_pages - page;

	bits_set(m->asked, word);
	map_ask(m, page, nr_pages < WORD_BITS ? nr_pages : WORD_BITS);
}

/* Whether a page is taken for cold: one that was read past the page cache, and one
 * that was not if what was asked about lately was cold.  Some of these are asked
 * about all the same, fewer as time goes by.  A wrong guess costs one read that
 * is not a copy: it is past the page cache, or it notes that the page is there. */
static bool map_guesses_cold(struct ul_map *m, uint64_t page)
{
	unsigned int nr;

	if (bits_have(m->read, page))
		return true;
	nr = atomic_load_explicit(&m->nr_cold, memory_order_relaxed);
	atomic_store_explicit(&m->nr_cold, nr + 1, memory_order_relaxed);
	if (nr < COLD_ANSWERS)
		return false;
	return nr % (nr < COLD_FOR_LONG ? COLD_PER_CHECK : COLD_PER_RARE_CHECK);
}

/* Where one page is resident, others are most likely, and asking for 64 costs
 * little more than asking for one.  Where none is it costs ten times as much. */
static void map_ask_again(struct ul_map *m, uint64_t page)
{
	if (map_guesses_cold(m, page))
		return;
	map_ask(m, page, 1);
	if (!map_knows(m, page))
		return;
	atomic_store_explicit(&m->nr_cold, 0, memory_order_relaxed);
	map_ask_word(m, page / WORD_BITS);
}

/* A device that has grown since has more than that. */
static bool map_has(const struct ul_map *m, uint64_t offset_bytes,
		    uint64_t nr_bytes)
{
	return offset_bytes <= m->nr_bytes &&
	       nr_bytes <= m->nr_bytes - offset_bytes;
}

/* In memory, a hole stays one until somebody writes there: it is asked about once. */
static bool map_is_resident(struct ul_map *m, uint64_t offset_bytes,
			    uint64_t nr_bytes, bool ask_again)
{
	uint64_t last;

	if (!map_has(m, offset_bytes, nr_bytes))
		return false;
	last = map_page(m, offset_bytes + nr_bytes - 1);
	for (uint64_t page = map_page(m, offset_bytes); page <= last; page++) {
		if (map_knows(m, page))
			continue;
		if (ask_again)
			map_ask_again(m, page);
		else if (!bits_have(m->asked, page / WORD_BITS))
			map_ask_word(m, page / WORD_BITS);
		if (!map_knows(m, page))
			return false;
	}
	return true;
}

/* Has this thread waited for pages that were thought to be there? */
static void map_check_faults(struct ul_map *m)
{
	static __thread unsigned int nr_copies;
	static __thread long nr_faults;
	struct rusage usage;

	if (++nr_copies % COPIES_PER_CHECK)
		return;
	if (getrusage(RUSAGE_THREAD, &usage))
		return;
	if (usage.ru_majflt - nr_faults > FAULTS_PER_CHECK)
		map_forget_all(m);
	nr_faults = usage.ru_majflt;
}

/* ---- what map.h declares ---- */

/* Where the page cache is the file: not so on a network, nor under FUSE. */
static bool fd_is_local(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs))
		return false;
	switch (fs.f_type) {
	case TMPFS_MAGIC:
	case RAMFS_MAGIC:
	case EXT4_SUPER_MAGIC:
	case XFS_SUPER_MAGIC:
	case BTRFS_SUPER_MAGIC:
	case F2FS_SUPER_MAGIC:
		return true;
	default:
		return false;
	}
}

int ul_map_create(int fd, uint64_t offset_bytes, uint64_t nr_bytes,
		  bool read_only, bool in_memory, struct ul_map **map)
{
	uint64_t page_bytes = sysconf(_SC_PAGESIZE);
	uint64_t lead_bytes = offset_bytes & (page_bytes - 1);
	uint64_t nr_pages =
		(lead_bytes + nr_bytes + page_bytes - 1) / page_bytes;
	uint64_t nr_words = nr_pages / WORD_BITS + 1;
	uint64_t nr_asked = nr_words / WORD_BITS + 1;
	struct ul_map *m;
	void *bytes;

	if (!fd_is_local(fd))
		return -EOPNOTSUPP;
	m = calloc(1, sizeof(*m) + (3 * nr_words + nr_asked) *
					   sizeof(m->resident[0]));
	if (!m)
		return -ENOMEM;
	bytes = mmap(NULL, lead_bytes + nr_bytes,
		     read_only ? PROT_READ : PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_NORESERVE, fd, offset_bytes - lead_bytes);
	if (bytes == MAP_FAILED) {
		free(m);
		return -errno;
	}
	/* mlockall(MCL_FUTURE) would pin every page that we touch. */
	munlock(bytes, lead_bytes + nr_bytes);
	m->read = m->resident + nr_words;
	m->again = m->read + nr_words;
	m->asked = m->again + nr_words;
	m->in_memory = in_memory;
	m->bytes = bytes;
	m->lead_bytes = lead_bytes;
	m->nr_bytes = nr_bytes;
	m->nr_pages = nr_pages;
	m->page_shift = __builtin_ctzl(page_bytes);
	pthread_once(&handler_once, install_handler);
	*map = m;
	return 0;
}

void ul_map_destroy(struct ul_map *m)
{
	if (!m)
		return;
	munmap(m->bytes, m->lead_bytes + m->nr_bytes);
	free(m);
}

char *ul_map_find(struct ul_map *m, uint64_t offset_bytes, uint64_t nr_bytes)
{
	if (!map_is_resident(m, offset_bytes, nr_bytes, !m->in_memory))
		return NULL;
	map_check_faults(m);
	return m->bytes + m->lead_bytes + offset_bytes;
}

bool ul_map_is_whole(const struct ul_map *m, uint64_t offset_bytes,
		     uint64_t nr_bytes)
{
	uint64_t begin = m->lead_bytes + offset_bytes;

	return !((begin | (begin + nr_bytes)) & ((1ULL << m->page_shift) - 1));
}

bool ul_map_is_new(struct ul_map *m, uint64_t offset_bytes, uint64_t nr_bytes)
{
	return !map_is_resident(m, offset_bytes, nr_bytes, false);
}

/* By its neighbour alone half of all random reads would be, once half was read. */
static bool map_is_stream(const struct ul_map *m, uint64_t page)
{
	uint64_t first = page > STREAM_PAGES ? page - STREAM_PAGES : 0;

	for (uint64_t before = first; before < page; before++)
		if (!bits_have(m->read, before))
			return false;
	return page;
}

bool ul_map_is_rarely_read(struct ul_map *m, uint64_t offset_bytes,
			   uint64_t nr_bytes)
{
	uint64_t page = map_page(m, offset_bytes);
	uint64_t end = map_page(m, offset_bytes + nr_bytes - 1) + 1;
	bool is_rare;

	if (!map_has(m, offset_bytes, nr_bytes))
		return false;
	is_rare = !map_is_stream(m, page);
	for (; page < end; page++) {
		is_rare &= !bits_have(m->again, page);
		bits_set(bits_have(m->read, page) ? m->again : m->read, page);
	}
	return is_rare;
}

static uint64_t map_group(const struct ul_map *m, uint64_t offset_bytes)
{
	return map_page(m, offset_bytes) / GROUP_PAGES * GROUP_PAGES;
}

bool ul_map_wants_group(const struct ul_map *m, uint64_t offset_bytes,
			uint64_t nr_bytes)
{
	uint64_t group = map_group(m, offset_bytes);
	uint64_t bits;

	if (!map_has(m, offset_bytes, nr_bytes) ||
	    nr_bytes >= GROUP_PAGES << m->page_shift ||
	    !bits_have(m->read, map_page(m, offset_bytes)))
		return false;
	bits = atomic_load_explicit(&m->read[group / WORD_BITS],
				    memory_order_relaxed);
	bits = bits >> group % WORD_BITS & ((1ULL << GROUP_PAGES) - 1);
	return __builtin_popcountll(bits) >= GROUP_READ;
}

bool ul_map_read_group(const struct ul_map *m, int fd, uint64_t map_pos,
		       uint64_t offset_bytes)
{
	return !readahead(fd,
			  map_pos - m->lead_bytes +
				  (map_group(m, offset_bytes) << m->page_shift),
			  GROUP_PAGES << m->page_shift);
}

void ul_map_ask_group(struct ul_map *m, uint64_t offset_bytes)
{
	uint64_t group = map_group(m, offset_bytes);
	uint64_t nr_pages = m->nr_pages - group;

	map_ask(m, group, nr_pages < GROUP_PAGES ? nr_pages : GROUP_PAGES);
}

void ul_map_touch(struct ul_map *m, uint64_t offset_bytes, uint64_t nr_bytes)
{
	const char *data = m->bytes + m->lead_bytes + offset_bytes;
	char byte;

	for (uint64_t at = 0; at < nr_bytes; at += TOUCH_BYTES)
		ul_map_copy(&byte, data + at, 1);
	ul_map_copy(&byte, data + nr_bytes - 1, 1);
}

void ul_map_note_resident(struct ul_map *m, uint64_t offset_bytes,
			  uint64_t nr_bytes)
{
	uint64_t begin = map_page(m, offset_bytes);
	uint64_t end = map_page(m, offset_bytes + nr_bytes - 1) + 1;

	if (!map_has(m, offset_bytes, nr_bytes))
		return;
	for (uint64_t page = begin; page < end; page += WORD_BITS) {
		page -= page % WORD_BITS;
		atomic_fetch_or_explicit(&m->resident[page / WORD_BITS],
					 word_mask(page, begin, end),
					 memory_order_relaxed);
	}
}

unsigned int ul_map_nr_forgets(const struct ul_map *m)
{
	return atomic_load_explicit(&m->nr_forgets, memory_order_relaxed);
}

void ul_map_forget(struct ul_map *m, uint64_t offset_bytes, uint64_t nr_bytes)
{
	uint64_t begin = map_page(m, offset_bytes);
	uint64_t end = map_page(m, offset_bytes + nr_bytes - 1) + 1;

	if (end > m->nr_pages)
		end = m->nr_pages;
	/* A discard may be of all of the device: by words, not by bits. */
	for (uint64_t page = begin; page < end; page += WORD_BITS) {
		page -= page % WORD_BITS;
		atomic_fetch_and_explicit(&m->resident[page / WORD_BITS],
					  ~word_mask(page, begin, end),
					  memory_order_relaxed);
		bits_clear(m->asked, page / WORD_BITS);
	}
}

void ul_map_refuse_huge(struct ul_map *m)
{
	madvise(m->bytes, m->lead_bytes + m->nr_bytes, MADV_NOHUGEPAGE);
}
