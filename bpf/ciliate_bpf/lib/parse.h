/* Parsing.
 *
 * All functions give 0 or a drop reason. Lengths that the headers claim are checked against each other and against the
 * packet, so that no later step reads what is not there.
 */
#ifndef CILIATE_PARSE_H
#define CILIATE_PARSE_H

#include <linux/ip.h>
#include <linux/ipv6.h>
#include "common.h"
#include "packet.h"
#include "repeat.h"

/* Flags of a TCP header, as in pkt->tcp_flags. */
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

/* Of RFC 792 and RFC 4443; the kernel's own headers drag in a C library. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_TIME_EXCEED 3
#define ICMPV6_PARAMPROB 4
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET 0x1fff
#define MAX_EXTENSIONS 8

/* The first 8 bytes of an L4 header, as far as they are looked at: of ICMP, or of a protocol with ports. */
struct l4_head {
	union {
		struct {
			__u8 type;
			__u8 code;
			__u16 checksum;
			__be16 identifier;
			__be16 sequence;
		};
		struct {
			__be16 sport;
			__be16 dport;
		};
	};
};

static always_inline int is_icmp(__u8 proto)
{
	return proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6;
}

static always_inline int is_icmp_error(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMP)
		return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
	return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
}

static always_inline int is_echo_request(__u8 proto, __u8 type)
{
	return type == (proto == IPPROTO_ICMP ? ICMP_ECHO : ICMPV6_ECHO_REQUEST);
}

static always_inline int is_echo_reply(__u8 proto, __u8 type)
{
	return type == (proto == IPPROTO_ICMP ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY);
}

/* The echo identifier stands for the port: the request carries it as destination, the reply as source. */
static always_inline void icmp_ports(struct tuple *tuple, __u8 proto, __u8 type, __be16 identifier)
{
	tuple->sport = 0;
	tuple->dport = 0;
	tuple->answer = is_echo_reply(proto, type);
	if (is_echo_request(proto, type))
		tuple->dport = identifier;
	else if (tuple->answer)
		tuple->sport = identifier;
	else
		tuple->dport = bpf_htons(type); /* others are flows of their own */
}

/* Bytes of an L4 header without which a packet is malformed; 0: not a protocol that is tracked. */
static always_inline __u32 minimal_header(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return 20;
	case IPPROTO_SCTP:
		return 12;
	case IPPROTO_UDP:
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return 8;
	}
	return 0;
}

/* The packet inside an ICMP error: addresses and the first 8 bytes of its L4 header. Writes pkt->inner. */
FUNCTION int parse_inner(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 offset, l4;
	__u8 l4_bytes[8] = {};
	struct tuple *inner;
	__u8 proto;

	if (!pkt)
		return DROP_INVALID;
	inner = &pkt->inner;
	offset = pkt->l4_offset + 8;
	if (pkt->family == FAMILY_IPV4) {
		struct iphdr ip;

		if (pkt->l4_length < 8 + 20 + 8 || bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) < 0)
			return DROP_CT_INVALID_HEADER;
		if (ip.version != 4 || ip.ihl < 5 || (bpf_ntohs(ip.frag_off) & IP_OFFSET))
			return DROP_CT_INVALID_HEADER;
		map_ipv4(&inner->saddr, ip.saddr);
		map_ipv4(&inner->daddr, ip.daddr);
		proto = ip.protocol;
		l4 = ip.ihl * 4;
	} else {
		struct ipv6hdr ip6;

		if (pkt->l4_length < 8 + 40 + 8 || bpf_skb_load_bytes(skb, offset, &ip6, sizeof(ip6)) < 0)
			return DROP_CT_INVALID_HEADER;
		if (ip6.version != 6)
			return DROP_CT_INVALID_HEADER;
		__builtin_memcpy(&inner->saddr, &ip6.saddr, 16);
		__builtin_memcpy(&inner->daddr, &ip6.daddr, 16);
		proto = ip6.nexthdr;
		l4 = 40;
	}
	if (!minimal_header(proto) || pkt->l4_length < 8 + l4 + 8)
		return DROP_CT_INVALID_HEADER;
	if (bpf_skb_load_bytes(skb, offset + l4, l4_bytes, sizeof(l4_bytes)) < 0)
		return DROP_CT_INVALID_HEADER;
	inner->proto = proto;
	if (is_icmp(proto)) {
		icmp_ports(inner, proto, l4_bytes[0], *(__be16 *)&l4_bytes[4]);
	} else {
		inner->sport = *(__be16 *)&l4_bytes[0];
		inner->dport = *(__be16 *)&l4_bytes[2];
	}
	return 0;
}

/* Ports of a later fragment are those of the first; without it nothing is known, and nothing passes. */
static always_inline int fragment_ports(struct pkt *pkt)
{
	struct frag_key key = {.saddr = pkt->tuple.saddr,
			       .daddr = pkt->tuple.daddr,
			       .id = pkt->frag_id,
			       .proto = pkt->proto,
			       .family = pkt->family};
	struct frag_entry *known = bpf_map_lookup_elem(&ciliate_frag, &key);

	if (!known)
		return DROP_FRAGMENT;
	pkt->tuple.sport = known->sport;
	pkt->tuple.dport = known->dport;
	pkt->policy_port = known->policy_port;
	if (is_icmp(pkt->proto))
		pkt->tuple.answer = is_echo_reply(pkt->proto, known->policy_port);
	return 0;
}

static always_inline int remember_fragment(struct pkt *pkt)
{
	struct frag_key key = {.saddr = pkt->tuple.saddr,
			       .daddr = pkt->tuple.daddr,
			       .id = pkt->frag_id,
			       .proto = pkt->proto,
			       .family = pkt->family};
	struct frag_entry entry = {.sport = pkt->tuple.sport,
				   .dport = pkt->tuple.dport,
				   .policy_port = pkt->policy_port};

	return bpf_map_update_elem(&ciliate_frag, &key, &entry, BPF_ANY) ? DROP_FRAGMENT : 0;
}

static always_inline int parse_tcp(struct __sk_buff *skb, struct pkt *pkt)
{
	__u8 *tail = bytes_at(skb, l4_at(pkt) + 12, 2);
	__u32 header;

	if (!tail)
		return DROP_CT_INVALID_HEADER;
	header = (tail[0] >> 4) * 4;
	if (header < 20 || header > pkt->l4_length)
		return DROP_CT_INVALID_HEADER;
	pkt->tcp_flags = tail[1];
	return 0;
}

/* Ports, TCP flags, ICMP type: everything of L4 that conntrack and policy need. */
FUNCTION int parse_l4(struct __sk_buff *skb, struct pkt *pkt)
{
	struct l4_head *head;
	__u32 need;
	__u8 type;

	if (!pkt)
		return DROP_INVALID;
	need = minimal_header(pkt->proto);
	if (!need)
		return DROP_CT_UNKNOWN_PROTOCOL;
	/* ICMP of the other family has no meaning and no end system takes it */
	if (pkt->proto == (pkt->family == FAMILY_IPV4 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return DROP_CT_UNKNOWN_PROTOCOL;
	if (pkt->flags & PKT_LATER_FRAGMENT)
		return fragment_ports(pkt);
	head = bytes_at(skb, l4_at(pkt), sizeof(*head));
	if (pkt->l4_length < need || !head)
		return DROP_CT_INVALID_HEADER;
	if (is_icmp(pkt->proto)) {
		type = head->type;
		pkt->policy_port = type;
		if (is_icmp_error(pkt->proto, type)) {
			pkt->flags |= PKT_ICMP_ERROR;
			pkt->tuple.dport = bpf_htons(type);
			return parse_inner(skb, pkt);
		}
		icmp_ports(&pkt->tuple, pkt->proto, type, head->identifier);
	} else {
		pkt->tuple.sport = head->sport;
		pkt->tuple.dport = head->dport;
		pkt->policy_port = bpf_ntohs(head->dport);
		if (pkt->proto == IPPROTO_TCP && parse_tcp(skb, pkt))
			return DROP_CT_INVALID_HEADER;
	}
	return pkt->flags & PKT_FRAGMENT ? remember_fragment(pkt) : 0;
}

/* A later fragment must not reach back over the ports and flags that were judged (RFC 1858, RFC 3128). */
static always_inline int overlaps_header(__u8 proto, __u32 offset)
{
	return offset < minimal_header(proto);
}

/* How long a packet is whose length field says 0: segments of TCP that together are longer than the field can say (BIG TCP).
 * As the kernel does, we believe its buffer then. Without the Ethernet header; 0: it is no such packet. */
static always_inline __u32 big_length(struct __sk_buff *skb)
{
	return skb->gso_segs > 1 && skb->len > ETH_HLEN + 0xffff ? skb->len - ETH_HLEN : 0;
}

FUNCTION int parse_ipv4(struct __sk_buff *skb, struct pkt *pkt)
{
	struct iphdr *ip = bytes_at(skb, ETH_HLEN, sizeof(*ip));
	__u32 header, total, offset;
	__u16 frag;

	if (!pkt || !ip)
		return DROP_INVALID;
	header = ip->ihl * 4;
	total = ip->tot_len ? bpf_ntohs(ip->tot_len) : big_length(skb);
	if (ip->version != 4 || header < 20 || total < header || ETH_HLEN + total > skb->len)
		return DROP_INVALID;
	pkt->family = FAMILY_IPV4;
	pkt->proto = ip->protocol;
	pkt->ttl = ip->ttl;
	map_ipv4(&pkt->tuple.saddr, ip->saddr);
	map_ipv4(&pkt->tuple.daddr, ip->daddr);
	pkt->tuple.proto = ip->protocol;
	pkt->l4_offset = ETH_HLEN + header;
	pkt->l4_length = total - header;
	frag = bpf_ntohs(ip->frag_off);
	if (frag & (IP_MORE_FRAGMENTS | IP_OFFSET)) {
		offset = (frag & IP_OFFSET) * 8;
		pkt->flags |= PKT_FRAGMENT;
		pkt->frag_id = bpf_ntohs(ip->id);
		if (offset) {
			pkt->flags |= PKT_LATER_FRAGMENT;
			if (overlaps_header(ip->protocol, offset))
				return DROP_FRAGMENT;
		}
	}
	return 0;
}

struct extension {
	__u8 next;
	__u8 length;
	__be16 frag_off;
	__be32 id;
};

/* Where a walk along extension headers is. end: of the packet; reason: a drop reason, or 0. */
struct walk {
	struct __sk_buff *skb;
	struct pkt *pkt;
	__u32 offset;
	__u32 end;
	__u32 reason;
	__u8 next;
};

static always_inline int is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS || next == IPPROTO_AH ||
	       next == IPPROTO_FRAGMENT;
}

static always_inline int walk_ends(struct walk *walk, __u32 reason)
{
	walk->reason = reason;
	return 1;
}

static always_inline void upper_layer(struct pkt *pkt, __u8 proto, __u32 offset, __u32 end)
{
	pkt->proto = proto;
	pkt->tuple.proto = proto;
	pkt->l4_offset = offset;
	pkt->l4_length = end - offset;
}

/* Whether a routing header takes the packet elsewhere than where it was judged to go: it has segments left (the byte behind
 * its type; segment routing, RFC 8754), or is of type 0, which nobody may use (RFC 5095). */
static always_inline int is_routed_on(const struct extension *ext)
{
	return (ext->frag_off & bpf_htons(0xff00)) == 0 || (ext->frag_off & bpf_htons(0x00ff)) != 0;
}

/* A fragment header. Behind the first fragment's there are headers, behind a later one's payload. */
static always_inline int walk_fragment(struct walk *walk, const struct extension *ext)
{
	__u32 at = bpf_ntohs(ext->frag_off) & 0xfff8;

	walk->pkt->flags |= PKT_FRAGMENT;
	walk->pkt->frag_id = bpf_ntohl(ext->id);
	walk->offset += 8;
	walk->next = ext->next;
	if (!at)
		return 0;
	walk->pkt->flags |= PKT_LATER_FRAGMENT;
	upper_layer(walk->pkt, ext->next, walk->offset, walk->end);
	return walk_ends(walk, overlaps_header(ext->next, at) ? DROP_FRAGMENT : 0);
}

STEP walk_extension(__u32 number, struct walk *walk)
{
	struct extension ext = {};

	if (!is_extension(walk->next)) {
		upper_layer(walk->pkt, walk->next, walk->offset, walk->end);
		return walk_ends(walk, 0);
	}
	/* hop-by-hop options come first or not at all; a second fragment header hides the first */
	if ((walk->next == IPPROTO_HOPOPTS && number) ||
	    (walk->next == IPPROTO_FRAGMENT && (walk->pkt->flags & PKT_FRAGMENT)))
		return walk_ends(walk, DROP_IPV6_EXTENSION);
	if (walk->offset + 8 > walk->end || bpf_skb_load_bytes(walk->skb, walk->offset, &ext, sizeof(ext)) < 0)
		return walk_ends(walk, DROP_IPV6_EXTENSION);
	if (walk->next == IPPROTO_ROUTING && is_routed_on(&ext))
		return walk_ends(walk, DROP_IPV6_EXTENSION);
	if (walk->next == IPPROTO_FRAGMENT)
		return walk_fragment(walk, &ext);
	walk->offset += walk->next == IPPROTO_AH ? (ext.length + 2) * 4 : (ext.length + 1) * 8;
	walk->next = ext.next;
	return walk->offset > walk->end ? walk_ends(walk, DROP_IPV6_EXTENSION) : 0;
}

FUNCTION int parse_ipv6(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ipv6hdr *ip6 = bytes_at(skb, ETH_HLEN, sizeof(*ip6));
	struct walk walk = {.skb = skb, .pkt = pkt, .offset = ETH_HLEN + 40, .reason = DROP_IPV6_EXTENSION};

	if (!pkt || !ip6)
		return DROP_INVALID;
	walk.end = ETH_HLEN + (ip6->payload_len ? 40 + bpf_ntohs(ip6->payload_len) : big_length(skb) ?: 40);
	if (ip6->version != 6 || walk.end > skb->len)
		return DROP_INVALID;
	pkt->family = FAMILY_IPV6;
	pkt->ttl = ip6->hop_limit;
	pkt->tuple.saddr = *(union addr *)&ip6->saddr;
	pkt->tuple.daddr = *(union addr *)&ip6->daddr;
	walk.next = ip6->nexthdr;
	if (is_extension(walk.next)) {
		REPEAT(MAX_EXTENSIONS, walk_extension, &walk);
		return walk.reason;
	}
	upper_layer(pkt, walk.next, walk.offset, walk.end);
	return 0;
}

#endif
