/* The endpoint programs.
 *
 * from_container  tc ingress of the host-side device: everything that the pod sends.
 * to_container    tc egress of the host-side device: what reaches the pod through the host's stack.
 *
 * Pod to pod on one node never leaves from_container: egress side of the sender, ingress side of the receiver, then
 * straight into the receiver's namespace. Later features hook in at the places marked "hook:".
 */
#include "lib/common.h"
#include "lib/events.h"
#include "lib/parse.h"
#include "lib/conntrack.h"
#include "lib/policy.h"
#include "lib/answers.h"
#include "lib/link.h"
#include "lib/hooks.h"
#include "lib/lookup.h"
#include "lib/deliver.h"
#include "lib/marks.h"
#include "lib/tunnel.h"
#include "lib/sender.h"
#include "lib/lb.h"
#include "lib/lb_answer.h"
#include "lib/lb_reject.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* The programs' own endpoint, where it is valid. Where its device is another one, its id was given away meanwhile. */
static always_inline struct ep_config *own_entry(struct __sk_buff *skb)
{
	struct ep_config *ep = endpoint(endpoint_id(skb));

	return ep && ep->ifindex == fixed(ep)->ifindex ? ep : NULL;
}

static always_inline int link_local_icmp6(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt, int *done)
{
	struct link_entry *link;
	__u8 type = 0;

	*done = 1;
	if (pkt->l4_length < 8 || bpf_skb_load_bytes(skb, pkt->l4_offset, &type, 1) < 0)
		return drop(skb, pkt, DROP_CT_INVALID_HEADER);
	if (!is_of_link(type)) {
		*done = 0;
		return 0;
	}
	link = link_of(ep);
	if (link)
		return link_icmp6(skb, pkt, ep, link);
	if (type == ND_SOLICIT && pkt->direction == EGRESS)
		return answer_solicit(skb, ep, pkt);
	/* router and neighbour messages and multicast listener reports have no listener on this link */
	return drop(skb, pkt, DROP_HOUSEKEEPING);
}

static always_inline int valid_source(struct pkt *pkt, struct ep_config *ep)
{
	const struct ep_config *own = fixed(ep);

	if (pkt->family == FAMILY_IPV4)
		return own->ipv4 && pkt->tuple.saddr.w[3] == own->ipv4;
	return (own->ipv6.w[0] | own->ipv6.w[1] | own->ipv6.w[2] | own->ipv6.w[3]) &&
	       addr_equal(&pkt->tuple.saddr, &own->ipv6);
}

/* To a pod of another node: this node is the hop. */
static always_inline int tunnel(struct __sk_buff *skb, struct pkt *pkt, struct tunnel_to node)
{
	int reason;

	if (pkt->ttl <= 1)
		return ttl_exceeded(skb, pkt);
	reason = decrement_ttl(skb, pkt);
	if (!reason && pkt->services[EGRESS] == LB_OUTSIDE) {
		reason = lb_to_outside(skb, pkt);
		if (reason == LB_ANSWER)
			reason = 0;
	}
	return reason ? drop(skb, pkt, reason) : encapsulate(skb, pkt, node);
}

/* A packet that goes no further than its service: to the pod itself, refused, or dropped. */
static always_inline int lb_ends(struct __sk_buff *skb, struct pkt *pkt, int outcome)
{
	if (outcome == LB_REJECT)
		return return_to_sender(skb, pkt, lb_reject(skb, pkt));
	if (outcome != LB_SELF)
		return drop(skb, pkt, outcome);
	forwarded(skb, pkt, TO_ENDPOINT);
	return return_to_sender(skb, pkt, 0);
}

static always_inline int egress_ip(struct __sk_buff *skb, struct ep_config *ep, struct pkt *pkt)
{
	struct ipcache_entry *entry;
	struct endpoint_info *to;
	int reason, done = 0, result, pod;

	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (is_typed_icmp6(pkt)) {
		result = link_local_icmp6(skb, ep, pkt, &done);
		if (done)
			return result;
	}
	if (!valid_source(pkt, ep))
		return drop(skb, pkt, DROP_SOURCE_IP);
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	arrived(skb, pkt, FROM_ENDPOINT);
	reason = lb_translate(skb, pkt);
	if (reason)
		return lb_ends(skb, pkt, reason);
	reason = HOOK_EGRESS(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	to = local_endpoint(&pkt->tuple.daddr, pkt->family);
	pod = to && !(to->flags & ENDPOINT_HOST);
	if (pod && !(ep->flags & EP_STACK)) {
		pkt->dst_identity = to->identity;
		pkt->dst_endpoint = to->id;
		pkt->flags |= PKT_TO_POD;
		reason = decide(skb, pkt);
		if (reason)
			return drop(skb, pkt, reason);
		return deliver(skb, pkt, to);
	}
	/* the node takes it for its own where route_localnet is on, and gives it to what listens for itself alone */
	if (is_loopback(&pkt->tuple.daddr, pkt->family))
		return drop(skb, pkt, DROP_UNKNOWN_TARGET);
	entry = ipcache_of(&pkt->tuple.daddr, pkt->family);
	pkt->dst_identity = entry ? entry->identity : IDENTITY_WORLD;
	if (forges_tunnel(pkt))
		return drop(skb, pkt, DROP_TUNNEL_OF_POD);
	reason = decide(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	/* hook: encryption of what leaves the node */
	reason = HOOK_LEAVE(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (tunnel_ifindex && !to) {
		struct tunnel_to node = tunnel_of(entry, &pkt->tuple.daddr, pkt->family);

		if (node.family)
			return tunnel(skb, pkt, node);
	}
	mark_sender(skb, pkt->src_identity);
	forwarded(skb, pkt, (to && !pod) || pkt->dst_identity == IDENTITY_HOST ? TO_HOST : TO_STACK);
	return TC_ACT_OK;
}

SEC("tc")
int from_container(struct __sk_buff *skb)
{
	struct ep_config *ep = own_entry(skb);
	struct ethhdr *eth = bytes_at(skb, 0, sizeof(*eth));
	NEW_PKT(pkt, EGRESS);

	if (!ep)
		return drop(skb, pkt, DROP_NO_CONFIG);
	side(pkt, ep, EGRESS);
	if (!eth)
		return drop(skb, pkt, DROP_INVALID);
	if (!mac_equal(eth->h_source, fixed(ep)->mac))
		return drop(skb, pkt, DROP_SOURCE_MAC);
	if (skb->protocol == bpf_htons(ETH_P_ARP) && !skb->vlan_present) {
		struct link_entry *link = link_of(ep);

		return link ? link_arp(skb, pkt, ep, link) : answer_arp(skb, ep, pkt);
	}
	return egress_ip(skb, ep, pkt);
}

SEC("tc")
int to_container(struct __sk_buff *skb)
{
	struct ep_config *ep = own_entry(skb);
	int reason, done = 0, result;
	NEW_PKT(pkt, INGRESS);

	if (!ep)
		return drop(skb, pkt, DROP_NO_CONFIG);
	side(pkt, ep, INGRESS);
	if (skb->protocol == bpf_htons(ETH_P_ARP) && !skb->vlan_present) {
		struct link_entry *link = link_of(ep);

		/* neighbours on our own links are permanent entries: ARP has no business there */
		return link ? link_arp(skb, pkt, ep, link) : drop(skb, pkt, DROP_HOUSEKEEPING);
	}
	reason = parse(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	if (is_typed_icmp6(pkt)) {
		result = link_local_icmp6(skb, ep, pkt, &done);
		if (done)
			return result;
	}
	reason = parse_l4(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	reason = stack_sender(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	arrived(skb, pkt, FROM_STACK);
	/* hook: decryption marks */
	reason = HOOK_INGRESS(skb, pkt);
	if (pkt->flags & PKT_CLAIM)
		pkt->services[INGRESS] = LB_OUTSIDE;
	if (!reason)
		reason = decide(skb, pkt);
	if (!reason && pkt->services[INGRESS] && pkt->services[INGRESS] != LB_OUTSIDE)
		reason = lb_restore(skb, pkt);
	if (reason)
		return drop(skb, pkt, reason);
	forwarded(skb, pkt, TO_ENDPOINT);
	return TC_ACT_OK;
}
