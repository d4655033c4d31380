"""What every identity backend must do."""

from __future__ import annotations

import asyncio

from ciliate.identity import CLUSTER_MAX, CLUSTER_MIN, Identity
from ciliate.kvstore import Kvstore
from ciliate.labels import LabelSet
from ciliate.plugin.conformance import Case, Stage

A, B = LabelSet.parse(["k8s:app=a", "k8s:io.kubernetes.pod.namespace=x"]), LabelSet.parse(["k8s:app=b"])
SOON = 5.0


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


async def _store(stage: Stage) -> None:
    await stage.provide("kvstore", Kvstore)


async def same_labels_same_number(stage: Stage) -> None:
    """Equal label sets get one number, different ones different numbers, all within the cluster's range."""
    await _store(stage)
    backend = await stage.make()
    first, again, other = await backend.allocate(A), await backend.allocate(A), await backend.allocate(B)
    _expect(first == again, f"{first} and {again} for equal labels")
    _expect(first.id != other.id, f"number {first.id} for different labels")
    for identity in (first, other):
        _expect(CLUSTER_MIN <= identity.id <= CLUSTER_MAX, f"number {identity.id} is outside the cluster's range")


async def nodes_agree(stage: Stage) -> None:
    """Two nodes that ask at the same time for the same labels get the same number."""
    await _store(stage)
    nodes = [await stage.make(node_name=f"node{number}") for number in range(2)]
    label_sets = [LabelSet.parse([f"k8s:app={number}"]) for number in range(10)]
    answers = await asyncio.gather(*(node.allocate(labels) for labels in label_sets for node in nodes))
    for number in range(10):
        one, other = answers[2 * number], answers[2 * number + 1]
        _expect(one.id == other.id, f"labels {label_sets[number].key}: numbers {one.id} and {other.id}")
    numbers = {answer.id for answer in answers}
    _expect(len(numbers) == 10, f"{len(numbers)} numbers for 10 label sets")


async def concurrent_requests_share_a_number(stage: Stage) -> None:
    """Many requests at once on one node get one number."""
    await _store(stage)
    backend = await stage.make()
    answers = await asyncio.gather(*(backend.allocate(A) for _ in range(20)))
    _expect(len({answer.id for answer in answers}) == 1, "several numbers for one label set")


async def a_number_survives_a_restart(stage: Stage) -> None:
    """After a restart of the node the same labels have the same number."""
    await _store(stage)
    backend = await stage.make()
    before = await backend.allocate(A)
    await stage.end(backend)
    after = await (await stage.make()).allocate(A)
    _expect(before.id == after.id, f"number {before.id} became {after.id}")


async def a_number_that_was_used_before_is_taken_again(stage: Stage) -> None:
    """A hint is the number where the cluster has none for these labels, and nothing where it has another."""
    await _store(stage)
    backend = await stage.make()
    hinted = await backend.allocate(A, 4711)
    _expect(hinted.id == 4711, f"number {hinted.id} in spite of a hint that nobody uses, expected 4711")
    other = await backend.allocate(B, 4711)
    _expect(other.id != 4711, "a number that stands for other labels was given again")
    again = await (await stage.make(node_name="other")).allocate(A, 300)
    _expect(again.id == 4711, f"number {again.id} where the cluster has 4711")


async def lookups_know_what_was_allocated(stage: Stage) -> None:
    """``get`` and ``identities`` know an allocated identity; unknown numbers give None."""
    await _store(stage)
    backend = await stage.make()
    identity = await backend.allocate(A)
    _expect(backend.get(identity.id) == identity, f"get({identity.id}) gave {backend.get(identity.id)}")
    _expect(identity.id in backend.identities(), "identities() lacks it")
    _expect(backend.get(CLUSTER_MAX + 1) is None, "get of an impossible number gave something")


async def observers_hear_of_other_nodes(stage: Stage) -> None:
    """A node hears of identities that another node makes."""
    await _store(stage)
    listener, maker = await stage.make(node_name="listener"), await stage.make(node_name="maker")
    heard: asyncio.Queue[Identity] = asyncio.Queue()

    def observe(added: list[Identity], removed: list[int]) -> None:
        for identity in added:
            heard.put_nowait(identity)

    listener.subscribe(observe)
    made = await maker.allocate(A)
    async with asyncio.timeout(SOON):
        got = await heard.get()
    _expect(got == made, f"heard of {got}, expected {made}")


async def references_are_counted(stage: Stage) -> None:
    """An identity that was asked for twice and released once is still held; releasing too often does no harm."""
    await _store(stage)
    backend = await stage.make()
    identity = await backend.allocate(A)
    await backend.allocate(A)
    await backend.release(identity.id)
    _expect((await backend.allocate(A)).id == identity.id, "the number changed while it was held")
    for _ in range(4):
        await backend.release(identity.id)


async def collection_spares_what_is_held(stage: Stage) -> None:
    """What some node holds is not collected; what none holds is, and its labels can be allocated again."""
    await _store(stage)
    backend, other = await stage.make(node_name="one"), await stage.make(node_name="two")
    held, free = await backend.allocate(A), await other.allocate(B)
    await other.release(free.id)
    removed = await backend.collect()
    _expect(removed == 1, f"collect removed {removed} identities, expected 1")
    _expect((await other.allocate(A)).id == held.id, "an identity in use was collected")
    await other.allocate(B)


CASES: list[Case] = [
    same_labels_same_number,
    nodes_agree,
    concurrent_requests_share_a_number,
    a_number_survives_a_restart,
    a_number_that_was_used_before_is_taken_again,
    lookups_know_what_was_allocated,
    observers_hear_of_other_nodes,
    references_are_counted,
    collection_spares_what_is_held,
]
