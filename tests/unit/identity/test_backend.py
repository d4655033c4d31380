"""Identities over a store: healing, collection; prefix identities; the label filter."""

from __future__ import annotations

import asyncio
import contextlib
import json
from ipaddress import ip_network
from pathlib import Path

import pytest

from ciliate.config import ConfigError, load_config
from ciliate.identity import LOCAL_BASE, Identity
from ciliate.identity.filter import LabelFilter, read_prefixes
from ciliate.identity.local import LocalIdentities, cidr_labels
from ciliate.labels import NAMESPACE, LabelSet, parse_label
from ciliate_kvstore.identity_backend import MASTERS, KvstoreIdentities
from ciliate_kvstore.sqlite import SqliteStore

A, B = LabelSet.parse(["k8s:app=a"]), LabelSet.parse(["k8s:app=b"])


@contextlib.asynccontextmanager
async def node(path: Path, name: str = "n1"):
    store = SqliteStore(path)
    await store.start()
    backend = KvstoreIdentities(store, name)
    await backend.start()
    try:
        yield backend, store
    finally:
        await backend.stop()
        await store.stop()


async def test_a_deleted_key_of_an_identity_in_use_is_written_again(tmp_path: Path) -> None:
    async with node(tmp_path / "kv.db") as (backend, store):
        identity = await backend.allocate(A)
        key = f"{MASTERS}{identity.id}"
        revision = (await store.get_prefix("")).revision
        await store.delete(key)
        async with asyncio.timeout(10):
            async for events in store.watch_prefix(key, revision + 1):
                if any(event.kind == "put" for event in events):
                    break
        assert backend.get(identity.id) == identity
        assert (await backend.allocate(A)).id == identity.id


async def test_collection_takes_what_nobody_uses_and_nothing_else(tmp_path: Path) -> None:
    async with node(tmp_path / "kv.db") as (backend, _), node(tmp_path / "kv.db", "n2") as (other, _):
        used, unused = await backend.allocate(A), await backend.allocate(B)
        shared = await other.allocate(A)
        assert shared.id == used.id
        gone: asyncio.Queue[int] = asyncio.Queue()

        def observe(added: list[Identity], removed: list[int]) -> None:
            for number in removed:
                gone.put_nowait(number)

        other.subscribe(observe)
        await backend.release(used.id)
        await backend.release(unused.id)
        assert await backend.collect() == 1
        assert await asyncio.wait_for(gone.get(), 10) == unused.id
        assert other.get(used.id) == used
        assert other.get(unused.id) is None


def test_prefix_identities_keep_their_numbers_over_a_restart() -> None:
    first = LocalIdentities()
    one, two = first.acquire(ip_network("10.0.0.0/8")), first.acquire(ip_network("fd00::/8"))
    assert one.id > LOCAL_BASE < two.id != one.id
    second = LocalIdentities()
    second.restore(first.snapshot())
    fresh = second.acquire(ip_network("192.0.2.0/24"))
    assert fresh.id not in (one.id, two.id)
    assert second.acquire(ip_network("fd00::/8")).id == two.id
    assert second.acquire(ip_network("10.0.0.0/8")).id == one.id


def test_prefix_references_are_counted() -> None:
    local, prefix = LocalIdentities(), ip_network("10.0.0.0/8")
    number = local.acquire(prefix).id
    local.acquire(prefix)
    assert local.release(prefix) is None
    assert local.release(prefix) == number
    assert local.release(prefix) is None
    assert local.get(number) is None


@pytest.mark.parametrize("data", [{"10.0.0.0/8": 5}, {"10.0.0.0/8": "x"}, {"no prefix": LOCAL_BASE + 1}])
def test_a_damaged_snapshot_is_refused(data: dict) -> None:
    with pytest.raises(ValueError, match=r"expected a local number|no prefix"):
        LocalIdentities().restore(data)


@pytest.mark.parametrize(
    ("prefix", "present", "count"),
    [
        ("10.1.0.0/16", ["cidr:0.0.0.0/0", "cidr:10.0.0.0/8", "cidr:10.1.0.0/16", "reserved:world"], 18),
        ("0.0.0.0/0", ["cidr:0.0.0.0/0", "reserved:world"], 2),
        ("2001:db8::/32", ["cidr:2001-db8--0/32", "cidr:0--0/0", "reserved:world"], 34),
    ],
)
def test_labels_of_a_prefix(prefix: str, present: list[str], count: int) -> None:
    labels = cidr_labels(ip_network(prefix))
    assert set(present) <= set(labels.strings())
    assert len(labels) == count


FILTERS = [
    ("", "k8s:app", True),
    ("", "k8s:io.kubernetes.pod.namespace", True),
    ("", "k8s:io.kubernetes.other", False),
    ("", "k8s:io.cilium.k8s.namespace.labels.team", True),
    ("", "k8s:io.cilium.k8s.policy.serviceaccount", True),
    ("", "k8s:pod-template-hash", False),
    ("", "k8s:controller-revision-hash", False),
    ("", "k8s:statefulset.kubernetes.io/pod-name", False),
    ("", "k8s:app.kubernetes.io/name", True),
    ("", "k8s:myapp.kubernetes.io/name", False),
    ("", "k8s:annotation.cilium.io/x", False),
    ("!build", "k8s:build-id", False),
    ("!build", "k8s:app", True),
    ("app", "k8s:app", True),
    ("app", "k8s:version", False),
    ("app", "k8s:io.kubernetes.pod.namespace", True),
    ("app.kubernetes.io/name", "k8s:app.kubernetes.io/name", True),
    ("container:app", "k8s:app", False),
    (r"!build\.example\.org", "k8s:build.example.org/id", False),
    (r"!build.example", "k8s:buildXexample", True),
    ("!(build|job)-[0-9]+$", "k8s:job-17", False),
    ("!(build|job)-[0-9]+$", "k8s:job-17a", True),
    (r"k8s:app\.kubernetes\.io/name", "k8s:app.kubernetes.io/name", True),
]


@pytest.mark.parametrize(("text", "label", "kept"), FILTERS)
def test_label_filter(text: str, label: str, kept: bool) -> None:
    assert LabelFilter(text).keeps(parse_label(label)) == kept


@pytest.mark.parametrize(
    ("prefixes", "kept"),
    [
        ([], {"app", "pod-template-hash", NAMESPACE}),
        ([{"prefix": "app", "invert": True}], {"pod-template-hash", NAMESPACE}),
        ([{"prefix": "app"}], {"app", NAMESPACE}),
        ([{"prefix": "app", "source": "container"}], {NAMESPACE}),
        ([{"prefix": NAMESPACE, "invert": True}], {"app", "pod-template-hash"}),
    ],
)
def test_prefixes_of_a_file_stand_in_for_the_default_set(tmp_path: Path, prefixes: list, kept: set[str]) -> None:
    path = tmp_path / "prefixes.json"
    path.write_text(json.dumps({"version": 1, "valid-prefixes": prefixes}))
    found = LabelFilter("", file=read_prefixes(str(path)))
    labels = LabelSet.parse(f"k8s:{key}=x" for key in ("app", "pod-template-hash", NAMESPACE))
    assert {label.key for label in found.apply(labels)} == kept


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("labels", "app !(", "prefix '(': expected a regular expression"),
        ("label-prefix-file", "/nowhere", "No such file"),
        ("label-prefix-file", {"version": 2, "valid-prefixes": []}, "Invalid enum value 2"),
        ("label-prefix-file", {"version": 1, "valid-prefixes": [{"prefx": "a"}]}, "valid-prefixes[0]"),
        ("label-prefix-file", {"version": 1, "valid-prefixes": [{"prefix": "["}]}, "prefix '['"),
    ],
)
def test_wrong_prefixes_are_named(tmp_path: Path, option: str, value: object, text: str) -> None:
    path = tmp_path / "prefixes.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError) as caught:
        load_config({option: value if isinstance(value, str) else str(path)})
    (problem,) = caught.value.problems
    assert problem.field == option
    assert text in str(problem)
