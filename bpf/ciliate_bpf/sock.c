/* Services where sockets meet them: a connection to a service is made to a backend in the first place, and nothing has to
 * be translated packet by packet. Attached to the cgroup of the node's processes, pods' included.
 *
 * sock_connect4, 6      a connection's destination becomes a backend
 * sock_sendmsg4, 6      likewise a datagram's, where the socket is not connected
 * sock_recvmsg4, 6      and where datagrams come from is the service again
 * sock_getpeername4, 6  as is the peer that the process asks for
 *
 * Left to the packets of pods (lb.h): connected UDP, which could not be given another backend here when its own goes; SCTP,
 * which has no hook; what a pod sends to itself, which must see another peer.
 */
#include "lib/common.h"
#include "lib/lb_select.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define PROCEED 1
#define REFUSE 0
#define ECONNREFUSED 111

/* The network namespace of the node itself. Its processes have no other translation. */
const volatile __u64 host_netns_cookie = 0;

struct sock_work {
	struct lb_frontend front;
	struct lb_service service;
	struct lb_backend backend;
	union addr client;
	union addr said; /* what the process named, and is shown again */
};

static always_inline void sock_key(struct lb_sock_key *key, __u64 cookie, const union addr *address, __be16 port,
				   __u8 proto, __u8 way)
{
	key->cookie = cookie;
	key->address = *address;
	key->port = port;
	key->proto = proto;
	key->way = way;
}

static always_inline int sock_is_mapped(const union addr *address)
{
	return !address->w[0] && !address->w[1] && address->w[2] == bpf_htonl(0xffff);
}

/* Whether an address means whoever names it: loopback, or none at all. */
static always_inline int sock_is_home(const union addr *address)
{
	if (sock_is_mapped(address))
		return address->b[12] == 127 || !address->w[3];
	return !(address->w[0] | address->w[1] | address->w[2]) && (!address->w[3] || address->w[3] == bpf_htonl(1));
}

/* The service that a process names. Node ports have a frontend without address, for the node's own processes that name their
 * own machine; to a pod that is its own namespace. */
static always_inline int sock_find(struct bpf_sock_addr *ctx, struct sock_work *work)
{
	work->said = work->front.address;
	if (sock_is_home(&work->front.address)) {
		if (bpf_get_netns_cookie(ctx) != host_netns_cookie)
			return 0;
		work->front.address.w[3] = 0;
	}
	return lb_service_get(&work->front, &work->service);
}

/* Whether somebody in the socket's own namespace takes what is sent to the backend; then it may be the pod itself. */
static always_inline int sock_may_be_self(struct bpf_sock_addr *ctx, const struct lb_backend *to)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *found;
	__u32 size = sizeof(tuple.ipv6);

	if (sock_is_mapped(&to->address)) {
		size = sizeof(tuple.ipv4);
		tuple.ipv4.daddr = to->address.w[3];
		tuple.ipv4.dport = to->port;
	} else {
		__builtin_memcpy(tuple.ipv6.daddr, &to->address, 16);
		tuple.ipv6.dport = to->port;
	}
	if (to->proto == IPPROTO_TCP)
		found = bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		found = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!found)
		return 0;
	bpf_sk_release(found);
	return 1;
}

/* A backend for a socket; affinity goes by network namespace, as a process has no address yet. Gives its number. */
static always_inline __u32 sock_pick(struct sock_work *work, __u64 netns)
{
	__u32 now = now_seconds(), id = 0;

	if (work->service.affinity) {
		work->client.w[0] = netns;
		work->client.w[1] = netns >> 32;
		work->client.w[3] = ~0U;
		id = lb_affine(&work->service, &work->client, now, &work->backend);
	}
	if (!id)
		id = lb_pick(&work->front, &work->service, bpf_get_prandom_u32(), 0, &work->backend);
	if (id && work->service.affinity)
		lb_affine_set(&work->service, &work->client, now, id);
	return id;
}

/* Remember that answers of the backend are the service's. */
static always_inline void sock_remember(struct sock_work *work, __u64 cookie, __u32 id)
{
	struct lb_sock value = {.address = work->said, .port = work->front.port};
	struct lb_sock_key key = {};

	value.service = work->service.id;
	value.backend = id;
	sock_key(&key, cookie, &work->backend.address, work->backend.port, work->front.proto, LB_SOCK_FROM);
	bpf_map_update_elem(&ciliate_lb_sock, &key, &value, BPF_ANY);
}

/* A backend in place of the service that the socket named; its number is 0 where that may be the pod itself. Gives PROCEED
 * or, where there is none, REFUSE. */
static always_inline int sock_translate(struct bpf_sock_addr *ctx, struct sock_work *work, __u64 cookie, __u64 netns)
{
	if (!sock_pick(work, netns)) {
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	}
	if (netns != host_netns_cookie && sock_may_be_self(ctx, &work->backend))
		work->backend.id = 0;
	else
		sock_remember(work, cookie, work->backend.id);
	return PROCEED;
}

/* A connection. Gives PROCEED with work->backend as destination, PROCEED with none (its number is 0), or REFUSE. */
static always_inline int sock_connect(struct bpf_sock_addr *ctx, struct sock_work *work)
{
	__u64 netns;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return PROCEED;
	work->front.proto = ctx->protocol;
	if (!sock_find(ctx, work))
		return PROCEED;
	netns = bpf_get_netns_cookie(ctx);
	if (netns != host_netns_cookie && work->front.proto == IPPROTO_UDP)
		return PROCEED;
	return sock_translate(ctx, work, bpf_get_socket_cookie(ctx), netns);
}

/* What of this socket came from a backend is from the service no more, where it speaks to the backend itself. */
static always_inline void sock_forget(struct bpf_sock_addr *ctx, const struct sock_work *work)
{
	struct lb_sock_key key = {};
	struct bpf_sock *sk = ctx->sk;

	/* for an IPv6 socket that is connected to an IPv4 service Linux names the backend with every datagram */
	if (sk && sk->dst_port == work->front.port && sk->dst_ip4 == work->said.w[3])
		return;
	sock_key(&key, bpf_get_socket_cookie(ctx), &work->said, work->front.port, IPPROTO_UDP, LB_SOCK_FROM);
	if (bpf_map_lookup_elem(&ciliate_lb_sock, &key))
		bpf_map_delete_elem(&ciliate_lb_sock, &key);
}

/* A datagram: the socket's backend for this service as long as that is there, then another one. */
static always_inline int sock_sendmsg(struct bpf_sock_addr *ctx, struct sock_work *work)
{
	struct lb_sock_key key = {};
	struct lb_sock fresh = {}, *known;
	__u64 cookie;

	work->front.proto = IPPROTO_UDP;
	if (!sock_find(ctx, work)) {
		sock_forget(ctx, work);
		return PROCEED;
	}
	cookie = bpf_get_socket_cookie(ctx);
	sock_key(&key, cookie, &work->front.address, work->front.port, IPPROTO_UDP, LB_SOCK_TO);
	known = bpf_map_lookup_elem(&ciliate_lb_sock, &key);
	if (known && known->service == work->service.id) {
		if (!known->backend || lb_backend_get(known->backend, &work->backend))
			return PROCEED;
	}
	if (sock_translate(ctx, work, cookie, bpf_get_netns_cookie(ctx)) == REFUSE)
		return REFUSE;
	fresh.service = work->service.id;
	fresh.backend = work->backend.id;
	bpf_map_update_elem(&ciliate_lb_sock, &key, &fresh, BPF_ANY);
	return PROCEED;
}

/* The service that stands for an address that a process is about to see; NULL where none does. */
static always_inline struct lb_sock *sock_service(struct bpf_sock_addr *ctx, const struct sock_work *work)
{
	struct lb_sock_key key = {};

	sock_key(&key, bpf_get_socket_cookie(ctx), &work->front.address, work->front.port, ctx->protocol, LB_SOCK_FROM);
	return bpf_map_lookup_elem(&ciliate_lb_sock, &key);
}

static always_inline void sock_read4(struct bpf_sock_addr *ctx, struct sock_work *work)
{
	map_ipv4(&work->front.address, ctx->user_ip4);
	work->front.port = ctx->user_port;
}

static always_inline void sock_read6(struct bpf_sock_addr *ctx, struct sock_work *work)
{
	work->front.address.w[0] = ctx->user_ip6[0];
	work->front.address.w[1] = ctx->user_ip6[1];
	work->front.address.w[2] = ctx->user_ip6[2];
	work->front.address.w[3] = ctx->user_ip6[3];
	work->front.port = ctx->user_port;
}

static always_inline void sock_write4(struct bpf_sock_addr *ctx, const union addr *address, __be16 port)
{
	ctx->user_ip4 = address->w[3];
	ctx->user_port = port;
}

static always_inline void sock_write6(struct bpf_sock_addr *ctx, const union addr *address, __be16 port)
{
	ctx->user_ip6[0] = address->w[0];
	ctx->user_ip6[1] = address->w[1];
	ctx->user_ip6[2] = address->w[2];
	ctx->user_ip6[3] = address->w[3];
	ctx->user_port = port;
}

#define FORWARD(hook, family)                                                                                          \
	SEC("cgroup/" #hook #family)                                                                                   \
	int sock_##hook##family(struct bpf_sock_addr *ctx)                                                             \
	{                                                                                                              \
		struct sock_work work = {};                                                                            \
		int verdict;                                                                                           \
                                                                                                                       \
		sock_read##family(ctx, &work);                                                                         \
		verdict = sock_##hook(ctx, &work);                                                                     \
		if (verdict == PROCEED && work.backend.id)                                                             \
			sock_write##family(ctx, &work.backend.address, work.backend.port);                             \
		return verdict;                                                                                        \
	}

#define BACKWARD(hook, family)                                                                                         \
	SEC("cgroup/" #hook #family)                                                                                   \
	int sock_##hook##family(struct bpf_sock_addr *ctx)                                                             \
	{                                                                                                              \
		struct sock_work work = {};                                                                            \
		struct lb_sock *service;                                                                               \
                                                                                                                       \
		sock_read##family(ctx, &work);                                                                         \
		service = sock_service(ctx, &work);                                                                    \
		if (service)                                                                                           \
			sock_write##family(ctx, &service->address, service->port);                                     \
		return PROCEED;                                                                                        \
	}

FORWARD(connect, 4)
FORWARD(connect, 6)
FORWARD(sendmsg, 4)
FORWARD(sendmsg, 6)
BACKWARD(recvmsg, 4)
BACKWARD(recvmsg, 6)
BACKWARD(getpeername, 4)
BACKWARD(getpeername, 6)
