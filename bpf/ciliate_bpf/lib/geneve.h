/* Geneve (RFC 8926) out of VXLAN (RFC 7348), for kernels without a Geneve device and the same on all others.
 *
 * The two headers have the same length and the VNI in the same place. So the tunnel device stays one of VXLAN, with all that
 * the kernel does for it (outer routes, segmentation, fragments, checksums), on Geneve's port, and its header's first four
 * bytes are exchanged where packets leave the node and where they arrive:
 *
 *   VXLAN    08 00 00 00 | VNI VNI VNI 00      flags, reserved
 *   Geneve   00 00 65 58 | VNI VNI VNI 00      version 0, no options, no flags; Ethernet inside
 *
 * The UDP checksum may be complete, left to hardware, or be made per segment later, and a program cannot tell. What is taken
 * from the source port is what the header gains, so that the checksum is the same before and after; the port is but a hash
 * of the flow to everybody else.
 */
#ifndef CILIATE_GENEVE_H
#define CILIATE_GENEVE_H

#include "common.h"
#include "marks.h"
#include "nodes.h"
#include "parse.h"
#include "tunnel.h"

#define VXLAN_WORD 0x08000000U
#define GENEVE_WORD 0x00006558U
#define HEADER_GAIN 0x5d58U /* of the 16-bit sum: 0x0000 + 0x6558 - 0x0800 - 0x0000 */

/* An outer packet's UDP header and the four bytes behind it. */
struct outer {
	__be16 sport;
	__be16 dport;
	__be16 length;
	__u16 checksum;
	__be32 word;
};

/* Sum of ones' complement (RFC 1071). It is never 0, unless both are. */
static always_inline __u16 add_once(__u16 a, __u16 b)
{
	__u32 sum = (__u32)a + b;

	return (sum & 0xffff) + (sum >> 16);
}

/* Where the outer UDP header is and who sent it; 0 where there is none. Later fragments have none. */
static always_inline __u32 outer_udp(struct __sk_buff *skb, union addr *source)
{
	if (skb->vlan_present)
		return 0;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip = {};

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 || ip.protocol != IPPROTO_UDP || ip.ihl < 5 ||
		    (ip.frag_off & bpf_htons(IP_OFFSET)))
			return 0;
		map_ipv4(source, ip.saddr);
		return ETH_HLEN + ip.ihl * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip6 = {};
		struct extension ext = {};

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6)) < 0)
			return 0;
		__builtin_memcpy(source, &ip6.saddr, 16);
		if (ip6.nexthdr == IPPROTO_UDP)
			return ETH_HLEN + sizeof(ip6);
		if (ip6.nexthdr != IPPROTO_FRAGMENT ||
		    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip6), &ext, sizeof(ext)) < 0 || ext.next != IPPROTO_UDP ||
		    (ext.frag_off & bpf_htons(0xfff8)))
			return 0;
		return ETH_HLEN + sizeof(ip6) + sizeof(ext);
	}
	return 0;
}

/* Exchange one header for the other. */
static always_inline int exchange(struct __sk_buff *skb, __u32 udp, struct outer *outer, __u32 word, __u16 gain)
{
	outer->sport = bpf_htons(add_once(bpf_ntohs(outer->sport), gain));
	outer->word = bpf_htonl(word);
	return bpf_skb_store_bytes(skb, udp, outer, sizeof(*outer), 0);
}

/* An outer packet that leaves the node. */
static always_inline void geneve_leaves(struct __sk_buff *skb)
{
	struct outer outer = {};
	union addr source = {};
	__u32 udp;

	udp = outer_udp(skb, &source);
	if (!udp || bpf_skb_load_bytes(skb, udp, &outer, sizeof(outer)) < 0)
		return;
	if (outer.dport == tunnel_port && outer.word == bpf_htonl(VXLAN_WORD))
		exchange(skb, udp, &outer, GENEVE_WORD, (__u16)~HEADER_GAIN);
}

/* What arrives, from another node: 1 where it is of the tunnel. Headers with options or flags are left as they are, and the
 * tunnel device refuses them: no node of ours sends any, and a critical one must not be passed over (RFC 8926 3.4). */
static always_inline int geneve_arrives(struct __sk_buff *skb)
{
	struct outer outer = {};
	union addr source = {};
	__u32 udp = outer_udp(skb, &source);

	if (!udp || bpf_skb_load_bytes(skb, udp, &outer, sizeof(outer)) < 0 || outer.dport != tunnel_port)
		return 0;
	if (outer.word != bpf_htonl(GENEVE_WORD) || !known_node(&source))
		return 0;
	return exchange(skb, udp, &outer, VXLAN_WORD, HEADER_GAIN) >= 0;
}

#endif
