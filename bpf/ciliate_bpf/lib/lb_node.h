/* Services from outside: node ports, external and load balancer addresses, at the node's own devices.
 *
 * To a backend of this node the client's address stays, so policy and the backend see who it is; the answers are translated
 * where they leave. To one of another node the client's address and port become this node's, so that the answers come here,
 * and go on to the client from here. ClusterIPs are not served to the outside.
 */
#ifndef CILIATE_LB_NODE_H
#define CILIATE_LB_NODE_H

#include "lb.h"
#include "lb_reject.h"
#include "lookup.h"
#include "sockets.h"

/* Whether the service is for this source (loadBalancerSourceRanges). */
static always_inline int lb_in_range(const struct lb_service *service, const union addr *source)
{
	struct lb_range key = {.prefixlen = 32 + 128, .service = service->id, .address = *source};

	return bpf_map_lookup_elem(&ciliate_lb_ranges, &key) != NULL;
}

/* Addresses by which this node speaks to others for clients; 0: it does not. */
const volatile __be32 lb_node_ipv4 = 0;
const volatile union addr lb_node_ipv6 = {};

#define LB_PORT_ATTEMPTS 16
#define LB_FIRST_PORT 32768
#define LB_PORTS 28232

static always_inline int lb_node_address(const struct pkt *pkt, union addr *to)
{
	if (pkt->family == FAMILY_IPV4) {
		map_ipv4(to, lb_node_ipv4);
		return lb_node_ipv4 != 0;
	}
	to->w[0] = lb_node_ipv6.w[0];
	to->w[1] = lb_node_ipv6.w[1];
	to->w[2] = lb_node_ipv6.w[2];
	to->w[3] = lb_node_ipv6.w[3];
	return (to->w[0] | to->w[3]) != 0;
}

/* Whether a backend is of this node. */
static always_inline int lb_is_here(const struct pkt *pkt, const union addr *address)
{
	return local_endpoint(address, pkt->family) != NULL ||
	       identity_of(address, pkt->family) == IDENTITY_HOST;
}

/* Whether a socket of the node itself takes what the backend answers to this end. */
static always_inline int lb_has_socket(struct __sk_buff *skb, const struct pkt *pkt, const struct lb_flow_key *key)
{
	struct socket_pair pair = {&key->daddr, &key->saddr, key->dport, key->sport};

	return socket_takes(skb, &pair, pkt->proto, pkt->family);
}

/* A port of the node's own for the client of work->flow, towards work->backend; the client's where that is free. Gives 0 or
 * a drop reason; the port is work->to.port, the address work->to.address. */
FUNCTION int lb_take_port(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_client client = {}, *known;
	struct lb_flow *flow;
	__u32 hash;
	int i;

	if (!pkt || !work)
		return DROP_INVALID;
	client.address = pkt->tuple.saddr;
	client.port = pkt->tuple.sport;
	client.service = work->service.id;
	if (!lb_node_address(pkt, &work->to.address))
		return DROP_NO_BACKEND;
	work->answer.saddr = work->to.address;
	work->answer.daddr = work->backend.address;
	work->answer.dport = work->backend.port;
	work->answer.proto = pkt->proto;
	work->answer.way = LB_FLOW_ANSWER;
	work->answer.endpoint = 0;
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	work->answer.sport = flow && flow->port ? flow->port : client.port;
	hash = lb_hash(&work->flow);
	for (i = 0; i < LB_PORT_ATTEMPTS; i++) {
		known = bpf_map_lookup_elem(&ciliate_lb_client, &work->answer);
		if (known && known->port == client.port && known->service == client.service &&
		    addr_equal(&known->address, &client.address))
			break;
		if (!known && !lb_has_socket(skb, pkt, &work->answer) &&
		    !bpf_map_update_elem(&ciliate_lb_client, &work->answer, &client, BPF_NOEXIST))
			break;
		hash = lb_mix(hash, i + 1);
		work->answer.sport = bpf_htons(LB_FIRST_PORT + (((__u64)hash * LB_PORTS) >> 32));
	}
	if (i == LB_PORT_ATTEMPTS)
		return DROP_NAT_NO_MAPPING;
	work->to.port = work->answer.sport;
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (flow && flow->port != work->to.port)
		flow->port = work->to.port;
	return 0;
}

/* The flow from outside that a packet answers, or that an ICMP error about an answer belongs to, into work->flow. */
static always_inline void lb_flow_answered(struct lb_work *work, const struct pkt *pkt)
{
	if (pkt->flags & PKT_ICMP_ERROR)
		lb_flow_of(&work->flow, &pkt->inner, LB_FLOW_ANSWER, 0);
	else
		lb_flow_back(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
}

/* An answer of another node's backend to a client that this node stands for; 0 to go on where it is none. */
FUNCTION int lb_answer_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_client *client;
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_answered(work, pkt);
	client = bpf_map_lookup_elem(&ciliate_lb_client, &work->flow);
	if (!client)
		return 0;
	reason = lb_to_front(work, &client->service);
	if (!reason)
		reason = lb_write_any(skb, pkt, work, LB_SOURCE);
	if (reason)
		return reason;
	work->to.address = client->address;
	work->to.port = client->port;
	return lb_write_any(skb, pkt, work, LB_DESTINATION);
}

/* A backend for a new flow, of this node where the policy asks for that; 0 where there is none. */
FUNCTION int lb_choose_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds(), id, local;

	asm volatile("" ::"r"(skb));
	if (!pkt || !work)
		return 0;
	id = lb_stays(work, now);
	local = work->service.flags & LB_LOCAL_ONLY;
	if (!id)
		id = lb_pick(&work->front, &work->service, lb_hash(&work->flow), local, &work->backend);
	if (!id)
		return 0;
	lb_chosen(work, id, now);
	return 1;
}

/* An ICMP error from outside about what a service answered: for the backend. */
FUNCTION int lb_outside_error(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_back(&work->flow, &pkt->inner, LB_FLOW_OUTSIDE, 0);
	if (!lb_backend_of_flow(work))
		return lb_answer_outside(skb, pkt);
	lb_to_backend(work);
	return lb_write_error(skb, pkt, &work->to, LB_SOURCE);
}

/* Whether a packet of no known flow answers a connection of the node itself, whose port is a service's now. */
static always_inline int lb_answers_node(struct __sk_buff *skb, struct pkt *pkt)
{
	struct socket_pair pair = {&pkt->tuple.saddr, &pkt->tuple.daddr, pkt->tuple.sport, pkt->tuple.dport};

	return !ct_opens(pkt) && socket_expects(skb, &pair, pkt->proto, pkt->family);
}

/* What arrives at the node. Gives 0 to go on, LB_REJECT or a drop reason. */
FUNCTION int lb_from_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	/* as the stack says without accept_local: nobody outside has an address of this node */
	if (lb_node_address(pkt, &work->to.address) && addr_equal(&pkt->tuple.saddr, &work->to.address))
		return DROP_SOURCE_IP;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_outside_error(skb, pkt);
	if (!lb_protocol(pkt->proto))
		return 0;
	if (!lb_service_of(work, pkt) || !(work->service.flags & LB_EXTERNAL))
		return lb_answer_outside(skb, pkt);
	if ((work->service.flags & LB_RANGES) && !lb_in_range(&work->service, &pkt->tuple.saddr))
		return DROP_SOURCE_RANGE;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_OUTSIDE, 0);
	if (!lb_known(pkt, work, now_seconds())) {
		if (lb_answers_node(skb, pkt))
			return 0;
		/* with the policy Local the balancer in front asks another node; else nobody else would answer */
		if (!lb_choose_outside(skb, pkt))
			return work->service.flags & LB_LOCAL_ONLY ? DROP_NO_BACKEND : LB_REJECT;
	}
	if (!lb_is_here(pkt, &work->backend.address)) {
		reason = lb_take_port(skb, pkt);
		if (!reason)
			reason = lb_write(skb, pkt, &work->to, LB_SOURCE);
		lb_to_backend(work);
		return reason ? reason : lb_write(skb, pkt, &work->to, LB_DESTINATION);
	}
	lb_to_backend(work);
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
	struct lb_flow *flow;
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	if (!(pkt->flags & PKT_ICMP_ERROR) && !lb_protocol(pkt->proto))
		return 0;
	lb_flow_answered(work, pkt);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow)
		return 0;
	reason = lb_to_front(work, &flow->service);
	return reason ? reason : lb_write_any(skb, pkt, work, LB_SOURCE);
}

#endif
