/* Which backend: by affinity, by table, by slot. Shared by packets (lb.h) and sockets (sock.c). */
#ifndef CILIATE_LB_SELECT_H
#define CILIATE_LB_SELECT_H

#include "common.h"
#include "lb_maps.h"

#define LB_ATTEMPTS 3

static always_inline __u32 lb_mix(__u32 hash, __u32 word)
{
	hash ^= word;
	hash *= 0x9e3779b1U;
	return hash ^ (hash >> 15);
}

/* The same for the same tuple on every node. core/ciliate/service/selection.py has the twin. */
static always_inline __u32 lb_hash(const struct lb_flow_key *key)
{
	__u32 hash = 0x2545f491U;

	hash = lb_mix(hash, key->saddr.w[0]);
	hash = lb_mix(hash, key->saddr.w[1]);
	hash = lb_mix(hash, key->saddr.w[2]);
	hash = lb_mix(hash, key->saddr.w[3]);
	hash = lb_mix(hash, key->daddr.w[0]);
	hash = lb_mix(hash, key->daddr.w[1]);
	hash = lb_mix(hash, key->daddr.w[2]);
	hash = lb_mix(hash, key->daddr.w[3]);
	hash = lb_mix(hash, (__u32)key->sport << 16 | key->dport);
	hash = lb_mix(hash, key->proto);
	hash ^= hash >> 16;
	hash *= 0x85ebca6bU;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35U;
	return hash ^ (hash >> 16);
}

/* Copies a backend out. Its memory may be given to another entry while we read: then its id differs. */
static always_inline int lb_backend_get(__u32 id, struct lb_backend *out)
{
	struct lb_backend *found = bpf_map_lookup_elem(&ciliate_lb_backends, &id);

	if (!found)
		return 0;
	*out = *found;
	return out->id == id;
}

/* A service as it stands, with at least one backend for this client, or 0. */
static always_inline int lb_service_get(const struct lb_frontend *front, struct lb_service *out)
{
	struct lb_service *found = bpf_map_lookup_elem(&ciliate_lb_services, front);

	if (!found)
		return 0;
	*out = *found;
	return 1;
}

/* The backend of a slot, by a number that is equal for equal clients; 0: none. */
static always_inline __u32 lb_slot_of(const struct lb_service *service, __u32 hash, __u32 local)
{
	struct lb_slot slot = {.service = service->id, .generation = service->generation};
	__u32 count = local ? service->local : service->count, *found;

	if ((service->flags & LB_MAGLEV) && !local) {
		struct lb_table *table = bpf_map_lookup_elem(&ciliate_lb_maglev, &service->id);

		if (table) {
			__u32 index = ((__u64)hash * LB_TABLE) >> 32;

			/* the verifier cannot work out that it is */
			asm volatile("" : "+r"(index));
			return index < LB_TABLE ? table->backends[index] : 0;
		}
	}
	slot.slot = ((__u64)hash * count) >> 32;
	if (local && (service->flags & LB_LOCAL_BEHIND))
		slot.slot += service->count;
	found = bpf_map_lookup_elem(&ciliate_lb_slots, &slot);
	return found ? *found : 0;
}

/* Pick a backend for a new flow. A change of the service in between is met by looking again. Gives the backend's id and
 * copies it to out, or 0 where there is none. */
FUNCTION __u32 lb_pick(const struct lb_frontend *front, struct lb_service *service, __u32 hash, __u32 local,
		       struct lb_backend *out)
{
	__u32 id;
	int i;

	if (!front || !service || !out)
		return 0;
	for (i = 0; i < LB_ATTEMPTS; i++) {
		if (!(local ? service->local : service->count))
			return 0;
		id = lb_slot_of(service, hash, local);
		if (id && lb_backend_get(id, out))
			return id;
		if (!lb_service_get(front, service))
			return 0;
	}
	return 0;
}

/* The backend that a client had, where affinity still holds and the backend is still the service's. */
static always_inline __u32 lb_affine(const struct lb_service *service, const union addr *client, __u32 now,
				     struct lb_backend *out)
{
	struct lb_affinity_key key = {.client = *client, .service = service->id};
	struct lb_affinity *known = bpf_map_lookup_elem(&ciliate_lb_affinity, &key);
	struct lb_member member = {.service = service->id};

	if (!known || now - known->used > service->affinity)
		return 0;
	member.backend = known->backend;
	if (!bpf_map_lookup_elem(&ciliate_lb_members, &member) || !lb_backend_get(member.backend, out))
		return 0;
	known->used = now;
	return member.backend;
}

static always_inline void lb_affine_set(const struct lb_service *service, const union addr *client, __u32 now, __u32 id)
{
	struct lb_affinity_key key = {.client = *client, .service = service->id};
	struct lb_affinity value = {.backend = id, .used = now};

	bpf_map_update_elem(&ciliate_lb_affinity, &key, &value, BPF_ANY);
}

#endif
