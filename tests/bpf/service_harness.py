"""Services in the maps of the programs under test, written as the agent writes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import ip_network
from typing import Any

from bpf_harness import Programs
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet
from snat_harness import Snat

from ciliate.datapath import lblayout
from ciliate.datapath.loadbalancer import TABLES, Entry, LoadBalancer
from ciliate.service.model import BackendSpec, FrontendSpec, ServiceSpec, packed
from ciliate.service.selection import maglev_table
from ciliate.service.table import ServiceTable

VIP4, VIP6 = "10.96.0.10", "fd10::10"


class Services:
    """A table of services over the maps of loaded programs."""

    def __init__(self, programs: Programs | Snat) -> None:
        self.programs = programs
        self.balancer = LoadBalancer({name: programs.maps[name] for name in TABLES})
        self.table = ServiceTable()
        self.balancer.adopt([], {})
        self.forget()

    def forget(self) -> None:
        """No flows."""
        for name in ("ciliate_lb_flow", "ciliate_lb_affinity", "ciliate_lb_client", "ciliate_lb_share"):
            table = self.programs.maps[name]
            table.delete_many([key for key, _ in table.items()])

    def put(
        self,
        front: tuple[str, int],
        backends: Sequence[tuple[str, int]],
        protocol: str = "TCP",
        affinity: int = 0,
        maglev: bool = False,
        flags: int = 0,
        local: Collection[str] = (),
        ranges: Collection[str] = (),
        ending: Collection[str] = (),
    ) -> int:
        """Make a service so; returns its number. ``ending``: backends that terminate."""
        spec = ServiceSpec(
            frontend_address=FrontendSpec(*front, protocol),
            backend_addresses=[BackendSpec(*item, item[0] in local, item[0] in ending) for item in backends],
            session_affinity_timeout=affinity,
            external_traffic_policy="Local" if flags & lblayout.LOCAL_ONLY else "Cluster",
        )
        change, (record,) = self.table.plan([spec])
        upserts = []
        for new, old in change.upserts:
            table = maglev_table([(self.table.backends[n], n) for n in new.backends]) if maglev else None
            networks = tuple(ip_network(text) for text in ranges)
            entry = Entry(
                new.id, new.frontend, new.backends, new.local, new.affinity, flags, networks, table, new.behind
            )
            upserts.append(
                (
                    entry,
                    entry._replace(backends=old.backends, affinity=old.affinity, behind=old.behind) if old else None,
                )
            )
        self.balancer.write(change.backends, upserts, [], change.gone)
        return record.id

    def delete(self, number: int) -> None:
        """Delete a service."""
        change, _ = self.table.plan([], [number])
        deletes = [Entry(item.id, item.frontend, item.backends, 0, item.affinity) for item in change.deletes]
        self.balancer.write({}, [], deletes, change.gone)

    def flows(self) -> dict[bytes, tuple[int, ...]]:
        """What the programs remember of flows."""
        return {key: lblayout.FLOW.unpack(value) for key, value in self.programs.maps["ciliate_lb_flow"].items()}

    def number_of(self, ip: str, port: int, proto: int) -> int:
        """The number of a backend."""
        key = (packed(ip) or b"") + port.to_bytes(2, "big") + bytes([proto])
        return next(number for number, known in self.table.backends.items() if known == key)


def parsed(data: bytes) -> Packet:
    """A frame with all checksums verified: each is the one that scapy computes."""
    frame = Ether(data)
    again = frame.copy()
    for layer in again.layers():
        if "chksum" in layer.__name__ or layer in (IP, TCP, UDP, ICMP, SCTP, ICMPv6DestUnreach):
            found = again.getlayer(layer)
            for field in ("chksum", "cksum"):
                if field in found.fields:
                    found.delfieldval(field)
    assert bytes(Ether(bytes(again))) == bytes(frame), f"checksums of {frame.summary()}"
    return frame


def l4(protocol: str, sport: int, dport: int, **fields: Any) -> Packet:
    if protocol == "SCTP":
        return SCTP(sport=sport, dport=dport) / SCTPChunkInit()
    return TCP(sport=sport, dport=dport, **fields) if protocol == "TCP" else UDP(sport=sport, dport=dport) / b"hello"


def unreachable(family: int, inner: Packet, src: str, dst: str) -> Packet:
    if family == 4:
        return IP(src=src, dst=dst) / ICMP(type=3, code=3) / bytes(inner)[:28]
    return IPv6(src=src, dst=dst) / ICMPv6DestUnreach(code=4) / bytes(inner)
