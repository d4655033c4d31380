"""Connections for streams: one to each member, made when the first stream wants it."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import defaultdict
from typing import Any

from grpc import StatusCode

from ciliate_kvstore.etcdv3.http2 import Wire, rpc_error
from ciliate_kvstore.etcdv3.settings import Endpoint, Settings

CONNECT_TIMEOUT = 2.0


class Wires:
    """All streams to a member share one connection."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wires: dict[Endpoint, Wire] = {}
        self._retired: list[Wire] = []
        self._turns: defaultdict[Endpoint, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._closed = False

    async def to(self, endpoint: Endpoint) -> Wire:
        """The connection to a member. AioRpcError where it cannot be had."""
        async with self._turns[endpoint]:
            wire = self._wires.get(endpoint)
            while wire is None or wire.closed:
                settings = self._settings
                wire = await self._open(endpoint, settings)
                if settings is self._settings:
                    self._wires[endpoint] = wire
                    break
                wire.fail("made with certificates that are not used any more")
            if self._closed:
                wire.fail("the store is stopped")
            return wire

    def retire(self, settings: Settings) -> None:
        """Make new connections from now on, with these settings. The old ones stay while there is a stream on them."""
        self._settings = settings
        self._retired = [wire for wire in (*self._retired, *self._wires.values()) if wire.retire()]
        self._wires.clear()

    def close(self) -> None:
        """End every connection; those that are being made follow."""
        self._closed = True
        for wire in (*self._retired, *self._wires.values()):
            wire.fail("the store is stopped")

    async def _open(self, endpoint: Endpoint, settings: Settings) -> Wire:
        host, _, port = endpoint.target.rpartition(":")
        host, scheme = host.strip("[]"), "https" if endpoint.tls else "http"
        options: dict[str, Any] = {}
        try:
            if endpoint.tls:
                options = {"ssl": context(settings), "server_hostname": settings.server_name or host}
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, wire = await asyncio.get_running_loop().create_connection(
                    lambda: Wire(settings.server_name or endpoint.target, scheme), host, int(port), **options
                )
        except TimeoutError:
            raise rpc_error(StatusCode.UNAVAILABLE, "failed to connect: no answer in time") from None
        except OSError as error:  # and every error of TLS
            raise rpc_error(StatusCode.UNAVAILABLE, f"failed to connect: {error.strerror or error}") from error
        return wire


def context(settings: Settings) -> ssl.SSLContext:
    """What TLS is told. OSError (ssl.SSLError) where certificates cannot be read."""
    made = ssl.create_default_context(cadata=settings.ca.decode("ascii", errors="replace") if settings.ca else None)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["h2"])
    if settings.cert and settings.key:
        _load_pair(made, settings.cert + b"\n" + settings.key)
    return made


def _load_pair(made: ssl.SSLContext, pair: bytes) -> None:
    """Python reads certificates of clients from files alone: this one is in memory, and gone afterwards."""
    descriptor = os.memfd_create("ciliate-etcd", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(pair)
        made.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
