/* Access to a packet's bytes. */
#ifndef CILIATE_PACKET_H
#define CILIATE_PACKET_H

#include "common.h"

/* `size` bytes at `offset`, to read and write in place; NULL where the packet is shorter. Headers are in one piece but for
 * rare packets, which are made so. That moves the packet: pointers into it that the caller has from before are gone. */
static always_inline void *bytes_at(struct __sk_buff *skb, __u32 offset, __u32 size)
{
	void *start = (void *)(long)skb->data + offset;

	/* the compiler must not move the sum about: the verifier wants to see one pointer compared and used */
	asm volatile("" : "+r"(start));
	if (start + size <= (void *)(long)skb->data_end)
		return start;
	if (bpf_skb_pull_data(skb, offset + size))
		return NULL;
	start = (void *)(long)skb->data + offset;
	asm volatile("" : "+r"(start));
	return start + size <= (void *)(long)skb->data_end ? start : NULL;
}

/* Where the packet's L4 header begins. Headers before it are of four bytes each, and none that is looked at begins further
 * behind than this bound: with both, the verifier follows accesses behind it, also where they have to be aligned. */
static always_inline __u32 l4_at(const struct pkt *pkt)
{
	return ETH_HLEN + ((pkt->l4_offset - ETH_HLEN) & 0x7ffc);
}

/* MAC addresses begin at even addresses and no better. */
static always_inline int mac_equal(const void *a, const void *b)
{
	const __u16 *x = a, *y = b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

static always_inline void mac_copy(void *to, const void *from)
{
	const __u16 *source = from;
	__u16 *target = to;

	target[0] = source[0];
	target[1] = source[1];
	target[2] = source[2];
}

#endif
