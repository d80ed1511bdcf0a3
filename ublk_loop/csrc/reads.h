/* SPDX-License-Identifier: MIT */
/*
 * reads.h - several reads at once by one thread.
 */
#ifndef UL_READS_H
#define UL_READS_H

#include "target.h"

/* A read is over: its bytes or -errno, as read(2) would say. */
typedef void (*ul_read_end)(struct ul_request *req, int32_t res);

/* Start up to UL_READS_MAX reads, linked by next, of one hctx; end each, and hand
 * them back to it as they come. -errno: this thread has no ring; nothing was
 * begun. */
int ul_reads_run(int fd, struct ul_request *first, ul_read_end end);

#endif
