/* The programs that are attached to devices. They never change: an upgrade is one slot of ciliate_entry. */
#include "lib/common.h"

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("tc")
int entry_from(struct __sk_buff *skb)
{
	bpf_tail_call(skb, &ciliate_entry, SLOT_FROM_CONTAINER);
	count(skb, DROP_MISSED_TAIL_CALL, EGRESS);
	return TC_ACT_SHOT;
}

SEC("tc")
int entry_to(struct __sk_buff *skb)
{
	bpf_tail_call(skb, &ciliate_entry, SLOT_TO_CONTAINER);
	count(skb, DROP_MISSED_TAIL_CALL, INGRESS);
	return TC_ACT_SHOT;
}
