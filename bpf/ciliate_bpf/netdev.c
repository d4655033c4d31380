/* The programs of the node's own devices (option `devices`).
 *
 * from_netdev  tc ingress: what arrives at the node.
 * to_netdev    tc egress: what leaves it, after the node's stack.
 *
 * Each feature is compiled in by its define and nothing of it is there without: CILIATE_MASQUERADE, CILIATE_GENEVE,
 * CILIATE_SERVICES. A packet that goes on gets TC_ACT_UNSPEC, so that filters of others on the device have their turn.
 */
#define PACKET_IN_MAP
#include "lib/common.h"
#include "lib/events.h"
#include "lib/lookup.h"
#include "lib/parse.h"
#include "lib/marks.h"
#ifdef CILIATE_GENEVE
#include "lib/geneve.h"
#endif
#ifdef CILIATE_MASQUERADE
#include "lib/nat.h"
#endif
#ifdef CILIATE_SERVICES
#include "lib/lb_node.h"
#endif

char _license[] SEC("license") = "Dual BSD/GPL";

/* Addresses, ports and what else there is to know of a packet; 1 where it is none that any feature is about. */
static always_inline int netdev_parse(struct __sk_buff *skb, struct pkt *pkt)
{
	int reason;

	if (skb->vlan_present)
		return 1;
	if (enable_ipv4 && skb->protocol == bpf_htons(ETH_P_IP))
		reason = parse_ipv4(skb, pkt);
	else if (enable_ipv6 && skb->protocol == bpf_htons(ETH_P_IPV6))
		reason = parse_ipv6(skb, pkt);
	else
		return 1;
	/* what is malformed, and later fragments whose first part was not seen, are the stack's own business */
	return reason || parse_l4(skb, pkt);
}

/* What arrives: a flow that has a mapping was there before any service on its port. Behind a tuple of the node itself there
 * may be a client for whom the node speaks to another node's backend. Gives 0, LB_REJECT or a drop reason. */
static always_inline int netdev_receive(struct __sk_buff *skb, struct pkt *pkt)
{
	int reason = 0;

#ifdef CILIATE_MASQUERADE
	reason = snat_ingress(skb, pkt);
	if (reason == SNAT_OF_NODE) {
#ifdef CILIATE_SERVICES
		return lb_answer_outside(skb, pkt);
#else
		return 0;
#endif
	}
	if (reason)
		return reason == SNAT_OF_POD ? 0 : reason;
#endif
#ifdef CILIATE_SERVICES
	reason = lb_from_outside(skb, pkt);
#endif
	return reason;
}

/* What leaves: answers of services to clients outside are nobody's flow but the service's. Gives 0, LB_ANSWER or a drop
 * reason. */
static always_inline int netdev_answers(struct __sk_buff *skb, struct pkt *pkt)
{
#ifdef CILIATE_SERVICES
	int reason = 0;

	/* the tuple is the node's then, and kept off pods' mappings as any of its own */
	if (lb_leaves_as_node(skb, pkt, &reason))
		return reason;
	lb_leaves_own(skb, pkt);
	return lb_to_outside(skb, pkt);
#else
	return 0;
#endif
}

/* Whether who sent this claims to be the node. The stack refuses that of IPv4 and takes it of IPv6. Other addresses than the
 * router's are looked at where a flow may begin, so it costs nothing on the way of a connection; not in what neighbours say of
 * addresses, or a duplicate would never be noticed. */
static always_inline int claims_node(const struct pkt *pkt)
{
	if (is_router(&pkt->tuple.saddr, pkt->family))
		return 1;
	if (pkt->family != FAMILY_IPV6 || (pkt->proto == IPPROTO_TCP && (pkt->tcp_flags & TCP_ACK)))
		return 0;
	if (pkt->proto == IPPROTO_ICMPV6 && pkt->policy_port >= 130 && pkt->policy_port <= 143)
		return 0;
	return identity_of(&pkt->tuple.saddr, FAMILY_IPV6) == IDENTITY_HOST;
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	int reason = 0;
	NEW_PKT(pkt, INGRESS);

#ifdef CILIATE_GENEVE
	if (geneve_arrives(skb))
		return TC_ACT_UNSPEC;
#endif
	if (netdev_parse(skb, pkt))
		return TC_ACT_UNSPEC;
	if (claims_node(pkt))
		return drop(skb, pkt, DROP_SOURCE_IP);
	reason = netdev_receive(skb, pkt);
#ifdef CILIATE_SERVICES
	if (reason == LB_REJECT)
		return lb_reject_outside(skb, pkt);
#endif
	return reason ? drop(skb, pkt, reason) : TC_ACT_UNSPEC;
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	int reason = 0;
	NEW_PKT(pkt, EGRESS);

	/* outer packets of the tunnel are nobody else's business */
	if ((skb->mark & MARK_MASK) == MARK_OVERLAY) {
#ifdef CILIATE_GENEVE
		geneve_leaves(skb);
#endif
		return TC_ACT_UNSPEC;
	}
	if (netdev_parse(skb, pkt)) {
#ifdef CILIATE_MASQUERADE
		if (snat_is_missed(skb, pkt))
			return drop(skb, pkt, DROP_NAT_PROTOCOL);
#endif
		return TC_ACT_UNSPEC;
	}
	reason = netdev_answers(skb, pkt);
#ifdef CILIATE_SERVICES
	if (reason == LB_ANSWER)
		return TC_ACT_UNSPEC;
#endif
#ifdef CILIATE_MASQUERADE
	if (!reason)
		reason = snat_egress(skb, pkt);
#endif
	return reason ? drop(skb, pkt, reason) : TC_ACT_UNSPEC;
}
