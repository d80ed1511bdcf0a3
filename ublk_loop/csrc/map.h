/* SPDX-License-Identifier: MIT */
/*
 * map.h - the resident part of a backing file, as memory.
 */
#ifndef UL_MAP_H
#define UL_MAP_H

#include <stdbool.h>
#include <stdint.h>

struct ul_map;

/* offset_bytes: where in the file the map's byte 0 is; any. -EOPNOTSUPP: the
 * page cache is not all there is to this file system.  in_memory: what is not
 * resident is a hole, and stays one until it is written. */
int ul_map_create(int fd, uint64_t offset_bytes, uint64_t nr_bytes,
		  bool read_only, bool in_memory, struct ul_map **map);
void ul_map_destroy(struct ul_map *map);
/* Where a range is, if reading or writing it needs no I/O, as far as is known;
 * else NULL.  For the kernel, or ul_map_copy(), to touch: see map.c. */
char *ul_map_find(struct ul_map *map, uint64_t offset_bytes, uint64_t nr_bytes);
/* Whether each of these pages was asked about here once at most, and not all of those
 * right before it: a stream is not that, but for its beginning.  Any thread. */
bool ul_map_is_rarely_read(struct ul_map *map, uint64_t offset_bytes,
			   uint64_t nr_bytes);
/* Whether a range is read again that has much around it that was read too: its group
 * is 16 pages, of which it is a part.  Any thread. */
bool ul_map_wants_group(const struct ul_map *map, uint64_t offset_bytes,
			uint64_t nr_bytes);
/* Have the page cache begin to read the group; map_pos: where in fd's file byte 0 is.
 * False: it does not. */
bool ul_map_read_group(const struct ul_map *map, int fd, uint64_t map_pos,
		       uint64_t offset_bytes);
/* Learn what of the group is resident. */
void ul_map_ask_group(struct ul_map *map, uint64_t offset_bytes);
/* Read a little of a range that was found.  A file in memory can be written then
 * without a fault for each page: the kernel maps 16 at a read fault, and one at a
 * write's.  Any thread that does not block SIGBUS. */
void ul_map_touch(struct ul_map *map, uint64_t offset_bytes, uint64_t nr_bytes);
/* Whether a range is of whole pages: to write it, none needs to be read first. */
bool ul_map_is_whole(const struct ul_map *map, uint64_t offset_bytes,
		     uint64_t nr_bytes);
/* Whether some page was not resident when the kernel was asked, once, and was not
 * written since. */
bool ul_map_is_new(struct ul_map *map, uint64_t offset_bytes,
		   uint64_t nr_bytes);
/* A range was written by a system call, or read by way of the page cache: it is
 * resident now. */
void ul_map_note_resident(struct ul_map *map, uint64_t offset_bytes,
			  uint64_t nr_bytes);
/* How often it was found that pages had been reclaimed.  Any thread. */
unsigned int ul_map_nr_forgets(const struct ul_map *map);
/* memcpy.  False: nothing (of use) was done; take another way.  Any thread that
 * does not block SIGBUS. */
bool ul_map_copy(void *to, const void *from, uint64_t nr_bytes);
/* Have khugepaged leave the pages as small as they are. */
void ul_map_refuse_huge(struct ul_map *map);
/* A range was punched or zeroed: look again before the next copy. */
void ul_map_forget(struct ul_map *map, uint64_t offset_bytes,
		   uint64_t nr_bytes);

#endif
