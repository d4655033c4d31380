"""Compressed map states decide as the whole ones do; a change never shows a verdict that is neither old nor new."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import policy_entry_of, policy_key_of, shape_bits
from ciliate.datapath.policymap import Enforcement, PolicyMap, PolicyTooLargeError
from ciliate.policy.compress import compress
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict, lookup

PEERS = (0, 5, 6)
PORTS = (0, 1, 2, 3, 8, 16384, 32768, 65534, 65535)
PLACES = (0, 0, 90, 91)
PACKETS = [
    (peer, proto, port, place)
    for peer in (*PEERS, 7)
    for place in {*PLACES, 92}
    for proto in (6, 17, 99)
    for port in PORTS
]
ENDPOINT = 9


@st.composite
def keys(draw: st.DrawFn) -> PolicyKey:
    peer, proto = draw(st.sampled_from(PEERS)), draw(st.sampled_from((0, 6, 17)))
    place = draw(st.sampled_from(PLACES))
    if not proto:
        return PolicyKey(INGRESS, peer, place=place)
    length = draw(st.sampled_from((0, 1, 2, 13, 14, 15, 16)))
    port = draw(st.sampled_from(PORTS)) & (0xFFFF << (16 - length)) & 0xFFFF
    return PolicyKey(INGRESS, peer, proto, port, length, place)


entries = st.builds(
    lambda verdict, proxy, rule: PolicyEntry(verdict, proxy if verdict is Verdict.REDIRECT else 0, rule),
    st.sampled_from([Verdict.ALLOW, Verdict.ALLOW, Verdict.DENY, Verdict.REDIRECT]),
    st.sampled_from([1000, 2000]),
    st.integers(1, 3),
)
states = st.dictionaries(keys(), entries, max_size=24)


def verdicts(state: dict[PolicyKey, PolicyEntry]) -> list[tuple[Verdict, int] | None]:
    found = [lookup(state, INGRESS, *packet) for packet in PACKETS]
    return [(entry.verdict, entry.proxy_port) if entry else None for entry in found]


@settings(max_examples=600, deadline=None)
@given(states)
def test_compressed_states_decide_the_same(state: dict[PolicyKey, PolicyEntry]) -> None:
    small = compress(state)
    assert len(small) <= len(state)
    assert verdicts(small) == verdicts(state)


@pytest.mark.parametrize(
    ("ports", "expected"), [(range(8000, 8032), 1), (range(8000, 8040), 2), (range(0, 80, 2), 40), (range(65536), 1)]
)
def test_neighbours_are_joined(ports: Iterable[int], expected: int) -> None:
    state = {PolicyKey(INGRESS, 5, 6, port, 16): PolicyEntry(Verdict.ALLOW, 0, 1) for port in ports}
    assert len(compress(state)) == expected


def test_what_anyone_may_is_not_said_again() -> None:
    port = (6, 80, 16)
    state = {PolicyKey(INGRESS, peer, *port): PolicyEntry(Verdict.ALLOW, 0, peer) for peer in (0, *range(300, 400))}
    assert compress(state) == {PolicyKey(INGRESS, 0, *port): PolicyEntry(Verdict.ALLOW, 0, 0)}


class Watched:
    """Stands for the kernel's map: keeps entries, and tells of every single step. ``fails_at`` refuses one write."""

    max_entries = 1000

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.seen: list[dict[PolicyKey, PolicyEntry]] = []
        self.fails_at: int | None = None

    def state(self) -> dict[PolicyKey, PolicyEntry]:
        return {policy_key_of(key)[1]: policy_entry_of(value).entry for key, value in self.entries.items()}

    def items(self) -> Iterable[tuple[bytes, bytes]]:
        return self.entries.items()

    def update_many(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in pairs:
            if self.fails_at is not None:
                self.fails_at -= 1
                if self.fails_at < 0:
                    self.fails_at = None
                    raise DatapathError(12, "no memory")
            self.entries[key] = value
            self.seen.append(self.state())

    def delete_many(self, gone: Iterable[bytes]) -> int:
        for key in gone:
            if self.entries.pop(key, None) is not None:
                self.seen.append(self.state())
        return 0


def change(
    kernel: Watched, policy: PolicyMap, new: dict[PolicyKey, PolicyEntry], told: list[Enforcement] | None = None
) -> None:
    upserts, deletes = policy.difference(ENDPOINT, new)
    policy.apply(ENDPOINT, upserts, deletes, (True, False), (True, False), (told if told is not None else []).append)


@settings(max_examples=300, deadline=None)
@given(states, states)
def test_every_step_shows_the_old_or_the_new_verdict(
    old: dict[PolicyKey, PolicyEntry], new: dict[PolicyKey, PolicyEntry]
) -> None:
    kernel = Watched()
    policy = PolicyMap(kernel)  # type: ignore[arg-type]
    change(kernel, policy, old)
    kernel.seen.clear()
    change(kernel, policy, new)
    assert kernel.state() == new
    before, after = verdicts(old), verdicts(new)
    for state in kernel.seen:
        for packet, found, one, two in zip(PACKETS, verdicts(state), before, after, strict=True):
            assert found in (one, two), packet


@settings(max_examples=200, deadline=None)
@given(states, states, st.integers(0, 10))
def test_a_write_that_fails_is_undone(
    old: dict[PolicyKey, PolicyEntry], new: dict[PolicyKey, PolicyEntry], fails_at: int
) -> None:
    kernel = Watched()
    policy = PolicyMap(kernel)  # type: ignore[arg-type]
    change(kernel, policy, old)
    kernel.fails_at = fails_at
    told: list[Enforcement] = []
    try:
        change(kernel, policy, new, told)
    except DatapathError:
        assert kernel.state() == dict(policy.entries(ENDPOINT)) == old
        assert (told[-1].ingress_shape, told[-1].egress_shape) == policy.shape(ENDPOINT)
    kernel.fails_at = None
    change(kernel, policy, new)
    assert kernel.state() == dict(policy.entries(ENDPOINT)) == new
    assert policy.shape(ENDPOINT)[0] == reduce(or_, map(shape_bits, new), 0)


@pytest.mark.parametrize(("limit", "room", "told"), [(4, 1000, "one endpoint may have 4"), (100, 4, "is full")])
def test_what_does_not_fit_is_refused_before_anything_is_written(limit: int, room: int, told: str) -> None:
    kernel = Watched()
    kernel.max_entries = room
    policy = PolicyMap(kernel, limit)  # type: ignore[arg-type]
    old = {PolicyKey(INGRESS, 5, 6, port, 16): PolicyEntry(Verdict.ALLOW) for port in (1, 2, 3)}
    change(kernel, policy, old)
    steps = len(kernel.seen)
    with pytest.raises(PolicyTooLargeError, match=told):
        change(kernel, policy, {PolicyKey(INGRESS, 5, 6, port, 16): PolicyEntry(Verdict.ALLOW) for port in range(8)})
    assert kernel.state() == old
    assert len(kernel.seen) == steps
