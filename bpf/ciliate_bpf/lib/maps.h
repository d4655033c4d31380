/* Every map. Sizes marked "set at load" are defaults that the loader changes. */
#ifndef CILIATE_MAPS_H
#define CILIATE_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

#define MAP(name, map_type, entries, key_type, value_type, map_flags_value)                                           \
	struct {                                                                                                       \
		__uint(type, map_type);                                                                                \
		__uint(max_entries, entries);                                                                          \
		__type(key, key_type);                                                                                 \
		__type(value, value_type);                                                                             \
		__uint(map_flags, map_flags_value);                                                                    \
	} name SEC(".maps")

MAP(ciliate_ep, BPF_MAP_TYPE_ARRAY, 65536, __u32, struct ep_config, 0);
MAP(ciliate_link, BPF_MAP_TYPE_HASH, 65536, __u32, struct link_entry, BPF_F_NO_PREALLOC);
MAP(ciliate_lxc, BPF_MAP_TYPE_HASH, 65536, struct endpoint_key, struct endpoint_info, BPF_F_NO_PREALLOC);
MAP(ciliate_ipcache, BPF_MAP_TYPE_LPM_TRIE, 512000, struct ipcache_key, struct ipcache_entry, BPF_F_NO_PREALLOC);
MAP(ciliate_tunnel, BPF_MAP_TYPE_LPM_TRIE, 65536, struct ipcache_key, struct tunnel_entry, BPF_F_NO_PREALLOC);
MAP(ciliate_place, BPF_MAP_TYPE_LPM_TRIE, 65536, struct ipcache_key, struct place_entry, BPF_F_NO_PREALLOC);
MAP(ciliate_policy, BPF_MAP_TYPE_HASH, 524288, struct policy_key, struct policy_entry, BPF_F_NO_PREALLOC);
MAP(ciliate_ct_tcp, BPF_MAP_TYPE_LRU_HASH, 524288, struct ct_key, struct ct_entry, 0); /* set at load */
MAP(ciliate_ct_any, BPF_MAP_TYPE_LRU_HASH, 262144, struct ct_key, struct ct_entry, 0); /* set at load */
MAP(ciliate_ct_share, BPF_MAP_TYPE_ARRAY, 65536, __u32, struct ct_share, 0);
#define CT_RING 32768
/* Flows of those who used up their share, of each table apart, the oldest of them next: CT_RING of TCP, then of others. */
MAP(ciliate_ct_ring, BPF_MAP_TYPE_ARRAY, 2 * CT_RING, __u32, struct ct_key, 0);
MAP(ciliate_frag, BPF_MAP_TYPE_LRU_HASH, 8192, struct frag_key, struct frag_entry, 0);
/* index: reason * 2 + direction */
MAP(ciliate_metrics, BPF_MAP_TYPE_PERCPU_ARRAY, 512, __u32, struct metrics_value, 0);
MAP(ciliate_config, BPF_MAP_TYPE_ARRAY, 1, __u32, struct node_config, 0);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
} ciliate_events SEC(".maps");

#define SLOT_FROM_CONTAINER 0
#define SLOT_TO_CONTAINER 1
#define SLOT_FROM_NETDEV 2
#define SLOT_TO_NETDEV 3
#define SLOT_FROM_OVERLAY 4
#define SLOT_FROM_HOST 5 /* egress of the router device */
#define ENTRY_SLOTS 8 /* another number would make another array, and an attached dispatcher holds on to the old one */

/* The switch for upgrades: attached filters run a dispatcher that tail-calls a slot of this array. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, ENTRY_SLOTS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} ciliate_entry SEC(".maps");

#endif
