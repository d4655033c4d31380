/* Masquerading: pods' packets that leave the cluster get the node's address, and the answers their own again.
 *
 * A mapping is two entries of ciliate_snat, one for each direction, that keep each other alive. The port stays what it
 * was where that is free; the same port serves any number of remotes, as an answer is known by remote and port together.
 * Flows of the node itself are entered with the tuple that they have, so that no pod's mapping takes an answer of theirs.
 * What arrives without a mapping goes on, to the node's services and its stack, whatever its port. No mapping has the port
 * of a service of the node, nor one that services may get.
 *
 * One pod never takes what all need: of the table it has at most snat_pod_max mappings, and of the ports towards one remote no
 * more than SNAT_SHARE of SNAT_SAMPLES, nor more than are free. That is found out by looking at some, so nothing has to be
 * counted there. The highest ports are the node's own. What nobody answers lives briefly.
 */
#ifndef CILIATE_NAT_H
#define CILIATE_NAT_H

#include "common.h"
#include "conntrack.h"
#include "lookup.h"
#include "natcsum.h"
#include "nattypes.h"
#include "parse.h"
#include "sockets.h"
#ifdef CILIATE_SERVICES
#include "lb_types.h"
#include "lb_maps.h"
#endif

MAP(ciliate_snat, BPF_MAP_TYPE_LRU_HASH, 524288, struct snat_key, struct snat_entry, 0); /* set at load */
MAP(ciliate_snat_dev, BPF_MAP_TYPE_HASH, 64, __u32, struct snat_device, 0);
MAP(ciliate_masq, BPF_MAP_TYPE_LPM_TRIE, 16384, struct ipcache_key, __u32, BPF_F_NO_PREALLOC);

MAP(ciliate_snat_pods, BPF_MAP_TYPE_HASH, 65536, union addr, struct snat_pod, BPF_F_NO_PREALLOC);

#define SNAT_TRIES 32
#define SNAT_DETERMINISTIC 6
#define SNAT_FIRST_PORT 1024
#define SNAT_RESERVE 64512 /* from here up the node's own flows alone */
#define SNAT_RESERVE_PORTS (65536 - SNAT_RESERVE)
#define SNAT_PORTS (SNAT_RESERVE - SNAT_FIRST_PORT)
#define SNAT_SAMPLES 32
#define SNAT_SHARE 12
#define SNAT_FEW 1024 /* mappings with which a pod is not worth a look */
#define LIFETIME_UNANSWERED 30

/* What snat_ingress gives beside 0 and drop reasons. */
#define SNAT_OF_POD 1
#define SNAT_OF_NODE 2

/* Ports that services of the node may get; no mapping takes one. 0: none. */
const volatile __u16 snat_services_first = 0;
const volatile __u16 snat_services_last = 0;

/* Mappings that one pod may have. 0: any number. */
const volatile __u32 snat_pod_max = 0;

/* What is found out about a packet on the way. key: the entry of its direction; pair: that of the other. */
struct nat {
	struct snat_key key;
	struct snat_key pair;
	struct nat_change change;
	union addr own; /* the node's address on the device */
	__u32 host;
	__u32 now;
	__u32 mine; /* of the ports looked at: the pod's own, and nobody's */
	__u32 free;
};

/* Too large for the stack beside the packet's context; no other packet comes in between (see NEW_PKT). */
MAP(ciliate_nat_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, __u32, struct nat, 0);
#define NEW_NAT(name)                                                                                                  \
	struct nat *name = bpf_map_lookup_elem(&ciliate_nat_scratch, &(__u32){0});                                     \
	if (!name)                                                                                                     \
	return 0

/* The tuple as a key. An echo identifier is the port of who asks, as the other side of an echo has none. */
static always_inline void snat_key(struct snat_key *key, const struct tuple *tuple, __u8 direction, int swap)
{
	key->saddr = swap ? tuple->daddr : tuple->saddr;
	key->daddr = swap ? tuple->saddr : tuple->daddr;
	swap = swap != is_icmp(tuple->proto);
	key->sport = swap ? tuple->dport : tuple->sport;
	key->dport = swap ? tuple->sport : tuple->dport;
	key->proto = tuple->proto;
	key->direction = direction;
	key->pad = 0;
}

/* The key of the other direction's packets, by this direction's entry. */
static always_inline void snat_pair(struct snat_key *pair, const struct snat_key *key, const union addr *addr, __be16 port)
{
	pair->proto = key->proto;
	pair->direction = !key->direction;
	pair->pad = 0;
	if (key->direction == EGRESS) { /* addr and port are the node's: answers go there */
		pair->saddr = key->daddr;
		pair->sport = key->dport;
		pair->daddr = *addr;
		pair->dport = port;
	} else { /* addr and port are the pod's: it sends from there */
		pair->saddr = *addr;
		pair->sport = port;
		pair->daddr = key->saddr;
		pair->dport = key->sport;
	}
}

static always_inline __u16 snat_flags(struct pkt *pkt, __u16 flags, int reply)
{
	const __u16 closing = SNAT_TX_CLOSING | SNAT_RX_CLOSING;

	if (reply)
		flags &= ~SNAT_UNANSWERED;
	if (pkt->proto != IPPROTO_TCP || (pkt->flags & (PKT_LATER_FRAGMENT | PKT_ICMP_ERROR)))
		return flags;
	if ((pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return flags & ~(closing | SNAT_RESET);
	flags |= SNAT_SEEN_NON_SYN;
	if (pkt->tcp_flags & TCP_RST)
		return flags | SNAT_RESET;
	/* whoever goes on after a reset did not believe it */
	flags &= ~SNAT_RESET;
	if (pkt->tcp_flags & TCP_FIN)
		flags |= reply ? SNAT_RX_CLOSING : SNAT_TX_CLOSING;
	return flags;
}

static always_inline __u32 snat_lifetime(__u8 proto, __u16 flags)
{
	const __u16 closing = SNAT_TX_CLOSING | SNAT_RX_CLOSING;

	if ((flags & closing) == closing || (flags & SNAT_RESET))
		return LIFETIME_CLOSING;
	if (flags & SNAT_UNANSWERED)
		return LIFETIME_UNANSWERED;
	if (proto != IPPROTO_TCP)
		return LIFETIME_ANY;
	return flags & SNAT_SEEN_NON_SYN ? LIFETIME_TCP : LIFETIME_SYN;
}

/* The address and port of the other half, as its entry has them: who sends the packets of this half. */
static always_inline void snat_origin(struct snat_entry *entry, const struct snat_key *key)
{
	if (key->direction == EGRESS) {
		entry->addr = key->saddr;
		entry->port = key->sport;
	} else {
		entry->addr = key->daddr;
		entry->port = key->dport;
	}
}

/* Once a second and when TCP's state changes: both halves get the new state, and a half that the table has evicted comes
 * back. Gives 1 where somebody else has the other half meanwhile: then this one is worth nothing. */
static always_inline int snat_refresh(struct pkt *pkt, struct nat *nat, struct snat_entry *entry, __u16 flags)
{
	struct snat_entry copy, *other;

	entry->flags = flags;
	entry->refreshed = nat->now;
	entry->lifetime = nat->now + snat_lifetime(pkt->proto, flags);
	copy = *entry;
	snat_pair(&nat->pair, &nat->key, &entry->addr, entry->port);
	snat_origin(&copy, &nat->key);
	other = bpf_map_lookup_elem(&ciliate_snat, &nat->pair);
	if (!other)
		return bpf_map_update_elem(&ciliate_snat, &nat->pair, &copy, BPF_NOEXIST) != 0;
	if (other->port != copy.port || !addr_equal(&other->addr, &copy.addr))
		return 1;
	other->flags = flags;
	other->refreshed = copy.refreshed;
	other->lifetime = copy.lifetime;
	return 0;
}

/* The entry of the packet, alive; NULL where there is none (any more). */
static always_inline struct snat_entry *snat_find(struct pkt *pkt, struct nat *nat, int reply)
{
	struct snat_entry *entry = bpf_map_lookup_elem(&ciliate_snat, &nat->key);
	__u16 flags;

	if (!entry)
		return NULL;
	flags = snat_flags(pkt, entry->flags, reply);
	if (entry->refreshed == nat->now && entry->flags == flags)
		return entry;
	if (snat_refresh(pkt, nat, entry, flags)) {
		bpf_map_delete_elem(&ciliate_snat, &nat->key);
		return NULL;
	}
	return entry;
}

/* Whether a socket of the node would take what answers this mapping. */
static always_inline int snat_has_socket(struct __sk_buff *skb, const struct snat_key *answer, __u8 family)
{
	struct socket_pair pair = {&answer->saddr, &answer->daddr, answer->sport, answer->dport};

	return socket_takes(skb, &pair, answer->proto, family);
}

/* Whether an end of the node is a service's: what arrives there is for the service. */
static always_inline int snat_is_service(const union addr *addr, __be16 port, __u8 proto)
{
#ifdef CILIATE_SERVICES
	struct lb_frontend front = {.address = *addr, .port = port, .proto = proto};

	return bpf_map_lookup_elem(&ciliate_lb_services, &front) != NULL;
#else
	return 0;
#endif
}

static always_inline int snat_is_reserved(__be16 port, __u8 proto)
{
	return !is_icmp(proto) && bpf_ntohs(port) >= snat_services_first && bpf_ntohs(port) <= snat_services_last;
}

/* Whether nobody but a mapping has the port of nat->pair. The node may have any that no service has. */
static always_inline int snat_is_free(struct __sk_buff *skb, struct pkt *pkt, struct nat *nat)
{
	if (snat_is_service(&nat->own, nat->pair.dport, pkt->proto))
		return 0;
	return nat->host || !(bpf_ntohs(nat->pair.dport) >= SNAT_RESERVE ||
			      snat_is_reserved(nat->pair.dport, pkt->proto) ||
			      snat_has_socket(skb, &nat->pair, pkt->family));
}

static always_inline struct snat_pod *snat_pod(const union addr *pod)
{
	return bpf_map_lookup_elem(&ciliate_snat_pods, pod);
}

/* One mapping more or less of a pod. Without a place to count it, it is not counted. */
static always_inline void snat_count(const union addr *pod, __s32 change)
{
	/* a value that the compiler knew whole would make a section of its own */
	struct snat_pod fresh = {.mappings = change}, *known = snat_pod(pod);

	if (!known && change > 0 && bpf_map_update_elem(&ciliate_snat_pods, pod, &fresh, BPF_NOEXIST))
		known = snat_pod(pod); /* another CPU was first */
	if (known && (change > 0 || known->mappings))
		__sync_fetch_and_add(&known->mappings, change);
}

/* Whether the port of nat->pair is this flow's now, or can be. */
static always_inline int snat_take(struct __sk_buff *skb, struct pkt *pkt, struct nat *nat, struct snat_entry *entry)
{
	struct snat_entry *holder = bpf_map_lookup_elem(&ciliate_snat, &nat->pair);

	if (holder) {
		if (holder->port == entry->port && addr_equal(&holder->addr, &entry->addr)) {
			holder->flags = entry->flags; /* our own other half, whose first one was evicted */
			holder->refreshed = entry->refreshed;
			holder->lifetime = entry->lifetime;
			return 1;
		}
		if ((__s32)(holder->lifetime - nat->now) >= 0)
			return 0;
		/* over, and only not collected yet */
		struct snat_key dead = {};

		if (!(holder->flags & SNAT_HOST))
			snat_count(&holder->addr, -1);
		snat_pair(&dead, &nat->pair, &holder->addr, holder->port);
		bpf_map_delete_elem(&ciliate_snat, &dead);
		bpf_map_delete_elem(&ciliate_snat, &nat->pair);
	}
	if (!snat_is_free(skb, pkt, nat))
		return 0;
	if (bpf_map_update_elem(&ciliate_snat, &nat->pair, entry, BPF_NOEXIST))
		return 0;
	/* looked at once, it is not what a full table evicts for its own other half */
	return bpf_map_lookup_elem(&ciliate_snat, &nat->pair) != NULL;
}

static always_inline __be16 next_port(__be16 port, __u32 step)
{
	__u32 value = bpf_ntohs(port), left_out = snat_services_last ? snat_services_last - snat_services_first + 1 : 0;

	/* a multiplicative hash: the same flow finds the same ports again */
	value = step < SNAT_DETERMINISTIC ? (value * 0x9e3779b1U + step) >> 16 : bpf_get_prandom_u32();
	value = SNAT_FIRST_PORT + value % (SNAT_PORTS - left_out);
	return bpf_htons(left_out && value >= snat_services_first ? value + left_out : value);
}

/* A port that no pod gets. */
static always_inline __be16 reserve_port(void)
{
	return bpf_htons(SNAT_RESERVE + bpf_get_prandom_u32() % SNAT_RESERVE_PORTS);
}

/* The ports of a remote, looked at one by one. What is counted is not in here, as the verifier would follow each count. */
struct snat_sample {
	struct nat *nat;
};

STEP snat_look(__u32 number, struct snat_sample *sample)
{
	struct nat *nat = sample->nat;
	struct snat_entry *holder;

	asm volatile("" ::"r"(number));
	nat->pair.dport = next_port(0, SNAT_DETERMINISTIC);
	holder = bpf_map_lookup_elem(&ciliate_snat, &nat->pair);
	if (!holder || (__s32)(holder->lifetime - nat->now) < 0)
		nat->free++;
	else if (addr_equal(&holder->addr, &nat->key.saddr))
		nat->mine++;
	return 0;
}

/* Whether a pod has its share already, so that a new mapping would be taken from others. */
FUNCTION int snat_has_share(struct __sk_buff *skb, struct nat *nat)
{
	struct snat_sample sample = {.nat = nat};
	struct snat_pod *pod;

	asm volatile("" ::"r"(skb));
	if (!nat)
		return 0;
	pod = snat_pod(&nat->key.saddr);
	if (!pod || (pod->mappings < SNAT_FEW && (!snat_pod_max || pod->mappings < snat_pod_max)))
		return 0;
	if (!snat_pod_max || pod->mappings < snat_pod_max) {
		snat_pair(&nat->pair, &nat->key, &nat->own, 0);
		nat->mine = 0;
		nat->free = 0;
		REPEAT(SNAT_SAMPLES, snat_look, &sample);
		if (nat->mine <= SNAT_SHARE && nat->mine <= nat->free)
			return 0;
	}
	__sync_fetch_and_add(&pod->refused, 1);
	return 1;
}

/* Make a mapping for nat->key; sets the port of nat->change. Gives 0 or a drop reason. */
FUNCTION int snat_create(struct __sk_buff *skb, struct pkt *pkt, struct nat *nat)
{
	struct snat_entry entry = {}, *winner;
	__be16 port;
	__u32 step;

	if (!pkt || !nat)
		return DROP_INVALID;
	if (!nat->host && snat_has_share(skb, nat))
		return DROP_NAT_SHARE;
	entry.flags = snat_flags(pkt, SNAT_UNANSWERED | (nat->host ? SNAT_HOST : 0), 0);
	entry.created = nat->now;
	entry.refreshed = nat->now;
	entry.lifetime = nat->now + snat_lifetime(pkt->proto, entry.flags);
	snat_origin(&entry, &nat->key);
	port = nat->key.sport;
	for (step = 0; step < SNAT_TRIES; step++) {
		snat_pair(&nat->pair, &nat->key, &nat->own, port);
		if (snat_take(skb, pkt, nat, &entry))
			break;
		port = nat->host && step >= SNAT_TRIES / 2 ? reserve_port() : next_port(port, step);
	}
	if (step == SNAT_TRIES)
		return DROP_NAT_NO_MAPPING;
	entry.addr = nat->own;
	entry.port = port;
	if (bpf_map_update_elem(&ciliate_snat, &nat->key, &entry, BPF_NOEXIST)) {
		/* another CPU had a packet of the same flow */
		winner = bpf_map_lookup_elem(&ciliate_snat, &nat->key);
		if (!winner || winner->port != port)
			bpf_map_delete_elem(&ciliate_snat, &nat->pair);
		if (!winner)
			return DROP_NAT_NO_MAPPING;
		port = winner->port;
	} else if (!nat->host) {
		snat_count(&nat->key.saddr, 1);
	}
	nat->change.to = nat->own;
	nat->change.to_port = port;
	return 0;
}

static always_inline __u32 masq_class(const union addr *addr, __u8 family)
{
	struct ipcache_key key = {};
	__u32 *class;

	ipcache_key_of(&key, addr, family);
	class = bpf_map_lookup_elem(&ciliate_masq, &key);
	return class ? *class : 0;
}

/* Whether a pod's packet answers a flow that came from outside, which knows the pod by its own address. */
static always_inline int answers_inbound(struct pkt *pkt, __u32 now)
{
	struct endpoint_info *local = local_endpoint(&pkt->tuple.saddr, pkt->family);
	struct ct_entry *entry;
	struct ct_key key = {};
	__u32 source;

	if (!local)
		return 0;
	pkt->src_endpoint = local->id;
	pkt->src_identity = local->identity;
	source = ct_key_of(&key, &pkt->tuple);
	entry = ct_find(&key, now);
	return entry && entry->end[ct_which(source)].first == CT_FIRST_IN;
}

/* Whether a packet without a mapping needs one: 0 no, 1 yes, else the reason why it cannot have one. Sets nat->host. */
static always_inline int snat_wanted(struct pkt *pkt, struct nat *nat, const struct snat_device *device)
{
	/* of ICMP only who asks needs a mapping, and only an echo can have one */
	int request = !is_icmp(pkt->proto) || is_echo_request(pkt->proto, pkt->policy_port);

	if (pkt->family == FAMILY_IPV4)
		map_ipv4(&nat->own, device->ipv4);
	else
		nat->own = device->ipv6;
	if (!(nat->own.w[3] | nat->own.w[1] | nat->own.w[0]) || !(device->flags & SNAT_ACTIVE))
		return 0;
	if (addr_equal(&nat->own, &pkt->tuple.saddr)) {
		nat->host = 1;
		/* where pods go unmasqueraded no mapping of theirs can be in the way, nor where a service answers */
		return request && !(masq_class(&pkt->tuple.daddr, pkt->family) & MASQ_DIRECT) &&
		       !snat_is_service(&nat->own, pkt->tuple.sport, pkt->proto);
	}
	if (!(masq_class(&pkt->tuple.saddr, pkt->family) & MASQ_SOURCE) ||
	    (masq_class(&pkt->tuple.daddr, pkt->family) & MASQ_DIRECT) || answers_inbound(pkt, nat->now))
		return 0;
	return request ? 1 : DROP_NAT_PROTOCOL;
}

/* What the entry of nat->key makes of a packet; gives 0 where that is what it is already. */
static always_inline int snat_change(struct nat *nat, __u32 side)
{
	struct nat_change *change = &nat->change;

	change->side = side;
	change->outer = 1;
	if (nat->key.direction == EGRESS) {
		change->from = nat->key.saddr;
		change->from_port = nat->key.sport;
	} else {
		change->from = nat->key.daddr;
		change->from_port = nat->key.dport;
	}
	return change->from_port != change->to_port || !addr_equal(&change->from, &change->to);
}

/* Whether the packet inside an error that leaves came from outside to the very pod that sends the error: that peer knows the
 * pod by its own address. The node itself may complain of what it forwards. */
FUNCTION int snat_error_leaves(struct pkt *pkt, __u32 now)
{
	struct ct_entry *entry;
	struct ct_key key = {};
	__u32 source;

	if (!pkt)
		return 0;
	if (!(masq_class(&pkt->tuple.saddr, pkt->family) & MASQ_SOURCE) ||
	    (masq_class(&pkt->tuple.daddr, pkt->family) & MASQ_DIRECT) || is_router(&pkt->tuple.saddr, pkt->family))
		return 1;
	if (!addr_equal(&pkt->inner.daddr, &pkt->tuple.saddr))
		return 0;
	source = ct_key_of(&key, &pkt->inner);
	entry = ct_find(&key, now);
	return entry && entry->end[ct_which(!source)].first == CT_FIRST_IN;
}

/* An ICMP error. One that leaves is about an answer to a pod, whose address the packet inside has; it comes from the pod
 * or from the node. One that arrives is about what a pod sent, and the packet inside has the node's address; what it gives
 * is as of snat_ingress. active: pods leave by the node's address alone. */
static always_inline int snat_error(struct __sk_buff *skb, struct pkt *pkt, struct nat *nat, __u8 direction, int active)
{
	struct snat_entry *entry;
	int reason, whose = 0;

	snat_key(&nat->key, &pkt->inner, direction, 1);
	if (direction == INGRESS) {
		/* another node's pod may complain of what was sent to it alone */
		pkt->src_identity = identity_of(&pkt->tuple.saddr, pkt->family);
		if (!ct_error_is_true(pkt))
			return 0;
	}
	entry = bpf_map_lookup_elem(&ciliate_snat, &nat->key);
	if (!entry)
		return active && !snat_error_leaves(pkt, nat->now) ? DROP_NAT_PROTOCOL : 0;
	if (direction == INGRESS)
		whose = entry->flags & SNAT_HOST ? SNAT_OF_NODE : SNAT_OF_POD;
	nat->change.to = entry->addr;
	nat->change.to_port = entry->port;
	if (!snat_change(nat, direction == EGRESS ? NAT_DESTINATION : NAT_SOURCE))
		return whose;
	if (direction == EGRESS) {
		nat->change.outer = addr_equal(&pkt->tuple.saddr, &nat->key.saddr);
		if (active && !nat->change.outer && !snat_error_leaves(pkt, nat->now))
			return DROP_NAT_PROTOCOL;
	}
	reason = nat_rewrite_error(skb, pkt, &nat->change);
	if (reason || direction == EGRESS)
		return reason;
	pkt->tuple.daddr = nat->change.to;
	pkt->inner.saddr = nat->change.to;
	if (!is_icmp(pkt->inner.proto))
		pkt->inner.sport = nat->change.to_port;
	return whose;
}

/* Whether a pod's packet would leave with the pod's own address because nobody can tell what flow it is of, as a fragment
 * whose first part is not known. */
static always_inline int snat_is_missed(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 ifindex = skb->ifindex;
	struct snat_device *device = bpf_map_lookup_elem(&ciliate_snat_dev, &ifindex);

	return device && (device->flags & SNAT_ACTIVE) && pkt->family &&
	       (masq_class(&pkt->tuple.saddr, pkt->family) & MASQ_SOURCE) &&
	       !(masq_class(&pkt->tuple.daddr, pkt->family) & MASQ_DIRECT);
}

/* What leaves the node by a device; gives 0 to go on, rewritten or not, or a drop reason. */
FUNCTION int snat_egress(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 ifindex = skb->ifindex;
	struct snat_device *device;
	struct snat_entry *entry;
	int reason;
	NEW_NAT(nat);

	nat->host = 0;
	device = bpf_map_lookup_elem(&ciliate_snat_dev, &ifindex);
	if (!pkt || !device)
		return 0;
	nat->now = now_seconds();
	if (pkt->flags & PKT_ICMP_ERROR)
		return snat_error(skb, pkt, nat, EGRESS, device->flags & SNAT_ACTIVE);
	snat_key(&nat->key, &pkt->tuple, EGRESS, 0);
	entry = snat_find(pkt, nat, 0);
	if (entry) {
		nat->change.to = entry->addr;
		nat->change.to_port = entry->port;
	} else {
		reason = snat_wanted(pkt, nat, device);
		if (reason != 1)
			return reason;
		reason = snat_create(skb, pkt, nat);
		if (reason)
			return reason;
	}
	return snat_change(nat, NAT_SOURCE) ? nat_rewrite(skb, pkt, &nat->change) : 0;
}

/* What arrives at the node: without a mapping it goes on as it is, which gives 0. SNAT_OF_POD: it is a pod's and for nobody
 * else; SNAT_OF_NODE: of a tuple of the node itself; else a drop reason. */
FUNCTION int snat_ingress(struct __sk_buff *skb, struct pkt *pkt)
{
	struct snat_entry *entry;
	int reason, whose;
	NEW_NAT(nat);

	if (!pkt)
		return 0;
	nat->now = now_seconds();
	if (pkt->flags & PKT_ICMP_ERROR)
		return snat_error(skb, pkt, nat, INGRESS, 0);
	snat_key(&nat->key, &pkt->tuple, INGRESS, 0);
	entry = snat_find(pkt, nat, 1);
	if (!entry)
		return 0;
	whose = entry->flags & SNAT_HOST ? SNAT_OF_NODE : SNAT_OF_POD;
	nat->change.to = entry->addr;
	nat->change.to_port = entry->port;
	if (!snat_change(nat, NAT_DESTINATION))
		return whose;
	reason = nat_rewrite(skb, pkt, &nat->change);
	if (reason)
		return reason;
	pkt->tuple.daddr = nat->change.to;
	if (!is_icmp(pkt->proto))
		pkt->tuple.dport = nat->change.to_port;
	return whose;
}

#endif
