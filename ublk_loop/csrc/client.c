// SPDX-License-Identifier: MIT
/*
 * client.c - the ublk command: hands its words to the daemon, or to Python.
 *
 * A Python takes longer to start than most commands take.  The daemon has all
 * of it in memory; so the words go there (a plain user has none by default), with the folder and the
 * UBLK_LOOP_ variables that they depend on, and a fork of the daemon does what
 * they say.  What comes back is an exit code and what to print.  Where no
 * daemon runs, or it says no (another version, other mounts), and for what
 * needs a process of its own, ublk-command beside this program is executed: the
 * same command in Python, which knows all words.
 *
 * Request: the line of JSON that protocol.py calls Run.  Reply: a line of three
 * numbers, exit code, bytes of stdout, bytes of stderr; then those bytes.
 * Every wait has a deadline.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define FALLBACK	"ublk-command"
#define CONNECT_S	10
/* Longer than the daemon gives to anything that it is asked for. */
#define REPLY_S		240
#define REPLY_MAX	(16 << 20)

extern char **environ;

/* ---- what the daemon may do ---- */

static const char *const commands[] = {
	"add",	   "del",    "list",	    "features",	   "recover",
	"quiesce", "resize", "update_size", "set_affinity", "stop"
};
/* These need a process of their own, or a terminal. */
static const char *const not_with[] = { "--foreground", "--lazy", "-h",
					"--help", "help" };

static bool is_one_of(const char *word, const char *const *list, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (!strcmp(word, list[i]))
			return true;
	return false;
}

static bool is_for_daemon(int argc, char **argv)
{
	const char *wanted = getenv("UBLK_LOOP_DAEMON");

	if ((geteuid() && !getenv("UBLK_LOOP_STATE_DIR")) ||
	    (wanted && !strcmp(wanted, "0")) || argc < 2 ||
	    !is_one_of(argv[1], commands, sizeof(commands) / sizeof(char *)))
		return false;
	for (int i = 2; i < argc; i++)
		if (is_one_of(argv[i], not_with,
			      sizeof(not_with) / sizeof(char *)))
			return false;
	return true;
}

/* ---- the request ---- */

/* Text as a JSON string.  Bytes that are no ASCII: false, Python knows how. */
static bool put_json(FILE *to, const char *text)
{
	putc('"', to);
	for (; *text; text++) {
		if (*text & 0x80)
			return false;
		if ((unsigned char)*text < 0x20 || *text == 0x7f)
			fprintf(to, "\\u%04x", *text);
		else if (*text == '"' || *text == '\\')
			fprintf(to, "\\%c", *text);
		else
			putc(*text, to);
	}
	putc('"', to);
	return true;
}

static bool put_environment(FILE *to)
{
	const char *separator = "";

	for (char **entry = environ; *entry; entry++) {
		char *value = strchr(*entry, '=');

		if (!value || strncmp(*entry, "UBLK_LOOP_", 10))
			continue;
		*value = '\0';
		fputs(separator, to);
		bool ok = put_json(to, *entry) && putc(':', to) &&
			  put_json(to, value + 1);

		*value = '=';
		if (!ok)
			return false;
		separator = ",";
	}
	return true;
}

/* The request, to be freed, or NULL: Python's. */
static char *make_request(int argc, char **argv)
{
	char cwd[PATH_MAX], *text = NULL;
	size_t nr_bytes;
	FILE *to = open_memstream(&text, &nr_bytes);
	bool ok = to && getcwd(cwd, sizeof(cwd)) && cwd[0] == '/';

	if (!to)
		return NULL;
	fputs("{\"command\":\"run\",\"version\":\"" UBLK_LOOP_VERSION
	      "\",\"cwd\":",
	      to);
	ok = ok && put_json(to, cwd);
	fputs(",\"words\":[", to);
	for (int i = 1; ok && i < argc; i++) {
		if (i > 1)
			putc(',', to);
		ok = put_json(to, argv[i]);
	}
	fputs("],\"environment\":{", to);
	ok = ok && put_environment(to);
	fputs("}}\n", to);
	if (fclose(to) || !ok) {
		free(text);
		return NULL;
	}
	return text;
}

/* ---- the daemon ---- */

static void set_timeout(int fd, int option, int seconds)
{
	struct timeval limit = { .tv_sec = seconds };

	setsockopt(fd, SOL_SOCKET, option, &limit, sizeof(limit));
}

/* A socket, or -1: no daemon, or a path that is too long for a plain connect. */
static int connect_daemon(void)
{
	const char *folder = getenv("UBLK_LOOP_STATE_DIR");
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd, nr;

	if (!folder || !*folder)
		folder = "/run/ublk";
	nr = snprintf(address.sun_path, sizeof(address.sun_path),
		      "%s/daemon.sock", folder);
	if (nr >= (int)sizeof(address.sun_path))
		return -1;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	set_timeout(fd, SO_SNDTIMEO, CONNECT_S);
	set_timeout(fd, SO_RCVTIMEO, REPLY_S);
	if (!connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return fd;
	close(fd);
	return -1;
}

static bool send_all(int fd, const char *text)
{
	size_t left = strlen(text);

	while (left) {
		ssize_t nr = send(fd, text, left, MSG_NOSIGNAL);

		if (nr < 0 && errno == EINTR)
			continue;
		if (nr < 0)
			return false;
		text += nr;
		left -= nr;
	}
	return true;
}

/* All that comes, to be freed; its length or -errno.  It ended without having
 * read the request: -ECONNRESET. */
static ssize_t receive_all(int fd, char **data)
{
	size_t room = 65536, nr = 0;
	ssize_t got;

	*data = NULL;
	do {
		char *more = realloc(*data, room + 1);

		if (!more || room > REPLY_MAX)
			return -ENOMEM;
		*data = more;
		got = recv(fd, *data + nr, room - nr, 0);
		if (got > 0)
			nr += got;
		if (nr == room)
			room *= 2;
	} while (got > 0 || (got < 0 && errno == EINTR));
	if (got < 0)
		return -errno;
	(*data)[nr] = '\0';
	return nr;
}

static int fail(const char *text)
{
	fprintf(stderr, "ublk: daemon: %s\n", text);
	return 1;
}

/* What the daemon said is printed; return the exit code, or -1: Python's. */
static int print_reply(const char *data, size_t nr_bytes)
{
	int code, nr_out, nr_err, head = 0;

	/* "{...}": a refusal, of a daemon that does not know us. */
	if (sscanf(data, "%d %d %d%n", &code, &nr_out, &nr_err, &head) != 3 ||
	    data[head] != '\n' || code < 0)
		return -1;
	data += head + 1;
	if (nr_out < 0 || nr_err < 0 ||
	    (size_t)nr_out + nr_err + head + 1 != nr_bytes)
		return fail("its reply was cut short");
	fwrite(data, 1, nr_out, stdout);
	fwrite(data + nr_out, 1, nr_err, stderr);
	if (fflush(stdout)) {
		fprintf(stderr, "ublk: stdout: %s\n", strerror(errno));
		return 1;
	}
	return code;
}

/* The exit code, or -1: Python's. */
static int ask_daemon(const char *request)
{
	int fd = connect_daemon(), code;
	ssize_t nr_bytes;
	char *reply;

	if (fd < 0)
		return -1;
	if (!send_all(fd, request))
		/* It ended, and has not taken the request. */
		return errno == EAGAIN ? fail("it takes no request") : -1;
	nr_bytes = receive_all(fd, &reply);
	if (nr_bytes > 0)
		code = print_reply(reply, nr_bytes);
	else if (nr_bytes == -ECONNRESET)
		code = -1;
	else if (nr_bytes == -EAGAIN)
		code = fail("Connection timed out");
	else
		code = fail(nr_bytes ? strerror(-nr_bytes) : "it went away");
	free(reply);
	close(fd);
	return code;
}

static int run_python(char **argv)
{
	char path[PATH_MAX + sizeof(FALLBACK)];
	ssize_t nr = readlink("/proc/self/exe", path, PATH_MAX);
	char *slash;

	if (nr > 0) {
		path[nr] = '\0';
		slash = strrchr(path, '/');
		strcpy(slash + 1, FALLBACK);
		execv(path, argv);
	}
	fprintf(stderr, "ublk: %s: %s; install ublk-loop anew\n",
		nr > 0 ? path : "/proc/self/exe", strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	char *request = is_for_daemon(argc, argv) ? make_request(argc, argv)
						  : NULL;
	int code = request ? ask_daemon(request) : -1;

	free(request);
	return code < 0 ? run_python(argv) : code;
}
