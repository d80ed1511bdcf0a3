/* SPDX-License-Identifier: MIT */
/*
 * hctx.h - what target.c asks of a hardware context.
 */
#ifndef UL_HCTX_H
#define UL_HCTX_H

#include "target.h"

/* Hand a request's result back; any thread.  The request is gone after it. */
void ul_hctx_complete(struct ul_request *req);
/* Whether the driver leaves it to us to move a request's data; then how, between
 * the driver and any memory of ours: 0, or -errno (-EFAULT: the memory). */
bool ul_hctx_is_user_copy(const struct ul_request *req);
/* Whether its pages are in the ring's buffer table: UL_RQ_ASYNC needs no copy. */
bool ul_hctx_is_registered(const struct ul_request *req);
int ul_hctx_user_copy(struct ul_request *req, void *data);
/* The same between driver and buffer where UBLK_F_USER_COPY
 * leaves that to us; any thread.  0 or -errno; nothing to do in copy mode. */
int ul_hctx_copy_in(struct ul_request *req);
int ul_hctx_copy_out(struct ul_request *req);

#endif
