"""The layouts that each map ever had, in their order: what an agent that finds an earlier one makes of its entries.

Whoever changes the key or the value of a map appends a ``Layout`` here (docs/datapath.md, "Changing a map's layout").
The last one is what the programs of this version have; a test compares it with ``layout``, ``lblayout`` and ``snat``.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field

from ciliate.datapath.mapfields import Convert, Entries, Fields, Shape, by_names

INDEX = Fields("index:I")
"""The key of arrays."""


@dataclass(frozen=True)
class Layout:
    """One layout of a map; its number is its place among the map's layouts, from 1.

    ``up`` makes entries of the layout before into entries of this one and ``down`` the other way; without them it goes
    by the names of the fields. ``since``: the first layout whose agents may take entries of this one by the names of
    the fields that they know; an agent of an earlier layout refuses to start on it. ``recorded`` is False for what
    there was before pins said which layout they have.
    """

    key: Fields
    value: Fields
    up: Convert | None = None
    down: Convert | None = None
    since: int = 1
    recorded: bool = True

    @property
    def shape(self) -> Shape:
        """Key and value."""
        return Shape(self.key, self.value)


@dataclass(frozen=True)
class MapLayouts:
    """The layouts of one map. ``flows``: programs write it, so what they write while a new map is filled counts; every
    other map's entries are the agent's, which writes all of them anew before the programs change to it, or counts
    and aids of which some may be missed."""

    name: str
    layouts: tuple[Layout, ...] = field(repr=False)
    flows: bool = False

    @property
    def number(self) -> int:
        """The number of the current layout."""
        return len(self.layouts)

    @property
    def current(self) -> Layout:
        """What the programs of this version have."""
        return self.layouts[-1]

    def path(self, start: int, end: int) -> Convert:
        """Entries of layout ``start`` as entries of layout ``end``, step by step."""
        steps = [self._step(number) for number in range(start, end)] if start < end else []
        steps += [self._back(number) for number in range(start, end, -1)]

        def convert(entries: Entries) -> Entries:
            for step in steps:
                entries = step(entries)
            return entries

        return convert

    def _step(self, number: int) -> Convert:
        old, new = self.layouts[number - 1], self.layouts[number]
        return new.up or by_names(old.shape, new.shape)

    def _back(self, number: int) -> Convert:
        old, new = self.layouts[number - 2], self.layouts[number - 1]
        return new.down or by_names(new.shape, old.shape)


def _first(key: Fields | str, value: str) -> tuple[Layout, ...]:
    return (Layout(Fields(key) if isinstance(key, str) else key, Fields(value), recorded=False),)


_PREFIX = "prefixlen:I family:B pad:3x addr:16s"
_FLOW = "addr0:16s addr1:16s port0:2s port1:2s proto:B requester:B pad:2x"
_TUPLE = "saddr:16s daddr:16s sport:2s dport:2s"


def _flow_state(end: str) -> str:
    """A flow's state by the fields of each of its ends."""
    return " ".join(
        [
            "lifetime:I reported0:I reported1:I tcp_flags:2s flags:B pad:x",
            *(" ".join(f"end{number}.{item}" for item in end.split()) for number in (0, 1)),
            "packets0:Q packets1:Q bytes0:Q bytes1:Q",
        ]
    )


_CONNTRACK = (
    *_first(_FLOW, _flow_state("src_identity:I rule:I ended:I service:I endpoint:H first:B pad:x")),
    # when policy was asked last; without it policy is asked about the next answer. The identity is the other end's now:
    # that of who began the flow is the same where it came in, and elsewhere policy is asked once more
    Layout(
        Fields(_FLOW), Fields(_flow_state("src_identity:I rule:I ended:I service:I epoch:I endpoint:H first:B pad:x"))
    ),
)
_POLICY_ENTRY = Fields("packets:Q bytes:Q rule:I proxy_port:2s verdict:B pad:x")
_FRONTEND, _NUMBER = "address:16s port:2s proto:B pad:x", "number:I"
_ENDPOINT = "ifindex:I identity:I ipv4:4s ipv6:16s mac:6s node_mac:6s id:H flags:H ingress_shape:I egress_shape:I"
_LB_FLOW = f"{_TUPLE} proto:B way:B endpoint:H"


def _clients_used_now(entries: Entries) -> Entries:
    """Clients of node ports had no lifetime: whoever is there has his last packet now."""
    now = struct.pack("=HI", 0, int(time.monotonic()))
    return [(key, value[:22] + now) for key, value in entries]


MAPS = (
    MapLayouts(
        "ciliate_ep",
        (*_first(INDEX, _ENDPOINT), Layout(INDEX, Fields(f"{_ENDPOINT} epoch:I"))),
    ),
    MapLayouts("ciliate_link", _first(INDEX, "next:Q interface_id:8s")),
    MapLayouts(
        "ciliate_lxc",
        _first("addr:16s family:B pad:3x", "ifindex:I identity:I id:H flags:B pad:x mac:6s node_mac:6s"),
    ),
    MapLayouts("ciliate_ipcache", _first(_PREFIX, "identity:I key:B node_family:B pad:2x node:16s")),
    MapLayouts("ciliate_tunnel", _first(_PREFIX, "node:16s key:B node_family:B pad:2x")),
    MapLayouts("ciliate_nodes", _first("addr:16s", "key:B pad:3x")),
    MapLayouts("ciliate_place", _first(_PREFIX, "number:I")),
    MapLayouts(
        "ciliate_policy",
        (
            Layout(
                Fields("identity:I port:2s endpoint:H proto:B direction:B prefix:B pad:x"),
                _POLICY_ENTRY,
                recorded=False,
            ),
            # entries for a place (ipBlocks that speak of pods)
            Layout(
                Fields("identity:I place:I port:2s endpoint:H proto:B direction:B prefix:B pad:x"),
                _POLICY_ENTRY,
                recorded=False,
            ),
        ),
    ),
    MapLayouts("ciliate_ct_tcp", _CONNTRACK, flows=True),
    MapLayouts("ciliate_ct_any", _CONNTRACK, flows=True),
    MapLayouts("ciliate_ct_share", (Layout(INDEX, Fields("used0:I used1:I replaced0:I replaced1:I")),)),
    MapLayouts("ciliate_ct_ring", (Layout(INDEX, Fields(_FLOW)),)),
    MapLayouts(
        "ciliate_frag",
        _first("saddr:16s daddr:16s id:I proto:B family:B pad:2x", "sport:2s dport:2s policy_port:H pad:2x"),
        flows=True,
    ),
    MapLayouts("ciliate_metrics", _first(INDEX, "packets:Q bytes:Q")),
    MapLayouts("ciliate_config", _first(INDEX, "monitor:I pad:4x")),
    MapLayouts(
        "ciliate_lb_services",
        _first(_FRONTEND, "id:I count:H local:H generation:H flags:H affinity:I"),
    ),
    MapLayouts("ciliate_lb_slots", _first("service:I generation:H slot:H", _NUMBER)),
    MapLayouts("ciliate_lb_backends", _first(_NUMBER, "address:16s id:I port:2s proto:B pad:x")),
    MapLayouts("ciliate_lb_reverse", _first(_NUMBER, _FRONTEND)),
    MapLayouts("ciliate_lb_members", _first("service:I backend:I", _NUMBER)),
    MapLayouts("ciliate_lb_maglev", _first(_NUMBER, "backends:4084s")),
    MapLayouts("ciliate_lb_ranges", _first("prefixlen:I service:I address:16s", _NUMBER)),
    MapLayouts("ciliate_lb_affinity", _first("client:16s service:I", "backend:I used:I"), flows=True),
    MapLayouts(
        "ciliate_lb_flow",
        (
            *_first(_LB_FLOW, "backend:I service:I used:I port:2s pad:2x"),
            # a state of 0 is that of a flow that is established
            Layout(Fields(_LB_FLOW), Fields("backend:I service:I used:I port:2s state:H")),
        ),
        flows=True,
    ),
    MapLayouts(
        "ciliate_lb_client",
        (
            *_first(_LB_FLOW, "address:16s service:I port:2s pad:2x"),
            Layout(Fields(_LB_FLOW), Fields("address:16s service:I port:2s state:H used:I"), up=_clients_used_now),
        ),
        flows=True,
    ),
    MapLayouts("ciliate_lb_share", _first("client:16s", "held:I refused:I"), flows=True),
    MapLayouts(
        "ciliate_lb_sock",
        _first("cookie:Q address:16s port:2s proto:B way:B pad:4x", "address:16s service:I backend:I port:2s pad:2x"),
        flows=True,
    ),
    MapLayouts(
        "ciliate_snat",
        _first(f"{_TUPLE} proto:B direction:B pad:2x", "addr:16s port:2s flags:H created:I refreshed:I lifetime:I"),
        flows=True,
    ),
    MapLayouts("ciliate_snat_dev", _first(_NUMBER, "ipv4:4s flags:I ipv6:16s")),
    MapLayouts("ciliate_snat_pods", _first("addr:16s", "mappings:I pad:4x refused:Q"), flows=True),
    MapLayouts("ciliate_masq", _first(_PREFIX, "class:I")),
)
REGISTRY = {item.name: item for item in MAPS}
"""Every map of the datapath whose entries have a layout, by name."""
