/* Where features of plugins step in. A feature that is not there leaves nothing behind.
 *
 * Each hook gives 0 to go on, or the reason for a drop (200 to 255 are for plugins). core/ciliate/datapath/feature.py
 * writes the file CILIATE_FEATURES, which defines the hooks that some feature has.
 */
#ifndef CILIATE_HOOKS_H
#define CILIATE_HOOKS_H

#include "common.h"

#ifdef CILIATE_FEATURES
#include CILIATE_FEATURES
#endif

/* a pod's packet, parsed, before its destination is looked up, conntrack and policy */
#ifndef HOOK_EGRESS
#define HOOK_EGRESS(skb, pkt) 0
#endif

/* a packet for a pod of this node, its sender known, before conntrack and policy of the receiver */
#ifndef HOOK_INGRESS
#define HOOK_INGRESS(skb, pkt) 0
#endif

/* a pod's packet that policy lets through and that leaves to the node's stack */
#ifndef HOOK_LEAVE
#define HOOK_LEAVE(skb, pkt) 0
#endif

#endif
