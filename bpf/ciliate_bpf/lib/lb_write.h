/* Writes addresses and ports into packets and keeps every checksum right. Sets the tuple in pkt accordingly. */
#ifndef CILIATE_LB_WRITE_H
#define CILIATE_LB_WRITE_H

#include "common.h"
#include "parse.h"
#include "sctp.h"

#define LB_DESTINATION 0
#define LB_SOURCE 1

/* Sum of what an address change means to a checksum. */
static always_inline __s64 lb_difference(const struct pkt *pkt, union addr *from, union addr *to)
{
	if (pkt->family == FAMILY_IPV4)
		return bpf_csum_diff(&from->w[3], 4, &to->w[3], 4, 0);
	return bpf_csum_diff(from->w, 16, to->w, 16, 0);
}

static always_inline int lb_store_address(struct __sk_buff *skb, const struct pkt *pkt, __u32 header, __u32 source,
					  const union addr *to)
{
	if (pkt->family == FAMILY_IPV4)
		return bpf_skb_store_bytes(
			skb, header + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr)),
			&to->w[3], 4, 0);
	return bpf_skb_store_bytes(
		skb, header + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr)), to, 16, 0);
}

/* Not where everything is inlined: the verifier walks too much there. A backend needs the service's port then. */
static always_inline int lb_sctp(struct __sk_buff *skb, const struct pkt *pkt, __be16 from, __be16 to, __u32 source)
{
#ifdef CILIATE_COMPAT
	return -1;
#endif
	/* both are numbers whose lowest byte comes first */
	__u32 difference = __builtin_bswap16(bpf_ntohs(from ^ to)), checksum;

	if (!source)
		difference <<= 16;
	if (bpf_skb_load_bytes(skb, pkt->l4_offset + 8, &checksum, 4) < 0)
		return -1;
	checksum ^= bpf_htonl(__builtin_bswap32(sctp_change(difference, pkt->l4_length)));
	return bpf_skb_store_bytes(skb, pkt->l4_offset + 8, &checksum, 4, 0);
}

/* The checksum field of TCP or UDP, as an offset into the header; 0: SCTP, whose checksum has no address in it. */
static always_inline __u32 lb_checksum_at(__u8 proto)
{
	return proto == IPPROTO_TCP ? 16 : proto == IPPROTO_UDP ? 6 : 0;
}

static always_inline int lb_port(struct __sk_buff *skb, const struct pkt *pkt, __be16 from, __be16 to, __u32 source,
				 __u64 flags)
{
	__u32 at = lb_checksum_at(pkt->proto);

	if (at ? bpf_l4_csum_replace(skb, pkt->l4_offset + at, from, to, 2 | flags) < 0 :
		 lb_sctp(skb, pkt, from, to, source) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, pkt->l4_offset + (source ? 0 : 2), &to, 2, 0);
}

/* Replace source or destination, address and port. Later fragments have no port to write. Gives 0 or a drop reason. */
FUNCTION int lb_write(struct __sk_buff *skb, struct pkt *pkt, struct lb_address *to, __u32 source)
{
	union addr *address;
	__be16 *port;
	__u64 flags;
	__u32 at;
	__s64 sum;

	if (!pkt || !to)
		return DROP_INVALID;
	address = source ? &pkt->tuple.saddr : &pkt->tuple.daddr;
	port = source ? &pkt->tuple.sport : &pkt->tuple.dport;
	flags = pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	at = lb_checksum_at(pkt->proto);
	sum = lb_difference(pkt, address, &to->address);
	if (pkt->family == FAMILY_IPV4 &&
	    bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), 0, sum, 0) < 0)
		return DROP_CSUM_L3;
	if (!(pkt->flags & PKT_LATER_FRAGMENT)) {
		if (at && bpf_l4_csum_replace(skb, pkt->l4_offset + at, 0, sum, BPF_F_PSEUDO_HDR | flags) < 0)
			return DROP_CSUM_L4;
		if (*port != to->port && lb_port(skb, pkt, *port, to->port, source, flags) < 0)
			return DROP_CSUM_L4;
	}
	if (lb_store_address(skb, pkt, ETH_HLEN, source, &to->address) < 0)
		return DROP_WRITE_ERROR;
	*address = to->address;
	*port = to->port;
	if (!source)
		pkt->policy_port = bpf_ntohs(to->port);
	return 0;
}

/* Where the header behind the inner IP header begins. */
static always_inline int lb_inner_l4(struct __sk_buff *skb, const struct pkt *pkt, __u32 *offset)
{
	__u8 first;

	*offset = pkt->l4_offset + 8;
	if (pkt->family == FAMILY_IPV6) {
		*offset += 40;
		return 0;
	}
	if (bpf_skb_load_bytes(skb, *offset, &first, 1) < 0)
		return -1;
	*offset += (first & 15) * 4;
	return 0;
}

/* Replace an end of the packet inside an ICMP error, and the error's own source or destination where that is the same.
 *
 * source: the inner packet's source is replaced (the error goes to it), else its destination (the error comes from it).
 * The inner address and the inner header checksum cancel each other out in ICMP's own checksum for IPv4.
 */
FUNCTION int lb_write_error(struct __sk_buff *skb, struct pkt *pkt, struct lb_address *to, __u32 source)
{
	union addr *inner, *outer;
	__u32 l4, outer_source = !source, sum_at;
	__be16 *port;
	__s64 sum;

	if (!pkt || !to)
		return DROP_INVALID;
	inner = source ? &pkt->inner.saddr : &pkt->inner.daddr;
	outer = source ? &pkt->tuple.daddr : &pkt->tuple.saddr;
	port = source ? &pkt->inner.sport : &pkt->inner.dport;
	sum = lb_difference(pkt, inner, &to->address);
	sum_at = pkt->l4_offset + 2;
	if (lb_inner_l4(skb, pkt, &l4) < 0)
		return DROP_INVALID;
	if (pkt->family == FAMILY_IPV4) {
		if (bpf_l3_csum_replace(skb, pkt->l4_offset + 8 + offsetof(struct iphdr, check), 0, sum, 0) < 0)
			return DROP_CSUM_L3;
	} else if (bpf_l4_csum_replace(skb, sum_at, 0, sum, 0) < 0) {
		return DROP_CSUM_L4;
	}
	if (bpf_l4_csum_replace(skb, sum_at, *port, to->port, 2) < 0)
		return DROP_CSUM_L4;
	if (bpf_skb_store_bytes(skb, l4 + (source ? 0 : 2), &to->port, 2, 0) < 0 ||
	    lb_store_address(skb, pkt, pkt->l4_offset + 8, source, &to->address) < 0)
		return DROP_WRITE_ERROR;
	if (addr_equal(outer, inner)) {
		if (pkt->family == FAMILY_IPV4) {
			if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), 0, sum, 0) < 0)
				return DROP_CSUM_L3;
		} else if (bpf_l4_csum_replace(skb, sum_at, 0, sum, BPF_F_PSEUDO_HDR) < 0) {
			return DROP_CSUM_L4;
		}
		if (lb_store_address(skb, pkt, ETH_HLEN, outer_source, &to->address) < 0)
			return DROP_WRITE_ERROR;
		*outer = to->address;
	}
	*inner = to->address;
	*port = to->port;
	return 0;
}

#endif
