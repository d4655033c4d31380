/* The program of the tunnel device.
 *
 * from_overlay  tc ingress: what other nodes sent through the tunnel, unwrapped. Its tunnel key is the sender's identity.
 */
#include "lib/common.h"
#include "lib/events.h"
#include "lib/parse.h"
#include "lib/conntrack.h"
#include "lib/policy.h"
#include "lib/answers.h"
#include "lib/hooks.h"
#include "lib/lookup.h"
#include "lib/deliver.h"
#include "lib/marks.h"
#include "lib/tunnel.h"
#include "lib/nodes.h"
#ifdef CILIATE_SERVICES
#include "lib/lb_answer.h"
#endif

char _license[] SEC("license") = "Dual BSD/GPL";

/* The node that sent the packet, and what it says of the sender. */
static always_inline int tunnel_key(struct __sk_buff *skb, union addr *node, __u32 *identity)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, 0))
		map_ipv4(node, bpf_htonl(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(node, key.remote_ipv6, 16);
	else
		return DROP_NO_TUNNEL_KEY;
	*identity = key.tunnel_id;
	return known_node(node) ? 0 : DROP_UNKNOWN_NODE;
}

/* Whether the sender can be true. Its address is neither this node's nor of one of its pods, nor by the ipcache at another
 * node than the one that sent it, whose address is compared where both are of one family. Reserved identities are not taken
 * from others, but for WORLD: the identity is then what the ipcache says of that address at that node, else WORLD. So HOST is
 * only ever this node.
 */
static always_inline int check_sender(struct pkt *pkt, const union addr *node)
{
	struct ipcache_entry *entry;
	int mapped = !node->w[0] && !node->w[1] && node->w[2] == bpf_htonl(0xffff);

	if (local_endpoint(&pkt->tuple.saddr, pkt->family) || is_router(&pkt->tuple.saddr, pkt->family))
		return DROP_SOURCE_IP;
	if (!pkt->src_identity)
		return DROP_TUNNEL_IDENTITY;
	entry = ipcache_of(&pkt->tuple.saddr, pkt->family);
	if (entry && entry->identity == IDENTITY_HOST)
		return DROP_SOURCE_IP;
	if (entry && entry->node_family == (mapped ? FAMILY_IPV4 : FAMILY_IPV6) && !addr_equal(&entry->node, node))
		return DROP_SOURCE_IP;
	if (pkt->src_identity == IDENTITY_WORLD || pkt->src_identity > LAST_RESERVED)
		return 0;
	pkt->src_identity = IDENTITY_WORLD;
	if (entry && entry->node_family && addr_equal(&entry->node, node))
		pkt->src_identity = entry->identity;
	return 0;
}

/* Not for a pod that is reached directly: the node's own address, or a pod that is reached through the stack. */
static always_inline int to_stack(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ipcache_entry *entry;

	if (!is_router(&pkt->tuple.daddr, pkt->family)) {
		entry = ipcache_of(&pkt->tuple.daddr, pkt->family);
		if (!entry)
			return drop(skb, pkt, DROP_NO_LOCAL_CONTAINER);
		if (entry->node_family || entry->identity <= IDENTITY_WORLD || entry->identity >= LOCAL_IDENTITY)
			return drop(skb, pkt, DROP_NOT_LOCAL);
		pkt->dst_identity = entry->identity;
	} else {
		pkt->dst_identity = IDENTITY_HOST;
	}
	bpf_skb_change_type(skb, PACKET_HOST_TYPE);
	mark_sender(skb, pkt->src_identity);
	forwarded(skb, pkt, pkt->dst_identity == IDENTITY_HOST ? TO_HOST : TO_STACK);
	return TC_ACT_OK;
}

#ifdef CILIATE_SERVICES
/* An answer to a client that this node stands for: the stack knows the way to it. */
static always_inline int to_client(struct __sk_buff *skb, struct pkt *pkt)
{
	bpf_skb_change_type(skb, PACKET_HOST_TYPE);
	mark_sender(skb, pkt->src_identity);
	forwarded(skb, pkt, TO_STACK);
	return TC_ACT_OK;
}
#endif

static always_inline int unwrapped(struct __sk_buff *skb)
{
	struct endpoint_info *to;
	union addr node = {};
	int reason;
	NEW_PKT(pkt, INGRESS);

	reason = tunnel_key(skb, &node, &pkt->src_identity);
	if (reason)
		return drop(skb, pkt, reason);
	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = check_sender(pkt, &node);
	if (reason)
		return drop(skb, pkt, reason);
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	arrived(skb, pkt, FROM_OVERLAY);
#ifdef CILIATE_SERVICES
	if (is_router(&pkt->tuple.daddr, pkt->family)) {
		reason = lb_answer_outside(skb, pkt);
		if (reason)
			return drop(skb, pkt, reason);
		if (!is_router(&pkt->tuple.daddr, pkt->family))
			return to_client(skb, pkt);
	}
#endif
	to = local_endpoint(&pkt->tuple.daddr, pkt->family);
	if (to && !(to->flags & ENDPOINT_HOST))
		return deliver_unwrapped(skb, pkt, to);
	return to_stack(skb, pkt);
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	return unwrapped(skb);
}
