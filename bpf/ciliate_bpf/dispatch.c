/* The programs that are attached to devices. They never change: an upgrade is one slot of ciliate_entry. */
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

SEC("tc")
int entry_from(struct __sk_buff *skb)
{
	take_whole_stack();
	bpf_tail_call(skb, &ciliate_entry, SLOT_FROM_CONTAINER);
	count(skb, DROP_MISSED_TAIL_CALL, EGRESS);
	return TC_ACT_SHOT;
}

SEC("tc")
int entry_to(struct __sk_buff *skb)
{
	take_whole_stack();
	bpf_tail_call(skb, &ciliate_entry, SLOT_TO_CONTAINER);
	count(skb, DROP_MISSED_TAIL_CALL, INGRESS);
	return TC_ACT_SHOT;
}
