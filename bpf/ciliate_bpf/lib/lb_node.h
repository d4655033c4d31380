/* Services from outside: node ports, external and load balancer addresses, at the node's own devices.
 *
 * To a backend of this node the client's address stays, so policy and the backend see who it is; the answers are translated
 * where they leave. To one of another node the client's address and port become this node's where the packet leaves, so that
 * the answers come here, and go on to the client from here. ClusterIPs are not served to the outside.
 */
#ifndef CILIATE_LB_NODE_H
#define CILIATE_LB_NODE_H

#include "lb.h"
#include "lb_answer.h"
#include "lb_reject.h"
#include "lookup.h"
#include "sockets.h"
#include "tunnel.h"

/* Whether work->service is for this source (loadBalancerSourceRanges). */
static always_inline int lb_in_range(struct lb_work *work, const union addr *source)
{
	work->range.prefixlen = 32 + 128;
	work->range.service = work->service.id;
	work->range.address = *source;
	return bpf_map_lookup_elem(&ciliate_lb_ranges, &work->range) != NULL;
}

/* Addresses by which this node speaks to others for clients; 0: it does not. */
const volatile __be32 lb_node_ipv4 = 0;
const volatile union addr lb_node_ipv6 = {};

/* Of which ports: none that the node's own connections are given, as the kernel knows nothing of those lent. */
const volatile __u32 lb_first_port = 1024;
const volatile __u32 lb_ports = 28976;
/* How many of them one client may have in all; 0: any. */
const volatile __u32 lb_client_share = 0;

#define LB_PORT_ATTEMPTS 16

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

/* Whether a backend is of this node; where it is not, work->tunnelled says whether it is reached by the tunnel. */
static always_inline int lb_is_here(struct lb_work *work, const struct pkt *pkt)
{
	struct ipcache_entry *entry;

	if (local_endpoint(&work->backend.address, pkt->family))
		return 1;
	entry = ipcache_of(&work->backend.address, pkt->family);
	if (entry && entry->identity == IDENTITY_HOST)
		return 1;
	work->tunnelled = tunnel_ifindex && tunnel_of(entry, &work->backend.address, pkt->family).family;
	return 0;
}

/* This node's address towards work->backend: by the tunnel, answers only come to the router's. */
static always_inline int lb_own_address(const struct pkt *pkt, struct lb_work *work, union addr *to)
{
	if (!work->tunnelled)
		return lb_node_address(pkt, to);
	router_address(pkt->family, to);
	return 1;
}

/* Whether a port of work->answer is one of the node's own: a socket takes what the backend answers to it, or a service. */
static always_inline int lb_is_own_port(struct __sk_buff *skb, const struct pkt *pkt, struct lb_work *work)
{
	struct socket_pair pair = {&work->answer.daddr, &work->answer.saddr, work->answer.dport, work->answer.sport};

	work->front.address = work->answer.saddr;
	work->front.port = work->answer.sport;
	work->front.proto = pkt->proto;
	return bpf_map_lookup_elem(&ciliate_lb_services, &work->front) || socket_takes(skb, &pair, pkt->proto, pkt->family);
}

static always_inline int lb_is_client(const struct lb_client *known, const struct lb_client *client)
{
	return known->port == client->port && known->service == client->service &&
	       addr_equal(&known->address, &client->address);
}

/* Whether the port of work->answer is this client's now. full: he has his share, and may but exchange what is over. */
static always_inline int lb_try_port(struct __sk_buff *skb, struct pkt *pkt, struct lb_work *work, int full, __u32 now)
{
	struct lb_client *known = bpf_map_lookup_elem(&ciliate_lb_client, &work->answer);

	if (known) {
		if (lb_is_client(known, &work->client)) {
			lb_touch(known, pkt, 0, now);
			return 1;
		}
		if (lb_alive(pkt->proto, known->used, known->state, now) ||
		    (full && !addr_equal(&known->address, &work->client.address)))
			return 0;
		lb_share_less(work, known);
		bpf_map_delete_elem(&ciliate_lb_client, &work->answer);
	} else if (full) {
		return 0;
	}
	if (lb_is_own_port(skb, pkt, work) ||
	    bpf_map_update_elem(&ciliate_lb_client, &work->answer, &work->client, BPF_NOEXIST))
		return 0;
	return 2;
}

/* A port for a new flow of work->client; the one that it had comes first, which a full table may have forgotten. Gives 0 or
 * a drop reason. */
FUNCTION int lb_new_port(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_share *share, first = {.held = 1};
	struct lb_flow *flow;
	__u32 now = now_seconds(), hash;
	int i, taken = 0, full;

	if (!pkt || !work)
		return DROP_INVALID;
	if (pkt->family == FAMILY_IPV6 && identity_of(&pkt->tuple.saddr, FAMILY_IPV6) == IDENTITY_WORLD)
		work->client.state |= LB_WIDE;
	lb_share_key(&work->who, &work->client.address, work->client.state & LB_WIDE);
	share = bpf_map_lookup_elem(&ciliate_lb_share, &work->who);
	full = share && lb_client_share && share->held >= lb_client_share;
	hash = lb_hash(&work->flow);
	for (i = 0; i < LB_PORT_ATTEMPTS; i++) {
		if (i || !work->answer.sport)
			work->answer.sport = bpf_htons(lb_first_port + (((__u64)hash * lb_ports) >> 32));
		taken = lb_try_port(skb, pkt, work, full, now);
		if (taken)
			break;
		hash = lb_mix(hash, i + 1);
	}
	if (!taken && full) {
		__sync_fetch_and_add(&share->refused, 1);
		return DROP_CLIENT_SHARE;
	}
	if (!taken)
		return DROP_NAT_NO_MAPPING;
	if (taken == 2 && share)
		__sync_fetch_and_add(&share->held, 1);
	else if (taken == 2)
		bpf_map_update_elem(&ciliate_lb_share, &work->who, &first, BPF_NOEXIST);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (flow)
		flow->port = work->answer.sport;
	return 0;
}

/* The port of the node's own that the client of work->flow has towards work->backend, in work->answer. Gives 0, or 1 where it
 * has none yet, or a drop reason. */
FUNCTION int lb_had_port(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds();
	struct lb_client *known;
	struct lb_flow *flow;

	asm volatile("" ::"r"(skb));
	if (!pkt || !work)
		return DROP_INVALID;
	work->client.address = pkt->tuple.saddr;
	work->client.port = pkt->tuple.sport;
	work->client.service = work->service.id;
	work->client.used = now;
	work->client.state = lb_state(pkt, LB_UNANSWERED | LB_OPENING, 0);
	if (!lb_own_address(pkt, work, &work->answer.saddr))
		return DROP_NO_BACKEND;
	work->answer.daddr = work->backend.address;
	work->answer.dport = work->backend.port;
	work->answer.proto = pkt->proto;
	work->answer.way = LB_FLOW_ANSWER;
	work->answer.endpoint = 0;
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	work->answer.sport = flow ? flow->port : 0;
	known = bpf_map_lookup_elem(&ciliate_lb_client, &work->answer);
	if (!known || !lb_is_client(known, &work->client))
		return 1;
	lb_touch(known, pkt, 0, now);
	return 0;
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

/* An ICMP error from outside about what a service answered: for the backend, to another node's in this node's name. */
FUNCTION int lb_outside_error(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_flow *flow;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_back(&work->flow, &pkt->inner, LB_FLOW_OUTSIDE, 0);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow || !lb_backend_get(flow->backend, &work->backend))
		return lb_answer_outside(skb, pkt);
	if (flow->port)
		mark_client(skb, flow->port);
	lb_to_backend(work);
	return lb_write_error(skb, pkt, &work->to, LB_SOURCE);
}

/* Whether a packet of no known flow answers a connection of the node itself, whose port is a service's now. */
static always_inline int lb_answers_node(struct __sk_buff *skb, struct pkt *pkt)
{
	struct socket_pair pair = {&pkt->tuple.saddr, &pkt->tuple.daddr, pkt->tuple.sport, pkt->tuple.dport};

	return !ct_opens(pkt) && socket_expects(skb, &pair, pkt->proto, pkt->family);
}

/* What is for no service: an answer to a client that this node stands for, or a flow of its own. One that begins with the
 * tuple of a flow through a service, as the backend knows it, ends that: its answers are not the service's. */
static always_inline int lb_not_served(struct __sk_buff *skb, struct pkt *pkt, struct lb_work *work)
{
	int reason = lb_answer_outside(skb, pkt);

	if (reason || (pkt->proto == IPPROTO_TCP && !ct_opens(pkt)))
		return reason;
	/* what is for the node itself is no backend's but where it has the host's network: there datagrams need no look */
	if (pkt->proto != IPPROTO_TCP && lb_node_address(pkt, &work->to.address) &&
	    addr_equal(&pkt->tuple.daddr, &work->to.address))
		return 0;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
	if (bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow))
		bpf_map_delete_elem(&ciliate_lb_flow, &work->flow);
	return 0;
}

/* Answers of this flow, whose destination is written already, come from the service: as its last packet says. */
FUNCTION int lb_expect_answer(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds();
	struct lb_flow *known;

	asm volatile("" ::"r"(skb));
	if (!pkt || !work)
		return 0;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
	known = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (known && known->service == work->service.id && lb_alive(pkt->proto, known->used, known->state, now)) {
		lb_touch(known, pkt, 0, now);
		return 0;
	}
	lb_remember(&work->flow, 0, work->service.id, now, lb_state(pkt, LB_UNANSWERED | LB_OPENING, 0));
	return 0;
}

/* What arrives at the node. Gives 0 to go on, LB_REJECT or a drop reason. */
FUNCTION int lb_from_outside(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	/* the stack says so too, but what a program does by then is done */
	if (lb_node_address(pkt, &work->to.address) && addr_equal(&pkt->tuple.saddr, &work->to.address))
		return DROP_SOURCE_IP;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_outside_error(skb, pkt);
	if (!lb_protocol(pkt->proto))
		return 0;
	if (!lb_service_of(work, pkt) || !(work->service.flags & LB_EXTERNAL))
		return lb_not_served(skb, pkt, work);
	if ((work->service.flags & LB_RANGES) && !lb_in_range(work, &pkt->tuple.saddr))
		return DROP_SOURCE_RANGE;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_OUTSIDE, 0);
	if (!lb_known(pkt, work, now_seconds())) {
		if (lb_answers_node(skb, pkt))
			return 0;
		/* with the policy Local the balancer in front asks another node; else nobody else would answer */
		if (!lb_choose_outside(skb, pkt))
			return work->service.flags & LB_LOCAL_ONLY ? DROP_NO_BACKEND : LB_REJECT;
	}
	if (!lb_is_here(work, pkt)) {
		reason = lb_had_port(skb, pkt);
		if (reason == 1)
			reason = lb_new_port(skb, pkt);
		if (reason)
			return reason;
		mark_client(skb, work->answer.sport);
	}
	lb_to_backend(work);
	reason = lb_write(skb, pkt, &work->to, LB_DESTINATION);
	if (reason)
		return reason;
	return lb_expect_answer(skb, pkt);
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

/* A client's packet to another node's backend leaves in this node's name. Gives whether it is one; sets *reason. */
static always_inline int lb_leaves_as_node(struct __sk_buff *skb, struct pkt *pkt, int *reason)
{
	__be16 port = take_client_mark(skb);
	struct lb_work *work = lb_work();

	if (!port || !work)
		return 0;
	work->to.port = port;
	*reason = lb_node_address(pkt, &work->to.address) ? lb_as_node(skb, pkt, &work->to) : DROP_NO_BACKEND;
	return 1;
}

/* A connection of the node's own ends a client's flow with the same tuple: the answers are the node's from now on. */
static always_inline void lb_leaves_own(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_client *client;

	if (!work || !ct_opens(pkt) || skb->ingress_ifindex)
		return;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_ANSWER, 0);
	client = bpf_map_lookup_elem(&ciliate_lb_client, &work->flow);
	if (!client)
		return;
	lb_share_less(work, client);
	bpf_map_delete_elem(&ciliate_lb_client, &work->flow);
}

#endif
