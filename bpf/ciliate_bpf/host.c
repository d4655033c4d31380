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

char _license[] SEC("license") = "Dual BSD/GPL";

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
