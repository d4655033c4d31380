/* The other nodes. Only programs of a node with tunnels use this, so no other node has the map. */
#ifndef CILIATE_NODES_H
#define CILIATE_NODES_H

#include "common.h"

MAP(ciliate_nodes, BPF_MAP_TYPE_HASH, 16384, struct node_key, struct node_entry, BPF_F_NO_PREALLOC);

static always_inline int known_node(const union addr *node)
{
	struct node_key key = {.addr = *node};

	return bpf_map_lookup_elem(&ciliate_nodes, &key) != NULL;
}

#endif
