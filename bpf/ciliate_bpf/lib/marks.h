/* Marks of packets on their way through the node's stack (inventory 1.11).
 *
 * bits 8-11    what the mark says: MARK_*
 * bits 16-31   identity, its low 16 bits; or a port in network order: the proxy's (MARK_TO_PROXY), or that by which this
 *              node speaks for a client outside (MARK_CLIENT)
 * bits 0-7     identity, its high 8 bits
 * bits 12-15   key of an encrypted packet (MARK_ENCRYPT, MARK_DECRYPT); with the others they are left as they are, because
 *              Kubernetes has 0x4000 and 0x8000 for itself
 *
 * A mark never crosses a network namespace, so no pod can make one.
 */
#ifndef CILIATE_MARKS_H
#define CILIATE_MARKS_H

#include "common.h"

#define MARK_MASK 0x0f00
#define MARK_TO_PROXY 0x0200
#define MARK_OVERLAY 0x0400 /* the outer packet of a tunnel */
#define MARK_CLIENT 0x0500  /* of a client outside, to another node's backend */
#define MARK_PROXY_INGRESS 0x0a00
#define MARK_PROXY_EGRESS 0x0b00
#define MARK_HOST 0x0c00
#define MARK_DECRYPT 0x0d00
#define MARK_ENCRYPT 0x0e00
#define MARK_IDENTITY 0x0f00
#define MARK_KEY_MASK 0xf000
#define MARK_KEY_SHIFT 12

static always_inline __u32 mark_identity(__u32 mark)
{
	return mark >> 16 | (mark & 0xff) << 16;
}

static always_inline __u32 mark_with_identity(__u32 mark, __u32 magic, __u32 identity)
{
	return (mark & MARK_KEY_MASK) | magic | identity << 16 | (identity >> 16 & 0xff);
}

/* Say who sent a packet that goes on through the stack. Identities of 24 bits are all that a sender can have. */
static always_inline void mark_sender(struct __sk_buff *skb, __u32 identity)
{
	skb->mark = mark_with_identity(skb->mark, MARK_IDENTITY, identity);
}

/* Have the packet's source replaced where it leaves the node: by the node's address and this port. */
static always_inline void mark_client(struct __sk_buff *skb, __be16 port)
{
	skb->mark = (skb->mark & MARK_KEY_MASK) | MARK_CLIENT | (__u32)port << 16;
}

/* Take that port out of the mark, as it is done once; 0 where there is none. */
static always_inline __be16 take_client_mark(struct __sk_buff *skb)
{
	__u32 mark = skb->mark;

	if ((mark & MARK_MASK) != MARK_CLIENT)
		return 0;
	skb->mark = mark & MARK_KEY_MASK;
	return mark >> 16;
}

/* Who sent a packet according to its mark; 0 where the mark does not say. */
static always_inline __u32 marked_sender(struct __sk_buff *skb)
{
	__u32 mark = skb->mark;

	switch (mark & MARK_MASK) {
	case MARK_IDENTITY:
	case MARK_DECRYPT:
	case MARK_PROXY_INGRESS:
	case MARK_PROXY_EGRESS:
		return mark_identity(mark);
	case MARK_HOST:
		return IDENTITY_HOST;
	}
	return 0;
}

#endif
