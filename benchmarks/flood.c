/* Sends bare packets at full rate from inside a network namespace, each of another flow: what a hostile pod would do.
 *
 * flood NETNS KIND SOURCE TARGET FIRST LAST PORTS SECONDS LEAST
 *   KIND      udp, syn, ack
 *   FIRST     to LAST: the source ports, in turn
 *   PORTS     how many target ports, from 1 on: the next one after every round of source ports; =N for port N alone
 *   SECONDS   how long at least
 *   LEAST     how many packets at least, within ten times that time
 * Prints how many packets were sent, how many the kernel refused, and the seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define PAYLOAD 4
#define LONGEST 80

static int six;
static unsigned char proto;
static struct sockaddr_storage target;
static socklen_t target_length;
static unsigned char source[16], destination[16];

static uint32_t sum(uint32_t total, const void *data, int length)
{
	const unsigned char *bytes = data;
	int i;

	for (i = 0; i + 1 < length; i += 2)
		total += bytes[i] << 8 | bytes[i + 1];
	return total;
}

static uint16_t fold(uint32_t total)
{
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return ~total;
}

static void put16(unsigned char *at, uint16_t value)
{
	at[0] = value >> 8;
	at[1] = value;
}

/* One packet, IP header included; returns its length. */
static int build(unsigned char *packet, const char *kind, int sport, int dport)
{
	int width = six ? 16 : 4, head = six ? 40 : 20, size = proto == 17 ? 8 + PAYLOAD : 20;
	unsigned char *l4 = packet + head;

	memset(packet, 0, LONGEST);
	if (six) {
		packet[0] = 0x60;
		put16(packet + 4, size);
		packet[6] = proto;
		packet[7] = 64;
		memcpy(packet + 8, source, 16);
		memcpy(packet + 24, destination, 16);
	} else {
		packet[0] = 0x45;
		put16(packet + 2, head + size);
		packet[8] = 64;
		packet[9] = proto;
		memcpy(packet + 12, source, 4);
		memcpy(packet + 16, destination, 4);
	}
	put16(l4, sport);
	put16(l4 + 2, dport);
	if (proto == 17) {
		put16(l4 + 4, size);
	} else {
		l4[7] = 1;
		l4[11] = !strcmp(kind, "ack");
		l4[12] = 5 << 4;
		l4[13] = strcmp(kind, "ack") ? 2 : 16;
		put16(l4 + 14, 64240);
	}
	put16(l4 + (proto == 17 ? 6 : 16),
	      fold(sum(sum(sum(proto + size, source, width), destination, width), l4, size)));
	return head + size;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void resolve(const char *from, const char *to)
{
	struct sockaddr_in *four = (void *)&target;
	struct sockaddr_in6 *other = (void *)&target;

	six = strchr(to, ':') != NULL;
	if (inet_pton(six ? AF_INET6 : AF_INET, from, source) != 1 || inet_pton(six ? AF_INET6 : AF_INET, to, destination) != 1)
		fail("address");
	if (six) {
		other->sin6_family = AF_INET6;
		memcpy(&other->sin6_addr, destination, 16);
		target_length = sizeof(*other);
	} else {
		four->sin_family = AF_INET;
		memcpy(&four->sin_addr, destination, 4);
		target_length = sizeof(*four);
	}
}

int main(int count, char **words)
{
	static unsigned char packets[BATCH][LONGEST];
	struct mmsghdr messages[BATCH] = {};
	struct iovec parts[BATCH];
	long sent = 0, refused = 0;
	int first, last, ports, raw, i, sport, dport, one = 1;
	double begin, passed, duration;
	long least;

	if (count != 10)
		return fprintf(stderr, "usage: flood NETNS KIND SOURCE TARGET FIRST LAST PORTS SECONDS LEAST\n"), 2;
	if (setns(open(words[1], O_RDONLY), CLONE_NEWNET))
		fail(words[1]);
	proto = strcmp(words[2], "udp") ? 6 : 17;
	resolve(words[3], words[4]);
	first = sport = atoi(words[5]);
	last = atoi(words[6]);
	ports = words[7][0] == '=' ? 1 : atoi(words[7]);
	dport = words[7][0] == '=' ? atoi(words[7] + 1) : 1;
	raw = socket(six ? AF_INET6 : AF_INET, SOCK_RAW, IPPROTO_RAW);
	if (raw < 0)
		fail("socket");
	i = 1 << 22;
	setsockopt(raw, SOL_SOCKET, SO_SNDBUF, &i, sizeof(i));
	if (six)
		setsockopt(raw, IPPROTO_IPV6, 36 /* IPV6_HDRINCL */, &one, sizeof(one));
	duration = atof(words[8]);
	least = atol(words[9]);
	for (begin = now(), passed = 0; passed < duration || (sent < least && passed < 10 * duration); passed = now() - begin) {
		for (i = 0; i < BATCH; i++) {
			parts[i].iov_base = packets[i];
			parts[i].iov_len = build(packets[i], words[2], sport, dport);
			messages[i].msg_hdr.msg_name = &target;
			messages[i].msg_hdr.msg_namelen = target_length;
			messages[i].msg_hdr.msg_iov = &parts[i];
			messages[i].msg_hdr.msg_iovlen = 1;
			if (++sport > last) {
				sport = first;
				if (ports > 1 && ++dport > ports)
					dport = 1;
			}
		}
		i = sendmmsg(raw, messages, BATCH, 0);
		if (i > 0)
			sent += i;
		else if (errno == ENOBUFS || errno == EAGAIN || errno == EPERM)
			refused += BATCH;
		else
			fail("send");
	}
	printf("%ld %ld %.3f\n", sent, refused, passed);
	return 0;
}
