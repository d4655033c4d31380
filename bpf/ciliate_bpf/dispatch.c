/* The programs that are attached to devices. They never change: an upgrade is one slot of ciliate_entry.
 *
 * An empty slot: whoever serves pods (containers, overlay, router device) lets nothing pass unjudged. On the node's own
 * devices it passes, as the node itself must stay reachable.
 */
#include "lib/common.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Without a JIT, Linux 6.12 and newer give a tail call's target as much stack as its caller has, and the target overruns
 * it. So the caller takes all that a program may have. */
static always_inline void take_whole_stack(void)
{
#ifdef CILIATE_COMPAT
	asm volatile("r0 = 0; *(u8 *)(r10 - 512) = r0;" ::: "r0", "memory");
#endif
}

#define DISPATCHER(name, slot, direction, otherwise)                                                                   \
	SEC("tc")                                                                                                      \
	int name(struct __sk_buff *skb)                                                                                \
	{                                                                                                              \
		take_whole_stack();                                                                                    \
		bpf_tail_call(skb, &ciliate_entry, slot);                                                              \
		count(skb, DROP_MISSED_TAIL_CALL, direction);                                                          \
		return otherwise;                                                                                      \
	}

DISPATCHER(entry_from, SLOT_FROM_CONTAINER, EGRESS, TC_ACT_SHOT)
DISPATCHER(entry_to, SLOT_TO_CONTAINER, INGRESS, TC_ACT_SHOT)
DISPATCHER(entry_from_netdev, SLOT_FROM_NETDEV, INGRESS, TC_ACT_UNSPEC)
DISPATCHER(entry_to_netdev, SLOT_TO_NETDEV, EGRESS, TC_ACT_UNSPEC)
DISPATCHER(entry_from_overlay, SLOT_FROM_OVERLAY, INGRESS, TC_ACT_SHOT)
DISPATCHER(entry_from_host, SLOT_FROM_HOST, EGRESS, TC_ACT_SHOT)
