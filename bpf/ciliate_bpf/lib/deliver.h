/* The receiver's side of a packet for a pod of this node, wherever it came from. */
#ifndef CILIATE_DELIVER_H
#define CILIATE_DELIVER_H

#include "common.h"
#include "events.h"
#include "lookup.h"
#include "policy.h"
#include "answers.h"
#include "hooks.h"
#include "lb.h"

/* TTL or hop limit one less. */
static always_inline int decrement_ttl(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ipv6hdr *ip6;
	struct iphdr *ip;
	__u32 sum;

	if (pkt->family == FAMILY_IPV4) {
		ip = bytes_at(skb, ETH_HLEN, sizeof(*ip));
		if (!ip)
			return DROP_WRITE_ERROR;
		/* ttl is the upper half of a word of the checksum (RFC 1624) */
		sum = ip->check + bpf_htons(0x0100);
		ip->check = sum + (sum >= 0xffff);
		ip->ttl--;
		return 0;
	}
	ip6 = bytes_at(skb, ETH_HLEN, sizeof(*ip6));
	if (!ip6)
		return DROP_WRITE_ERROR;
	ip6->hop_limit--;
	return 0;
}

/* The MAC addresses of the link to a pod. */
static always_inline int address_to(struct __sk_buff *skb, struct endpoint_info *to)
{
	struct ethhdr *eth = bytes_at(skb, 0, sizeof(*eth));

	if (!eth)
		return DROP_WRITE_ERROR;
	mac_copy(eth->h_dest, to->mac);
	mac_copy(eth->h_source, to->node_mac);
	return 0;
}

/* What the receiver says; gives 0 or a drop reason. */
static always_inline int accept(struct __sk_buff *skb, struct pkt *pkt, struct ep_config *peer)
{
	int reason;

	side(pkt, peer, INGRESS);
	/* hook: decryption */
	reason = HOOK_INGRESS(skb, pkt);
	if (!reason)
		reason = decide(skb, pkt);
	return reason || !pkt->services[INGRESS] ? reason : lb_restore(skb, pkt);
}

/* The receiver's side of a packet between two pods of this node. */
static always_inline int deliver(struct __sk_buff *skb, struct pkt *pkt, struct endpoint_info *to)
{
	struct ep_config *peer = endpoint(to->id);
	int reason;

	if (!peer)
		return drop(skb, pkt, DROP_NO_CONFIG);
	if (pkt->ttl <= 1)
		return ttl_exceeded(skb, pkt);
	reason = accept(skb, pkt, peer);
	if (!reason)
		reason = decrement_ttl(skb, pkt);
	if (!reason)
		reason = address_to(skb, to);
	if (reason)
		return drop(skb, pkt, reason);
	forwarded(skb, pkt, TO_ENDPOINT);
	return bpf_redirect_peer(to->ifindex, 0);
}

/* The same for a packet of another node's pod, out of the tunnel. The sender's node was the hop, and took one of its TTL. */
static always_inline int deliver_unwrapped(struct __sk_buff *skb, struct pkt *pkt, struct endpoint_info *to)
{
	struct ep_config *peer = endpoint(to->id);
	int reason;

	if (!peer)
		return drop(skb, pkt, DROP_NO_CONFIG);
	reason = accept(skb, pkt, peer);
	if (!reason)
		reason = address_to(skb, to);
	if (reason)
		return drop(skb, pkt, reason);
	bpf_skb_change_type(skb, PACKET_HOST_TYPE);
	forwarded(skb, pkt, TO_ENDPOINT);
	return bpf_redirect_peer(to->ifindex, 0);
}

#endif
