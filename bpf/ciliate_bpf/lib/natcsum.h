/* Replacing addresses and ports with all checksums that cover them. */
#ifndef CILIATE_NATCSUM_H
#define CILIATE_NATCSUM_H

#include "common.h"
#include "parse.h"
#include "sctp.h"

#define NAT_SOURCE 0
#define NAT_DESTINATION 1
#define SCTP_CHECKSUM 8

/* What to write. side: of the packet, or of the packet inside an ICMP error; the address around that is on the other side,
 * and written where outer is set. */
struct nat_change {
	union addr from;
	union addr to;
	__be16 from_port;
	__be16 to_port;
	__u32 side;
	__u32 outer;
};

/* A port of an SCTP packet and its CRC32c. 0 there means that the device computes it later. */
static always_inline int nat_sctp(struct __sk_buff *skb, struct pkt *pkt, __u32 side, __be16 from, __be16 to)
{
	__u32 change = (__u16)(from ^ to), at = pkt->l4_offset + SCTP_CHECKSUM, crc = 0;

	/* the length of the whole is not known from a part of it */
	if (pkt->flags & PKT_FRAGMENT)
		return DROP_NAT_PROTOCOL;
	if (bpf_skb_load_bytes(skb, at, &crc, 4) < 0)
		return DROP_WRITE_ERROR;
	if (!crc)
		return 0;
	if (side == NAT_DESTINATION)
		change <<= 16;
	crc ^= sctp_change(change, pkt->l4_length);
	return bpf_skb_store_bytes(skb, at, &crc, 4, 0) < 0 ? DROP_WRITE_ERROR : 0;
}

/* Where the checksum of a protocol stands in its header. */
static always_inline __u32 checksum_offset(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return 16;
	case IPPROTO_UDP:
		return 6;
	}
	return 2;
}

/* The address in the IP header at `header`; gives what it changes in a checksum with a pseudo header through sum.
 *
 * Some cards give a sum over the whole packet. Where every checksum is corrected by hand it stays what it was; the helper
 * that corrects the checksum of L4 takes an IPv6 address from that sum, so then storing the address must add it (`flags`).
 */
static always_inline int nat_address(struct __sk_buff *skb, __u8 family, __u32 header, __u32 side,
				     const struct nat_change *change, __u64 flags, __s64 *sum)
{
	if (family == FAMILY_IPV4) {
		__be32 old = change->from.w[3], new = change->to.w[3];

		*sum = bpf_csum_diff(&old, 4, &new, 4, 0);
		if (bpf_l3_csum_replace(skb, header + offsetof(struct iphdr, check), old, new, 4) < 0)
			return DROP_WRITE_ERROR;
		header += side == NAT_SOURCE ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr);
		return bpf_skb_store_bytes(skb, header, &new, 4, 0) < 0 ? DROP_WRITE_ERROR : 0;
	}
	union addr old6 = change->from, new6 = change->to;

	*sum = bpf_csum_diff(old6.w, 16, new6.w, 16, 0);
	header += side == NAT_SOURCE ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr);
	return bpf_skb_store_bytes(skb, header, &new6, 16, flags) < 0 ? DROP_WRITE_ERROR : 0;
}

static always_inline int nat_port(struct __sk_buff *skb, struct pkt *pkt, __u32 side, __be16 from, __be16 to, __u32 mark)
{
	__u32 at = pkt->l4_offset + (is_icmp(pkt->proto) ? 4 : side == NAT_SOURCE ? 0 : 2);
	int reason;

	if (from == to)
		return 0;
	if (pkt->proto == IPPROTO_SCTP) {
		reason = nat_sctp(skb, pkt, side, from, to);
		if (reason)
			return reason;
	} else if (bpf_l4_csum_replace(skb, pkt->l4_offset + checksum_offset(pkt->proto), from, to, mark | 2) < 0) {
		return DROP_WRITE_ERROR;
	}
	return bpf_skb_store_bytes(skb, at, &to, 2, 0) < 0 ? DROP_WRITE_ERROR : 0;
}

/* Source or destination of a packet; gives 0 or a drop reason. Later fragments have an address alone. */
FUNCTION int nat_rewrite(struct __sk_buff *skb, struct pkt *pkt, const struct nat_change *change)
{
	__s64 sum = 0;
	__u32 mark;
	int reason;

	if (!pkt || !change)
		return DROP_INVALID;
	mark = pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	reason = nat_address(skb, pkt->family, ETH_HLEN, change->side, change, BPF_F_RECOMPUTE_CSUM, &sum);
	if (reason || (pkt->flags & PKT_LATER_FRAGMENT))
		return reason;
	/* ICMP has no pseudo header in IPv4, SCTP in neither family */
	if (pkt->proto != IPPROTO_SCTP && pkt->proto != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(skb, pkt->l4_offset + checksum_offset(pkt->proto), 0, sum, mark | BPF_F_PSEUDO_HDR) < 0)
		return DROP_WRITE_ERROR;
	return nat_port(skb, pkt, change->side, change->from_port, change->to_port, mark);
}

/* Checksum arithmetic of RFC 1624 on 16 bits. */
static always_inline __u16 csum_apply(__u16 check, __s64 sum)
{
	__u64 value = (__u16)~check;

	value += (__u32)sum;
	value = (value & 0xffff) + (value >> 16);
	value = (value & 0xffff) + (value >> 16);
	value = (value & 0xffff) + (value >> 16);
	return ~(__u16)value;
}

static always_inline __s64 diff16(__u16 from, __u16 to, __s64 sum)
{
	__be32 old = from, new = to;

	return bpf_csum_diff(&old, 4, &new, 4, (__u32)sum);
}

/* The packet inside an ICMP error, at most its first 8 bytes of L4 and a TCP checksum behind them. `icmp` collects what
 * its changes are to the checksum of the ICMP message around it. */
static always_inline int nat_inner(struct __sk_buff *skb, struct pkt *pkt, const struct nat_change *change, __s64 *icmp)
{
	__be16 from_port = change->from_port, to_port = change->to_port;
	__u32 header = pkt->l4_offset + 8, l4 = header + 40, at, left;
	__u8 proto = pkt->inner.proto, first = 0;
	__u16 check = 0, fixed = 0;
	__s64 sum = 0, all;
	int reason;

	if (pkt->family == FAMILY_IPV4) {
		if (bpf_skb_load_bytes(skb, header, &first, 1) < 0)
			return DROP_WRITE_ERROR;
		l4 = header + (first & 15) * 4;
	}
	reason = nat_address(skb, pkt->family, header, change->side, change, 0, &sum);
	if (reason)
		return reason;
	/* in IPv4 the header's own checksum makes up for the address */
	*icmp = pkt->family == FAMILY_IPV4 ? 0 : sum;
	all = proto == IPPROTO_ICMP ? 0 : sum;
	if (from_port != to_port) {
		at = l4 + (is_icmp(proto) ? 4 : change->side == NAT_SOURCE ? 0 : 2);
		if (bpf_skb_store_bytes(skb, at, &to_port, 2, 0) < 0)
			return DROP_WRITE_ERROR;
		all = diff16(from_port, to_port, all);
		*icmp = diff16(from_port, to_port, *icmp);
	}
	/* a CRC cannot be corrected without the length, and nobody checks that of a part */
	if (proto == IPPROTO_SCTP)
		return 0;
	at = l4 + checksum_offset(proto);
	left = pkt->l4_offset + pkt->l4_length;
	if (at + 2 > left || bpf_skb_load_bytes(skb, at, &check, 2) < 0 || (proto == IPPROTO_UDP && !check))
		return 0;
	fixed = csum_apply(check, all);
	if (proto == IPPROTO_UDP && !fixed)
		fixed = 0xffff;
	*icmp = diff16(check, fixed, *icmp);
	return bpf_skb_store_bytes(skb, at, &fixed, 2, 0) < 0 ? DROP_WRITE_ERROR : 0;
}

/* An ICMP error: the packet inside it, the address around it, and its own checksum. */
FUNCTION int nat_rewrite_error(struct __sk_buff *skb, struct pkt *pkt, const struct nat_change *change)
{
	__s64 icmp = 0, sum = 0;
	__u16 check = 0;
	int reason;

	if (!pkt || !change)
		return DROP_INVALID;
	reason = nat_inner(skb, pkt, change, &icmp);
	if (!reason && change->outer)
		reason = nat_address(skb, pkt->family, ETH_HLEN, !change->side, change, 0, &sum);
	if (reason)
		return reason;
	if (bpf_skb_load_bytes(skb, pkt->l4_offset + 2, &check, 2) < 0)
		return DROP_WRITE_ERROR;
	if (pkt->family == FAMILY_IPV6)
		icmp = (__s64)(__u32)icmp + (__u32)sum;
	icmp = (icmp & 0xffffffff) + (icmp >> 32);
	check = csum_apply(check, icmp);
	return bpf_skb_store_bytes(skb, pkt->l4_offset + 2, &check, 2, 0) < 0 ? DROP_WRITE_ERROR : 0;
}

#endif
