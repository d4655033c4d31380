"""Between the store's types and the protocol's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ciliate.kvstore import MAX_OPS, Batch, Compare, Event, KeyValue, KvstoreError, Op, Put

_TARGETS = {"version": 0, "create_revision": 1, "mod_revision": 2, "value": 3, "lease": 4}
_EVERYTHING = b"\0"


def range_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with ``prefix``."""
    for index in range(len(prefix) - 1, -1, -1):
        if prefix[index] < 0xFF:
            return prefix[:index] + bytes([prefix[index] + 1])
    return _EVERYTHING


class Convert:
    """Knows the namespace that is put before every key and taken off again.

    ``messages`` has the protocol's classes by name: ours, or those of another client.
    """

    def __init__(self, namespace: str, messages: Any) -> None:
        self._messages = messages
        self._namespace = namespace.encode()
        self._skip = len(self._namespace)

    def key(self, key: str) -> bytes:
        """A key as the server has it."""
        return self._namespace + key.encode()

    def span(self, prefix: str) -> tuple[bytes, bytes]:
        """First key and end of a range."""
        start = self.key(prefix)
        return start or _EVERYTHING, range_end(start)

    def text(self, key: bytes) -> str:
        """A key as callers know it."""
        return key[self._skip :].decode(errors="surrogateescape")

    def items(self, kvs: Any) -> list[KeyValue]:
        """Keys of an answer."""
        skip = self._skip
        return [
            KeyValue(
                kv.key[skip:].decode(errors="surrogateescape"),
                kv.value,
                kv.mod_revision,
                kv.create_revision,
                kv.version,
                kv.lease,
            )
            for kv in kvs
        ]

    def batch(self, events: Sequence[Any], revision: int) -> Batch:
        """Events of a watch."""
        skip, found = self._skip, []
        for event in events:
            kv = event.kv
            kind = "delete" if event.type else "put"
            key = kv.key[skip:].decode(errors="surrogateescape")
            found.append(Event(kind, key, kv.value, kv.mod_revision, kv.lease))  # type: ignore[arg-type]
        return Batch(found, revision)

    def transaction(self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> Any:
        """A transaction; KvstoreError where it is too large for a server with its defaults."""
        largest = max(len(compare), len(success), len(failure))
        if largest > MAX_OPS:
            raise KvstoreError(f"etcd: a transaction of {largest} operations, expected at most {MAX_OPS}")
        return self._messages.TxnRequest(
            compare=[self._compare(item) for item in compare],
            success=[self._operation(item) for item in success],
            failure=[self._operation(item) for item in failure],
        )

    def _compare(self, condition: Compare) -> Any:
        start, end = self.span(condition.key) if condition.prefix else (self.key(condition.key), b"")
        union = {condition.target: condition.expected}
        return self._messages.Compare(target=_TARGETS[condition.target], key=start, range_end=end, **union)

    def _operation(self, op: Op) -> Any:
        if isinstance(op, Put):
            put = self._messages.PutRequest(key=self.key(op.key), value=op.value, lease=op.lease)
            return self._messages.RequestOp(request_put=put)
        start, end = self.span(op.key) if op.prefix else (self.key(op.key), b"")
        gone = self._messages.DeleteRangeRequest(key=start, range_end=end)
        return self._messages.RequestOp(request_delete_range=gone)
