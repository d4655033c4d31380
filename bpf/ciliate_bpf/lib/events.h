/* Events to user space, through the ring buffer. */
#ifndef CILIATE_EVENTS_H
#define CILIATE_EVENTS_H

#include "common.h"

/* Never read: the ring buffer has no type of its own, and this puts the event's into BTF for user space to check. */
const volatile struct event event_layout = {};

/* A global function: verified once, called from everywhere. kind: type << 8 | subtype. */
FUNCTION int emit(struct __sk_buff *skb, struct pkt *pkt, __u32 kind)
{
	struct event *event;
	__u32 captured = skb->len;

	if (!pkt)
		return 0;
	event = bpf_ringbuf_reserve(&ciliate_events, sizeof(*event), 0);
	if (!event)
		return 0;
	event->type = kind >> 8;
	event->subtype = kind & 0xff;
	event->endpoint = pkt->direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint;
	event->hash = bpf_get_hash_recalc(skb);
	event->src_identity = pkt->src_identity;
	event->dst_identity = pkt->dst_identity;
	event->src_endpoint = pkt->src_endpoint;
	event->dst_endpoint = pkt->dst_endpoint;
	event->direction = pkt->direction;
	event->ct_state = pkt->ct_state;
	event->proto = pkt->proto;
	event->family = pkt->family;
	event->rule = pkt->rule;
	event->ifindex = skb->ifindex;
	event->len_orig = skb->len;
	event->verdict = pkt->verdict;
	event->tcp_flags = pkt->tcp_flags;
	event->saddr = pkt->tuple.saddr;
	event->daddr = pkt->tuple.daddr;
	event->sport = pkt->tuple.sport;
	event->dport = pkt->tuple.dport;
	event->pad = 0;
	if (captured > CAPTURE)
		captured = CAPTURE;
	/* 1 to CAPTURE, in a form that the verifier of Linux 6.1 follows too; an empty packet fails the load */
	asm volatile("" : "+r"(captured));
	captured = ((captured - 1) & (CAPTURE - 1)) + 1;
	if (bpf_skb_load_bytes(skb, 0, event->packet, captured) < 0)
		captured = 0;
	event->len_cap = captured;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* What is told of a packet: as its endpoint says, or as the node does. */
static always_inline __u32 monitor_level(const struct pkt *pkt)
{
	__u32 zero = 0;
	struct node_config *config;

	if (pkt->monitor & MONITOR_OWN)
		return pkt->monitor;
	config = bpf_map_lookup_elem(&ciliate_config, &zero);
	return config ? config->monitor : 0;
}

/* Tell of a step on a packet's way. */
static always_inline void debug(struct __sk_buff *skb, struct pkt *pkt, __u32 step)
{
	if (enable_debug)
		emit(skb, pkt, EVENT_DEBUG << 8 | step);
}

/* Count and report a drop. Always returns TC_ACT_SHOT. */
FUNCTION int drop(struct __sk_buff *skb, struct pkt *pkt, __u32 reason)
{
	if (!pkt)
		return TC_ACT_SHOT;
	count(skb, reason, pkt->direction);
	if (reason != DROP_HOUSEKEEPING && !(pkt->monitor & MONITOR_NO_DROPS))
		emit(skb, pkt, EVENT_DROP << 8 | (reason & 0xff));
	return TC_ACT_SHOT;
}

/* Report a packet that came in at a place where everybody's packets do, where every step is asked for. */
static always_inline void arrived(struct __sk_buff *skb, struct pkt *pkt, __u32 where)
{
	if (monitor_level(pkt) & MONITOR_TRACE_FROM)
		emit(skb, pkt, EVENT_TRACE << 8 | where);
}

/* Count a packet that goes on, and report it as far as the monitor level says. */
static always_inline void forwarded(struct __sk_buff *skb, struct pkt *pkt, __u32 where)
{
	__u32 level = monitor_level(pkt);

	count(skb, FORWARDED, pkt->direction);
	if ((level & MONITOR_TRACE_ALL) || ((level & MONITOR_TRACE_NEW) && pkt->report))
		emit(skb, pkt, EVENT_TRACE << 8 | where);
}

#endif
