/* Services from outside: node ports, external and load balancer addresses, at the node's own devices.
 *
 * Backends of this node serve; the client's address stays, so policy and the backend see who it is. What goes to a backend
 * is routed by the node's stack; its answers are translated where they leave. ClusterIPs are not served to the outside.
 */
#ifndef CILIATE_LB_NODE_H
#define CILIATE_LB_NODE_H

#include "lb.h"
#include "lb_reject.h"

/* Whether the service is for this source (loadBalancerSourceRanges). */
static always_inline int lb_in_range(const struct lb_service *service, const union addr *source)
{
	struct lb_range key = {.prefixlen = 32 + 128, .service = service->id, .address = *source};

	return bpf_map_lookup_elem(&ciliate_lb_ranges, &key) != NULL;
}

/* A backend of this node for a new flow; 0 where there is none. */
FUNCTION int lb_choose_local(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds(), id = 0;

	asm volatile("" ::"r"(skb));
	if (!pkt || !work)
		return 0;
	if (work->service.affinity)
		id = lb_affine(&work->service, &work->flow.saddr, now, &work->backend);
	if (!id)
		id = lb_pick(&work->front, &work->service, lb_hash(&work->flow), 1, &work->backend);
	if (!id)
		return 0;
	if (work->service.affinity)
		lb_affine_set(&work->service, &work->flow.saddr, now, id);
	lb_remember(&work->flow, id, work->service.id, now);
	return 1;
}

/* An ICMP error from outside about what a service answered: for the backend. */
FUNCTION int lb_outside_error(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_flow *flow;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_back(&work->flow, &pkt->inner, LB_FLOW_OUTSIDE, 0);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow || !lb_backend_get(flow->backend, &work->backend))
		return 0;
	work->to.address = work->backend.address;
	work->to.port = work->backend.port;
	return lb_write_error(skb, pkt, &work->to, LB_SOURCE);
}

/* What arrives at the node. Gives 0 to go on, LB_REJECT or a drop reason. */
FUNCTION int lb_from_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_outside_error(skb, pkt);
	if (!lb_protocol(pkt->proto))
		return 0;
	work->front.address = pkt->tuple.daddr;
	work->front.port = pkt->tuple.dport;
	work->front.proto = pkt->proto;
	if (!lb_service_get(&work->front, &work->service) || !(work->service.flags & LB_EXTERNAL))
		return 0;
	if ((work->service.flags & LB_RANGES) && !lb_in_range(&work->service, &pkt->tuple.saddr))
		return DROP_SOURCE_RANGE;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_OUTSIDE, 0);
	if (!lb_known(pkt, work, now_seconds()) && !lb_choose_local(skb, pkt))
		/* with the policy Local the balancer in front asks another node; else nobody else would answer */
		return work->service.flags & LB_LOCAL_ONLY ? DROP_NO_BACKEND : LB_REJECT;
	work->to.address = work->backend.address;
	work->to.port = work->backend.port;
	reason = lb_write(skb, pkt, &work->to, LB_DESTINATION);
	if (reason)
		return reason;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
	lb_remember(&work->flow, 0, work->service.id, now_seconds());
	return 0;
}

/* The answer to a client outside whose service has no backend: back where it came from. */
static always_inline int lb_reject_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ethhdr eth = {}, back = {};

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) < 0 || lb_reject(skb, pkt))
		return TC_ACT_SHOT;
	__builtin_memcpy(back.h_dest, eth.h_source, 6);
	__builtin_memcpy(back.h_source, eth.h_dest, 6);
	back.h_proto = eth.h_proto;
	if (bpf_skb_store_bytes(skb, 0, &back, sizeof(back), 0) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

/* What leaves the node: answers of backends come from the service again, and so do their ICMP errors. */
FUNCTION int lb_to_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_frontend *front;
	struct lb_flow *flow;

	if (!pkt || !work)
		return DROP_INVALID;
	if (pkt->flags & PKT_ICMP_ERROR)
		lb_flow_of(&work->flow, &pkt->inner, LB_FLOW_ANSWER, 0);
	else if (lb_protocol(pkt->proto))
		lb_flow_back(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
	else
		return 0;
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow)
		return 0;
	front = bpf_map_lookup_elem(&ciliate_lb_reverse, &flow->service);
	if (!front)
		return DROP_NO_SERVICE;
	work->to.address = front->address;
	work->to.port = front->port;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_write_error(skb, pkt, &work->to, LB_DESTINATION);
	return lb_write(skb, pkt, &work->to, LB_SOURCE);
}

#endif
