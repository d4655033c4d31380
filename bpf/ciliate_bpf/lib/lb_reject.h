/* Answers for clients of services without backends: a reset for TCP, port unreachable for everything else. */
#ifndef CILIATE_LB_REJECT_H
#define CILIATE_LB_REJECT_H

#include "answers.h"

#define ICMP_PORT_UNREACHABLE 3
#define ICMPV6_PORT_UNREACHABLE 4
#define TCP_HEADER 20

struct tcp_reset {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__u16 checksum;
	__u16 urgent;
};

struct pseudo4 {
	__be32 saddr;
	__be32 daddr;
	__be16 proto;
	__be16 length;
};

/* RFC 9293, 3.10.7.1: what a closed port answers. */
static always_inline int lb_reset_of(struct __sk_buff *skb, const struct pkt *pkt, struct tcp_reset *reset)
{
	struct tcp_reset seen = {};
	__u32 length;

	if (pkt->tcp_flags & TCP_RST || bpf_skb_load_bytes(skb, pkt->l4_offset, &seen, sizeof(seen)) < 0)
		return -1;
	reset->sport = seen.dport;
	reset->dport = seen.sport;
	reset->offset = TCP_HEADER / 4 << 4;
	reset->flags = TCP_RST;
	if (seen.flags & TCP_ACK) {
		reset->seq = seen.ack;
		return 0;
	}
	length = pkt->l4_length - (seen.offset >> 4) * 4;
	length += !!(seen.flags & TCP_SYN) + !!(seen.flags & TCP_FIN);
	reset->ack = bpf_htonl(bpf_ntohl(seen.seq) + length);
	reset->flags |= TCP_ACK;
	return 0;
}

FUNCTION int lb_reset4(struct __sk_buff *skb, struct pkt *pkt)
{
	struct {
		struct iphdr ip;
		struct tcp_reset tcp;
	} answer = {};
	struct pseudo4 pseudo = {};
	__s64 sum;

	if (!pkt || lb_reset_of(skb, pkt, &answer.tcp) < 0)
		return -1;
	pseudo.saddr = pkt->tuple.daddr.w[3];
	pseudo.daddr = pkt->tuple.saddr.w[3];
	pseudo.proto = bpf_htons(IPPROTO_TCP);
	pseudo.length = bpf_htons(TCP_HEADER);
	sum = bpf_csum_diff(0, 0, (__be32 *)&answer.tcp, TCP_HEADER, 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), sum);
	answer.tcp.checksum = fold(sum);
	answer.ip.version = 4;
	answer.ip.ihl = 5;
	answer.ip.tot_len = bpf_htons(sizeof(answer));
	answer.ip.ttl = 64;
	answer.ip.protocol = IPPROTO_TCP;
	answer.ip.saddr = pseudo.saddr;
	answer.ip.daddr = pseudo.daddr;
	answer.ip.check = fold(bpf_csum_diff(0, 0, (__be32 *)&answer.ip, sizeof(answer.ip), 0));
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(answer), 0) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &answer, sizeof(answer), 0);
}

FUNCTION int lb_reset6(struct __sk_buff *skb, struct pkt *pkt)
{
	struct {
		struct ipv6hdr ip;
		struct tcp_reset tcp;
	} answer = {};
	struct pseudo6 pseudo = {};
	__s64 sum;

	if (!pkt || lb_reset_of(skb, pkt, &answer.tcp) < 0)
		return -1;
	pseudo.saddr = pkt->tuple.daddr;
	pseudo.daddr = pkt->tuple.saddr;
	pseudo.length = bpf_htonl(TCP_HEADER);
	pseudo.next = bpf_htonl(IPPROTO_TCP);
	sum = bpf_csum_diff(0, 0, (__be32 *)&answer.tcp, TCP_HEADER, 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), sum);
	answer.tcp.checksum = fold(sum);
	answer.ip.version = 6;
	answer.ip.payload_len = bpf_htons(TCP_HEADER);
	answer.ip.nexthdr = IPPROTO_TCP;
	answer.ip.hop_limit = 64;
	__builtin_memcpy(&answer.ip.saddr, &pseudo.saddr, 16);
	__builtin_memcpy(&answer.ip.daddr, &pseudo.daddr, 16);
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(answer), 0) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &answer, sizeof(answer), 0);
}

/* Write the answer over a packet to a service without backends. Gives 0 where there is one to send back. */
static always_inline int lb_reject(struct __sk_buff *skb, struct pkt *pkt)
{
	drop(skb, pkt, DROP_NO_BACKEND);
	if (pkt->flags & PKT_LATER_FRAGMENT)
		return -1;
	if (pkt->family == FAMILY_IPV4) {
		if (pkt->proto == IPPROTO_TCP)
			return lb_reset4(skb, pkt);
		return icmp_error4(skb, pkt, ICMP_DEST_UNREACH << 8 | ICMP_PORT_UNREACHABLE);
	}
	if (pkt->proto == IPPROTO_TCP)
		return lb_reset6(skb, pkt);
	return icmp_error6(skb, pkt, ICMPV6_DEST_UNREACH << 8 | ICMPV6_PORT_UNREACHABLE);
}

#endif
