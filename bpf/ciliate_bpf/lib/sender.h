/* Who sent a packet that comes through the node's stack. */
#ifndef CILIATE_SENDER_H
#define CILIATE_SENDER_H

#include "common.h"
#include "lookup.h"
#include "marks.h"
#include "tunnel.h"

/* Whether this node made the packet: it came by no device. But connection tracking puts together what is forwarded, and the
 * parts of IPv6 that the stack then makes of it have lost their device; they have no socket either, as the node's own have. */
static always_inline int made_here(struct __sk_buff *skb, const struct pkt *pkt)
{
	if (skb->ingress_ifindex)
		return 0;
	return !(pkt->family == FAMILY_IPV6 && (pkt->flags & PKT_FRAGMENT)) || skb->sk;
}

/* A mark of our own programs says it. Without one, only what this node made itself is HOST; everything else is who the
 * ipcache says, unless its address cannot be true where the packet came from: then it is a claim, and counts as WORLD.
 */
static always_inline __u32 stack_sender(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 identity = marked_sender(skb);
	struct ipcache_entry *entry;
	struct endpoint_info *local;

	if (identity)
		return identity;
	if (made_here(skb, pkt))
		return IDENTITY_HOST;
	entry = ipcache_of(&pkt->tuple.saddr, pkt->family);
	/* one of this node's addresses, or a pod that would have come through the tunnel */
	if (!entry || entry->identity == IDENTITY_HOST || (tunnel_ifindex && entry->node_family))
		return IDENTITY_WORLD;
	identity = entry->identity;
	/* a pod of this node, from another device than its own */
	local = local_endpoint(&pkt->tuple.saddr, pkt->family);
	return local && local->ifindex != skb->ingress_ifindex ? IDENTITY_WORLD : identity;
}

#endif
