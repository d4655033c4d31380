/* The endpoint programs.
 *
 * from_container  tc ingress of the host-side device: everything that the pod sends.
 * to_container    tc egress of the host-side device: what reaches the pod through the host's stack.
 *
 * Pod to pod on one node never leaves from_container: egress side of the sender, ingress side of the receiver, then
 * straight into the receiver's namespace. Later features hook in at the places marked "hook:".
 */
#include "lib/common.h"
#include "lib/events.h"
#include "lib/parse.h"
#include "lib/conntrack.h"
#include "lib/policy.h"
#include "lib/answers.h"
#include "lib/hooks.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define ND_ROUTER_SOLICIT 133

static always_inline struct ep_config *endpoint(__u32 id)
{
	struct ep_config *ep = bpf_map_lookup_elem(&ciliate_ep, &id);

	return ep && (ep->flags & EP_VALID) ? ep : NULL;
}

/* The programs' own endpoint, where it is valid. Where its device is another one, its id was given away meanwhile. */
static always_inline struct ep_config *own_entry(struct __sk_buff *skb)
{
	struct ep_config *ep = endpoint(endpoint_id(skb));

	return ep && ep->ifindex == fixed(ep)->ifindex ? ep : NULL;
}

/* The identity behind an address, or WORLD where nobody claims it. */
static always_inline __u32 identity_of(const union addr *addr, __u8 family)
{
	struct ipcache_key key = {.prefixlen = 32 + 128, .family = family};
	struct ipcache_entry *entry;

	if (family == FAMILY_IPV4) {
		key.prefixlen = 32 + 32;
		key.addr.w[0] = addr->w[3];
	} else {
		key.addr = *addr;
	}
	entry = bpf_map_lookup_elem(&ciliate_ipcache, &key);
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

static always_inline void side(struct pkt *pkt, struct ep_config *ep, __u8 direction)
{
	pkt->direction = direction;
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

/* TTL or hop limit one less, and the MAC addresses of the next hop. */
static always_inline int rewrite(struct __sk_buff *skb, struct pkt *pkt, struct endpoint_info *to)
{
	struct ethhdr eth = {.h_proto = skb->protocol};
	__u8 ttl = pkt->ttl - 1;

	if (pkt->family == FAMILY_IPV4) {
		/* ttl and protocol make one 16-bit word of the checksum */
		if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), bpf_htons(pkt->ttl << 8),
					bpf_htons(ttl << 8), 2) < 0 ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, ttl), &ttl, 1, 0) < 0)
			return DROP_WRITE_ERROR;
	} else if (bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, hop_limit), &ttl, 1, 0) < 0) {
		return DROP_WRITE_ERROR;
	}
	__builtin_memcpy(eth.h_dest, to->mac, 6);
	__builtin_memcpy(eth.h_source, to->node_mac, 6);
	return bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) < 0 ? DROP_WRITE_ERROR : 0;
}

/* The receiver's side of a packet between two pods of this node. */
static always_inline int deliver(struct __sk_buff *skb, struct pkt *pkt, struct endpoint_info *to)
{
	struct ep_config *peer = endpoint(to->id);
	int reason;

	if (!peer)
		return drop(skb, pkt, DROP_NO_CONFIG);
	if (pkt->ttl <= 1)
		return pkt->family == FAMILY_IPV4 ? ttl_exceeded4(skb, pkt) : ttl_exceeded6(skb, pkt);
	side(pkt, peer, INGRESS);
	/* hook: reverse translation of services, decryption */
	reason = HOOK_INGRESS(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = decide(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = rewrite(skb, pkt, to);
	if (reason)
		return drop(skb, pkt, reason);
	forwarded(skb, pkt, TO_ENDPOINT);
	return bpf_redirect_peer(to->ifindex, 0);
}

/* What the node's own stack must see or nobody: neighbour discovery and multicast housekeeping of a pod. */
static always_inline int is_link_local_icmp6(struct pkt *pkt)
{
	return pkt->family == FAMILY_IPV6 && pkt->proto == IPPROTO_ICMPV6 && !(pkt->flags & PKT_FRAGMENT);
}

static always_inline int link_local_icmp6(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt, int *done)
{
	__u8 type = 0;

	*done = 1;
	if (pkt->l4_length < 8 || bpf_skb_load_bytes(skb, pkt->l4_offset, &type, 1) < 0)
		return drop(skb, pkt, DROP_CT_INVALID_HEADER);
	if (type == ND_SOLICIT)
		return answer_solicit(skb, ep, pkt);
	/* router and neighbour messages and multicast listener reports have no listener on this link */
	if ((type >= 130 && type <= 137) || type == 143)
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	*done = 0;
	return 0;
}

static always_inline int valid_source(struct pkt *pkt, struct ep_config *ep)
{
	const struct ep_config *own = fixed(ep);

	if (pkt->family == FAMILY_IPV4)
		return own->ipv4 && pkt->tuple.saddr.w[3] == own->ipv4;
	return (own->ipv6.w[0] | own->ipv6.w[1] | own->ipv6.w[2] | own->ipv6.w[3]) &&
	       addr_equal(&pkt->tuple.saddr, &own->ipv6);
}

static always_inline int egress_ip(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt)
{
	struct endpoint_info *to;
	int reason, done = 0, result;

	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (is_link_local_icmp6(pkt)) {
		result = link_local_icmp6(skb, ep, pkt, &done);
		if (done)
			return result;
	}
	if (!valid_source(pkt, ep))
		return drop(skb, pkt, DROP_SOURCE_IP);
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	/* hook: services translate the destination here, before conntrack and policy */
	reason = HOOK_EGRESS(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	pkt->dst_identity = identity_of(&pkt->tuple.daddr, pkt->family);
	to = local_endpoint(&pkt->tuple.daddr, pkt->family);
	if (to && !(to->flags & ENDPOINT_HOST))
		pkt->dst_endpoint = to->id;
	reason = decide(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (to && !(to->flags & ENDPOINT_HOST))
		return deliver(skb, pkt, to);
	/* hook: tunnel, encryption and masquerading of what leaves the node */
	reason = HOOK_LEAVE(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	forwarded(skb, pkt, to || pkt->dst_identity == IDENTITY_HOST ? TO_HOST : TO_STACK);
	return TC_ACT_OK;
}

SEC("tc")
int from_container(struct __sk_buff *skb)
{
	struct ep_config *ep = own_entry(skb);
	struct ethhdr eth = {};
	NEW_PKT(pkt, EGRESS);

	if (!ep)
		return drop(skb, pkt, DROP_NO_CONFIG);
	side(pkt, ep, EGRESS);
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) < 0)
		return drop(skb, pkt, DROP_INVALID);
	if (__builtin_memcmp(eth.h_source, fixed(ep)->mac, 6))
		return drop(skb, pkt, DROP_SOURCE_MAC);
	if (skb->protocol == bpf_htons(ETH_P_ARP) && !skb->vlan_present)
		return answer_arp(skb, ep, pkt);
	return egress_ip(skb, ep, pkt);
}

/* Who sent a packet that comes through the host's stack. Only what this host made itself is HOST; one of its addresses
 * on a packet that arrived from elsewhere is a claim, and counts as WORLD. */
static always_inline __u32 stack_source(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 identity;

	if (!skb->ingress_ifindex)
		return IDENTITY_HOST;
	identity = identity_of(&pkt->tuple.saddr, pkt->family);
	return identity == IDENTITY_HOST ? IDENTITY_WORLD : identity;
}

SEC("tc")
int to_container(struct __sk_buff *skb)
{
	struct ep_config *ep = own_entry(skb);
	int reason;
	NEW_PKT(pkt, INGRESS);

	if (!ep)
		return drop(skb, pkt, DROP_NO_CONFIG);
	side(pkt, ep, INGRESS);
	/* neighbours on this link are permanent entries: ARP has no business here */
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	/* so has the neighbour discovery of the host's side */
	if (is_link_local_icmp6(pkt)) {
		__u8 type = 0;

		if (pkt->l4_length < 8 || bpf_skb_load_bytes(skb, pkt->l4_offset, &type, 1) < 0)
			return drop(skb, pkt, DROP_CT_INVALID_HEADER);
		if ((type >= 130 && type <= 137) || type == 143)
			return drop(skb, pkt, DROP_HOUSEKEEPING);
	}
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	pkt->src_identity = stack_source(skb, pkt);
	/* hook: reverse translation, decryption marks */
	reason = HOOK_INGRESS(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = decide(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	forwarded(skb, pkt, TO_ENDPOINT);
	return TC_ACT_OK;
}
