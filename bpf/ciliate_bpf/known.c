/* Asked by a rule of the kernel's packet filter (xt_bpf): is this packet of a flow that BPF masquerading serves? So another
 * engine that takes over leaves such flows alone. The packet begins with its IP header. */
#include "lib/common.h"
#include "lib/nat.h"

char _license[] SEC("license") = "Dual BSD/GPL";

static always_inline __u32 behind_ipv4(struct __sk_buff *skb, struct snat_key *key)
{
	struct iphdr ip = {};

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)) < 0 || (ip.frag_off & bpf_htons(IP_OFFSET)))
		return 0;
	map_ipv4(&key->saddr, ip.saddr);
	map_ipv4(&key->daddr, ip.daddr);
	key->proto = ip.protocol;
	return ip.ihl * 4;
}

static always_inline __u32 behind_ipv6(struct __sk_buff *skb, struct snat_key *key)
{
	struct ipv6hdr ip6 = {};

	/* behind extension headers nothing is found, and the flow counts as new */
	if (bpf_skb_load_bytes(skb, 0, &ip6, sizeof(ip6)) < 0)
		return 0;
	__builtin_memcpy(&key->saddr, &ip6.saddr, 16);
	__builtin_memcpy(&key->daddr, &ip6.daddr, 16);
	key->proto = ip6.nexthdr;
	return sizeof(ip6);
}

SEC("socket")
int snat_known(struct __sk_buff *skb)
{
	struct snat_key key = {.direction = EGRESS};
	__u8 first = 0, head[8] = {};
	__u32 l4;

	if (bpf_skb_load_bytes(skb, 0, &first, 1) < 0)
		return 0;
	l4 = first >> 4 == 4 ? behind_ipv4(skb, &key) : behind_ipv6(skb, &key);
	if (!l4 || bpf_skb_load_bytes(skb, l4, head, sizeof(head)) < 0)
		return 0;
	if (is_icmp(key.proto)) {
		key.sport = *(__be16 *)&head[4];
	} else {
		key.sport = *(__be16 *)&head[0];
		key.dport = *(__be16 *)&head[2];
	}
	return bpf_map_lookup_elem(&ciliate_snat, &key) != NULL;
}
