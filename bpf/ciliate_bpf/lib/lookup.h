/* Endpoints, addresses and identities: what every program that meets a pod's packet looks up first. */
#ifndef CILIATE_LOOKUP_H
#define CILIATE_LOOKUP_H

#include "common.h"
#include "parse.h"

static always_inline struct ep_config *endpoint(__u32 id)
{
	struct ep_config *ep = bpf_map_lookup_elem(&ciliate_ep, &id);

	return ep && (ep->flags & EP_VALID) ? ep : NULL;
}

/* key: of zeros. */
static always_inline void ipcache_key_of(struct ipcache_key *key, const union addr *addr, __u8 family)
{
	key->family = family;
	if (family == FAMILY_IPV4) {
		key->prefixlen = 32 + 32;
		key->addr.w[0] = addr->w[3];
	} else {
		key->prefixlen = 32 + 128;
		key->addr = *addr;
	}
}

/* What is known of an address; NULL where nobody claims it. */
static always_inline struct ipcache_entry *ipcache_of(const union addr *addr, __u8 family)
{
	struct ipcache_key key = {};

	ipcache_key_of(&key, addr, family);
	return bpf_map_lookup_elem(&ciliate_ipcache, &key);
}

/* The identity behind an address, or WORLD where nobody claims it. */
static always_inline __u32 identity_of(const union addr *addr, __u8 family)
{
	struct ipcache_entry *entry = ipcache_of(addr, family);

	return entry ? entry->identity : IDENTITY_WORLD;
}

static always_inline struct endpoint_info *local_endpoint(const union addr *addr, __u8 family)
{
	struct endpoint_key key = {.family = family};

	if (family == FAMILY_IPV4)
		key.addr.w[0] = addr->w[3];
	else
		key.addr = *addr;
	return bpf_map_lookup_elem(&ciliate_lxc, &key);
}

/* Whether an address is one that everybody has for himself: nobody can send to another's. */
static always_inline int is_loopback(const union addr *addr, __u8 family)
{
	if (family == FAMILY_IPV4)
		return addr->b[12] == 127;
	return !(addr->w[0] | addr->w[1] | addr->w[2]) && addr->w[3] == bpf_htonl(1);
}

/* The node's own address towards pods, and towards other nodes by the tunnel. */
static always_inline void router_address(__u8 family, union addr *to)
{
	to->w[0] = family == FAMILY_IPV4 ? 0 : router_ipv6.w[0];
	to->w[1] = family == FAMILY_IPV4 ? 0 : router_ipv6.w[1];
	to->w[2] = family == FAMILY_IPV4 ? bpf_htonl(0xffff) : router_ipv6.w[2];
	to->w[3] = family == FAMILY_IPV4 ? router_ipv4 : router_ipv6.w[3];
}

/* Whether an address is the node's own one towards pods. */
static always_inline int is_router(const union addr *addr, __u8 family)
{
	union addr router = {.w = {router_ipv6.w[0], router_ipv6.w[1], router_ipv6.w[2], router_ipv6.w[3]}};

	if (family == FAMILY_IPV4)
		return router_ipv4 && addr->w[3] == router_ipv4;
	return (router.w[0] | router.w[1] | router.w[2] | router.w[3]) && addr_equal(addr, &router);
}

static always_inline void side(struct pkt *pkt, struct ep_config *ep, __u8 direction)
{
	pkt->direction = direction;
	/* first of all: it is written after everything that it is about */
	pkt->epoch = ep->epoch;
	barrier();
	pkt->monitor = ep->flags >> EP_MONITOR_SHIFT;
	if (direction == INGRESS) {
		pkt->dst_endpoint = ep->id;
		pkt->dst_identity = ep->identity;
		pkt->shape = ep->ingress_shape;
		pkt->enforce = !!(ep->flags & EP_ENFORCE_INGRESS);
	} else {
		pkt->src_endpoint = ep->id;
		pkt->src_identity = ep->identity;
		pkt->shape = ep->egress_shape;
		pkt->enforce = !!(ep->flags & EP_ENFORCE_EGRESS);
	}
}

static always_inline int parse(struct __sk_buff *skb, struct pkt *pkt)
{
	int reason;

	if (skb->vlan_present)
		return DROP_UNSUPPORTED_L2;
	if (enable_ipv4 && skb->protocol == bpf_htons(ETH_P_IP))
		reason = parse_ipv4(skb, pkt);
	else if (enable_ipv6 && skb->protocol == bpf_htons(ETH_P_IPV6))
		reason = parse_ipv6(skb, pkt);
	else
		return DROP_UNSUPPORTED_L2;
	return reason;
}

/* Whether there is a type of ICMPv6 to read. In a fragment too: nobody sends such of what concerns a link (RFC 6980). */
static always_inline int is_typed_icmp6(struct pkt *pkt)
{
	return pkt->family == FAMILY_IPV6 && pkt->proto == IPPROTO_ICMPV6 && !(pkt->flags & PKT_LATER_FRAGMENT);
}

/* Types of ICMPv6: router and neighbour messages, multicast listeners. */
static always_inline int is_of_link(__u8 type)
{
	return (type >= 130 && type <= 137) || type == 143;
}

/* Router and neighbour messages and multicast listener reports: they concern a link, and ours have two ends that know
 * each other. One that is too short to say counts as such.
 */
static always_inline int is_link_housekeeping(struct __sk_buff *skb, struct pkt *pkt)
{
	__u8 type = 0;

	if (!is_typed_icmp6(pkt))
		return 0;
	if (pkt->l4_length < 8 || bpf_skb_load_bytes(skb, pkt->l4_offset, &type, 1) < 0)
		return 1;
	return is_of_link(type);
}

#endif
