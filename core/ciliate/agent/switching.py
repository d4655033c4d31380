"""Another provider in place of the running one: start the new one, move the state, let everybody use it, stop the old.

Where anything fails the old one stays in use. A switch lasts until the agent ends; the configuration decides what the
next one starts with.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from ciliate.config import PROVIDER_OPTIONS, AgentConfig, store_options
from ciliate.identity import is_local, is_reserved
from ciliate.identity.backend import IdentityBackend
from ciliate.ipam import RESERVED_OWNERS, Address, Ipam
from ciliate.kvstore import MAX_OPS, Kvstore, Put
from ciliate.plugin import PluginError, UnknownProviderError

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

Move = Callable[[Any, Any], Awaitable[None]]
KEYS = "cilium/"
"""What a cluster has in a store begins so."""


class Switching:
    """The switches of one agent, one at a time."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = asyncio.Lock()

    async def switch(self, kind: str, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Make provider ``name`` the active one of ``kind``; PluginError says what stood in the way.

        ``options`` go before those of the configuration.
        """
        moves: dict[str, Move] = {
            "kvstore": self._move_store,
            "identity": self._move_identities,
            "ipam": self._move_addresses,
            "loader": self._move_loader,
            "masquerade": lambda old, new: self._agent.masquerading.move(name, new),
        }
        if kind not in moves:
            choices = f"can be: {', '.join(moves)}"
            raise UnknownProviderError(f"kind {kind!r}: cannot be switched while the agent runs; {choices}")
        agent = self._agent
        async with self._lock:
            config = self._with_options(name, options)
            context = replace(agent.context(), config=config)
            await agent.plugins.switch(kind, name, context, moves[kind])
            changed = {PROVIDER_OPTIONS[kind]: name, "plugins": config.plugins, "kvstore_opt": config.kvstore_opt}
            agent.config = msgspec.structs.replace(agent.config, **changed)
            if kind == "kvstore":
                agent.controllers.trigger("kvstore-status")  # the status is about the store that is in use

    def _with_options(self, name: str, options: Mapping[str, Any]) -> AgentConfig:
        """The configuration with options of one provider. Those that ``kvstore-opt`` has come into its section."""
        config = self._agent.config
        if not options:
            return config
        sections = store_options(config.kvstore_opt)
        given = {key.replace("-", "_"): value for key, value in {**sections.pop(name, {}), **options}.items()}
        plugins = {**config.plugins, name: {**config.plugins.get(name, {}), **given}}
        rest = {f"{provider}.{key}": value for provider, found in sections.items() for key, value in found.items()}
        text = msgspec.json.encode(rest).decode() if rest else ""
        return msgspec.structs.replace(config, plugins=plugins, kvstore_opt=text)

    async def _move_store(self, old: Kvstore, new: Kvstore) -> None:
        """Copy every key, use the new store, copy what was written meanwhile, and begin its users anew."""
        agent = self._agent
        copied = await self._copy(old, new, 0)
        agent.handles[Kvstore].bind(new)
        agent.local_keys.rebind()
        try:
            await self._copy(old, new, copied)
            await agent.plugins.restart("identity", agent.context(), self._move_identities)
        except BaseException:
            agent.handles[Kvstore].bind(old)
            agent.local_keys.rebind()
            raise

    async def _copy(self, old: Kvstore, new: Kvstore, after: int) -> int:
        """Copy what the new store lacks, and what was written after a revision. Returns the revision.

        Keys under a lease are left to their owners. Where both are one store, by another client, nothing is written.
        """
        snapshot = await old.get_prefix("")
        there = {item.key: item.value for item in (await new.get_prefix(KEYS)).items}
        plain = [item for item in snapshot.items if item.mod_revision > after and not item.lease]
        wanted = [item for item in plain if (there.get(item.key) != item.value if after else item.key not in there)]
        items = [Put(item.key, item.value) for item in wanted]
        for start in range(0, len(items), MAX_OPS):
            await new.put_many(items[start : start + MAX_OPS])
        return snapshot.revision

    async def _move_identities(self, old: IdentityBackend, new: IdentityBackend) -> None:
        """Take up in the new backend every identity that an endpoint has; its number must stay."""
        agent = self._agent
        for endpoint in agent.endpoints.endpoints():
            number = endpoint.identity
            identity = None if is_reserved(number) or is_local(number) else old.get(number)
            if identity is None:
                continue
            given = await new.allocate(identity.labels, number)
            if given.id != number:
                change = f"identity {number} of endpoint {endpoint.id} would become {given.id}"
                raise PluginError(f"{change}; restart the agent for that")
        agent.handles[IdentityBackend].bind(new)
        agent.follow_identities()

    async def _move_addresses(self, old: Ipam, new: Ipam) -> None:
        """Claim in the new provider every address that is in use."""
        if new.router != old.router:
            raise PluginError(f"the router would be {new.router.addresses}, and pods know it as {old.router.addresses}")
        held: dict[str, list[Address]] = defaultdict(list)
        for address, owner in old.owners().items():
            held[owner].append(address)
        for owner in held.keys() - RESERVED_OWNERS:
            await new.claim(owner, held[owner])
        self._agent.handles[Ipam].bind(new)

    async def _move_loader(self, old: Any, new: Any) -> None:
        await self._agent.datapath.switch_loader(new)
