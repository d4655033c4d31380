/* Packets that are answered on the spot: ARP, neighbour solicitation, expired TTL. All go back to the sender's device. */
#ifndef CILIATE_ANSWERS_H
#define CILIATE_ANSWERS_H

#include "common.h"
#include "events.h"
#include "parse.h"

#define PACKET_HOST_TYPE 0
#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2
#define ND_SOLICIT 135
#define ND_ADVERT 136
#define ND_FLAGS 0xe0000000U /* router, solicited, override */

struct arp_packet {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

struct nd_packet {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 flags;
	union addr target;
	__u8 option;
	__u8 option_length;
	__u8 mac[6];
};

struct pseudo6 {
	union addr saddr;
	union addr daddr;
	__be32 length;
	__be32 next;
};

static always_inline __u16 fold(__s64 sum)
{
	__u64 value = sum;

	value = (value & 0xffffffff) + (value >> 32);
	value = (value & 0xffff) + (value >> 16);
	value = (value & 0xffff) + (value >> 16);
	value = (value & 0xffff) + (value >> 16);
	return ~(__u16)value;
}

/* Back to the pod, past our own egress program. */
static always_inline int send_back(struct __sk_buff *skb, struct ep_config *ep, __be16 protocol)
{
	struct ethhdr eth = {.h_proto = protocol};

	mac_copy(eth.h_dest, fixed(ep)->mac);
	mac_copy(eth.h_source, fixed(ep)->node_mac);
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) < 0)
		return TC_ACT_SHOT;
	bpf_skb_change_type(skb, PACKET_HOST_TYPE);
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Every request is answered with the MAC of our side, whatever the address: the pod has no neighbours. */
static always_inline int answer_arp(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt)
{
	struct arp_packet arp = {};
	__u8 ip[4];

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)) < 0)
		return drop(skb, pkt, DROP_INVALID);
	if (arp.hardware != bpf_htons(ARPHRD_ETHER) || arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_length != 6 ||
	    arp.protocol_length != 4)
		return drop(skb, pkt, DROP_INVALID);
	if (arp.operation != bpf_htons(ARPOP_REQUEST))
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	/* a probe for the pod's own address (RFC 5227) must stay without answer */
	if (*(__be32 *)arp.target_ip == fixed(ep)->ipv4)
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	__builtin_memcpy(ip, arp.target_ip, 4);
	arp.operation = bpf_htons(ARPOP_REPLY);
	mac_copy(arp.target_mac, fixed(ep)->mac);
	__builtin_memcpy(arp.target_ip, arp.sender_ip, 4);
	mac_copy(arp.sender_mac, fixed(ep)->node_mac);
	__builtin_memcpy(arp.sender_ip, ip, 4);
	if (bpf_skb_store_bytes(skb, ETH_HLEN, &arp, sizeof(arp), 0) < 0)
		return drop(skb, pkt, DROP_WRITE_ERROR);
	return send_back(skb, ep, bpf_htons(ETH_P_ARP));
}

static always_inline int is_gateway(const union addr *target)
{
	union addr router = {.w = {router_ipv6.w[0], router_ipv6.w[1], router_ipv6.w[2], router_ipv6.w[3]}};

	return addr_equal(target, &router);
}

/* Neighbour solicitation for the gateway: write the advertisement over it. */
FUNCTION int answer_solicit(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt)
{
	struct nd_packet advert = {};
	struct ipv6hdr ip6 = {};
	struct pseudo6 pseudo = {};
	__s64 sum;

	if (!pkt || !ep)
		return TC_ACT_SHOT;
	if (pkt->ttl != 255 || pkt->l4_length < 24 || pkt->l4_offset != ETH_HLEN + 40)
		return drop(skb, pkt, DROP_INVALID);
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6)) < 0 ||
	    bpf_skb_load_bytes(skb, pkt->l4_offset + 8, &advert.target, 16) < 0)
		return drop(skb, pkt, DROP_INVALID);
	/* duplicate address detection for the pod's own address: nobody else has it */
	if (!pkt->tuple.saddr.w[0] && !pkt->tuple.saddr.w[1] && !pkt->tuple.saddr.w[2] && !pkt->tuple.saddr.w[3])
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	if (!is_gateway(&advert.target))
		return drop(skb, pkt, DROP_UNKNOWN_TARGET);
	advert.type = ND_ADVERT;
	advert.flags = bpf_htonl(ND_FLAGS);
	advert.option = 2;
	advert.option_length = 1;
	mac_copy(advert.mac, fixed(ep)->node_mac);
	pseudo.saddr = advert.target;
	pseudo.daddr = pkt->tuple.saddr;
	pseudo.length = bpf_htonl(sizeof(advert));
	pseudo.next = bpf_htonl(IPPROTO_ICMPV6);
	sum = bpf_csum_diff(0, 0, (__be32 *)&advert, sizeof(advert), 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), sum);
	advert.checksum = fold(sum);
	ip6.payload_len = bpf_htons(sizeof(advert));
	__builtin_memcpy(&ip6.saddr, &pseudo.saddr, 16);
	__builtin_memcpy(&ip6.daddr, &pseudo.daddr, 16);
	if (bpf_skb_change_tail(skb, ETH_HLEN + 40 + sizeof(advert), 0) < 0 ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6), 0) < 0 ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + 40, &advert, sizeof(advert), 0) < 0)
		return drop(skb, pkt, DROP_WRITE_ERROR);
	return send_back(skb, ep, bpf_htons(ETH_P_IPV6));
}

struct icmp_error4 {
	struct iphdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 unused;
	__u8 original[28];
};

struct icmp_error6 {
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 unused;
	__u8 original[48];
};

/* Write an ICMP error over the packet that it speaks of, back to whom that came from (RFC 792, RFC 4443), but never
 * because of an error. kind: type << 8 | code. A router speaks for itself, an unreachable port for its own address.
 * Gives 0 where there is an error to send. */
FUNCTION int icmp_error4(struct __sk_buff *skb, struct pkt *pkt, __u32 kind)
{
	struct icmp_error4 error = {};

	if (!pkt || (pkt->flags & (PKT_ICMP_ERROR | PKT_LATER_FRAGMENT)))
		return -1;
	if (pkt->l4_offset != ETH_HLEN + 20 || bpf_skb_load_bytes(skb, ETH_HLEN, error.original, 28) < 0)
		return -1;
	error.ip.version = 4;
	error.ip.ihl = 5;
	error.ip.tot_len = bpf_htons(sizeof(error));
	error.ip.ttl = 64;
	error.ip.protocol = IPPROTO_ICMP;
	error.ip.saddr = kind >> 8 == ICMP_DEST_UNREACH ? pkt->tuple.daddr.w[3] : router_ipv4;
	error.ip.daddr = pkt->tuple.saddr.w[3];
	error.ip.check = fold(bpf_csum_diff(0, 0, (__be32 *)&error.ip, sizeof(error.ip), 0));
	error.type = kind >> 8;
	error.code = kind;
	error.checksum = fold(bpf_csum_diff(0, 0, (__be32 *)&error.type, sizeof(error) - sizeof(error.ip), 0));
	if (!error.ip.saddr || bpf_skb_change_tail(skb, ETH_HLEN + sizeof(error), 0) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &error, sizeof(error), 0);
}

FUNCTION int icmp_error6(struct __sk_buff *skb, struct pkt *pkt, __u32 kind)
{
	struct icmp_error6 error = {};
	struct pseudo6 pseudo = {};
	__u32 length = sizeof(error) - sizeof(error.ip);
	__s64 sum;

	if (!pkt || (pkt->flags & (PKT_ICMP_ERROR | PKT_LATER_FRAGMENT)))
		return -1;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, error.original, 48) < 0)
		return -1;
	if (kind >> 8 == ICMPV6_DEST_UNREACH) {
		pseudo.saddr = pkt->tuple.daddr;
	} else {
		pseudo.saddr.w[0] = router_ipv6.w[0];
		pseudo.saddr.w[1] = router_ipv6.w[1];
		pseudo.saddr.w[2] = router_ipv6.w[2];
		pseudo.saddr.w[3] = router_ipv6.w[3];
	}
	pseudo.daddr = pkt->tuple.saddr;
	pseudo.length = bpf_htonl(length);
	pseudo.next = bpf_htonl(IPPROTO_ICMPV6);
	error.ip.version = 6;
	error.ip.payload_len = bpf_htons(length);
	error.ip.nexthdr = IPPROTO_ICMPV6;
	error.ip.hop_limit = 64;
	__builtin_memcpy(&error.ip.saddr, &pseudo.saddr, 16);
	__builtin_memcpy(&error.ip.daddr, &pseudo.daddr, 16);
	error.type = kind >> 8;
	error.code = kind;
	sum = bpf_csum_diff(0, 0, (__be32 *)&error.type, length, 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), sum);
	error.checksum = fold(sum);
	if (!(pseudo.saddr.w[0] | pseudo.saddr.w[3]) || bpf_skb_change_tail(skb, ETH_HLEN + sizeof(error), 0) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &error, sizeof(error), 0);
}

/* Send what was written over a packet back to the pod that it came from. */
static always_inline int return_to_sender(struct __sk_buff *skb, struct pkt *pkt, int problem)
{
	__u32 id = pkt->src_endpoint;
	struct ep_config *ep = bpf_map_lookup_elem(&ciliate_ep, &id);

	if (problem || !ep)
		return TC_ACT_SHOT;
	return send_back(skb, ep, pkt->family == FAMILY_IPV4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6));
}

/* A packet that would be forwarded with TTL 0: tell its sender. */
static always_inline int ttl_exceeded(struct __sk_buff *skb, struct pkt *pkt)
{
	int problem;

	drop(skb, pkt, DROP_TTL_EXCEEDED);
	if (pkt->family == FAMILY_IPV4)
		problem = icmp_error4(skb, pkt, ICMP_TIME_EXCEEDED << 8);
	else
		problem = icmp_error6(skb, pkt, ICMPV6_TIME_EXCEED << 8);
	return return_to_sender(skb, pkt, problem);
}

#endif
