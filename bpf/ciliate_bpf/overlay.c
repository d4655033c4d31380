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

/* Whether the source address can be true: it is neither this node's nor of one of its pods. A node that claims to have sent
 * a packet itself is believed where the ipcache has that address at that node, and its identity is what stands there.
 */
static always_inline int check_sender(struct pkt *pkt, const union addr *node)
{
	struct ipcache_entry *entry;

	if (local_endpoint(&pkt->tuple.saddr, pkt->family) || is_router(&pkt->tuple.saddr, pkt->family))
		return DROP_SOURCE_IP;
	if (pkt->src_identity > IDENTITY_HOST)
		return 0;
	if (pkt->src_identity != IDENTITY_HOST)
		return DROP_TUNNEL_IDENTITY;
	entry = ipcache_of(&pkt->tuple.saddr, pkt->family);
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
