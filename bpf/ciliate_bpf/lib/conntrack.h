/* Connection tracking: states, lifetimes, closing (inventory 1.8), ICMP errors by the packet inside. */
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

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16


static always_inline struct ct_entry *ct_find(struct ct_key *key, __u32 now)
{
	struct ct_entry *entry;

	if (key->proto == IPPROTO_TCP)
		entry = bpf_map_lookup_elem(&ciliate_ct_tcp, key);
	else
		entry = bpf_map_lookup_elem(&ciliate_ct_any, key);
	/* an entry past its lifetime is dead, whether or not it was collected yet */
	if (entry && (__s32)(entry->lifetime - now) < 0)
		return NULL;
	return entry;
}

static always_inline void ct_swap(struct ct_key *to, const struct ct_key *from)
{
	to->saddr = from->daddr;
	to->daddr = from->saddr;
	to->sport = from->dport;
	to->dport = from->sport;
	to->proto = from->proto;
	to->endpoint = from->endpoint;
	to->direction = !from->direction;
}

/* Flags, closing and lifetime of a TCP flow; returns whether the packet is worth a report. */
static always_inline __u8 ct_tcp(struct ct_entry *entry, __u8 tcp_flags, int reply, __u32 now)
{
	__u16 both = CT_TX_CLOSING | CT_RX_CLOSING;
	__u8 *seen = reply ? &entry->rx_flags_seen : &entry->tx_flags_seen;
	__u8 fresh = tcp_flags & ~*seen;

	if ((tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN && (entry->flags & both)) {
		entry->flags = 0;
		entry->tx_flags_seen = 0;
		entry->rx_flags_seen = 0;
	}
	if (!(tcp_flags & TCP_SYN))
		entry->flags |= CT_SEEN_NON_SYN;
	*seen |= tcp_flags;
	if ((tcp_flags & (TCP_FIN | TCP_RST)) && (entry->flags & both) != both) {
		entry->flags |= reply ? CT_RX_CLOSING : CT_TX_CLOSING;
		if ((entry->flags & both) == both)
			entry->lifetime = now + LIFETIME_CLOSING;
	}
	if ((entry->flags & both) != both)
		entry->lifetime = now + (entry->flags & CT_SEEN_NON_SYN ? LIFETIME_TCP : LIFETIME_SYN);
	return fresh != 0;
}

static always_inline void ct_touch(struct __sk_buff *skb, struct pkt *pkt, struct ct_entry *entry, int reply, __u32 now)
{
	__u32 *last = reply ? &entry->last_rx_report : &entry->last_tx_report;

	if (pkt->proto == IPPROTO_TCP) {
		if (!(pkt->flags & PKT_LATER_FRAGMENT))
			pkt->report |= ct_tcp(entry, pkt->tcp_flags, reply, now);
	} else {
		entry->lifetime = now + LIFETIME_ANY;
	}
	if (now - *last >= REPORT_INTERVAL) {
		*last = now;
		pkt->report = 1;
	}
	if (reply) {
		__sync_fetch_and_add(&entry->rx_packets, 1);
		__sync_fetch_and_add(&entry->rx_bytes, skb->len);
	} else {
		__sync_fetch_and_add(&entry->tx_packets, 1);
		__sync_fetch_and_add(&entry->tx_bytes, skb->len);
	}
}

/* An ICMP error belongs to a flow where the packet inside it is of that flow and came from whom the error goes to. */
static always_inline __u8 ct_related(struct pkt *pkt, struct ct_key *key, __u32 now)
{
	struct ct_key reversed = {};

	if (!addr_equal(&pkt->inner.saddr, &pkt->tuple.daddr))
		return CT_NEW;
	*key = pkt->inner;
	key->endpoint = pkt->direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint;
	key->direction = !pkt->direction;
	if (ct_find(key, now))
		return CT_RELATED;
	ct_swap(&reversed, key);
	return ct_find(&reversed, now) ? CT_RELATED : CT_NEW;
}

/* Whether a packet opens a TCP connection. */
static always_inline int ct_opens(struct pkt *pkt)
{
	return pkt->proto == IPPROTO_TCP && !(pkt->flags & PKT_LATER_FRAGMENT) &&
	       (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Find the packet's flow at the endpoint and direction that pkt names. Sets ct_state and report, and the verdict to
 * deny for answers of a flow that was ended: as new packets of nobody's flow they would bring it back to life.
 */
FUNCTION int ct_lookup(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 now = now_seconds();
	struct ct_key forward = {}, reverse = {};
	struct ct_entry *entry;

	if (!pkt)
		return 0;
	pkt->report = 0;
	if (pkt->flags & PKT_ICMP_ERROR) {
		pkt->ct_state = ct_related(pkt, &forward, now);
		pkt->report = 1;
		return 0;
	}
	forward = pkt->tuple;
	forward.direction = pkt->direction;
	forward.endpoint = pkt->direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint;
	ct_swap(&reverse, &forward);
	entry = ct_find(&reverse, now);
	if (entry && (entry->flags & CT_ENDED)) {
		pkt->ct_state = CT_REPLY;
		if (!ct_opens(pkt)) {
			pkt->verdict = VERDICT_DENY;
			return 0;
		}
		bpf_map_delete_elem(&ciliate_ct_tcp, &reverse);
		entry = NULL;
	}
	if (entry) {
		pkt->ct_state = CT_REPLY;
		ct_touch(skb, pkt, entry, 1, now);
		return 0;
	}
	entry = ct_find(&forward, now);
	if (entry && !(entry->flags & CT_ENDED)) {
		pkt->ct_state = CT_ESTABLISHED;
		ct_touch(skb, pkt, entry, 0, now);
		return 0;
	}
	pkt->ct_state = CT_NEW;
	pkt->report = 1;
	return 0;
}

static always_inline void ct_key_of(struct pkt *pkt, struct ct_key *key)
{
	*key = pkt->tuple;
	key->direction = pkt->direction;
	key->endpoint = pkt->direction == INGRESS ? pkt->dst_endpoint : pkt->src_endpoint;
}

/* Make an entry for a new flow; gives 0 or a drop reason. */
FUNCTION int ct_create(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ct_entry entry = {};
	struct ct_key key = {};
	__u32 now = now_seconds();

	if (!pkt)
		return DROP_CT_CREATE;
	ct_key_of(pkt, &key);
	entry.tx_packets = 1;
	entry.tx_bytes = skb->len;
	entry.src_identity = pkt->src_identity;
	entry.rule = pkt->rule;
	entry.last_tx_report = now;
	if (pkt->proto == IPPROTO_TCP) {
		ct_tcp(&entry, pkt->tcp_flags, 0, now);
		return bpf_map_update_elem(&ciliate_ct_tcp, &key, &entry, BPF_ANY) ? DROP_CT_CREATE : 0;
	}
	entry.lifetime = now + LIFETIME_ANY;
	return bpf_map_update_elem(&ciliate_ct_any, &key, &entry, BPF_ANY) ? DROP_CT_CREATE : 0;
}

/* End a flow whose allowance is gone. Its entry stays for a while, so that answers under way do not make a new one. */
FUNCTION int ct_end(struct __sk_buff *skb, struct pkt *pkt)
{
	struct ct_entry *entry;
	struct ct_key key = {};

	asm volatile("" ::"r"(skb));
	if (!pkt)
		return 0;
	ct_key_of(pkt, &key);
	entry = ct_find(&key, now_seconds());
	if (!entry)
		return 0;
	entry->lifetime = now_seconds() + (pkt->proto == IPPROTO_TCP ? LIFETIME_ENDED_TCP : LIFETIME_ENDED_ANY);
	entry->flags |= CT_ENDED;
	return 0;
}

#endif
