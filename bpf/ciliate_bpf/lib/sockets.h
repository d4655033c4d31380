/* Sockets of the node itself, which a port that it lends to somebody must not be taken from. */
#ifndef CILIATE_SOCKETS_H
#define CILIATE_SOCKETS_H

#include "common.h"

/* Who sends, and to which end of the node. */
struct socket_pair {
	const union addr *saddr;
	const union addr *daddr;
	__be16 sport;
	__be16 dport;
};

/* Fills in the tuple of such a packet; gives its size. */
static always_inline __u32 socket_tuple(struct bpf_sock_tuple *tuple, const struct socket_pair *pair, __u8 family)
{
	if (family == FAMILY_IPV4) {
		tuple->ipv4.saddr = pair->saddr->w[3];
		tuple->ipv4.daddr = pair->daddr->w[3];
		tuple->ipv4.sport = pair->sport;
		tuple->ipv4.dport = pair->dport;
		return sizeof(tuple->ipv4);
	}
	__builtin_memcpy(tuple->ipv6.saddr, pair->saddr, 16);
	__builtin_memcpy(tuple->ipv6.daddr, pair->daddr, 16);
	tuple->ipv6.sport = pair->sport;
	tuple->ipv6.dport = pair->dport;
	return sizeof(tuple->ipv6);
}

/* Whether a socket of the node would take such a packet: a listener, a connection, a bound UDP socket. */
static always_inline int socket_takes(struct __sk_buff *skb, const struct socket_pair *pair, __u8 proto, __u8 family)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *found;
	__u32 size = socket_tuple(&tuple, pair, family);

	if (proto == IPPROTO_TCP)
		found = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (proto == IPPROTO_UDP)
		found = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		return 0;
	if (!found)
		return 0;
	bpf_sk_release(found);
	return 1;
}

/* Whether a socket of the node is connected to who sends such a packet. */
static always_inline int socket_expects(struct __sk_buff *skb, const struct socket_pair *pair, __u8 proto, __u8 family)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *found;
	__u32 size = socket_tuple(&tuple, pair, family);
	int connected;

	/* not what socket_takes asks: both must give the verifier one kind of socket here */
	if (proto == IPPROTO_TCP)
		found = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (proto == IPPROTO_UDP)
		found = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		return 0;
	if (!found)
		return 0;
	connected = found->dst_port != 0;
	bpf_sk_release(found);
	return connected;
}

#endif
