"""Takes keys from the store for good, also in the eyes of those who hold them though the store lacks them."""

from __future__ import annotations

from collections.abc import Mapping

from ciliate.kvstore import MAX_OPS, Delete, Kvstore, Put


async def remove_for_all(store: Kvstore, items: Mapping[str, bytes]) -> None:
    """Write each key without a lease and delete it. KvstoreError where the store fails.

    A watcher that holds a key whose lease ran out waits for its owner; a deletion of a key without a lease is one by
    intention, which it follows at once.
    """
    keys = list(items)
    for start in range(0, len(keys), MAX_OPS):
        some = keys[start : start + MAX_OPS]
        await store.transaction([], [Put(key, items[key]) for key in some])
        await store.transaction([], [Delete(key) for key in some])
