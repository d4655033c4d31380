/* The load balancer's maps. Sizes are set at load. */
#ifndef CILIATE_LB_MAPS_H
#define CILIATE_LB_MAPS_H

#include "maps.h"

MAP(ciliate_lb_services, BPF_MAP_TYPE_HASH, 65536, struct lb_frontend, struct lb_service, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_slots, BPF_MAP_TYPE_HASH, 524288, struct lb_slot, __u32, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_backends, BPF_MAP_TYPE_HASH, 262144, __u32, struct lb_backend, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_reverse, BPF_MAP_TYPE_HASH, 65536, __u32, struct lb_frontend, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_members, BPF_MAP_TYPE_HASH, 524288, struct lb_member, __u32, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_maglev, BPF_MAP_TYPE_HASH, 65536, __u32, struct lb_table, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_ranges, BPF_MAP_TYPE_LPM_TRIE, 65536, struct lb_range, __u32, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_affinity, BPF_MAP_TYPE_LRU_HASH, 65536, struct lb_affinity_key, struct lb_affinity, 0);
MAP(ciliate_lb_flow, BPF_MAP_TYPE_LRU_HASH, 131072, struct lb_flow_key, struct lb_flow, 0);
MAP(ciliate_lb_client, BPF_MAP_TYPE_LRU_HASH, 65536, struct lb_flow_key, struct lb_client, 0);
MAP(ciliate_lb_share, BPF_MAP_TYPE_HASH, 65536, union addr, struct lb_share, BPF_F_NO_PREALLOC);
MAP(ciliate_lb_sock, BPF_MAP_TYPE_LRU_HASH, 131072, struct lb_sock_key, struct lb_sock, 0);

#endif
