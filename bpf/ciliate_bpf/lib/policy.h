/* Policy look-up: the order of ciliate.policy.mapstate.lookup, pruned by the endpoint's shape. */
#ifndef CILIATE_POLICY_H
#define CILIATE_POLICY_H

#include "common.h"
#include "conntrack.h"
#include "events.h"
#include "lookup.h"
#include "repeat.h"

#define NO_ENTRY 0xff

static always_inline int policy_hit(struct __sk_buff *skb, struct pkt *pkt, struct policy_key *key)
{
	struct policy_entry *entry = bpf_map_lookup_elem(&ciliate_policy, key);

	if (!entry)
		return 0;
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, skb->len);
	pkt->rule = entry->rule;
	pkt->verdict = entry->verdict;
	return 1;
}

/* What policy is asked, as one number: the shape of the end's policy in the low half, then port, protocol, direction, and
 * whether it is asked again, of a flow that was allowed before: then it is not of the packet, but of the flow's first. */
#define QUESTION_PORT 32
#define QUESTION_PROTO 48
#define QUESTION_DIRECTION 56
#define QUESTION_AGAIN 57

static always_inline __u64 question_of(__u32 shape, __u8 direction, __u8 proto, __u16 port)
{
	return shape | (__u64)port << QUESTION_PORT | (__u64)proto << QUESTION_PROTO |
	       (__u64)(direction & 1) << QUESTION_DIRECTION;
}

struct policy_walk {
	struct __sk_buff *skb;
	struct pkt *pkt;
	__u32 port;
	struct policy_key key;
	__u32 left; /* prefix lengths to look for, as bits */
	__u32 found;
};

/* 1 where bits is larger, without a branch for the verifier to follow. */
static always_inline __u32 exceeds(__u32 bits, __u32 limit)
{
	__u32 difference = limit - bits;

	asm volatile("" : "+r"(difference));
	return difference >> 31;
}

/* The number of the highest bit of 16 that is set. */
static always_inline __u32 highest_bit(__u32 bits)
{
	__u32 number = exceeds(bits, 0xff) << 3;

	number |= exceeds(bits >> number, 0xf) << 2;
	number |= exceeds(bits >> number, 3) << 1;
	return number | exceeds(bits >> number, 1);
}

/* An entry with a port range, the smallest range first. */
STEP policy_range(__u32 number, struct policy_walk *walk)
{
	__u32 prefix;

	if (!walk->left)
		return 1;
	prefix = highest_bit(walk->left) & 15;
	walk->left &= ~(1U << prefix);
	walk->key.prefix = prefix;
	walk->key.port = bpf_htons(walk->port & (0xffff0000U >> prefix) & 0xffff);
	walk->found = policy_hit(walk->skb, walk->pkt, &walk->key);
	return walk->found;
}

/* Entries of one peer, or of any, at a place or wherever: the port itself, ranges, the protocol, then all traffic.
 * Returns whether one decides.
 */
FUNCTION int policy_of_peer(struct __sk_buff *skb, struct pkt *pkt, __u32 identity, __u32 place)
{
	struct policy_walk walk = {.skb = skb, .pkt = pkt};
	__u64 question;
	__u32 shape;

	if (!pkt)
		return 0;
	question = pkt->question;
	shape = question;
	walk.port = question >> QUESTION_PORT & 0xffff;
	walk.key.direction = question >> QUESTION_DIRECTION & 1;
	walk.key.endpoint = pkt->direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint;
	walk.key.identity = identity;
	walk.key.place = place;
	walk.key.proto = question >> QUESTION_PROTO;
	if (shape & SHAPE_PORT) {
		walk.key.prefix = 16;
		walk.key.port = bpf_htons(walk.port);
		if (policy_hit(skb, pkt, &walk.key))
			return 1;
	}
	walk.left = shape & SHAPE_RANGES;
	if (walk.left) {
		REPEAT(16, policy_range, &walk);
		if (walk.found)
			return 1;
	}
	if (!(shape & SHAPE_ALL_TRAFFIC))
		return 0;
	walk.key.proto = 0;
	walk.key.prefix = 0;
	walk.key.port = 0;
	return policy_hit(skb, pkt, &walk.key);
}

/* The place of the peer, 0 for none. What is not a pod or node has none: its identity is of its prefix already. */
static always_inline __u32 place_of_peer(struct pkt *pkt, __u32 identity)
{
	const union addr *addr = pkt->direction == INGRESS ? &pkt->tuple.saddr : &pkt->tuple.daddr;
	struct ipcache_key key = {};
	struct place_entry *entry;

	/* of a flow that an ICMP error is about: the other end of the packet inside */
	if ((pkt->question >> QUESTION_AGAIN & 1) && (pkt->flags & PKT_ICMP_ERROR))
		addr = pkt->direction == INGRESS ? &pkt->inner.daddr : &pkt->inner.saddr;
	if (identity == IDENTITY_WORLD || identity >= LOCAL_IDENTITY)
		return 0;
	ipcache_key_of(&key, addr, pkt->family);
	entry = bpf_map_lookup_elem(&ciliate_place, &key);
	return entry ? entry->number : 0;
}

/* The peer's identity where endpoints of this shape ask for places, too. Returns whether an entry decides. */
FUNCTION int policy_by_place(struct __sk_buff *skb, struct pkt *pkt, __u32 identity)
{
	__u32 place;

	if (!pkt)
		return 0;
	place = place_of_peer(pkt, identity);
	if (place && (pkt->question & SHAPE_PAIRS) && policy_of_peer(skb, pkt, identity, place))
		return 1;
	if (policy_of_peer(skb, pkt, identity, 0))
		return 1;
	return place && policy_of_peer(skb, pkt, IDENTITY_ANY, place);
}

/* Answers pkt->question: sets pkt->verdict and pkt->rule. */
static always_inline void policy_lookup(struct __sk_buff *skb, struct pkt *pkt, __u32 identity)
{
	pkt->verdict = VERDICT_DENY;
	if (pkt->question & (SHAPE_PLACES | SHAPE_PAIRS)) {
		if (policy_by_place(skb, pkt, identity))
			return;
	} else if (policy_of_peer(skb, pkt, identity, 0)) {
		return;
	}
	policy_of_peer(skb, pkt, IDENTITY_ANY, 0);
}

/* What policy is asked of the flow that a packet answers or complains of, at the end that it passes; 0: nothing is enforced. */
FUNCTION __u64 policy_again(struct pkt *pkt)
{
	__u8 direction, outward, proto;
	const struct tuple *tuple;
	struct ct_entry *entry;
	struct ep_config *ep;
	__u16 port;

	if (!pkt)
		return 0;
	direction = pkt->direction & 1;
	ep = endpoint(direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint);
	entry = ct_find(&pkt->flow, now_seconds());
	if (!ep || !entry)
		return 0;
	outward = entry->end[ct_which(pkt->source ^ (direction == INGRESS))].first == CT_FIRST_OUT;
	if (!(ep->flags & (outward ? EP_ENFORCE_EGRESS : EP_ENFORCE_INGRESS)))
		return 0;
	tuple = pkt->flags & PKT_ICMP_ERROR ? &pkt->inner : &pkt->tuple;
	proto = tuple->proto;
	port = bpf_ntohs(tuple->sport);
	/* the packet inside an error goes the other way than the error */
	if ((pkt->flags & PKT_ICMP_ERROR) && outward == (direction == INGRESS))
		port = bpf_ntohs(tuple->dport);
	if (is_icmp(proto))
		port = proto == IPPROTO_ICMP ? ICMP_ECHO : ICMPV6_ECHO_REQUEST;
	return question_of(outward ? ep->egress_shape : ep->ingress_shape, outward ? EGRESS : INGRESS, proto, port);
}

/* Sets pkt->question, without a protocol where nothing is enforced, and whom it is about: the peer in pkt->known. What passes
 * through there the verifier takes for any value, so that it has one path to follow and not one for each question. */
static always_inline void policy_question(struct pkt *pkt, __u8 direction, int again)
{
	struct known *known = &pkt->known[direction];

	if (again) {
		if (pkt->ct_state != CT_RELATED)
			known->peer = ct_peer(pkt, direction);
		pkt->question = policy_again(pkt) | 1ULL << QUESTION_AGAIN;
	} else {
		known->peer = direction == INGRESS ? pkt->src_identity : pkt->dst_identity;
		pkt->question = pkt->enforce ? question_of(pkt->shape, direction, pkt->proto, pkt->policy_port) : 0;
	}
	known->epoch = pkt->epoch;
	barrier();
}

/* Conntrack and policy of one endpoint in one direction; gives 0 or a drop reason.
 *
 * Policy is asked for every packet, so that a rule that goes ends its flows; replies and related errors pass without, until
 * the end's policy or the peer's identity changes: then it is asked once more whether the flow may be.
 * Between two pods of the node the flow is looked up with the sender's side and recorded with the receiver's.
 */
FUNCTION int decide(struct __sk_buff *skb, struct pkt *pkt)
{
	__u8 direction;
	int reason, again;

	if (!pkt)
		return DROP_INVALID;
	direction = pkt->direction & 1;
	pkt->rule = 0;
	pkt->verdict = VERDICT_ALLOW;
	if (!(pkt->tracked & (1 << direction)))
		ct_lookup(skb, pkt);
	pkt->ct_state = pkt->ct_states[direction];
	debug(skb, pkt, DEBUG_FLOW);
	if (pkt->ct_state == CT_HELD) {
		pkt->ct_state = CT_REPLY;
		pkt->verdict = VERDICT_DENY;
		return DROP_FLOW_ENDED;
	}
	if (ct_error_is_false(pkt, direction))
		return DROP_FALSE_ERROR;
	/* an established flow is judged anew below */
	if ((pkt->flags & PKT_CLAIM) && pkt->ct_state > CT_ESTABLISHED)
		return DROP_SOURCE_IP;
	again = pkt->ct_state == CT_REPLY || pkt->ct_state == CT_RELATED;
	if (!again || ct_is_stale(pkt, direction)) {
		policy_question(pkt, direction, again);
		again = pkt->question >> QUESTION_AGAIN & 1;
		if (pkt->question >> QUESTION_PROTO & 0xff)
			policy_lookup(skb, pkt, pkt->known[direction].peer);
		debug(skb, pkt, DEBUG_POLICY);
		if (pkt->verdict != VERDICT_ALLOW) {
			if ((again || pkt->ct_state == CT_ESTABLISHED) && !(pkt->flags & PKT_CLAIM)) {
				debug(skb, pkt, DEBUG_END);
				ct_end(skb, pkt);
			}
			if (again)
				return DROP_FLOW_ENDED;
			return pkt->verdict == VERDICT_REDIRECT ? DROP_NO_PROXY : DROP_POLICY;
		}
		if (again)
			ct_allowed(pkt);
		pkt->rules[direction] = pkt->rule;
		if (pkt->ct_state == CT_NEW && (monitor_level(pkt) & MONITOR_VERDICT))
			emit(skb, pkt, EVENT_VERDICT << 8 | pkt->verdict);
	}
	if (direction == EGRESS && (pkt->flags & PKT_TO_POD))
		return 0;
	/* an ICMP error of no known flow that policy allows needs no entry: nobody replies to it */
	if ((pkt->flags & PKT_ICMP_ERROR) || !(ct_begins(pkt, EGRESS) || ct_begins(pkt, INGRESS)))
		return 0;
	debug(skb, pkt, DEBUG_CREATE);
	reason = ct_create(skb, pkt);
	if (pkt->flags & PKT_RECORDED)
		ct_charge(pkt);
	return reason;
}

#endif
