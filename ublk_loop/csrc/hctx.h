/* SPDX-License-Identifier: MIT */
/*
 * hctx.h - what target.c and iothread.c ask of a hardware context.
 */
#ifndef UL_HCTX_H
#define UL_HCTX_H

#include "target.h"

/* ---- for target.c ---- */

/* Hand a request's result back; any thread.  The request is gone after it. */
void ul_hctx_complete(struct ul_request *req);
/* The same for several of one hctx, linked by next from first to last. */
void ul_hctx_complete_list(struct ul_request *first, struct ul_request *last);
/* Whether the driver leaves it to us to move a request's data; then how, between
 * the driver and any memory of ours: 0, or -errno (-EFAULT: the memory). */
bool ul_hctx_is_user_copy(const struct ul_request *req);
/* Whether a user copy may make a page dirty after it was written back. */
bool ul_hctx_pins_pages(const struct ul_request *req);
/* Whether its pages are in the ring's buffer table: UL_RQ_ASYNC needs no copy. */
bool ul_hctx_is_registered(const struct ul_request *req);
/* Whether they can be put there, for UL_RQ_ASYNC (req->registers). */
bool ul_hctx_can_register(const struct ul_request *req);
int ul_hctx_user_copy(struct ul_request *req, void *data);
int ul_hctx_user_copy_part(struct ul_request *req, void *data,
			   uint64_t offset_bytes, uint64_t nr_bytes);
/* The same for a part of its metadata, of a request with UBLK_IO_F_INTEGRITY. */
int ul_hctx_copy_metadata(struct ul_request *req, void *data,
			  uint64_t offset_bytes, uint64_t nr_bytes);
/* The same between driver and buffer where UBLK_F_USER_COPY
 * leaves that to us; any thread.  0 or -errno; nothing to do in copy mode. */
int ul_hctx_copy_in(struct ul_request *req);
int ul_hctx_copy_out(struct ul_request *req);
/* Set a request's result, and have its data where the client reads it. */
void ul_hctx_end(struct ul_request *req, int32_t res);

/* ---- for iothread.c, on its thread ---- */

/* On a new ring: map the descriptors, queue or do the fetch of every tag. */
int ul_hctx_prepare(struct ul_hctx *h);
/* After the ring is gone, or will be at once. */
void ul_hctx_unprepare(struct ul_hctx *h);
void ul_hctx_handle_cqe(struct ul_hctx *h, const struct io_uring_cqe *cqe);
/* All cqes of a batch were handled; all results of a round were committed. */
void ul_hctx_end_reap(struct ul_hctx *h);
/* The file's size may be another than the last batch learned. */
void ul_hctx_forget_size(struct ul_hctx *h);
void ul_hctx_end_round(struct ul_hctx *h);
void ul_hctx_commit(struct ul_hctx *h, struct ul_request *req);
bool ul_hctx_has_inflight(const struct ul_hctx *h);
/* The request that it was just given is the only one. */
bool ul_hctx_is_alone(const struct ul_hctx *hctx);
/* Whether the driver may still give us a request. */
bool ul_hctx_fetches(const struct ul_hctx *h);
/* Let go of the memory of the buffers, which must not be in use. */
void ul_hctx_give_back(struct ul_hctx *h);

#endif
