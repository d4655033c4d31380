/* Configuration constants, packet context, small helpers. */
#ifndef CILIATE_COMMON_H
#define CILIATE_COMMON_H

#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "types.h"
#include "drop.h"
#include "maps.h"

#define NSEC_PER_SEC 1000000000ULL
#define EEXIST 17
#define always_inline inline __attribute__((always_inline))
#define barrier() asm volatile("" ::: "memory")

/* Large functions. Global ones are verified once, however often they are called; that takes a kernel with BTF of its own.
 * With CILIATE_COMPAT everything is inlined, for kernels without BTF or without JIT. */
#ifdef CILIATE_COMPAT
#define FUNCTION static always_inline
#else
#define FUNCTION __noinline
#endif

/* Node constants, set before loading; what is false is pruned by the verifier. */
const volatile __u8 enable_ipv4 = 1;
const volatile __u8 enable_ipv6 = 1;
const volatile __u8 enable_debug = 0;
const volatile __be32 router_ipv4 = 0;
const volatile union addr router_ipv6 = {};

#ifdef CILIATE_TEMPLATE
/* The endpoint that these programs are loaded for: its entry in ciliate_ep, as far as that is fixed. */
const volatile struct ep_config own_endpoint = {};
#else
/* Only test runs set this: they cannot set a class id. */
const volatile __u32 test_endpoint = 0;
#endif

#define PKT_FRAGMENT 1        /* any part of a fragmented datagram */
#define PKT_LATER_FRAGMENT 2  /* not the first: it has no L4 header */
#define PKT_ICMP_ERROR 4      /* inner has the tuple of the packet that it complains of */
#define PKT_TO_POD 8          /* goes from a pod straight to dst_endpoint, a pod of this node */
#define PKT_RECORDED 32       /* a new entry of conntrack was made for it */
#define PKT_CLAIM 16          /* its source may be made up: it answers no flow, and ends none */

/* What conntrack knows of a packet's flow at one end, as ct_end has it. */
struct known {
	__u32 peer;
	__u32 epoch;
};

/* A packet as parsed, and what was found out about it so far. */
struct pkt {
	__u64 question; /* what policy is asked (policy.h) */
	struct tuple tuple;
	struct tuple inner;
	struct ct_key flow; /* of tuple, or of inner where that counts */
	__u32 src_identity;
	__u32 dst_identity;
	__u32 rule;
	__u32 frag_id;
	__u32 rules[2]; /* which allow the flow, by direction */
	__u32 services[2]; /* by direction: who translated what was sent, and to whom a reply has to be translated back */
	__u32 shape; /* of the endpoint at the end that direction names, as its epoch */
	__u32 epoch;
	struct known known[2]; /* by direction: of a tracked flow, or as it is to be recorded */
	__u32 l4_offset;
	__u32 l4_length;
	__u16 src_endpoint;
	__u16 dst_endpoint;
	__u16 policy_port; /* destination port, or ICMP type; host byte order */
	__u8 family;
	__u8 proto;
	__u8 flags;
	__u8 tcp_flags;
	__u8 ttl;
	__u8 ct_state;     /* at the end that direction names */
	__u8 ct_states[2]; /* by direction, as far as tracked (bits by direction) says that they are known */
	__u8 tracked;
	__u8 source;       /* which end of flow the packet comes from */
	__u8 direction;
	__u8 enforce;
	__u8 verdict;
	__u8 report;
	__u8 monitor; /* of the endpoint at the end that direction names; 0: as the node's */
};

/* Data of the programs' own endpoint. Identity, flags and shapes may change while it lives and are always read from
 * ciliate_ep. Its id is the class id of the filter and the rest stands in ciliate_ep too (one program for all endpoints),
 * or both are constants (CILIATE_TEMPLATE: programs for each endpoint). These two functions are all that differs. */
static always_inline __u32 endpoint_id(struct __sk_buff *skb)
{
#ifdef CILIATE_TEMPLATE
	return own_endpoint.id;
#else
	return test_endpoint ? test_endpoint : skb->tc_classid & 0xffff;
#endif
}

/* What is fixed of the own endpoint: ifindex, id, addresses, MACs. ep: its entry. */
static always_inline const struct ep_config *fixed(const struct ep_config *ep)
{
#ifdef CILIATE_TEMPLATE
	ep = (const struct ep_config *)&own_endpoint;
	/* the compiler must not know where this points: it would read the zeros of the template */
	asm volatile("" : "+r"(ep));
#endif
	return ep;
}

/* The context of a new packet. Where everything is inlined, one stack has to do for all of it and is too small: then the
 * context stands in a map of each CPU's own. No other packet comes in between, as programs of tc run with softirqs off.
 * PACKET_IN_MAP: so it is for programs that need more of the stack. */
#if defined(CILIATE_COMPAT) || defined(PACKET_IN_MAP)
MAP(ciliate_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, __u32, struct pkt, 0);
#define NEW_PKT(name, way)                                                                                             \
	struct pkt *name = bpf_map_lookup_elem(&ciliate_scratch, &(__u32){0});                                         \
	if (!name)                                                                                                     \
		return TC_ACT_SHOT;                                                                                    \
	__builtin_memset(name, 0, sizeof(*name));                                                                      \
	name->direction = way
#else
#define NEW_PKT(name, way) struct pkt name##_space = {.direction = way}, *name = &name##_space
#endif

static always_inline __u32 now_seconds(void)
{
	return (__u32)(bpf_ktime_get_coarse_ns() / NSEC_PER_SEC);
}

static always_inline int addr_equal(const union addr *a, const union addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static always_inline void map_ipv4(union addr *addr, __be32 ipv4)
{
	addr->w[0] = 0;
	addr->w[1] = 0;
	addr->w[2] = bpf_htonl(0xffff);
	addr->w[3] = ipv4;
}

static always_inline void count(struct __sk_buff *skb, __u8 reason, __u8 direction)
{
	__u32 index = reason * 2 + (direction & 1);
	struct metrics_value *value = bpf_map_lookup_elem(&ciliate_metrics, &index);

	if (value) {
		value->packets++;
		value->bytes += skb->len;
	}
}

#endif
