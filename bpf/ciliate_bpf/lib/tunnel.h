/* Tunnels to other nodes: which node a packet goes to, and the tunnel key that a device in collect-metadata mode encapsulates
 * by. The key's 24 bits carry the sender's identity.
 */
#ifndef CILIATE_TUNNEL_H
#define CILIATE_TUNNEL_H

#include "common.h"
#include "events.h"
#include "lookup.h"
#include "marks.h"

/* The tunnel device, or 0: then nothing of this is in the programs. */
const volatile __u32 tunnel_ifindex = 0;
/* Where nodes listen for each other's tunnel packets, in network order. */
const volatile __u16 tunnel_port = 0;

/* What Linux 5.13 knows of the structure; newer kernels take the shorter one too. */
#define TUNNEL_KEY_SIZE offsetof(struct bpf_tunnel_key, local_ipv4)
#define TUNNEL_TTL 64

struct tunnel_to {
	const union addr *node;
	__u8 family;
};

/* Where an address is tunnelled to: what the ipcache says of it, else whose pod range it is in. family 0: nowhere. */
static always_inline struct tunnel_to tunnel_of(struct ipcache_entry *entry, const union addr *addr, __u8 family)
{
	struct tunnel_to to = {};
	struct ipcache_key key = {};
	struct tunnel_entry *range;

	if (entry) {
		to.node = &entry->node;
		to.family = entry->node_family;
		return to;
	}
	ipcache_key_of(&key, addr, family);
	range = bpf_map_lookup_elem(&ciliate_tunnel, &key);
	if (range) {
		to.node = &range->node;
		to.family = range->node_family;
	}
	return to;
}

/* A pod's packet to where nodes listen, and not to a pod: masqueraded it would come from this node, and say what it likes
 * about who sent the packet inside. */
static always_inline int forges_tunnel(const struct pkt *pkt)
{
	return tunnel_ifindex && pkt->proto == IPPROTO_UDP && pkt->tuple.dport == tunnel_port &&
	       (pkt->dst_identity <= IDENTITY_WORLD || pkt->dst_identity >= LOCAL_IDENTITY);
}

/* Give the packet to the tunnel device, for it to be wrapped up to that node. */
static always_inline int encapsulate(struct __sk_buff *skb, struct pkt *pkt, struct tunnel_to to)
{
	struct bpf_tunnel_key key = {.tunnel_ttl = TUNNEL_TTL};
	/* IPv4 has no use for the outer checksum; IPv6 is to have one (RFC 8200 8.1) */
	__u32 flags = BPF_F_ZERO_CSUM_TX;

	key.tunnel_id = pkt->src_identity < LOCAL_IDENTITY ? pkt->src_identity : IDENTITY_WORLD;
	if (to.family == FAMILY_IPV4) {
		key.remote_ipv4 = bpf_ntohl(to.node->w[3]);
	} else {
		__builtin_memcpy(key.remote_ipv6, to.node, 16);
		flags = BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, TUNNEL_KEY_SIZE, flags) < 0)
		return drop(skb, pkt, DROP_NO_TUNNEL_KEY);
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_OVERLAY;
	forwarded(skb, pkt, TO_OVERLAY);
	return bpf_redirect(tunnel_ifindex, 0);
}

#endif
