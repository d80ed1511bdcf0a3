/* SPDX-License-Identifier: MIT */
/*
 * watch.h - what iothread.c asks of a watch on a backing file.
 */
#ifndef UL_WATCH_H
#define UL_WATCH_H

/* A descriptor that is readable once @fd's file was written or cut by a system
 * call; its owner closes it.  -errno: this file, or one more, cannot be watched. */
int ul_watch_open(int fd);
/* Forget what was noticed: what comes from here on makes it readable anew. */
void ul_watch_clear(int watch_fd);

#endif
