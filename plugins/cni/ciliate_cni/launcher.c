// SPDX-License-Identifier: Apache-2.0
/* The CNI executable's short way: hands the request to the agent and prints its answer, in a millisecond.
 *
 * It knows one case, that of an agent that answers. For everything else (an agent that is down or starting, requests that
 * are wrong, VERSION) it becomes the executable in Python beside it (shim.py, installed under this file's name with ".py"),
 * which gets the standard input that was read here once more. The frame is described there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define ANSWER_TIME 90 /* seconds within which a connected agent has to answer */
#define LARGEST (4 << 20) /* bytes of a request or an answer */

/* the installer writes the agent's socket over this */
__attribute__((used)) static const volatile char default_socket[sizeof(((struct sockaddr_un *)0)->sun_path)] =
	"@ciliate-cni-socket@";

extern char **environ;

struct buffer {
	char *data;
	size_t size, room;
};

static char *input;
static size_t input_size;

static void become_python(const char *lost)
{
	char path[PATH_MAX];
	ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 4);

	if (size < 0)
		exit(1);
	strcpy(path + size, ".py");
	if (lost)
		setenv("CILIATE_CNI_LOST", lost, 1);
	if (input) {
		int file = memfd_create("stdin", 0);

		for (size_t done = 0; done < input_size;) {
			ssize_t part = write(file, input + done, input_size - done);

			if (part < 0)
				exit(1);
			done += part;
		}
		lseek(file, 0, SEEK_SET);
		dup2(file, 0);
	}
	execl(path, path, (char *)NULL);
	fprintf(stderr, "ciliate-cni: %s: %s\n", path, strerror(errno));
	exit(1);
}

static const char *variable(const char *name)
{
	const char *value = getenv(name);

	return value ? value : "";
}

static int is_one_of(const char *command, const char *const *names)
{
	for (; *names; names++)
		if (!strcmp(command, *names))
			return 1;
	return 0;
}

static int leads_elsewhere(const char *name)
{
	return strchr(name, '/') || strchr(name, '\\') || strstr(name, "..");
}

static void append(struct buffer *to, const void *data, size_t size)
{
	while (to->size + size > to->room) {
		to->room = to->room ? to->room * 2 : 65536;
		to->data = realloc(to->data, to->room);
		if (!to->data || to->room > 4 * LARGEST)
			become_python(NULL);
	}
	memcpy(to->data + to->size, data, size);
	to->size += size;
}

static void read_input(void)
{
	struct buffer all = {};
	char part[65536];
	ssize_t size;

	while ((size = read(0, part, sizeof(part))) > 0)
		append(&all, part, size);
	if (size < 0)
		become_python(NULL); /* which meets the same error */
	append(&all, "", 1); /* so that there is something even where nothing was read */
	input = all.data;
	input_size = all.size - 1;
	if (input_size > LARGEST / 2)
		become_python(NULL);
}

static void put_number(char *to, uint32_t value)
{
	for (int place = 3; place >= 0; place--, value >>= 8)
		to[place] = value & 0xff;
}

static struct buffer make_frame(void)
{
	struct buffer frame = {};
	char head[12] = "CNI1";

	append(&frame, head, sizeof(head));
	for (char **item = environ; *item; item++)
		if (!strncmp(*item, "CNI_", 4))
			append(&frame, *item, strlen(*item) + 1);
	if (frame.size > sizeof(head))
		frame.size--; /* NUL stands between variables only */
	put_number(frame.data + 4, frame.size - sizeof(head));
	put_number(frame.data + 8, input_size);
	append(&frame, input, input_size);
	return frame;
}

static int connect_agent(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const char *path = getenv("CILIATE_CNI_SOCKET");
	int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (!path)
		path = (const char *)default_socket;
	if (*path != '/' || strlen(path) >= sizeof(address.sun_path))
		become_python(NULL);
	strcpy(address.sun_path, path);
	if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof(address)))
		become_python(NULL);
	return connection;
}

static void send_frame(int connection, const struct buffer *frame, int namespace)
{
	struct iovec data = {frame->data, frame->size};
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
	ssize_t sent;

	if (namespace >= 0) {
		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);

		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &namespace, sizeof(int));
	}
	sent = sendmsg(connection, &message, MSG_NOSIGNAL);
	for (size_t done = sent; sent >= 0 && done < frame->size; done += sent)
		sent = send(connection, frame->data + done, frame->size - done, MSG_NOSIGNAL);
	if (sent < 0)
		become_python(strerror(errno));
}

static void receive(int connection, char *to, size_t size)
{
	while (size) {
		ssize_t part = recv(connection, to, size, 0);

		if (part < 0 && errno == EINTR)
			continue;
		if (part < 0)
			become_python(errno == EAGAIN ? "timed out" : strerror(errno));
		if (!part)
			become_python("it went away before it had answered");
		to += part;
		size -= part;
	}
}

static int print_answer(int connection)
{
	unsigned char head[5];
	char *output;
	uint32_t size;

	receive(connection, (char *)head, sizeof(head));
	size = (uint32_t)head[1] << 24 | head[2] << 16 | head[3] << 8 | head[4];
	if (size > LARGEST)
		become_python("it gave an answer that is too long");
	output = malloc(size + 1);
	if (!output)
		exit(1);
	receive(connection, output, size);
	for (size_t done = 0; done < size;) {
		ssize_t part = write(1, output + done, size - done);

		if (part < 0)
			exit(1);
		done += part;
	}
	return head[0];
}

int main(void)
{
	static const char *const known[] = {"ADD", "DEL", "CHECK", "GC", "STATUS", NULL};
	static const char *const need_namespace[] = {"ADD", "CHECK", NULL};
	const char *command = variable("CNI_COMMAND"), *path = variable("CNI_NETNS");
	struct timeval limit = {.tv_sec = ANSWER_TIME};
	struct buffer frame;
	int connection, namespace = -1;

	if (!is_one_of(command, known) || leads_elsewhere(variable("CNI_CONTAINERID")) ||
	    leads_elsewhere(variable("CNI_IFNAME")))
		become_python(NULL);
	read_input();
	if (*path) {
		namespace = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would make us wait */
		if (namespace < 0 && is_one_of(command, need_namespace))
			become_python(NULL);
	}
	frame = make_frame();
	connection = connect_agent();
	setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	send_frame(connection, &frame, namespace);
	return print_answer(connection);
}
