"""Ways to the members of a cluster: fail-over, tokens, what an error of gRPC means.

Calls go by channels of grpc.aio, long streams by connections of our own (`http2` says why).

One member is used at a time; a failed call moves on to the next. A call is repeated where that can do no harm: the
caller says so, or the error says that the first attempt never reached a server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc import StatusCode, aio

from ciliate.backoff import Backoff
from ciliate.config import ConfigError
from ciliate.kvstore import CompactedError, KvstoreError, LeaseExpiredError
from ciliate_kvstore.etcdv3 import messages as own_messages
from ciliate_kvstore.etcdv3.http2 import Follows
from ciliate_kvstore.etcdv3.settings import Endpoint, Settings
from ciliate_kvstore.etcdv3.wires import Wires

log = logging.getLogger(__name__)
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # newer releases give a ping a minute, whatever the line above says: a store that hangs must be noticed
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # a proxy for the web must not carry what etcd says
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"
CONNECT_PATIENCE = 2.0
"""Seconds after which a call is given up where no member takes connections: callers know better how to wait."""
RETRY_MIN = 0.02
RETRY_MAX = 1.0
RENEW_INTERVAL = 1.0
"""Seconds between two looks at the files of certificates and password, while calls fail."""
_UNSENT = ("failed to connect", "connections to all backends failing", "no leader", "too many requests")
"""Parts of messages that say that nothing was done."""
_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not accepted, see ca_file, server_name and its dates: ",
    "_ALERT_": "the server does not accept this client's certificate, see cert_file, key_file and its dates: ",
    "WRONG_VERSION_NUMBER": "no TLS is spoken there, see address (https or http): ",
}
"""What people have to look at, by parts of what the library says."""
_TOKEN = ("invalid auth token", "revision of auth store is old", "auth: token")


class Connection:
    """``problem`` is why the last call failed, or empty; ``losses`` counts them."""

    messages: Any = own_messages
    """The protocol's classes by name, that requests are made of."""

    def __init__(self, settings: Settings, renew: Callable[[], Settings] | None = None) -> None:
        """``renew`` reads the files that the options name again; ConfigError where that fails."""
        self.problem = ""
        self.losses = 0
        self.settings = settings
        self._renew = renew
        self._look_again = 0.0
        self._retired: list[Any] = []
        self._wires = Wires(settings)
        self._channels: dict[Endpoint, Any] = {}
        self._methods: dict[tuple[Endpoint, str], Any] = {}
        self._turn = 0
        self._token = ""
        self._closed = False

    @property
    def endpoint(self) -> Endpoint:
        """The member in use."""
        endpoints = self.settings.endpoints
        return endpoints[self._turn % len(endpoints)]

    async def close(self) -> None:
        """End every call."""
        self._closed = True
        self._retire()
        self._wires.close()
        for channel in self._retired:
            await channel.close()
        self._retired.clear()

    def _retire(self) -> None:
        """Use new channels from now on. The old ones stay, because watches on them may well go on."""
        self._retired += self._channels.values()
        self._channels.clear()
        self._methods.clear()
        self._wires.retire(self.settings)

    async def _renewed(self) -> bool:
        """Whether certificates, user or password on disk are other ones than those in use; then those are used."""
        settings, now = self.settings, time.monotonic()
        secret = settings.username or any(endpoint.tls for endpoint in settings.endpoints)
        if self._renew is None or not secret or now < self._look_again:
            return False
        self._look_again = now + RENEW_INTERVAL
        try:
            fresh = await asyncio.to_thread(self._renew)
        except ConfigError as error:
            log.warning("certificates or password cannot be read again, the old ones are used on: %s", error)
            return False
        if fresh == settings or self._closed:
            return False
        log.info("certificates or password on disk are new, and used from now on")
        self.settings, self._token = fresh, ""
        self._retire()
        return True

    def _channel(self, endpoint: Endpoint) -> Any:
        if self._closed:
            raise KvstoreError("etcd: the store is stopped")
        if endpoint not in self._channels:
            self._channels[endpoint] = self._open(endpoint)
        return self._channels[endpoint]

    def _open(self, endpoint: Endpoint) -> Any:
        credentials, options = self._credentials(endpoint)
        if credentials is None:
            return aio.insecure_channel(endpoint.target, options=options)
        return aio.secure_channel(endpoint.target, credentials, options=options)

    def _credentials(self, endpoint: Endpoint) -> tuple[Any, list[tuple[str, Any]]]:
        """Credentials of a channel, None without TLS, and its options."""
        settings = self.settings
        options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
        if not endpoint.tls:
            return None, options
        if settings.server_name:
            options.append(("grpc.ssl_target_name_override", settings.server_name))
        return grpc.ssl_channel_credentials(settings.ca, settings.key, settings.cert), options

    def _method(self, endpoint: Endpoint, path: str) -> Any:
        key = (endpoint, path)
        if key not in self._methods or self._closed:
            name = path.rpartition("/")[2]
            two_way = name in ("LeaseKeepAlive", "Watch")  # a watch that takes more than one request
            make = getattr(self._channel(endpoint), "stream_stream" if two_way else "unary_unary")
            request, answer = own_messages.TYPES[path]
            self._methods[key] = make(
                path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
            )
        return self._methods[key]

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    async def authenticate(self) -> None:
        """Get a new token, where the options have a user; KvstoreError where it is refused."""
        if not self.settings.username:
            return
        self._token = ""
        while not self._token:
            settings = self.settings
            request = self.messages.AuthenticateRequest(name=settings.username, password=settings.password)
            try:
                token = (await self.call(AUTHENTICATE, request, again=True)).token
                if settings is self.settings:  # else it is of a user or password that is not used any more
                    self._token = token
            except KvstoreError:
                if not await self._renewed():
                    raise

    async def log_in(self) -> None:
        """Have a token, where one is needed."""
        if self.settings.username and not self._token:
            await self.authenticate()

    async def call(self, path: str, request: Any, *, again: bool) -> Any:
        """Call a method; ``again`` says that doing it twice does no harm. KvstoreError where no member does it."""
        began = time.monotonic()
        deadline = began + self.settings.timeout
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX)
        fresh_token = False
        if path != AUTHENTICATE:
            await self.log_in()
        while True:
            endpoint = self.endpoint
            try:
                answer = await self._attempt(endpoint, path, request, deadline)
            except aio.AioRpcError as error:
                self._failed(endpoint, error)
                undone = again or _is_unsent(error) or _is_token(error)
                if path != AUTHENTICATE and await self._renewed() and undone:
                    await self.log_in()
                    continue
                if _is_token(error) and self.settings.username and not fresh_token:
                    fresh_token = True
                    await self.authenticate()
                    continue
                if not (_moves_on(error) and (again or _is_unsent(error))):
                    raise self.explained(endpoint, error) from error
                until = min(deadline, began + CONNECT_PATIENCE) if _is_unsent(error) else deadline
                if time.monotonic() + waiting.next() >= until:
                    raise self.explained(endpoint, error) from error
                await self._pause(waiting)
            else:
                self.problem = ""
                return answer

    async def _pause(self, waiting: Backoff) -> None:
        # the first round over all members is quick, then they get time
        if waiting.attempt >= len(self.settings.endpoints):
            await waiting.wait()

    async def _attempt(self, endpoint: Endpoint, path: str, request: Any, deadline: float) -> Any:
        several = len(self.settings.endpoints) > 1
        # a member that does not answer must leave time for another one
        limit = self.settings.timeout / 2 if several else self.settings.timeout
        left = max(min(limit, deadline - time.monotonic()), 0.001)
        try:
            return await self._method(endpoint, path)(request, timeout=left, metadata=self._metadata())
        except (aio.UsageError, asyncio.InvalidStateError) as error:
            raise KvstoreError(f"etcd: {endpoint.name}: {error or 'the connection was closed'}") from error
        except asyncio.CancelledError:
            if self._closed:
                raise KvstoreError("etcd: the store is stopped") from None
            raise

    async def ask(self, endpoint: Endpoint, path: str, request: Any, timeout: float) -> Any:
        """Call a method of one member, once. KvstoreError where that fails."""
        try:
            return await self._method(endpoint, path)(request, timeout=timeout, metadata=self._metadata())
        except aio.AioRpcError as error:
            raise self.explained(endpoint, error) from error

    async def stream(self, path: str) -> tuple[Endpoint, Any]:
        """Open a stream to the member in use; tell `stream_failed` or `lost` how it ends."""
        await self.log_in()
        endpoint = self.endpoint
        return endpoint, self._method(endpoint, path)(metadata=self._stream_metadata())

    async def follow(self, path: str, request: Any) -> tuple[Endpoint, Follows]:
        """Open a stream that answers one request for long; KvstoreError where the member is not reached."""
        await self.log_in()
        endpoint, decode = self.endpoint, own_messages.TYPES[path][1].FromString
        try:
            wire = await self._wires.to(endpoint)
            return endpoint, wire.stream(path, self._stream_metadata(), request.SerializeToString(), decode)
        except aio.AioRpcError as error:
            raise await self.stream_failed(endpoint, error) from error

    def _stream_metadata(self) -> tuple[tuple[str, str], ...]:
        # a member without leader knows nothing of changes: it then ends the stream
        return (*self._metadata(), ("hasleader", "true"))

    async def stream_failed(self, endpoint: Endpoint, error: aio.AioRpcError) -> KvstoreError:
        """What to raise where a stream broke; a token that has run out is replaced."""
        self._failed(endpoint, error)
        await self._renewed()
        if _is_token(error):
            await self.authenticate()
        return self.explained(endpoint, error)

    def _failed(self, endpoint: Endpoint, error: aio.AioRpcError) -> None:
        if _moves_on(error):
            self.problem = f"{endpoint.name}: {_text(error)}"
            self.losses += 1
            if endpoint == self.endpoint:
                self._turn += 1

    async def refused(self, endpoint: Endpoint, reason: str) -> KvstoreError:
        """The server ended a watch; where a token may be the reason a new one is got."""
        if self.settings.username:
            await self.authenticate()
        return KvstoreError(f"etcd: {endpoint.name}: the watch was ended: {reason or 'no reason given'}")

    def lost(self, endpoint: Endpoint, reason: str) -> KvstoreError:
        """A stream ended without an error of gRPC: note it, and what to raise."""
        self.problem = f"{endpoint.name}: {reason}"
        self.losses += 1
        return KvstoreError(f"etcd: {self.problem}")

    @staticmethod
    def explained(endpoint: Endpoint, error: aio.AioRpcError) -> KvstoreError:
        """The error that a caller understands."""
        text = _text(error)
        if "requested lease not found" in text:
            return LeaseExpiredError("the lease is unknown or has run out")
        if "required revision has been compacted" in text:
            return CompactedError(0)
        if "user name is empty" in text:
            text = "the store wants a user: set the options username and password"
        return KvstoreError(f"etcd: {endpoint.name}: {text}")


def _text(error: aio.AioRpcError) -> str:
    code = error.code()
    text = (error.details() or "").removeprefix("etcdserver: ")
    if code == StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    hint = next((hint for part, hint in _HINTS.items() if part in text), "")
    return hint + (text or str(code.name))


def _is_token(error: aio.AioRpcError) -> bool:
    return error.code() == StatusCode.UNAUTHENTICATED or any(part in (error.details() or "") for part in _TOKEN)


def _is_unsent(error: aio.AioRpcError) -> bool:
    text = error.details() or ""
    return any(part in text for part in _UNSENT)


def _moves_on(error: aio.AioRpcError) -> bool:
    """Whether another member may do better."""
    if error.code() in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL, StatusCode.UNKNOWN):
        return True
    return error.code() == StatusCode.RESOURCE_EXHAUSTED and "too many requests" in (error.details() or "")
