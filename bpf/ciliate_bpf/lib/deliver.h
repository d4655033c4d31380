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
	return 0;
}

/* The MAC addresses of the link to a pod. */
static always_inline int address_to(struct __sk_buff *skb, struct endpoint_info *to)
{
	struct ethhdr eth = {.h_proto = skb->protocol};

	__builtin_memcpy(eth.h_dest, to->mac, 6);
	__builtin_memcpy(eth.h_source, to->node_mac, 6);
	return bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) < 0 ? DROP_WRITE_ERROR : 0;
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
