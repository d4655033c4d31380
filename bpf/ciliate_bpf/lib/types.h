/* Layouts shared by the programs and by user space.
 *
 * Every struct is padded by hand: a map key with padding that the compiler chose would be hashed with garbage.
 * core/ciliate/datapath/layout.py has the Python twins; a test compares them through BTF.
 */
#ifndef CILIATE_TYPES_H
#define CILIATE_TYPES_H

#include <linux/types.h>

#define FAMILY_IPV4 1
#define FAMILY_IPV6 2

#define INGRESS 0
#define EGRESS 1

/* Reserved identities. */
#define IDENTITY_ANY 0
#define IDENTITY_HOST 1
#define IDENTITY_WORLD 2
/* Beyond are identities of label sets. */
#define LAST_RESERVED 99
/* From here on identities are of one node alone (prefixes) and mean nothing to another one. */
#define LOCAL_IDENTITY (1U << 24)

/* An address. In conntrack keys, fragments and events IPv4 is mapped (::ffff:a.b.c.d, so w[3] is the IPv4 address);
 * in endpoint_key and ipcache_key, which say their family, IPv4 stands in w[0]. */
union addr {
	__u8 b[16];
	__be32 w[4];
};

/* ep_config.flags */
#define EP_VALID 1
#define EP_ENFORCE_INGRESS 2
#define EP_ENFORCE_EGRESS 4
/* What it sends to pods of the node takes the way through the node's stack, where others translate it (mapped ports). */
#define EP_STACK 8
/* The upper byte: what is told of the endpoint's packets (MONITOR_*); without MONITOR_OWN as the node says. */
#define EP_MONITOR_SHIFT 8

/* Shape: bit n (0 to 16) says that the endpoint has entries with a protocol and a port prefix of n bits;
 * bit 17 that it has entries for all traffic of a peer, bit 18 for anyone at a place, bit 19 for an identity at a place.
 * Only look-ups that can succeed are made. */
#define SHAPE_RANGES 0xffffU
#define SHAPE_PORT (1U << 16)
#define SHAPE_ALL_TRAFFIC (1U << 17)
#define SHAPE_PLACES (1U << 18)
#define SHAPE_PAIRS (1U << 19)

/* One endpoint, by its id (the class id of its filters). epoch: changes whenever its policy took something away. */
struct ep_config {
	__u32 ifindex;
	__u32 identity;
	__be32 ipv4;
	union addr ipv6;
	__u8 mac[6];
	__u8 node_mac[6];
	__u16 id;
	__u16 flags;
	__u32 ingress_shape;
	__u32 egress_shape;
	__u32 epoch;
};

/* An endpoint on a link of another plugin (link.h), by its id. next: when its messages are due, which may be ahead;
 * interface_id: of its link-local address (fe80::/64). */
struct link_entry {
	__u64 next;
	__u8 interface_id[8];
};

/* Local addresses: pods, and with ENDPOINT_HOST the node's own. */
struct endpoint_key {
	union addr addr;
	__u8 family;
	__u8 pad[3];
};

#define ENDPOINT_HOST 1

struct endpoint_info {
	__u32 ifindex;
	__u32 identity;
	__u16 id;
	__u8 flags;
	__u8 pad;
	__u8 mac[6];
	__u8 node_mac[6];
};

/* Who is behind an address; 32 static bits (family and padding) stand before the address. */
struct ipcache_key {
	__u32 prefixlen;
	__u8 family;
	__u8 pad[3];
	union addr addr;
};

/* node: where packets to the address are tunnelled to, of family node_family (IPv4 mapped); 0: not tunnelled.
 * key: that node's encryption key. */
struct ipcache_entry {
	__u32 identity;
	__u8 key;
	__u8 node_family;
	__u16 pad;
	union addr node;
};

/* Other nodes' pod ranges (keys as in the ipcache), for addresses that the ipcache does not know yet. */
struct tunnel_entry {
	union addr node;
	__u8 key;
	__u8 node_family;
	__u16 pad;
};

/* The other nodes' addresses, IPv4 mapped: who may send through the tunnel. */
struct node_key {
	union addr addr;
};

struct node_entry {
	__u8 key;
	__u8 pad[3];
};

/* Where a pod or node is (keys as in the ipcache): the narrowest prefix around its address that an ipBlock names. */
struct place_entry {
	__u32 number;
};

/* Policy: port in network order with the bits below prefix cleared; proto 0 is all traffic of the peer.
 * place 0: wherever the peer is. */
struct policy_key {
	__u32 identity;
	__u32 place;
	__be16 port;
	__u16 endpoint;
	__u8 proto;
	__u8 direction;
	__u8 prefix;
	__u8 pad;
};

#define VERDICT_ALLOW 0
#define VERDICT_DENY 1
#define VERDICT_REDIRECT 2

struct policy_entry {
	__u64 packets;
	__u64 bytes;
	__u32 rule;
	__be16 proxy_port;
	__u8 verdict;
	__u8 pad;
};

/* A flow, the same in both directions: its two ends in an order that depends on nothing but themselves.
 * requester: for ICMP, which of the ends asks; an answer is told from a request by it, as identifiers may be equal. */
struct ct_key {
	union addr addr[2];
	__be16 port[2];
	__u8 proto;
	__u8 requester;
	__u16 pad;
};

#define CT_FIRST_OUT 1 /* the flow's first packet left this end's pod */
#define CT_FIRST_IN 2  /* it came to it */

/* A flow as one end tracks it, at whose device it passes. No pod of this node stands at an end whose first is 0.
 * ended: until when (seconds of the monotonic clock) answers are held back, because its allowance went; else 0.
 * Answers pass without a question of policy while the peer's identity and the endpoint's epoch are these. */
struct ct_end {
	__u32 peer; /* identity at the other end, when policy was asked last; 0: not known */
	__u32 rule;
	__u32 ended;
	__u32 service; /* by which its last packet was translated, for the way back; 0: none */
	__u32 epoch; /* of the endpoint, when policy was asked last */
	__u16 endpoint;
	__u8 first;
	__u8 pad;
};

#define CT_SEEN_NON_SYN 4 /* 1 and 2: end 0 and end 1 sent its FIN */
#define CT_CLOSING 3
#define CT_RESET 8 /* either end sent an RST, and neither anything since */

/* What both ends share, then each end. sent, reported and tcp_flags: of packets that end 0 and end 1 sent.
 * lifetime and reported: seconds of the monotonic clock. */
struct ct_entry {
	__u32 lifetime;
	__u32 reported[2];
	__u8 tcp_flags[2];
	__u8 flags;
	__u8 pad;
	struct ct_end end[2];
	__u64 packets[2];
	__u64 bytes[2];
};

/* What an endpoint has of the tables of flows, TCP and others, by its id; 0: everybody together. used: as counted last, and
 * what was recorded since; replaced: how many new ones took the place of one of its own. */
struct ct_share {
	__u32 used[2];
	__u32 replaced[2];
};

#define CT_NEW 0
#define CT_ESTABLISHED 1
#define CT_REPLY 2
#define CT_RELATED 3
#define CT_HELD 4 /* an answer of a flow whose allowance went */

/* Ends of one packet, as it says: its source and its destination. */
struct tuple {
	union addr saddr;
	union addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 answer; /* an ICMP echo reply */
	__u16 pad;
};

/* Ports of a datagram whose later fragments carry none. */
struct frag_key {
	union addr saddr;
	union addr daddr;
	__u32 id;
	__u8 proto;
	__u8 family;
	__u16 pad;
};

struct frag_entry {
	__be16 sport;
	__be16 dport;
	__u16 policy_port;
	__u16 pad;
};

struct metrics_value {
	__u64 packets;
	__u64 bytes;
};

/* What may change while the programs run. */
struct node_config {
	__u32 monitor;
	__u32 pad;
};

#define MONITOR_TRACE_ALL 1
#define MONITOR_TRACE_NEW 2
#define MONITOR_VERDICT 4
#define MONITOR_TRACE_FROM 8 /* where packets come from, too */
#define MONITOR_NO_DROPS 0x40
#define MONITOR_OWN 0x80

#define EVENT_DROP 1
#define EVENT_DEBUG 2
#define EVENT_TRACE 4
#define EVENT_VERDICT 5

#define TO_ENDPOINT 0
#define TO_HOST 2
#define TO_STACK 3
#define TO_OVERLAY 4
#define FROM_ENDPOINT 5
#define FROM_HOST 7
#define FROM_STACK 8
#define FROM_OVERLAY 9

/* Steps that debug events tell of. */
#define DEBUG_FLOW 1   /* conntrack was asked: ct_state */
#define DEBUG_POLICY 2 /* policy was asked: rule and verdict */
#define DEBUG_CREATE 3 /* the flow is recorded, at the end or ends where it is new */
#define DEBUG_END 4    /* the flow's allowance went, at this end */

#define CAPTURE 128

/* One record of the events ring buffer. subtype: drop reason, observation point or verdict. */
struct event {
	__u8 type;
	__u8 subtype;
	__u16 endpoint;
	__u32 hash;
	__u32 src_identity;
	__u32 dst_identity;
	__u16 src_endpoint;
	__u16 dst_endpoint;
	__u8 direction;
	__u8 ct_state;
	__u8 proto;
	__u8 family;
	__u32 rule;
	__u32 ifindex;
	__u32 len_orig;
	__u16 len_cap;
	__u8 verdict;
	__u8 tcp_flags;
	union addr saddr;
	union addr daddr;
	__be16 sport;
	__be16 dport;
	__u32 pad;
	__u8 packet[CAPTURE];
};

#include "lb_types.h"

#endif
