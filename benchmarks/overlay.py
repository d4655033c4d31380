"""What packets to another node cost in each routing mode. Run as root: python benchmarks/overlay.py

Two nodes with their pods, five times over: joined by the datapath with VXLAN, with Geneve and by routes, with conntrack
and a policy at the receiver; and by the kernel alone, with a VXLAN device and by routes. Rounds are interleaved, both
ends on one processor. Geneve is held against the kernel's VXLAN too, as such a device is not everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from statistics import median
from typing import NamedTuple

import transactions
from harness import live_harness, nodes_harness
from report import Figure, run_parts
from transactions import Cost, Ends

from ciliate.datapath import devices
from ciliate.datapath.tunnel import OVERHEAD

CLIENT, SERVER = nodes_harness.CLIENT, nodes_harness.SERVER
MODES = ("vxlan", "geneve", "direct")
KERNEL = {"vxlan": "kernel vxlan", "geneve": "kernel vxlan", "direct": "kernel routes"}
"""What each mode is held against."""
KINDS = {"rr": "request/response", "crr": "connect/request/close", "bulk": "1 MiB of a stream"}
TARGET = 1.05
MTU = nodes_harness.LINK_MTU - OVERHEAD[4]
"""In a tunnel."""
LINK = {4: "169.254.9", 6: "fd99:"}


class Size(NamedTuple):
    """Transactions of each kind per round, and how many rounds."""

    rr: int
    crr: int
    bulk: int
    rounds: int


FULL, QUICK = Size(3000, 800, 200, 9), Size(1500, 400, 100, 3)


def ip(tag: str, namespace: str, *lines: str) -> None:
    """Lines for the command ip in a namespace."""
    command = ["ip", "-n", f"{tag}{namespace}", "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


@contextlib.contextmanager
def namespaces() -> Iterator[live_harness.Net]:
    """Two nodes with their pods, joined by a link."""
    net = nodes_harness.make_net(f"cb{uuid.uuid4().hex[:5]}")
    try:
        path = Path("/proc/sys/net/ipv4/ip_local_port_range")
        net.run(f"pod{CLIENT}", lambda: path.write_text("1024 65535"))  # room for the closed connections of all rounds
        yield net
    finally:
        net.remove()


@contextlib.asynccontextmanager
async def joined_by_the_datapath(mode: str) -> AsyncIterator[str]:
    """Namespaces' common beginning."""
    root = Path(tempfile.mkdtemp(prefix="ciliate-benchmark-"))
    try:
        (root / "compiled").mkdir()
        with namespaces() as net:
            async with nodes_harness.two_nodes(net, nodes_harness.Mode(mode), root, root / "compiled"):
                yield net.tag
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def joined_by_the_kernel(tunnel: bool) -> Iterator[str]:
    """The same devices, addresses and MTU, with routes and, for a tunnel, a VXLAN device, and no program anywhere."""
    with namespaces() as net:
        for node in (1, 2):
            forward(net, node)
        macs = {node: vxlan(net.tag, node) for node in (1, 2)} if tunnel else {}
        for node in (1, 2):
            other = 3 - node
            for version in (4, 6):
                via, device, neighbour = nodes_harness.underlay(other, version), "eth0", []
                if tunnel:
                    via, device = f"{LINK[version]}{'.' if version == 4 else ':'}{other}", "vx"
                    neighbour = [f"neigh replace {via} lladdr {macs[other]} dev vx nud permanent"]
                route = f"route add {nodes_harness.pods(other, version)} via {via} dev {device}"
                ip(net.tag, f"n{node}", *neighbour, route)
            for pod in (pod for pod, home in nodes_harness.HOME.items() if home == node):
                connect(net, node, pod, MTU if tunnel else nodes_harness.LINK_MTU)
        yield net.tag


def forward(net: live_harness.Net, node: int) -> None:
    """Make a router of a node, with an address towards pods."""
    ip(net.tag, f"n{node}", *(f"address add {nodes_harness.router(node, version)} dev lo" for version in (4, 6)))
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        net.run(f"n{node}", lambda path=Path("/proc/sys/net", name): path.write_text("1"))


def vxlan(tag: str, node: int) -> str:
    """A tunnel to the other node; returns its MAC address."""
    mac = f"02:00:00:00:99:{node:02x}"
    ends = f"local {nodes_harness.underlay(node, 4)} remote {nodes_harness.underlay(3 - node, 4)}"
    ip(
        tag,
        f"n{node}",
        f"link add vx address {mac} mtu {MTU} type vxlan id 42 dstport 4789 {ends} nolearning",
        f"address add {LINK[4]}.{node}/24 dev vx",
        f"address add {LINK[6]}:{node}/64 dev vx nodad",
        "link set vx up",
    )
    return mac


def connect(net: live_harness.Net, node: int, pod: int, mtu: int) -> None:
    """A pod's link to its node."""
    descriptor, name = net.descriptors[f"pod{pod}"], f"veth{pod}"
    four, six = IPv4Address(nodes_harness.address(pod, 4)), IPv6Address(nodes_harness.address(pod, 6))
    routers = IPv4Address(nodes_harness.router(node, 4)), IPv6Address(nodes_harness.router(node, 6))

    def both_ends() -> str:
        made = devices.create_endpoint_device(name, descriptor, "eth0", mtu)
        devices.configure_container(descriptor, "eth0", four, six, *routers)
        devices.connect_host(made.host_ifindex, made.container_mac, four, six, *routers)
        return made.host_mac.hex(":")

    mac = net.run(f"n{node}", both_ends)
    # a solicitation for an address of another device gets no answer, so the pod knows its router beforehand
    ip(net.tag, f"pod{pod}", f"neigh replace {routers[1]} lladdr {mac} dev eth0")


def sent(tag: str) -> tuple[int, int]:
    """Bytes and packets that the client's node sent on its link so far; a packet that the card would segment is one."""
    command = ["ip", "netns", "exec", f"{tag}n1", "cat", "/proc/net/dev"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = next(line for line in text.splitlines() if line.strip().startswith("eth0:")).split()
    return int(fields[9]), int(fields[10])


class Place(NamedTuple):
    """Two joined nodes: the common beginning of their namespaces' names, and who talks there."""

    tag: str
    ends: Ends


def rounds(places: dict[str, Place], kind: str, size: Size) -> tuple[dict[str, Cost], dict[str, float]]:
    """Median costs of one kind of transaction, every round in another order, and mean bytes of the packets sent."""
    count, names = getattr(size, kind), list(places)
    for name in names:
        places[name].ends.run(kind, max(1, count // 4))
    found: dict[str, list[Cost]] = {name: [] for name in names}
    before = {name: sent(place.tag) for name, place in places.items()}
    for number in range(size.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(places[name].ends.run(kind, count))
    lengths = {}
    for name, place in places.items():
        size_of, packets = (after - begun for after, begun in zip(sent(place.tag), before[name], strict=True))
        lengths[name] = size_of / packets
    return {name: Cost(*map(median, zip(*costs, strict=True))) for name, costs in found.items()}, lengths


def figures(kind: str, family: int, costs: dict[str, Cost], lengths: dict[str, float]) -> Iterator[Figure]:
    """Ratios of each mode to its peer."""
    for mode in MODES:
        ours, theirs, peer = costs[mode], costs[KERNEL[mode]], KERNEL[mode]
        ratio, name = ours.cpu / theirs.cpu, f"{mode}, IPv{family}, {KINDS[kind]}"
        beside = f"{ours.cpu / 1e3:.2f} µs against {theirs.cpu / 1e3:.2f} µs; time {ours.latency / theirs.latency:.3f}"
        if kind == "bulk":
            beside += f"; packets of {lengths[mode]:,.0f} bytes against {lengths[peer]:,.0f}"
        yield Figure(f"{name}: CPU", f"{ratio:.3f} of {peer}", f"<= {TARGET}", ratio / TARGET, beside)


def compare(tags: dict[str, str], family: int, size: Size) -> list[Figure]:
    """Every kind of transaction in every place."""
    found: list[Figure] = []
    address = nodes_harness.address(SERVER, family)
    for kinds, serve in ((("rr", "crr"), "serve"), (("bulk",), "sink")):
        with transactions.program() as binary, contextlib.ExitStack() as stack:
            places = {}
            for name, tag in tags.items():
                ends = Ends(binary, tag, address, CLIENT, SERVER, serve)
                stack.callback(ends.close)
                ends.ready()
                places[name] = Place(tag, ends)
            for kind in kinds:
                found += figures(kind, family, *rounds(places, kind, size))
    return found


async def measure(family: int, size: Size) -> list[Figure]:
    """Every figure of one address family."""
    async with contextlib.AsyncExitStack() as stack:
        tags = {mode: await stack.enter_async_context(joined_by_the_datapath(mode)) for mode in MODES}
        tags |= {name: stack.enter_context(joined_by_the_kernel("vxlan" in name)) for name in set(KERNEL.values())}
        return await asyncio.to_thread(compare, tags, family, size)


def main() -> None:
    """Measure and print."""
    run_parts(
        __doc__ or "",
        ("ipv4", "ipv6"),
        lambda part, quick: asyncio.run(measure(int(part[-1]), QUICK if quick else FULL)),
    )


if __name__ == "__main__":
    main()
