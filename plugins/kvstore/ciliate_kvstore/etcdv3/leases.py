"""Leases of etcd. Times to live are whole seconds there, and at least one and a half elections (2 s by default)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from grpc import aio

from ciliate.kvstore import KvstoreError, LeaseExpiredError
from ciliate.kvstore.metrics import measured
from ciliate_kvstore.etcdv3.connection import Connection

KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
TIME_TO_LIVE = "/etcdserverpb.Lease/LeaseTimeToLive"
REVOKE = "/etcdserverpb.Lease/LeaseRevoke"


class EtcdLease:
    """A lease. It is not kept alive by itself: its owner does that."""

    def __init__(self, connection: Connection, number: int, ttl: float, text: Any) -> None:
        self.id = number
        self.ttl = ttl
        self._connection = connection
        self._text = text

    async def keep_alive(self) -> None:
        """Begin its time anew; LeaseExpiredError where it has run out."""
        with measured("keepalive"):
            try:
                async with asyncio.timeout(self._connection.settings.timeout):
                    answer = await self._beat()
            except TimeoutError:
                raise self._connection.lost(self._connection.endpoint, "no answer in time") from None
            if answer.TTL <= 0:
                raise LeaseExpiredError(f"lease {self.id:x} is unknown or has run out")
            self.ttl = float(answer.TTL)

    async def _beat(self) -> Any:
        """One beat on a stream of its own: beats are minutes apart, so that an idle stream would only cost."""
        endpoint, call = await self._connection.stream(KEEP_ALIVE)
        try:
            await call.write(self._connection.messages.LeaseKeepAliveRequest(ID=self.id))
            answer = await call.read()
        except aio.AioRpcError as error:
            raise await self._connection.stream_failed(endpoint, error) from error
        except asyncio.InvalidStateError as error:
            # how grpc.aio says that the stream was over before the write
            raise await stream_error(self._connection, endpoint, call) from error
        finally:
            call.cancel()
        if answer is aio.EOF:
            raise await stream_error(self._connection, endpoint, call)
        return answer

    async def revoke(self) -> None:
        """End it now, with its keys; nothing happens where it has ended before."""
        with measured("revoke"), contextlib.suppress(LeaseExpiredError):
            await self._connection.call(REVOKE, self._connection.messages.LeaseRevokeRequest(ID=self.id), again=True)

    async def keys(self) -> set[str]:
        """The keys under it; LeaseExpiredError where it has run out."""
        with measured("lease"):
            request = self._connection.messages.LeaseTimeToLiveRequest(ID=self.id, keys=True)
            answer = await self._connection.call(TIME_TO_LIVE, request, again=True)
            if answer.TTL <= 0:
                raise LeaseExpiredError(f"lease {self.id:x} is unknown or has run out")
            return {self._text(key) for key in answer.keys}


async def stream_error(connection: Connection, endpoint: Any, call: Any) -> KvstoreError:
    """What to raise where a stream is over: its status if that is an error."""
    code = await call.code()
    details = await call.details()
    error = aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details)
    if code.value[0]:
        return await connection.stream_failed(endpoint, error)
    return connection.lost(endpoint, "the stream ended")
