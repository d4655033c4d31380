/* Connection tracking: states, lifetimes, closing (inventory 1.8), ICMP errors by the packet inside.
 *
 * A flow is one entry, the same for both directions and for both of its ends on this node. Each end is judged for itself:
 * its record says which way the flow's first packet went there, and whether its allowance went since. So a packet between
 * two pods of the node is looked up once, and what one pod's policy says never speaks for the other's.
 */
#ifndef CILIATE_CONNTRACK_H
#define CILIATE_CONNTRACK_H

#include "common.h"
#include "parse.h"

#define LIFETIME_TCP 21600
#define LIFETIME_SYN 60
#define LIFETIME_ANY 60
#define LIFETIME_CLOSING 10
#define LIFETIME_ENDED_TCP 1200 /* longer than TCP tries to send again, 924 s by default */
#define LIFETIME_ENDED_ANY 10
#define REPORT_INTERVAL 5
/* An endpoint's own part of a table. It may have more while a quarter of the table is free. */
#define CT_PART 8
#define CT_RESERVE 4

/* The tables' sizes, as loaded. */
const volatile __u32 ct_tcp_max = 524288;
const volatile __u32 ct_any_max = 262144;

/* An end's number as an index. The verifier knows its range and the compiler does not: it would OR it into an address. */
static always_inline __u32 ct_which(__u32 end)
{
	asm volatile("%0 &= 1" : "+r"(end));
	return end;
}

/* Which end of its flow a packet's source is: by an order of addresses and ports that both directions agree on. */
static always_inline __u8 ct_source(const struct tuple *tuple)
{
	int i;

	for (i = 3; i >= 0; i--)
		if (tuple->saddr.w[i] != tuple->daddr.w[i])
			return tuple->saddr.w[i] > tuple->daddr.w[i];
	return tuple->sport > tuple->dport;
}

/* Writes the key of a packet's flow and gives the packet's source in it. What passes through *key, where that is not on the
 * stack, the verifier takes for any value, so that it has one path to follow afterwards and not one for each source. */
static always_inline __u32 ct_key_of(struct ct_key *key, const struct tuple *tuple)
{
	__u32 source, target;

	key->requester = ct_source(tuple);
	barrier();
	source = ct_which(key->requester);
	target = ct_which(!source);
	key->addr[source] = tuple->saddr;
	key->addr[target] = tuple->daddr;
	key->port[source] = tuple->sport;
	key->port[target] = tuple->dport;
	key->proto = tuple->proto;
	key->requester = is_icmp(tuple->proto) ? source ^ tuple->answer : 0;
	return source;
}

static always_inline struct ct_entry *ct_at(const struct ct_key *key)
{
	if (key->proto == IPPROTO_TCP)
		return bpf_map_lookup_elem(&ciliate_ct_tcp, key);
	return bpf_map_lookup_elem(&ciliate_ct_any, key);
}

/* An entry past its lifetime is dead, whether or not it was collected yet. */
static always_inline struct ct_entry *ct_find(const struct ct_key *key, __u32 now)
{
	struct ct_entry *entry = ct_at(key);

	return entry && (__s32)(entry->lifetime - now) >= 0 ? entry : NULL;
}

/* Where an end holds answers back, the entry stays at least that long. Written only where it changes: others read it. */
static always_inline void ct_live_until(struct ct_entry *entry, __u32 until)
{
	if (entry->lifetime == until)
		return;
	if ((entry->end[0].ended | entry->end[1].ended) && (__s32)(until - entry->lifetime) < 0)
		return;
	entry->lifetime = until;
}

/* Whether a TCP flow is over: both ends have closed it, or one of them reset it. */
static always_inline int ct_is_over(__u8 flags)
{
	return (flags & CT_CLOSING) == CT_CLOSING || (flags & CT_RESET);
}

/* Flags, closing and lifetime of a TCP flow; returns whether the packet is worth a report. */
static always_inline __u8 ct_tcp(struct ct_entry *entry, __u8 tcp_flags, __u32 source, __u32 now)
{
	__u8 flags = entry->flags, seen = entry->tcp_flags[ct_which(source)], fresh;
	__u32 life = LIFETIME_SYN;

	if ((tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN && (flags & (CT_CLOSING | CT_RESET))) {
		flags = 0;
		seen = 0;
		entry->tcp_flags[ct_which(!source)] = 0;
	}
	fresh = tcp_flags & ~seen;
	if (fresh || !seen)
		entry->tcp_flags[ct_which(source)] = seen | tcp_flags;
	if (!(tcp_flags & TCP_SYN))
		flags |= CT_SEEN_NON_SYN;
	if (tcp_flags & TCP_FIN)
		flags |= 1 << source;
	/* who goes on after a reset did not believe it */
	flags = tcp_flags & TCP_RST ? flags | CT_RESET : flags & ~CT_RESET;
	if (ct_is_over(flags))
		life = LIFETIME_CLOSING;
	else if ((flags & CT_SEEN_NON_SYN) && entry->tcp_flags[ct_which(!source)])
		life = LIFETIME_TCP;
	/* what follows on the last FIN or RST prolongs nothing */
	if (life != LIFETIME_CLOSING || !ct_is_over(entry->flags))
		ct_live_until(entry, now + life);
	if (flags != entry->flags)
		entry->flags = flags;
	return fresh != 0;
}

/* A packet of a live flow. A flow's packets in one direction come one after the other, so its counters are not atomic:
 * where two processors do send at once, one of the packets may not be counted. */
FUNCTION int ct_touch(struct __sk_buff *skb, struct pkt *pkt, struct ct_entry *entry, __u32 now)
{
	__u32 source;

	if (!pkt || !entry)
		return 0;
	pkt->report = 0;
	if (pkt->proto != IPPROTO_TCP)
		ct_live_until(entry, now + LIFETIME_ANY);
	else if (!(pkt->flags & PKT_LATER_FRAGMENT))
		pkt->report = ct_tcp(entry, pkt->tcp_flags, pkt->source, now);
	source = ct_which(pkt->source);
	if (now - entry->reported[source] >= REPORT_INTERVAL) {
		entry->reported[source] = now;
		pkt->report = 1;
	}
	/* where the sender is a pod of this node and the packet came through the stack, it was counted when it left */
	if (pkt->direction == INGRESS && entry->end[source].first)
		return 0;
	entry->packets[source]++;
	entry->bytes[source] += skb->len;
	return 0;
}

/* Whether a packet opens a TCP connection. */
static always_inline int ct_opens(struct pkt *pkt)
{
	return pkt->proto == IPPROTO_TCP && !(pkt->flags & PKT_LATER_FRAGMENT) &&
	       (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* What the flow is at one end for a packet that passes it in this direction. A packet that asks is no answer: it is a
 * flow of its own, whatever its ports or its identifier; only a SYN that crosses another's on the way is one. */
static always_inline __u8 ct_state_at(struct pkt *pkt, const struct ct_entry *entry, const struct ct_end *end,
				      __u8 direction, __u16 endpoint, __u32 now)
{
	if (!end->first || end->endpoint != endpoint)
		return CT_NEW;
	if (pkt->flags & PKT_ICMP_ERROR)
		return end->ended ? CT_NEW : CT_RELATED;
	if (end->first == (direction == EGRESS ? CT_FIRST_OUT : CT_FIRST_IN))
		return end->ended ? CT_NEW : CT_ESTABLISHED;
	if (is_icmp(pkt->proto) && !pkt->tuple.answer)
		return CT_NEW;
	if (ct_opens(pkt) && (end->ended || entry->flags))
		return CT_NEW;
	if (!end->ended)
		return CT_REPLY;
	return (__s32)(end->ended - now) < 0 ? CT_NEW : CT_HELD;
}

/* What the flow is at the end that a packet passes in this direction, and the service that goes with it. */
static always_inline void ct_at_end(struct pkt *pkt, struct ct_entry *entry, __u32 direction, __u32 now)
{
	struct ct_end *end;
	__u8 state;

	/* where no endpoint of this node stands, the id of one is 0 and no record has it */
	end = &entry->end[ct_which(pkt->source ^ (direction == INGRESS))];
	state = ct_state_at(pkt, entry, end, direction, direction == EGRESS ? pkt->src_endpoint : pkt->dst_endpoint, now);
	pkt->ct_states[direction] = state;
	pkt->known[direction].peer = end->peer;
	pkt->known[direction].epoch = end->epoch;
	barrier();
	state = pkt->ct_states[direction];
	/* the last packet counts: what an earlier flow with this tuple left must not hide the service */
	if (direction == EGRESS && state == CT_ESTABLISHED && end->service != pkt->services[EGRESS])
		end->service = pkt->services[EGRESS];
	if (state == CT_REPLY ||
	    (state == CT_RELATED && end->first == (direction == INGRESS ? CT_FIRST_OUT : CT_FIRST_IN)))
		pkt->services[direction] = end->service;
}

/* Whether the sender forwards packets of others, so that it may complain of any: the node, and what is outside. */
static always_inline int ct_from_router(const struct pkt *pkt)
{
	return pkt->src_identity <= IDENTITY_WORLD || pkt->src_identity >= LOCAL_IDENTITY;
}

/* Whether an ICMP error can be true: it goes to who sent the packet inside. Routers may send one, pods are none: they can but
 * complain of what was sent to them, or one could tell another that the peers of its flows are gone. */
static always_inline int ct_error_is_true(const struct pkt *pkt)
{
	return addr_equal(&pkt->inner.saddr, &pkt->tuple.daddr) &&
	       (ct_from_router(pkt) || addr_equal(&pkt->inner.daddr, &pkt->tuple.saddr));
}

/* Whether a pod complains of a packet that it never got. What it did get is tracked at its own end; at the receiver's the
 * flow may be another one meanwhile. */
static always_inline int ct_error_is_false(const struct pkt *pkt, __u8 direction)
{
	if (!(pkt->flags & PKT_ICMP_ERROR) || pkt->ct_state == CT_RELATED)
		return 0;
	return direction == EGRESS || (!ct_from_router(pkt) && !ct_error_is_true(pkt));
}

/* Find the packet's flow: its state at the end that pkt->direction names, and at the receiver's too where that is a pod
 * of this node that gets the packet next. Sets ct_states, services, report; pkt->tracked says for which directions. */
static always_inline void ct_lookup(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ct_entry *entry;
	__u32 now = now_seconds();
	__u8 state;

	pkt->tracked = 1 << (pkt->direction & 1);
	if (pkt->flags & PKT_TO_POD)
		pkt->tracked |= 1 << INGRESS;
	pkt->report = 1;
	if (pkt->flags & PKT_ICMP_ERROR) {
		if (!ct_error_is_true(pkt))
			return;
		pkt->source = !ct_key_of(&pkt->flow, &pkt->inner);
	} else {
		pkt->source = ct_key_of(&pkt->flow, &pkt->tuple);
	}
	entry = ct_find(&pkt->flow, now);
	if (!entry)
		return;
	ct_at_end(pkt, entry, INGRESS, now);
	ct_at_end(pkt, entry, EGRESS, now);
	barrier();
	state = pkt->ct_states[pkt->direction & 1];
	if (state == CT_ESTABLISHED || state == CT_REPLY)
		ct_touch(skb, pkt, entry, now);
}

static always_inline void ct_write_end(struct ct_end *end, struct pkt *pkt, __u8 direction)
{
	end->first = 0;
	barrier();
	end->peer = pkt->known[direction].peer;
	end->epoch = pkt->known[direction].epoch;
	end->rule = pkt->rules[direction];
	end->ended = 0;
	end->endpoint = direction == EGRESS ? pkt->src_endpoint : pkt->dst_endpoint;
	end->service = pkt->services[direction];
	barrier();
	end->first = direction == EGRESS ? CT_FIRST_OUT : CT_FIRST_IN;
}

/* Whether the packet is the first of its flow at this end. */
static always_inline int ct_begins(struct pkt *pkt, __u8 direction)
{
	return (pkt->tracked & (1 << direction)) && pkt->ct_states[direction] == CT_NEW;
}

static always_inline void ct_write_ends(struct ct_entry *entry, struct pkt *pkt)
{
	if (ct_begins(pkt, EGRESS))
		ct_write_end(&entry->end[ct_which(pkt->source)], pkt, EGRESS);
	if (ct_begins(pkt, INGRESS))
		ct_write_end(&entry->end[ct_which(!pkt->source)], pkt, INGRESS);
}

/* What the ends share of a new flow, with its first packet counted. */
static always_inline void ct_first(struct __sk_buff *skb, struct pkt *pkt, struct ct_entry *entry, __u32 now)
{
	__u32 source = ct_which(pkt->source);

	entry->lifetime = now + LIFETIME_ANY;
	if (pkt->proto == IPPROTO_TCP) {
		entry->tcp_flags[source] = pkt->tcp_flags;
		if (pkt->tcp_flags & TCP_FIN)
			entry->flags = 1 << source;
		if (pkt->tcp_flags & TCP_RST)
			entry->flags |= CT_RESET;
		if (!(pkt->tcp_flags & TCP_SYN))
			entry->flags |= CT_SEEN_NON_SYN;
		/* it lives long once it is answered */
		entry->lifetime = now + (entry->flags & CT_RESET ? LIFETIME_CLOSING : LIFETIME_SYN);
	}
	entry->reported[source] = now;
	entry->packets[source] = 1;
	entry->bytes[source] = skb->len;
}

static always_inline long ct_insert(const struct ct_key *key, const struct ct_entry *entry, __u64 flags)
{
	if (key->proto == IPPROTO_TCP)
		return bpf_map_update_elem(&ciliate_ct_tcp, key, entry, flags);
	return bpf_map_update_elem(&ciliate_ct_any, key, entry, flags);
}

/* Whether an end's record has to stay when the flow is recorded at the other one. */
static always_inline int ct_stays(struct ct_entry *entry, struct pkt *pkt)
{
	return (!ct_begins(pkt, EGRESS) && entry->end[ct_which(pkt->source)].first) ||
	       (!ct_begins(pkt, INGRESS) && entry->end[ct_which(!pkt->source)].first);
}

/* A new entry counts as its endpoint's: whose pod began the flow here, or got its first packet. Where that one used up its part
 * and the table is nearly full, the entry takes the place of an earlier one of those who did so too: nobody else's goes. */
FUNCTION int ct_charge(struct pkt *pkt)
{
	__u32 owner, zero = 0, table, max, index;
	struct ct_share *own, *all;
	struct ct_key *slot;

	if (!pkt)
		return 0;
	table = ct_which(pkt->flow.proto != IPPROTO_TCP);
	max = table ? ct_any_max : ct_tcp_max;
	owner = ct_begins(pkt, EGRESS) ? pkt->src_endpoint : pkt->dst_endpoint;
	own = bpf_map_lookup_elem(&ciliate_ct_share, &owner);
	all = bpf_map_lookup_elem(&ciliate_ct_share, &zero);
	if (!own || !all || !owner)
		return 0;
	__sync_fetch_and_add(&own->used[table], 1);
	__sync_fetch_and_add(&all->used[table], 1);
	if (own->used[table] <= max / CT_PART || all->used[table] <= max - max / CT_RESERVE)
		return 0;
	index = __sync_fetch_and_add(&all->replaced[table], 1);
	index = table * CT_RING + (index % (max / 16 + 1) & (CT_RING - 1));
	slot = bpf_map_lookup_elem(&ciliate_ct_ring, &index);
	if (!slot)
		return 0;
	__sync_fetch_and_add(&own->replaced[table], 1);
	if (slot->proto && !(table ? bpf_map_delete_elem(&ciliate_ct_any, slot) : bpf_map_delete_elem(&ciliate_ct_tcp, slot))) {
		__sync_fetch_and_add(&own->used[table], -1);
		__sync_fetch_and_add(&all->used[table], -1);
	}
	*slot = pkt->flow;
	return 0;
}

/* Record a new flow at the ends where it is new; gives 0 or a drop reason. */
FUNCTION int ct_create(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ct_entry fresh = {}, *entry;
	__u32 now = now_seconds();
	long failed;

	if (!pkt)
		return DROP_CT_CREATE;
	entry = ct_find(&pkt->flow, now);
	if (entry && ct_stays(entry, pkt)) {
		ct_write_ends(entry, pkt);
		return 0;
	}
	ct_first(skb, pkt, &fresh, now);
	ct_write_ends(&fresh, pkt);
	failed = ct_insert(&pkt->flow, &fresh, entry ? BPF_ANY : BPF_NOEXIST);
	if (!failed && !entry)
		pkt->flags |= PKT_RECORDED;
	if (failed != -EEXIST)
		return failed ? DROP_CT_CREATE : 0;
	/* a dead entry is in the way, or the other end recorded the flow at this moment */
	entry = ct_find(&pkt->flow, now);
	if (!entry)
		return ct_insert(&pkt->flow, &fresh, BPF_ANY) ? DROP_CT_CREATE : 0;
	ct_write_ends(entry, pkt);
	return 0;
}

/* The peer of a flow at the end that direction names, as the packet says. The node's own addresses are taken for what they
 * were when the flow began: others are masqueraded by them, both ways. */
static always_inline __u32 ct_peer(const struct pkt *pkt, __u8 direction)
{
	__u32 now = direction == INGRESS ? pkt->src_identity : pkt->dst_identity, before = pkt->known[direction].peer;

	return before && (now == IDENTITY_HOST || before == IDENTITY_HOST) ? before : now;
}

/* Whether what once allowed a packet's flow may have gone since: its end's policy lost something, or the peer is another one.
 * Who complains of a flow by an ICMP error need not be its peer. */
static always_inline int ct_is_stale(const struct pkt *pkt, __u8 direction)
{
	const struct known *known = &pkt->known[direction];

	if (pkt->ct_state == CT_RELATED)
		return known->peer && known->epoch != pkt->epoch;
	return known->epoch != pkt->epoch || known->peer != ct_peer(pkt, direction);
}

/* Policy still allows a flow at the end that direction names: until something changes it need not be asked again. */
FUNCTION int ct_allowed(struct pkt *pkt)
{
	struct ct_entry *entry;
	struct ct_end *end;

	if (!pkt)
		return 0;
	entry = ct_find(&pkt->flow, now_seconds());
	if (!entry)
		return 0;
	end = &entry->end[ct_which(pkt->source ^ (pkt->direction == INGRESS))];
	end->peer = pkt->known[pkt->direction & 1].peer;
	end->epoch = pkt->epoch;
	return 0;
}

/* End a flow whose allowance is gone at this end. It is known for a while, so that answers under way make no new one. */
FUNCTION int ct_end(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 now = now_seconds(), until;
	struct ct_entry *entry;

	asm volatile("" ::"r"(skb));
	if (!pkt)
		return 0;
	entry = ct_find(&pkt->flow, now);
	if (!entry)
		return 0;
	until = now + (pkt->proto == IPPROTO_TCP ? LIFETIME_ENDED_TCP : LIFETIME_ENDED_ANY);
	entry->end[ct_which(pkt->source ^ (pkt->direction == INGRESS))].ended = until;
	if ((__s32)(until - entry->lifetime) > 0)
		entry->lifetime = until;
	return 0;
}

#endif
