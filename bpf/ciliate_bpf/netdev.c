/* The programs of the node's own devices (option `devices`).
 *
 * from_netdev  tc ingress: what arrives at the node.
 * to_netdev    tc egress: what leaves it, after the node's stack.
 *
 * Each feature is compiled in by its define and nothing of it is there without: CILIATE_MASQUERADE, CILIATE_GENEVE. A packet
 * that goes on gets TC_ACT_UNSPEC, so that filters of others on the device have their turn.
 */
#include "lib/common.h"
#include "lib/events.h"
#include "lib/parse.h"
#ifdef CILIATE_GENEVE
#include "lib/geneve.h"
#endif

char _license[] SEC("license") = "Dual BSD/GPL";

static always_inline int is_ip(struct __sk_buff *skb)
{
	return (enable_ipv4 && skb->protocol == bpf_htons(ETH_P_IP)) ||
	       (enable_ipv6 && skb->protocol == bpf_htons(ETH_P_IPV6));
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
#ifdef CILIATE_GENEVE
	if (geneve_arrives(skb))
		return TC_ACT_UNSPEC;
#endif
	if (!is_ip(skb) || skb->vlan_present)
		return TC_ACT_UNSPEC;
	/* hook: NodePort translates the destination here, before masquerading is reversed */
	return TC_ACT_UNSPEC;
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
#ifdef CILIATE_GENEVE
	if (geneve_leaves(skb))
		return TC_ACT_UNSPEC;
#endif
	if (!is_ip(skb) || skb->vlan_present)
		return TC_ACT_UNSPEC;
	/* hook: NodePort translates the source of its replies here, before masquerading */
	return TC_ACT_UNSPEC;
}
