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
 * ipcache says, unless its address cannot be true where the packet came from. One of this node's own then counts as WORLD, as
 * somebody may have masqueraded the packet here. So does a pod's that comes through the tunnel only, as its node may send to
 * ours without, but it is a mere claim. A pod of this node from another device than its own is refused.
 * Sets the sender's identity; gives 0 or a drop reason.
 */
static always_inline int stack_sender(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ipcache_entry *entry;
	struct endpoint_info *local;

	pkt->src_identity = marked_sender(skb);
	if (pkt->src_identity)
		return 0;
	pkt->src_identity = IDENTITY_HOST;
	if (made_here(skb, pkt))
		return 0;
	pkt->src_identity = IDENTITY_WORLD;
	entry = ipcache_of(&pkt->tuple.saddr, pkt->family);
	if (!entry || entry->identity == IDENTITY_HOST)
		return 0;
	if (tunnel_ifindex && entry->node_family) {
		pkt->flags |= PKT_CLAIM;
		return 0;
	}
	local = local_endpoint(&pkt->tuple.saddr, pkt->family);
	if (local && local->ifindex != skb->ingress_ifindex)
		/* what the stack made parts of has lost its device */
		return skb->ingress_ifindex ? DROP_SOURCE_IP : 0;
	pkt->src_identity = entry->identity;
	return 0;
}

#endif
