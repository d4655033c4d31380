/* What an endpoint and its neighbours say to each other on a link of another plugin (a bridge, or the node itself): ARP,
 * neighbour discovery, listeners of multicast. Policy has no say in it, so it is let through only as far as it says of the
 * endpoint itself what is true, carries nothing else, and does not come too often.
 *
 * Endpoints on such links have an entry in ciliate_link. On our own links there are no neighbours: answers.h.
 */
#ifndef CILIATE_LINK_H
#define CILIATE_LINK_H

#include "common.h"
#include "events.h"
#include "parse.h"
#include "answers.h"

#define MLD_QUERY 130
#define MLD_REPORT 131
#define MLD_DONE 132
#define MLD2_REPORT 143
#define ND_SOURCE_MAC 1
#define ND_TARGET_MAC 2
#define ND_NONCE 14
#define ND_OPTIONS 2
#define ND_ROUTER 0x80000000U
#define ND_SOLICITED_OVERRIDE 0x60000000U
#define ND_AT (ETH_HLEN + 40)
#define MLD_AT (ND_AT + 8) /* behind a hop-by-hop header with a router alert, and nothing else */
#define MLD_RECORDS 64
#define ARP_PADDED 60

/* Messages of one endpoint: so many at once, and one more in each interval. */
#define LINK_BURST 256
#define LINK_INTERVAL (NSEC_PER_SEC / 64)

struct nd_option {
	__u8 type;
	__u8 length;
	__u8 mac[6];
};

struct nd_message {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 flags;
	union addr target;
};

struct mld_header {
	__u8 next;
	__u8 length;
	__u8 alert[4];
	__u8 padding[2];
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 reserved;
	__be16 records;
};

static always_inline struct link_entry *link_of(struct ep_config *ep)
{
	__u32 id = ep->id;

	return bpf_map_lookup_elem(&ciliate_link, &id);
}

/* Whether a message may be sent now. Processors that ask at once may each let one more through. */
static always_inline int is_due(struct link_entry *link)
{
	__u64 now = bpf_ktime_get_coarse_ns(), next = link->next;

	if (next < now)
		link->next = now;
	else if (next - now >= LINK_BURST * LINK_INTERVAL)
		return 0;
	__sync_fetch_and_add(&link->next, LINK_INTERVAL);
	return 1;
}

static always_inline int is_unspecified(const union addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[2] | addr->w[3]);
}

static always_inline int is_own_ipv6(const union addr *addr, const struct ep_config *own, const struct link_entry *link)
{
	const __u32 *id = (const __u32 *)link->interface_id;

	if (addr->w[0] == bpf_htonl(0xfe800000) && !addr->w[1])
		return addr->w[2] == id[0] && addr->w[3] == id[1];
	return !is_unspecified(addr) && addr_equal(addr, &own->ipv6);
}

/* What ends a message: a drop reason, or 0 to let it through, cut to its length. */
static always_inline int link_ends(struct __sk_buff *skb, struct pkt *pkt, int reason, __u32 length)
{
	if (!reason && skb->len > length && bpf_skb_change_tail(skb, length, 0) < 0)
		reason = DROP_WRITE_ERROR;
	if (reason)
		return drop(skb, pkt, reason);
	count(skb, FORWARDED, pkt->direction);
	return TC_ACT_OK;
}

static always_inline int arp_reason(const struct arp_packet *arp, const struct ep_config *own, __u8 direction)
{
	__be32 sender = *(const __be32 *)arp->sender_ip, target = *(const __be32 *)arp->target_ip;

	if (arp->hardware != bpf_htons(ARPHRD_ETHER) || arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_length != 6 ||
	    arp->protocol_length != 4)
		return DROP_INVALID;
	if (arp->operation != bpf_htons(ARPOP_REQUEST) && arp->operation != bpf_htons(ARPOP_REPLY))
		return DROP_HOUSEKEEPING;
	if (direction == INGRESS)
		/* that the endpoint's address is another's */
		return own->ipv4 && sender == own->ipv4 ? DROP_SOURCE_IP : 0;
	if (!mac_equal(arp->sender_mac, own->mac))
		return DROP_SOURCE_MAC;
	/* a probe has no sender yet (RFC 5227) */
	if (!sender && arp->operation == bpf_htons(ARPOP_REQUEST))
		sender = target;
	return own->ipv4 && sender == own->ipv4 ? 0 : DROP_SOURCE_IP;
}

FUNCTION int link_arp(struct __sk_buff *skb, struct pkt *pkt, struct ep_config *ep, struct link_entry *link)
{
	struct arp_packet arp = {};
	int reason;

	if (!pkt || !ep || !link)
		return TC_ACT_SHOT;
	/* frames from outside are padded to the shortest that Ethernet has */
	if (skb->len > ARP_PADDED || bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)) < 0)
		return drop(skb, pkt, DROP_INVALID);
	reason = arp_reason(&arp, fixed(ep), pkt->direction);
	if (!reason && pkt->direction == EGRESS && !is_due(link))
		reason = DROP_LINK_RATE;
	return link_ends(skb, pkt, reason, ETH_HLEN + sizeof(arp));
}

/* The options of a solicitation or an advertisement: link-layer addresses, which must be the endpoint's in what it sends, and
 * the nonce of a probe (RFC 7527). */
static always_inline int nd_options(struct __sk_buff *skb, struct pkt *pkt, const struct ep_config *own, __u8 message)
{
	__u32 number, at = ND_AT + sizeof(struct nd_message);
	int probe = is_unspecified(&pkt->tuple.saddr);
	struct nd_option option = {};

#pragma unroll
	for (number = 0; number < ND_OPTIONS; number++, at += sizeof(option)) {
		if (at >= pkt->l4_offset + pkt->l4_length)
			return 0;
		if (bpf_skb_load_bytes(skb, at, &option, sizeof(option)) < 0 || option.length != 1)
			return DROP_INVALID;
		if (probe && message == ND_SOLICIT && option.type == ND_NONCE)
			continue;
		if (probe || option.type != (message == ND_SOLICIT ? ND_SOURCE_MAC : ND_TARGET_MAC))
			return DROP_INVALID;
		if (pkt->direction == EGRESS && !mac_equal(option.mac, own->mac))
			return DROP_SOURCE_MAC;
	}
	return 0;
}

static always_inline int nd_sender(const struct pkt *pkt, const struct nd_message *nd, const struct ep_config *own,
				   const struct link_entry *link)
{
	int solicits = nd->type == ND_SOLICIT, own_target = is_own_ipv6(&nd->target, own, link);
	int probe = solicits && is_unspecified(&pkt->tuple.saddr), own_source = is_own_ipv6(&pkt->tuple.saddr, own, link);

	if (pkt->direction == INGRESS)
		/* that the endpoint's address is another's; a probe for it is answered by the endpoint */
		return own_source || (!solicits && own_target) ? DROP_SOURCE_IP : 0;
	if (!(probe || own_source) || ((probe || !solicits) && !own_target))
		return DROP_SOURCE_IP;
	return 0;
}

static always_inline int nd_reason(struct __sk_buff *skb, struct pkt *pkt, const struct ep_config *own,
				   const struct link_entry *link)
{
	struct nd_message nd = {};
	__u32 options = pkt->l4_length - sizeof(nd), flags;
	int reason;

	if (pkt->ttl != 255 || pkt->l4_offset != ND_AT || pkt->l4_length < sizeof(nd) ||
	    options > ND_OPTIONS * sizeof(struct nd_option) || options % sizeof(struct nd_option) ||
	    bpf_skb_load_bytes(skb, ND_AT, &nd, sizeof(nd)) < 0 || nd.code || nd.target.b[0] == 0xff)
		return DROP_INVALID;
	/* only of others it may be said that they are routers */
	flags = pkt->direction == EGRESS ? ND_SOLICITED_OVERRIDE : ND_SOLICITED_OVERRIDE | ND_ROUTER;
	if (bpf_ntohl(nd.flags) & ~(nd.type == ND_ADVERT ? flags : 0))
		return DROP_HOUSEKEEPING;
	reason = nd_sender(pkt, &nd, own, link);
	return reason ? reason : nd_options(skb, pkt, own, nd.type);
}

/* An endpoint reports groups, without sources, and is asked for them by routers and switches. */
static always_inline int mld_reason(struct __sk_buff *skb, struct pkt *pkt, const struct ep_config *own,
				    const struct link_entry *link)
{
	__u32 length = pkt->l4_length, records;
	struct mld_header mld = {};
	int to_group;

	if (pkt->ttl != 1 || pkt->l4_offset != MLD_AT || bpf_skb_load_bytes(skb, ND_AT, &mld, sizeof(mld)) < 0 || mld.code ||
	    mld.alert[0] != 5 || mld.alert[1] != 2 || mld.alert[2] || mld.alert[3] || (mld.padding[0] && mld.padding[0] != 1) ||
	    mld.padding[1])
		return DROP_INVALID;
	to_group = pkt->tuple.daddr.b[0] == 0xff && pkt->tuple.daddr.b[1] == 2;
	if (!to_group)
		return DROP_INVALID;
	if (pkt->direction == INGRESS) {
		if (mld.type != MLD_QUERY)
			return DROP_HOUSEKEEPING;
		return length == 24 || length == 28 ? 0 : DROP_INVALID;
	}
	if (mld.type == MLD_QUERY)
		return DROP_HOUSEKEEPING;
	if (!is_unspecified(&pkt->tuple.saddr) && !is_own_ipv6(&pkt->tuple.saddr, own, link))
		return DROP_SOURCE_IP;
	if (mld.type != MLD2_REPORT)
		return length == 24 ? 0 : DROP_INVALID;
	records = bpf_ntohs(mld.records);
	return !mld.reserved && records <= MLD_RECORDS && length == 8 + records * 20 ? 0 : DROP_INVALID;
}

/* ICMPv6 of types 130 to 137 and 143. */
FUNCTION int link_icmp6(struct __sk_buff *skb, struct pkt *pkt, struct ep_config *ep, struct link_entry *link)
{
	__u8 type = 0;
	int reason;

	if (!pkt || !ep || !link)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, pkt->l4_offset, &type, 1) < 0)
		return drop(skb, pkt, DROP_CT_INVALID_HEADER);
	if (type == ND_SOLICIT || type == ND_ADVERT)
		reason = nd_reason(skb, pkt, fixed(ep), link);
	else if (type <= MLD_DONE || type == MLD2_REPORT)
		reason = mld_reason(skb, pkt, fixed(ep), link);
	else
		/* routers and their redirects: others' packets would follow */
		reason = DROP_HOUSEKEEPING;
	if (!reason && pkt->direction == EGRESS && !is_due(link))
		reason = DROP_LINK_RATE;
	return link_ends(skb, pkt, reason, pkt->l4_offset + pkt->l4_length);
}

#endif
