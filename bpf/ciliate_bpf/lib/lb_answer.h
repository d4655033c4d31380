/* Flows from outside through a service, where their packets pass the node again: answers, and what a client outside sends to
 * another node's backend.
 *
 * Destinations are written where a packet arrives, sources where it leaves. In between the node's stack sees client and
 * backend, so it meets none of the node's own addresses as the source of what arrived. docs/services.md has the whole.
 */
#ifndef CILIATE_LB_ANSWER_H
#define CILIATE_LB_ANSWER_H

#include "lb.h"
#include "lookup.h"
#include "marks.h"

/* In place of a service in conntrack: the flow came to the pod by the node's stack, though its sender is to be reached by
 * the tunnel, as from a node port. Its answers are looked up before they go into the tunnel. */
#define LB_OUTSIDE 0xffffffffU

/* The flow from outside that a packet answers, or that an ICMP error about an answer belongs to, into work->flow. */
static always_inline void lb_flow_answered(struct lb_work *work, const struct pkt *pkt)
{
	if (pkt->flags & PKT_ICMP_ERROR)
		lb_flow_of(&work->flow, &pkt->inner, LB_FLOW_ANSWER, 0);
	else
		lb_flow_back(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
}

/* Whose share of ports a client's flows count to. wide: an outside address of IPv6, where everybody has as many as he likes:
 * its /64 is meant. */
static always_inline void lb_share_key(union addr *key, const union addr *client, int wide)
{
	*key = *client;
	if (!wide)
		return;
	key->w[2] = 0;
	key->w[3] = 0;
}

/* One port less. What the count misses, as where a full table forgets, the collector puts right. */
static always_inline void lb_share_less(struct lb_work *work, const struct lb_client *client)
{
	struct lb_share *share;

	lb_share_key(&work->whom, &client->address, client->state & LB_WIDE);
	share = bpf_map_lookup_elem(&ciliate_lb_share, &work->whom);
	if (share && share->held)
		__sync_fetch_and_add(&share->held, -1);
}

/* What an answer of another node's backend is to a client that this node stands for: for the client. A connection that the
 * backend opens itself is none. Gives 0 or a drop reason; where it is an answer, the packet has another destination. */
FUNCTION int lb_answer_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds();
	struct lb_client *client;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_answered(work, pkt);
	client = bpf_map_lookup_elem(&ciliate_lb_client, &work->flow);
	if (!client || !lb_alive(work->flow.proto, client->used, client->state, now))
		return 0;
	if (ct_opens(pkt)) {
		lb_share_less(work, client);
		bpf_map_delete_elem(&ciliate_lb_client, &work->flow);
		return 0;
	}
	lb_touch(client, pkt, 1, now);
	work->to.address = client->address;
	work->to.port = client->port;
	return lb_write_any(skb, pkt, work, LB_DESTINATION);
}

/* What leaves the node: answers of backends come from the service again, and so do their ICMP errors. A connection that the
 * backend opens itself ends the flow that its answers would be taken for. Gives LB_ANSWER, 0 where it is none, or a drop
 * reason. */
FUNCTION int lb_to_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds();
	struct lb_flow *flow;
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	if (!(pkt->flags & PKT_ICMP_ERROR) && !lb_protocol(pkt->proto))
		return 0;
	lb_flow_answered(work, pkt);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow || !lb_alive(work->flow.proto, flow->used, flow->state, now))
		return 0;
	if (ct_opens(pkt)) {
		bpf_map_delete_elem(&ciliate_lb_flow, &work->flow);
		return 0;
	}
	lb_touch(flow, pkt, 1, now);
	reason = lb_to_front(work, &flow->service);
	if (!reason)
		reason = lb_write_any(skb, pkt, work, LB_SOURCE);
	return reason ? reason : LB_ANSWER;
}

/* A client's packet to another node's backend leaves in this node's name: by address and port. */
FUNCTION int lb_as_node(struct __sk_buff *skb, struct pkt *pkt, struct lb_address *own)
{
	if (!pkt || !own)
		return DROP_INVALID;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_write_error(skb, pkt, own, LB_DESTINATION);
	return lb_write(skb, pkt, own, LB_SOURCE);
}

#endif
