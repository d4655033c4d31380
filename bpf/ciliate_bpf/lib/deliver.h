/* The receiver's side of a packet for a pod of this node, wherever it came from. */
#ifndef CILIATE_DELIVER_H
#define CILIATE_DELIVER_H

#include "common.h"
#include "events.h"
#include "lookup.h"
#include "policy.h"
#include "answers.h"
#include "hooks.h"

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

#endif
