/* The program of the router device.
 *
 * from_host  tc egress: what the node itself sends, or forwards, to pods of other nodes; the routes of their ranges lead here.
 */
#include "lib/common.h"
#include "lib/events.h"
#include "lib/parse.h"
#include "lib/lookup.h"
#include "lib/marks.h"
#include "lib/sender.h"
#include "lib/tunnel.h"
#ifdef CILIATE_SERVICES
#include "lib/lb_answer.h"
#endif

char _license[] SEC("license") = "Dual BSD/GPL";

#ifdef CILIATE_SERVICES
/* Services from outside: a client's packet to another node's backend goes in the name of this node, whose address there is the
 * router's; it is the world's. An answer to a client that is another node's pod comes from the service. */
static always_inline int serve(struct __sk_buff *skb, struct pkt *pkt)
{
	__be16 port = take_client_mark(skb);
	struct lb_address own = {.port = port};
	int reason;

	if (!port) {
		reason = skb->ingress_ifindex ? lb_to_outside(skb, pkt) : 0;
		return reason == LB_ANSWER ? 0 : reason;
	}
	pkt->src_identity = IDENTITY_WORLD;
	router_address(pkt->family, &own.address);
	return lb_as_node(skb, pkt, &own);
}
#endif

SEC("tc")
int from_host(struct __sk_buff *skb)
{
	struct ipcache_entry *entry;
	struct tunnel_to to;
	int reason;
	NEW_PKT(pkt, EGRESS);

	/* the device resolves no neighbours; what the stack says to its link all the same has no listener */
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (is_link_housekeeping(skb, pkt))
		return drop(skb, pkt, DROP_HOUSEKEEPING);
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = stack_sender(skb, pkt);
#ifdef CILIATE_SERVICES
	if (!reason)
		reason = serve(skb, pkt);
#endif
	if (reason)
		return drop(skb, pkt, reason);
	entry = ipcache_of(&pkt->tuple.daddr, pkt->family);
	pkt->dst_identity = entry ? entry->identity : IDENTITY_WORLD;
	arrived(skb, pkt, FROM_HOST);
	to = tunnel_of(entry, &pkt->tuple.daddr, pkt->family);
	if (!tunnel_ifindex || !to.family)
		return drop(skb, pkt, DROP_NO_TUNNEL_ENDPOINT);
	return encapsulate(skb, pkt, to);
}
