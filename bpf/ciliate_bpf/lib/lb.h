/* Services, packet by packet: what a pod sends to one goes to a backend, and answers come from the service again.
 *
 * A flow's backend stands in ciliate_lb_flow; its conntrack entry, which has the translated tuple, says which service the
 * answers come from. Every packet of the flow writes that, so an entry that an earlier flow with the same
 * tuple left never hides it. docs/services.md has the whole.
 */
#ifndef CILIATE_LB_H
#define CILIATE_LB_H

#include "common.h"
#include "conntrack.h"
#include "lb_select.h"
#include "lb_write.h"

/* Beside 0 and drop reasons, what lb_translate gives. */
#define LB_SELF 1   /* to the sender itself, past policy and conntrack */
#define LB_REJECT 2 /* the service has no backend: its client is told */
#define LB_ANSWER 3 /* what leaves is an answer, and comes from the service now */

#define LB_IDLE 60 /* seconds after which a packet that may open a flow is a new one */

/* What is worked on: too much for the stack. No other packet comes in between, as programs of tc run with softirqs off. */
struct lb_work {
	struct lb_frontend front;
	struct lb_service service;
	struct lb_backend backend;
	struct lb_address to;
	struct lb_flow_key flow;
	struct lb_flow_key answer;
	struct lb_client client;
	struct lb_range range;
	union addr who;  /* whose share of ports */
	union addr whom; /* from whose share one goes */
	__u32 tunnelled; /* the backend is reached by the tunnel */
	struct tuple tuple;
	struct ct_key track;
};

MAP(ciliate_lb_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, __u32, struct lb_work, 0);

static always_inline struct lb_work *lb_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&ciliate_lb_scratch, &zero);
}

/* What a pod that reaches itself through a service sees as its peer. */
const volatile __be32 lb_self_ipv4 = bpf_htonl(0xa9fe2a01); /* 169.254.42.1 */
const volatile union addr lb_self_ipv6 = {.w = {bpf_htonl(0xfd000c11), bpf_htonl(0x00055e1f), 0, bpf_htonl(1)}};

static always_inline void lb_self_address(const struct pkt *pkt, union addr *to)
{
	if (pkt->family == FAMILY_IPV4) {
		map_ipv4(to, lb_self_ipv4);
		return;
	}
	to->w[0] = lb_self_ipv6.w[0];
	to->w[1] = lb_self_ipv6.w[1];
	to->w[2] = lb_self_ipv6.w[2];
	to->w[3] = lb_self_ipv6.w[3];
}

static always_inline void lb_flow_of(struct lb_flow_key *key, const struct tuple *tuple, __u8 way, __u16 endpoint)
{
	key->saddr = tuple->saddr;
	key->daddr = tuple->daddr;
	key->sport = tuple->sport;
	key->dport = tuple->dport;
	key->proto = tuple->proto;
	key->way = way;
	key->endpoint = endpoint;
}

/* The flow that a packet with this tuple answers. */
static always_inline void lb_flow_back(struct lb_flow_key *key, const struct tuple *tuple, __u8 way, __u16 endpoint)
{
	lb_flow_of(key, tuple, way, endpoint);
	key->saddr = tuple->daddr;
	key->daddr = tuple->saddr;
	key->sport = tuple->dport;
	key->dport = tuple->sport;
}

static always_inline int lb_protocol(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* What a packet makes of the state of its flow. answer: it comes from the backend. */
static always_inline __u16 lb_state(const struct pkt *pkt, __u16 state, int answer)
{
	if (pkt->flags & (PKT_LATER_FRAGMENT | PKT_ICMP_ERROR))
		return state;
	if (answer)
		state &= ~LB_UNANSWERED;
	if (pkt->proto != IPPROTO_TCP)
		return state;
	if ((pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return state & (LB_TX_CLOSING | LB_RX_CLOSING | LB_RESET) ?
			       (state & LB_WIDE) | LB_UNANSWERED | LB_OPENING :
			       state;
	if (pkt->tcp_flags & TCP_RST)
		return state | LB_RESET;
	/* whoever goes on after a reset did not believe it */
	state &= ~LB_RESET;
	if (!(pkt->tcp_flags & TCP_SYN) && !(state & LB_UNANSWERED))
		state &= ~LB_OPENING;
	if (pkt->tcp_flags & TCP_FIN)
		state |= answer ? LB_RX_CLOSING : LB_TX_CLOSING;
	return state;
}

static always_inline int lb_closed(__u16 state)
{
	const __u16 closing = LB_TX_CLOSING | LB_RX_CLOSING;

	return (state & closing) == closing || (state & LB_RESET);
}

/* Seconds without a packet after which a flow is over: those of conntrack. loadbalancer.py has the twin. */
static always_inline __u32 lb_lifetime(__u8 proto, __u16 state)
{
	if (proto != IPPROTO_TCP)
		return LIFETIME_ANY;
	if (lb_closed(state))
		return LIFETIME_CLOSING;
	return state & (LB_UNANSWERED | LB_OPENING) ? LIFETIME_SYN : LIFETIME_TCP;
}

static always_inline int lb_alive(__u8 proto, __u32 used, __u16 state, __u32 now)
{
	return (__s32)(used + lb_lifetime(proto, state) - now) >= 0;
}

/* The flow of this entry has a packet more. What follows on the last FIN or a reset prolongs nothing. */
#define lb_touch(entry, pkt, answer, now)                                                                              \
	do {                                                                                                           \
		__u16 before_ = (entry)->state, state_ = lb_state(pkt, before_, answer);                               \
                                                                                                                       \
		if (state_ != before_)                                                                                 \
			(entry)->state = state_;                                                                       \
		if ((entry)->used != (now) && !(lb_closed(before_) && lb_closed(state_)))                              \
			(entry)->used = (now);                                                                         \
	} while (0)

/* Whether another flow with the translated tuple is alive, so that answers could not be told apart. */
FUNCTION int lb_taken(const struct pkt *pkt, __u32 now)
{
	struct lb_work *work = lb_work();
	struct ct_entry *entry;
	struct ct_end *end;
	__u32 source;

	if (!pkt || !work)
		return 0;
	work->tuple = pkt->tuple;
	work->tuple.daddr = work->backend.address;
	work->tuple.dport = work->backend.port;
	source = ct_key_of(&work->track, &work->tuple);
	entry = ct_find(&work->track, now);
	if (!entry)
		return 0;
	end = &entry->end[ct_which(source)];
	if (!end->first || end->endpoint != pkt->src_endpoint || end->service == work->service.id)
		return 0;
	return pkt->proto != IPPROTO_TCP ||
	       ((entry->flags & CT_SEEN_NON_SYN) && !ct_is_over(entry->flags));
}

/* The service that a packet is for, into work->front and work->service. */
static always_inline int lb_service_of(struct lb_work *work, const struct pkt *pkt)
{
	work->front.address = pkt->tuple.daddr;
	work->front.port = pkt->tuple.dport;
	work->front.proto = pkt->proto;
	return lb_service_get(&work->front, &work->service);
}

/* What is to be written next: the backend. */
static always_inline void lb_to_backend(struct lb_work *work)
{
	work->to.address = work->backend.address;
	work->to.port = work->backend.port;
}

/* What is to be written next: a service, as its clients know it. Gives 0 or a drop reason. */
static always_inline int lb_to_front(struct lb_work *work, const __u32 *service)
{
	struct lb_frontend *front = bpf_map_lookup_elem(&ciliate_lb_reverse, service);

	if (!front)
		return DROP_NO_SERVICE;
	work->to.address = front->address;
	work->to.port = front->port;
	return 0;
}

/* Write work->to at a side of the packet, of whatever kind: what an ICMP error complains of went the other way. */
static always_inline int lb_write_any(struct __sk_buff *skb, struct pkt *pkt, struct lb_work *work, __u32 side)
{
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_write_error(skb, pkt, &work->to, !side);
	return lb_write(skb, pkt, &work->to, side);
}

static always_inline void lb_remember(const struct lb_flow_key *flow, __u32 backend, __u32 service, __u32 now, __u16 state)
{
	struct lb_flow value = {.backend = backend, .service = service, .used = now, .state = state};

	bpf_map_update_elem(&ciliate_lb_flow, flow, &value, BPF_ANY);
}

/* The backend that this flow has already, as long as it is there. */
static always_inline int lb_known(struct pkt *pkt, struct lb_work *work, __u32 now)
{
	struct lb_flow *known = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);

	if (!known || known->service != work->service.id)
		return 0;
	if (now - known->used > LB_IDLE && (pkt->proto != IPPROTO_TCP || ct_opens(pkt)))
		return 0;
	if (!lb_backend_get(known->backend, &work->backend))
		return 0;
	lb_touch(known, pkt, 0, now);
	/* its answers are not looked up here */
	if (known->state & LB_UNANSWERED)
		known->state &= ~LB_UNANSWERED;
	return 1;
}

/* The backend of the flow that work->flow names, into work->backend; 0 where there is none. */
static always_inline int lb_backend_of_flow(struct lb_work *work)
{
	struct lb_flow *flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);

	return flow && lb_backend_get(flow->backend, &work->backend);
}

/* The backend that the client of a new flow had; 0 where that does not count. */
static always_inline __u32 lb_stays(struct lb_work *work, __u32 now)
{
	return work->service.affinity ? lb_affine(&work->service, &work->flow.saddr, now, &work->backend) : 0;
}

/* The flow has this backend from now on, and with affinity its client too. */
static always_inline void lb_chosen(struct lb_work *work, __u32 backend, __u32 now)
{
	if (work->service.affinity)
		lb_affine_set(&work->service, &work->flow.saddr, now, backend);
	lb_remember(&work->flow, backend, work->service.id, now, LB_OPENING);
}

/* A backend for a new flow, or for one whose backend is gone. Gives 0 where the service has none. */
FUNCTION int lb_choose(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	__u32 now = now_seconds(), id, hash;
	int i;

	asm volatile("" ::"r"(skb));
	if (!pkt || !work)
		return 0;
	id = lb_stays(work, now);
	if (!id) {
		hash = lb_hash(&work->flow);
		for (i = 0; i < LB_ATTEMPTS; i++) {
			id = lb_pick(&work->front, &work->service, hash, 0, &work->backend);
			if (!id || work->service.count == 1 || !lb_taken(pkt, now))
				break;
			hash = lb_mix(hash, i + 1);
		}
		if (!id)
			return 0;
	}
	lb_chosen(work, id, now);
	return 1;
}

/* A pod that reaches itself: it must see another peer, or it would answer past us. */
FUNCTION int lb_to_self(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_self_address(pkt, &work->to.address);
	work->to.port = pkt->tuple.sport;
	reason = lb_write(skb, pkt, &work->to, LB_SOURCE);
	if (reason)
		return reason;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_SELF, pkt->src_endpoint);
	lb_remember(&work->flow, 0, work->service.id, now_seconds(), 0);
	return LB_SELF;
}

/* An answer of a pod to itself: from the service, to the pod's own address. */
FUNCTION int lb_from_self(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_flow *flow;
	union addr pod;
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_back(&work->flow, &pkt->tuple, LB_FLOW_SELF, pkt->src_endpoint);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow)
		return DROP_UNKNOWN_TARGET;
	pod = pkt->tuple.saddr;
	reason = lb_to_front(work, &flow->service);
	if (!reason)
		reason = lb_write(skb, pkt, &work->to, LB_SOURCE);
	if (reason)
		return reason;
	work->to.address = pod;
	work->to.port = pkt->tuple.dport;
	reason = lb_write(skb, pkt, &work->to, LB_DESTINATION);
	return reason ? reason : LB_SELF;
}

static always_inline int lb_is_self(const struct pkt *pkt, struct lb_work *work)
{
	lb_self_address(pkt, &work->to.address);
	return addr_equal(&pkt->tuple.daddr, &work->to.address);
}

/* An ICMP error of a pod about what it sent to itself: from the service, about what it had sent there. */
FUNCTION int lb_self_error(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	struct lb_flow *flow;
	__u32 service;
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	lb_flow_of(&work->flow, &pkt->inner, LB_FLOW_SELF, pkt->src_endpoint);
	flow = bpf_map_lookup_elem(&ciliate_lb_flow, &work->flow);
	if (!flow)
		return DROP_UNKNOWN_TARGET;
	service = flow->service;
	work->to.address = pkt->inner.daddr;
	work->to.port = pkt->inner.sport;
	reason = lb_write_error(skb, pkt, &work->to, LB_SOURCE);
	if (!reason)
		reason = lb_to_front(work, &service);
	if (!reason)
		reason = lb_write_error(skb, pkt, &work->to, LB_DESTINATION);
	return reason ? reason : LB_SELF;
}

/* An ICMP error of a pod about what came from a service: it is for the backend that the flow has. */
FUNCTION int lb_translate_error(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();

	if (!pkt || !work)
		return DROP_INVALID;
	if (!lb_protocol(pkt->inner.proto))
		return 0;
	if (lb_is_self(pkt, work))
		return lb_self_error(skb, pkt);
	lb_flow_back(&work->flow, &pkt->inner, LB_FLOW_CLIENT, pkt->src_endpoint);
	if (!lb_backend_of_flow(work))
		return 0;
	lb_to_backend(work);
	return lb_write_error(skb, pkt, &work->to, LB_SOURCE);
}

/* What a pod sends, before anything else looks at its destination. Gives 0 to go on, LB_SELF, LB_REJECT or a drop
 * reason. */
FUNCTION int lb_translate(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	if (pkt->flags & PKT_ICMP_ERROR)
		return lb_translate_error(skb, pkt);
	if (!lb_protocol(pkt->proto))
		return 0;
	if (!lb_service_of(work, pkt))
		return lb_is_self(pkt, work) ? lb_from_self(skb, pkt) : 0;
	lb_flow_of(&work->flow, &pkt->tuple, LB_FLOW_CLIENT, pkt->src_endpoint);
	if (!lb_known(pkt, work, now_seconds()) && !lb_choose(skb, pkt))
		return LB_REJECT;
	lb_to_backend(work);
	reason = lb_write(skb, pkt, &work->to, LB_DESTINATION);
	if (reason)
		return reason;
	if (addr_equal(&pkt->tuple.saddr, &pkt->tuple.daddr))
		return lb_to_self(skb, pkt);
	pkt->services[EGRESS] = work->service.id;
	return 0;
}

/* What a pod gets of a flow that it opened through a service (pkt->services, from conntrack): from the service again. */
FUNCTION int lb_restore(struct __sk_buff *skb, struct pkt *pkt)
{
	struct lb_work *work = lb_work();
	int reason;

	if (!pkt || !work)
		return DROP_INVALID;
	reason = lb_to_front(work, &pkt->services[INGRESS]);
	return reason ? reason : lb_write_any(skb, pkt, work, LB_SOURCE);
}

#endif
