"""The loaded program against the specification: generated policies and packets, and malformed packets. Tier bpf."""

from __future__ import annotations

import errno
import random
from ipaddress import IPv4Address, IPv6Address

from bpf_harness import (
    CIDR4,
    CIDR6,
    CIDR_ID,
    NODE_MAC,
    OTHER_PLACE,
    PEER4,
    PEER6,
    PEER_ID,
    PEER_PLACE,
    POD,
    POD4,
    POD6,
    POD_MAC,
    PODS_PLACE,
    SHOT,
    WORLD4,
    WORLD6,
    WORLD_ID,
    Programs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet

from ciliate.policy.mapstate import EGRESS, PolicyEntry, PolicyKey, Verdict, lookup

ETHER = Ether(src=POD_MAC, dst=NODE_MAC)
PEERS = {PEER_ID: (PEER4, PEER6), CIDR_ID: (CIDR4, CIDR6), WORLD_ID: (WORLD4, WORLD6)}
PORTS = [0, 1, 53, 79, 80, 81, 443, 8000, 8015, 8016, 32768, 65535]
MALFORMED = 60_000


def masked(port: int, prefix: int) -> int:
    return port & (0xFFFF << (16 - prefix)) & 0xFFFF


keys = st.builds(
    lambda identity, proto, port, prefix, place: (
        PolicyKey(EGRESS, identity, proto, masked(port, prefix), prefix, place)
        if proto
        else PolicyKey(EGRESS, identity, place=place)
    ),
    st.sampled_from([0, *PEERS]),
    st.sampled_from([0, 6, 17, 132, 1, 58]),
    st.sampled_from([*PORTS, 8, 128]),
    st.sampled_from([0, 1, 8, 12, 15, 16]),
    st.sampled_from([0, 0, PEER_PLACE, PODS_PLACE, OTHER_PLACE]),
)
verdicts = st.sampled_from([PolicyEntry(Verdict.ALLOW, 0, 1), PolicyEntry(Verdict.DENY, 0, 2)])
policies = st.dictionaries(keys, verdicts, max_size=12)
packets = st.lists(
    st.tuples(
        st.sampled_from(list(PEERS)),
        st.sampled_from([4, 6]),
        st.sampled_from([6, 17, 132, 1]),
        st.sampled_from(PORTS),
    ),
    min_size=1,
    max_size=8,
)


def build(peer: int, family: int, proto: int, port: int, sport: int) -> tuple[Packet, int, int]:
    """The frame, its protocol number and the port that policy sees."""
    target = PEERS[peer][family == 6]
    header = IP(src=POD4, dst=target) if family == 4 else IPv6(src=POD6, dst=target)
    if proto == 1:
        payload: Packet = ICMP(type=8, id=sport) if family == 4 else ICMPv6EchoRequest(id=sport)
        return ETHER / header / payload, (1 if family == 4 else 58), (8 if family == 4 else 128)
    layer = {6: TCP(sport=sport, dport=port, flags="S"), 17: UDP(sport=sport, dport=port)}.get(proto)
    if layer is None:
        header = IP(src=POD4, dst=target, proto=132) if family == 4 else IPv6(src=POD6, dst=target, nh=132)
        layer = SCTP(sport=sport, dport=port)
    return ETHER / header / layer, proto, port


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, flows=packets)
def test_the_program_decides_as_the_specification(
    programs: Programs, policy: dict[PolicyKey, PolicyEntry], flows: list[tuple[int, int, int, int]]
) -> None:
    programs.flush()
    programs.enforce(POD, policy, egress=True)
    for number, (peer, family, proto, port) in enumerate(flows):
        frame, protocol, seen = build(peer, family, proto, port, 1000 + number)
        entry = lookup(policy, EGRESS, peer, protocol, seen, PEER_PLACE if peer == PEER_ID else 0)
        allowed = entry is not None and entry.verdict == Verdict.ALLOW
        assert (programs.why(frame) == 0) == allowed, (policy, peer, protocol, seen)


def seeds() -> list[bytes]:
    frames: list[Packet] = [
        ETHER / IP(src=POD4, dst=PEER4) / TCP(dport=80, flags="S"),
        ETHER / IP(src=POD4, dst=PEER4, options=b"\x01\x01\x01\x01") / UDP(dport=80) / b"data",
        ETHER / IP(src=POD4, dst=PEER4) / ICMP() / b"data",
        ETHER / IP(src=POD4, dst=PEER4) / ICMP(type=3) / IP(src=PEER4, dst=POD4) / UDP(sport=80, dport=9),
        ETHER / IP(src=POD4, dst=PEER4, flags="MF", id=3) / UDP(dport=80) / (b"x" * 24),
        ETHER / IP(src=POD4, dst=PEER4, frag=3, id=3, proto=17) / (b"x" * 24),
        ETHER / IPv6(src=POD6, dst=PEER6) / TCP(dport=80, flags="S"),
        ETHER / IPv6(src=POD6, dst=PEER6) / IPv6ExtHdrDestOpt() / UDP(dport=80) / b"data",
        ETHER / IPv6(src=POD6, dst=PEER6) / IPv6ExtHdrFragment(m=1, id=4) / UDP(dport=80) / (b"x" * 24),
        ETHER / IPv6(src=POD6, dst=PEER6) / ICMPv6EchoRequest() / b"data",
        ETHER / IP(src=POD4, dst=PEER4, proto=132) / SCTP(dport=80),
        ETHER / ARP(op=1, pdst="10.5.0.1"),
    ]
    return [bytes(frame) for frame in frames]


def mutate(frame: bytes, chance: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(12, len(data))
        data[place] = chance.choice([0, 0xFF, chance.randrange(256), data[place] ^ (1 << chance.randrange(8))])
    if chance.random() < 0.4:
        del data[chance.randrange(34, max(len(data), 35)) :]
    if chance.random() < 0.2:
        data += chance.randbytes(chance.randrange(1, 40))
    return bytes(data)


def sent_by_the_pod(frame: bytes) -> bool:
    """A plain reading of what must hold for anything that goes on: the source is the pod's, lengths fit."""
    kind = frame[12:14]
    if kind == b"\x08\x06":
        return True
    if kind == b"\x08\x00":
        header, total = (frame[14] & 15) * 4, int.from_bytes(frame[16:18], "big")
        fits = frame[14] >> 4 == 4 and 20 <= header <= total and 14 + total <= len(frame)
        return fits and frame[26:30] == IPv4Address(POD4).packed
    if kind == b"\x86\xdd":
        fits = frame[14] >> 4 == 6 and 54 + int.from_bytes(frame[18:20], "big") <= len(frame)
        return fits and frame[22:38] == IPv6Address(POD6).packed
    return False


def attempt(programs: Programs, frame: bytes) -> tuple[int, bytes] | None:
    """Verdict and packet; None where the kernel itself refuses to make a packet of this."""
    try:
        return programs.send(frame)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return None


def answered(data: bytes) -> bool:
    """Whether what came out goes back to the pod itself: ARP, neighbour and time-exceeded answers."""
    return data[:6] == bytes.fromhex(POD_MAC.replace(":", ""))


def test_malformed_packets_never_pass_a_denying_policy(programs: Programs) -> None:
    chance, frames = random.Random(20190429), seeds()
    programs.enforce(POD, {}, egress=True)
    for _ in range(MALFORMED // 2):
        frame = mutate(chance.choice(frames), chance)
        outcome = attempt(programs, frame)
        assert outcome is None or outcome[0] == SHOT or answered(outcome[1]), frame.hex()
    assert programs.flows() == []


def test_malformed_packets_pass_an_open_policy_only_where_they_are_sound(programs: Programs) -> None:
    chance, frames = random.Random(20190430), seeds()
    accepted = 0
    for _ in range(MALFORMED // 2):
        frame = mutate(chance.choice(frames), chance)
        outcome = attempt(programs, frame)
        if outcome is None or outcome[0] == SHOT or answered(outcome[1]):
            continue
        assert sent_by_the_pod(frame), frame.hex()
        accepted += 1
    assert accepted > MALFORMED // 100
