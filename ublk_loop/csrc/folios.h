/* SPDX-License-Identifier: MIT */
/*
 * folios.h - small folios where a file is written a little at a time.
 */
#ifndef UL_FOLIOS_H
#define UL_FOLIOS_H

#include <stdbool.h>
#include <stdint.h>

#include "map.h"

struct ul_folios;

/* map, sync_fd: borrowed.  sync_fd is an open file description that nobody asks
 * for write errors.  offset_bytes: where byte 0 is in the file.  *folios is NULL
 * where the file system does not care how large a folio is. */
int ul_folios_create(struct ul_map *map, int sync_fd, uint64_t offset_bytes,
		     uint64_t nr_bytes, struct ul_folios **folios);
void ul_folios_destroy(struct ul_folios *folios);
/* A write call there took nr_ns.  Any thread. */
void ul_folios_note_write(struct ul_folios *folios, uint64_t offset_bytes,
			  uint64_t nr_bytes, uint64_t nr_ns);
/* So much will be written there by other ways than a small call.  Any thread. */
void ul_folios_note_large(struct ul_folios *folios, uint64_t offset_bytes,
			  uint64_t nr_bytes);
/* Whether this place waits for ul_folios_split(); until then writes should not
 * reach the file by another way.  Any thread. */
bool ul_folios_are_due(const struct ul_folios *folios, uint64_t offset_bytes);
/* Whether a write there had better be done by the map, and then is.  Any thread. */
bool ul_folios_take_mapped(struct ul_folios *folios, uint64_t offset_bytes,
			   uint64_t nr_bytes);
/* Split what is there, if it is due.  Waits for the disk.  One thread at once. */
void ul_folios_split(struct ul_folios *folios, uint64_t offset_bytes);

#endif
