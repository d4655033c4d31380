/* Layouts of the load balancer. core/ciliate/datapath/lblayout.py has the Python twins; a test compares them through BTF.
 *
 * Addresses are as in conntrack keys: IPv4 is mapped into IPv6.
 */
#ifndef CILIATE_LB_TYPES_H
#define CILIATE_LB_TYPES_H

/* What clients speak to. The protocol is part of the key: 53/TCP and 53/UDP are two services. */
struct lb_frontend {
	union addr address;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

#define LB_MAGLEV 1        /* backends are picked from its table in ciliate_lb_maglev */
#define LB_LOCAL_ONLY 2    /* from outside only backends of this node are picked (externalTrafficPolicy: Local) */
#define LB_RANGES 4        /* from outside only sources in ciliate_lb_ranges */
#define LB_EXTERNAL 8      /* may be reached from outside: node port, external or load balancer address */
#define LB_LOCAL_BEHIND 16 /* the backends of this node terminate: their slots follow on the others', from count on */

/* One service as it stands now. The slots 0 to count - 1 of its generation name its backends, those of this node first.
 * A change writes the slots of the next generation and then this entry, so nobody ever meets half of a change. */
struct lb_service {
	__u32 id;
	__u16 count;
	__u16 local;
	__u16 generation;
	__u16 flags;
	__u32 affinity; /* seconds that a client stays with its backend; 0: no affinity */
};

struct lb_slot {
	__u32 service;
	__u16 generation;
	__u16 slot;
};

/* A backend, shared by the services that have it. It repeats its id, by which a reader knows that it read one whole. */
struct lb_backend {
	union addr address;
	__u32 id;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

/* An address and port to write into a packet. */
struct lb_address {
	union addr address;
	__be16 port;
	__u16 pad;
};

/* A flow as its packets say, before translation. endpoint: the pod that sends them. */
struct lb_flow_key {
	union addr saddr;
	union addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 way;
	__u16 endpoint;
};

/* Which backend a flow has. used: second of the monotonic clock in which it had its last packet; with state, it says whether
 * the flow is over (lb_alive). */
struct lb_flow {
	__u32 backend;
	__u32 service;
	__u32 used;
	__be16 port; /* from outside to another node: the node's own, in place of the client's */
	__u16 state;
};

/* Who is behind a port of the node's own, by the translated tuple (LB_FLOW_ANSWER). */
struct lb_client {
	union addr address;
	__u32 service;
	__be16 port;
	__u16 state;
	__u32 used;
};

/* State of a flow, as far as its packets tell. */
#define LB_UNANSWERED 1 /* the backend sent nothing yet */
#define LB_OPENING 2    /* TCP: nothing but SYNs, or nothing answered */
#define LB_TX_CLOSING 4 /* TCP: the client sent its FIN */
#define LB_RX_CLOSING 8 /* and the backend its own */
#define LB_RESET 16
#define LB_WIDE 32 /* the client's share is that of its /64; no state, but told by it for as long as the entry is there */

/* What one client outside has of the node's ports towards backends of other nodes, and how many flows it was refused. */
struct lb_share {
	__u32 held;
	__u32 refused;
};

/* lb_flow_key.way */
#define LB_FLOW_CLIENT 1  /* a pod's packets to the service */
#define LB_FLOW_SELF 2    /* a pod that reached itself: its answers */
#define LB_FLOW_OUTSIDE 3 /* from outside to the service */
#define LB_FLOW_ANSWER 4  /* the translated tuple of one from outside */

/* Session affinity. client: a pod's or outside address, or the cookie of a network namespace with w[3] all ones. */
struct lb_affinity_key {
	union addr client;
	__u32 service;
};

struct lb_affinity {
	__u32 backend;
	__u32 used;
};

/* Backends of services with affinity: one that left the service gets no more clients by affinity. */
struct lb_member {
	__u32 service;
	__u32 backend;
};

#define LB_TABLE 1021

struct lb_table {
	__u32 backends[LB_TABLE];
};

/* loadBalancerSourceRanges; the service stands before the address and counts with the prefix. */
struct lb_range {
	__u32 prefixlen;
	__u32 service;
	union addr address;
};

#define LB_SOCK_TO 0   /* service -> backend */
#define LB_SOCK_FROM 1 /* backend -> service */

/* What sockets were told: which backend stands for a service, and which service for a backend. */
struct lb_sock_key {
	__u64 cookie;
	union addr address;
	__be16 port;
	__u8 proto;
	__u8 way;
	__u32 pad;
};

struct lb_sock {
	union addr address;
	__u32 service;
	__u32 backend;
	__be16 port;
	__u16 pad;
};

#endif
