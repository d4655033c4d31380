"""What is asked before an await may be another thing behind it: the parts of the agent where that is so. Tier unit."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.agent import daemon
from ciliate.agent.daemon import Agent
from ciliate.agent.masquerading import Masquerading
from ciliate.config import AgentConfig
from ciliate.datapath import devices
from ciliate.identity import Identity
from ciliate.kvstore import LeaseExpiredError
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.labels import LabelSet
from ciliate.plugin import PluginManager
from ciliate_kvstore.etcdv3 import wires as wires_module
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.settings import Endpoint, Settings
from ciliate_kvstore.etcdv3.wires import Wires
from ciliate_kvstore.identity_backend import KvstoreIdentities


def anything(**members: Any) -> Any:
    """An object with these members."""
    return SimpleNamespace(**members)


async def test_a_plan_of_masquerading_is_made_while_nodes_come(tmp_path: Any) -> None:
    async def look(function: Any, *arguments: Any) -> dict[str, Any]:
        masquerading._nodes_changed([], [])
        return {}

    registry = anything(others={})
    agent = anything(
        config=AgentConfig(state_dir=str(tmp_path)),
        membership=anything(registry=registry),
        datapath=anything(programs=anything(run=look)),
        balancing=anything(reserved_ports=tuple),
    )
    masquerading = Masquerading(agent)
    assert (await masquerading._make_plan()).direct


async def test_addresses_of_the_node_are_those_of_the_last_look(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ip_network("192.0.2.1/32"), ip_network("192.0.2.2/32")
    looks, held, go = [{one, two}, {one}], asyncio.Event(), asyncio.Event()

    async def reserve(*arguments: Any) -> None:
        if not held.is_set():
            held.set()
            await go.wait()

    monkeypatch.setattr(devices, "node_prefixes", lambda: looks.pop(0))
    monkeypatch.setattr(devices, "delivered_prefixes", set)
    monkeypatch.setattr(devices, "group_prefixes", set)
    monkeypatch.setattr(daemon, "reserve_node", reserve)
    agent = Agent(AgentConfig(state_dir=str(tmp_path)), PluginManager.load())
    agent.ipam = anything()
    first = asyncio.ensure_future(agent._publish_node())
    await held.wait()
    second = asyncio.ensure_future(agent._publish_node())
    await asyncio.wait([second], timeout=0.1)
    go.set()
    await asyncio.gather(first, second)
    assert agent.node_prefixes == {one}
    assert agent.ipcache.get(two) is None


async def test_services_follow_addresses_that_somebody_else_noticed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod on another plugin's device has the node's addresses read too."""
    refreshed = []

    async def note() -> None:
        refreshed.append(set(agent.node_prefixes))

    async def nothing(*arguments: Any) -> None:
        return None

    monkeypatch.setattr(devices, "node_prefixes", lambda: {ip_network("192.0.2.1/32")})
    monkeypatch.setattr(devices, "delivered_prefixes", set)
    monkeypatch.setattr(devices, "group_prefixes", set)
    monkeypatch.setattr(daemon, "reserve_node", nothing)
    monkeypatch.setattr(daemon, "node_mtu", lambda config: None)
    agent = Agent(AgentConfig(state_dir=str(tmp_path)), PluginManager.load())
    agent.ipam, agent.realizer = anything(), anything(realize=nothing)
    agent.balancing = anything(cluster=anything(refresh=note))
    await agent._publish_node()
    await agent._refresh_node()
    await agent._refresh_node()
    assert refreshed == [agent.node_prefixes]


class OldLease:
    """Ends while it is asked, when the next one is there already."""

    id = 1

    def __init__(self, keys: LocalKeys, following: Any) -> None:
        self._keys, self._following = keys, following

    async def keys(self) -> set[str]:
        self._keys._lease = self._following
        raise LeaseExpiredError("lease 1 is over")

    keep_alive = keys


async def test_the_end_of_an_old_lease_is_not_that_of_the_next() -> None:
    following: Any = anything(id=2)
    keys = LocalKeys(anything())
    keys._lease = OldLease(keys, following)  # type: ignore[assignment]
    await keys._compare()
    assert keys._lease is following


async def test_an_identity_whose_key_goes_again_while_it_is_written_is_written_again() -> None:
    class Store:
        """Somebody removes the key as soon as it is there."""

        async def transaction(self, *arguments: Any) -> Any:
            backend._missing(["300"])

    store: Any = Store()
    backend = KvstoreIdentities(store, "n1")
    backend._known[300] = Identity(300, LabelSet.parse(["k8s:app=a"]))
    backend._references[300] = 1
    backend._broken[300] = False
    await backend._mend_one(300)
    assert 300 in backend._broken


def settings(password: str) -> Settings:
    return Settings(endpoints=(Endpoint("a", "127.0.0.1:1", False),), username="u", password=password)


async def test_a_token_is_of_the_password_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def call(path: str, request: Any, *, again: bool) -> Any:
        asked.append(request.password)
        if len(asked) == 1:
            connection.settings, connection._token = settings("new"), ""
        return anything(token=f"token of {request.password}")

    connection = Connection(settings("old"))
    monkeypatch.setattr(connection, "call", call)
    await connection.authenticate()
    assert (asked, connection._token) == (["old", "new"], "token of new")


async def test_a_connection_with_old_certificates_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wire:
        """One connection."""

        closed = False

        def fail(self, reason: str) -> None:
            self.closed = True

    made: list[Wire] = []

    class Loop:
        async def create_connection(self, *arguments: Any, **options: Any) -> tuple[None, Wire]:
            made.append(Wire())
            if len(made) == 1:
                kept.retire(settings("new"))
            return None, made[-1]

    kept = Wires(settings("old"))
    monkeypatch.setattr(wires_module.asyncio, "get_running_loop", Loop)
    wire: Any = await kept.to(settings("old").endpoints[0])
    assert wire is made[1]
    assert [item.closed for item in made] == [True, False]
