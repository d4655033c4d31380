/* Layouts of masquerading, shared with user space (twins: core/ciliate/datapath/snat.py). */
#ifndef CILIATE_NATTYPES_H
#define CILIATE_NATTYPES_H

#include "types.h"

/* snat_entry.flags */
#define SNAT_HOST 1         /* a flow of the node itself: keeps its tuple, and nobody else may have it */
#define SNAT_TX_CLOSING 2
#define SNAT_RX_CLOSING 4
#define SNAT_SEEN_NON_SYN 8
#define SNAT_RESET 16
#define SNAT_UNANSWERED 32  /* nobody has answered yet */

/* A packet as it comes: at egress before its source is replaced, at ingress before its destination is. An echo identifier
 * stands where the pod's and the node's port stand. */
struct snat_key {
	union addr saddr;
	union addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 direction;
	__u16 pad;
};

/* One direction of a mapping: what the source (egress) or destination (ingress) becomes.
 * created, refreshed, lifetime: seconds of the monotonic clock. */
struct snat_entry {
	union addr addr;
	__be16 port;
	__u16 flags;
	__u32 created;
	__u32 refreshed;
	__u32 lifetime;
};

/* What a pod has of the table, by its address. mappings: as many as were made since they were last counted, and those that
 * were there then; refused: new flows beyond the pod's share. */
struct snat_pod {
	__u32 mappings;
	__u32 pad;
	__u64 refused;
};

/* A device that masquerades, by its interface index: the addresses to use; an address of 0 is none. */
#define SNAT_ACTIVE 1 /* new flows get mappings; without, those that exist are served and no more */

struct snat_device {
	__be32 ipv4;
	__u32 flags;
	union addr ipv6;
};

/* What an address is for masquerading; the key is that of the ipcache. */
#define MASQ_SOURCE 1 /* a pod's: masqueraded when it leaves */
#define MASQ_DIRECT 2 /* reached without masquerading */

#endif
