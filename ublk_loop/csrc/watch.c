// SPDX-License-Identifier: MIT
/*
 * watch.c - word of a backing file's new size, without asking for it.
 *
 * Whether a file was cut since the last batch is a system call for each batch to
 * ask (lseek), a twentieth of a lone request's way. inotify tells: truncate(2)
 * queues IN_MODIFY before it returns, the iothread's ring polls for it, and task
 * works run in the order in which they were queued. So of a request that was
 * sent after a cut the thread sees the cut first.
 *
 * Writes by mapping make no events, our own pwrites do; as long as one is not
 * cleared, others like it are dropped without a word. So the thread asks again
 * for some batches after each event, clears, and asks once more.
 *
 * One watch has one reader: with two, one could clear what the other has yet to
 * see.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "watch.h"

/* In bytes; an event without a name is 16. */
#define EVENTS_BYTES 1024

int ul_watch_open(int fd)
{
	struct stat st;
	char path[32];
	int watch_fd, ret;

	/* A block device's node in /dev is not what is written to. */
	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return -EOPNOTSUPP;
	watch_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	if (watch_fd < 0)
		return -errno;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (inotify_add_watch(watch_fd, path, IN_MODIFY) < 0) {
		ret = -errno;
		close(watch_fd);
		return ret;
	}
	return watch_fd;
}

void ul_watch_clear(int watch_fd)
{
	char events[EVENTS_BYTES];

	while (read(watch_fd, events, sizeof(events)) > 0)
		;
}
