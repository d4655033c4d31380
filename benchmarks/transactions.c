/* Both ends of TCP transactions of one byte each way, and of streams, in a namespace and on a processor of their choice.
 *
 * transactions NETNS CPU serve ADDRESS PORT [PORTS] prints "ready", serves connections one after the other until killed,
 *                                                   on so many consecutive ports
 * transactions NETNS CPU rr ADDRESS PORT COUNT      request/response on one connection
 * transactions NETNS CPU crr ADDRESS PORT COUNT     connect, request, response, close
 * transactions NETNS CPU sink ADDRESS PORT          prints "ready", reads one connection after the other to its end
 * transactions NETNS CPU bulk ADDRESS PORT COUNT    sends so many MiB to a sink, as transactions of one MiB
 *
 * A client prints the median and the 99th percentile of a transaction and the processor time of its own in all, in ns.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_PORTS 16

static void check(int result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "transactions: %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static long long clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void enter(const char *netns, int cpu)
{
	int fd = open(netns, O_RDONLY);
	cpu_set_t set;

	check(fd, netns);
	check(setns(fd, CLONE_NEWNET), "setns");
	close(fd);
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	check(sched_setaffinity(0, sizeof(set), &set), "processor");
}

static int make(const char *address, int port, struct sockaddr_storage *to, socklen_t *length)
{
	struct sockaddr_in *four = (struct sockaddr_in *)to;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)to;
	int fd, one = 1;

	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, address, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(port);
		*length = sizeof(*four);
	} else if (inet_pton(AF_INET6, address, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		*length = sizeof(*six);
	} else {
		fprintf(stderr, "transactions: %s: not an address\n", address);
		exit(1);
	}
	fd = socket(to->ss_family, SOCK_STREAM, 0);
	check(fd, "socket");
	check(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)), "SO_REUSEADDR");
	check(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)), "TCP_NODELAY");
	return fd;
}

static void converse(int listener)
{
	int fd = accept(listener, NULL, NULL);
	char byte;

	check(fd, "accept");
	while (read(fd, &byte, 1) == 1)
		check(write(fd, &byte, 1), "write");
	close(fd);
}

static void serve(const char *address, int port, int ports)
{
	struct pollfd listeners[MAX_PORTS] = {};
	struct sockaddr_storage to;
	socklen_t length;
	int i;

	if (ports < 1 || ports > MAX_PORTS)
		exit(2);
	for (i = 0; i < ports; i++) {
		listeners[i].fd = make(address, port + i, &to, &length);
		listeners[i].events = POLLIN;
		check(bind(listeners[i].fd, (struct sockaddr *)&to, length), "bind");
		check(listen(listeners[i].fd, 16), "listen");
	}
	puts("ready");
	fflush(stdout);
	while (ports == 1)
		converse(listeners[0].fd);
	for (;;) {
		check(poll(listeners, ports, -1), "poll");
		for (i = 0; i < ports; i++)
			if (listeners[i].revents & POLLIN)
				converse(listeners[i].fd);
	}
}

static int reach(const char *address, int port)
{
	struct sockaddr_storage to;
	socklen_t length;
	int fd = make(address, port, &to, &length);

	check(connect(fd, (struct sockaddr *)&to, length), "connect");
	return fd;
}

static void ask(int fd)
{
	char byte = 'x';

	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1) {
		fprintf(stderr, "transactions: no answer: %s\n", strerror(errno));
		exit(1);
	}
}

static char block[1 << 18];

static void sink(const char *address, int port)
{
	struct sockaddr_storage to;
	socklen_t length;
	int listener = make(address, port, &to, &length), fd;

	check(bind(listener, (struct sockaddr *)&to, length), "bind");
	check(listen(listener, 16), "listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		fd = accept(listener, NULL, NULL);
		check(fd, "accept");
		while (read(fd, block, sizeof(block)) > 0)
			;
		close(fd);
	}
}

/* Ends when the sink has read everything. */
static void bulk(const char *address, int port, int count)
{
	long long begin = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID), left = (long long)count << 20;
	int fd = reach(address, port);
	long sent;

	for (; left; left -= sent) {
		sent = write(fd, block, left < (long long)sizeof(block) ? left : (long long)sizeof(block));
		check(sent, "write");
	}
	check(shutdown(fd, SHUT_WR), "shutdown");
	if (read(fd, block, 1)) {
		fprintf(stderr, "transactions: the sink did not read all: %s\n", strerror(errno));
		exit(1);
	}
	begin = (clock_ns(CLOCK_MONOTONIC) - begin) / count;
	printf("%lld %lld %lld\n", begin, begin, clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}

static int ascending(const void *a, const void *b)
{
	long long x = *(const long long *)a, y = *(const long long *)b;

	return (x > y) - (x < y);
}

static void client(const char *address, int port, int count, int connecting)
{
	long long *took = calloc(count, sizeof(*took)), begin, cpu;
	int fd = -1, i;

	if (!took || count < 1)
		exit(1);
	if (!connecting) {
		fd = reach(address, port);
		ask(fd);
	}
	cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
	for (i = 0; i < count; i++) {
		begin = clock_ns(CLOCK_MONOTONIC);
		if (connecting)
			fd = reach(address, port);
		ask(fd);
		if (connecting)
			close(fd);
		took[i] = clock_ns(CLOCK_MONOTONIC) - begin;
	}
	cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	qsort(took, count, sizeof(*took), ascending);
	printf("%lld %lld %lld\n", took[count / 2], took[count - 1 - count / 100], cpu);
}

int main(int argc, char **argv)
{
	if (argc < 6) {
		fprintf(stderr, "usage: transactions NETNS CPU serve|rr|crr|sink|bulk ADDRESS PORT [COUNT]\n");
		return 2;
	}
	enter(argv[1], atoi(argv[2]));
	if (!strcmp(argv[3], "serve"))
		serve(argv[4], atoi(argv[5]), argc > 6 ? atoi(argv[6]) : 1);
	if (!strcmp(argv[3], "sink"))
		sink(argv[4], atoi(argv[5]));
	if (!strcmp(argv[3], "bulk"))
		bulk(argv[4], atoi(argv[5]), argc > 6 ? atoi(argv[6]) : 100);
	else
		client(argv[4], atoi(argv[5]), argc > 6 ? atoi(argv[6]) : 1000, !strcmp(argv[3], "crr"));
	return 0;
}
