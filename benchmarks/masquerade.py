"""What masquerading costs: BPF against iptables and plain routing. Run as root: python benchmarks/masquerade.py

A pod, a node and a world, three times over: routed, with a MASQUERADE rule of iptables, with the engine `bpf`. Rounds
are interleaved and both ends share one processor. Masquerading's own cost is what it adds to plain routing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from html import escape
from ipaddress import ip_address, ip_network
from pathlib import Path
from statistics import median

from harness import Node, node
from report import Figure, table
from transactions import FULL, KINDS, LOADER, QUICK, Cost, Ends, Size, program, widen_ports

from ciliate.masquerade import MasqueradePlan
from ciliate_masq.bpf_engine import BpfMasquerade

ROUTED, IPTABLES, BPF = "plain routing", "iptables", "bpf"
WORLD, POD = "pod1", "pod2"
"""Namespaces by the names that `transactions.Ends` knows: the first serves, the second asks."""
UNIT = {"rr": "packet pair", "crr": "connection"}
TARGET = 0.9
OUT = Path(__file__).parent / "out" / "masquerade.svg"
ADDRESSES = {
    4: ("10.200.0.10", "10.200.0.1", "192.0.2.1", "192.0.2.2"),
    6: ("fd00:9::a", "fd00:9::1", "fd00:8::1", "fd00:8::2"),
}
"""IP version -> the pod, the node towards it, the node outside, the world."""
SOURCES = {4: "10.200.0.0/24", 6: "fd00:9::/64"}


def ip(joined: Node, namespace: str, *arguments: str) -> None:
    """The command ip in a namespace."""
    subprocess.run(["ip", "-n", f"{joined.net.tag}{namespace}", *arguments], check=True)


def join(joined: Node) -> None:
    """Pod, node and world by two veth pairs and routes, without any program."""
    tag = joined.net.tag
    for device, namespace in (("pod", POD), ("out", WORLD)):
        ip(joined, "node", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", f"{tag}{namespace}")
    for pod, inner, outer, world in ADDRESSES.values():
        length = "24" if "." in pod else "64"
        for namespace, device, address in (
            (POD, "eth0", pod),
            ("node", "pod", inner),
            ("node", "out", outer),
            (WORLD, "eth0", world),
        ):
            nodad = [] if "." in pod else ["nodad"]
            ip(joined, namespace, "address", "add", f"{address}/{length}", "dev", device, *nodad)
    for namespace, device in ((POD, "eth0"), ("node", "pod"), ("node", "out"), (WORLD, "eth0")):
        ip(joined, namespace, "link", "set", device, "up")
    for pod, inner, outer, _ in ADDRESSES.values():
        ip(joined, POD, "route", "add", "default", "via", inner)
        ip(joined, WORLD, "route", "add", SOURCES[4 if "." in pod else 6], "via", outer)


def with_iptables(joined: Node) -> None:
    """One MASQUERADE rule of each family."""
    for version, command in ((4, "iptables"), (6, "ip6tables")):
        rule = ["-t", "nat", "-A", "POSTROUTING", "-s", SOURCES[version], "-o", "out", "-j", "MASQUERADE"]
        subprocess.run(["nsenter", f"--net=/run/netns/{joined.net.tag}node", command, *rule], check=True)


async def with_bpf(joined: Node) -> None:
    """The engine on the device to the world."""
    plan = MasqueradePlan(
        sources=tuple(ip_network(text) for text in SOURCES.values()),
        direct=tuple(ip_network(text) for text in SOURCES.values()),
        devices={"out": tuple(ip_address(ADDRESSES[version][2]) for version in (4, 6))},
    )
    await joined.datapath.programs.start()
    await BpfMasquerade(joined.datapath, joined.datapath.programs).engage(plan)


def rounds(all_ends: dict[str, Ends], size: Size, kind: str) -> dict[str, Cost]:
    """Median costs of one kind of transaction, every round in another order."""
    count, names = getattr(size, kind), list(all_ends)
    found: dict[str, list[Cost]] = {name: [] for name in names}
    for name in names:
        all_ends[name].run(kind, count // 4)
    for number in range(size.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(all_ends[name].run(kind, count))
    return {name: Cost(*map(median, zip(*costs, strict=True))) for name, costs in found.items()}


def figures(kind: str, family: int, costs: dict[str, Cost]) -> list[Figure]:
    """Ratios of one kind of transaction."""
    plain, iptables, bpf = (costs[name].cpu for name in (ROUTED, IPTABLES, BPF))
    what, ratio = f"IPv{family}, per {UNIT[kind]}", (bpf - plain) / (iptables - plain)
    added = (
        f"{(bpf - plain) / 1e3:.2f} µs against {(iptables - plain) / 1e3:.2f} µs, on {plain / 1e3:.2f} µs of routing"
    )
    in_all = (
        f"{bpf / 1e3:.2f} µs against {iptables / 1e3:.2f} µs; p50 {costs[BPF].latency / costs[IPTABLES].latency:.3f}"
    )
    return [
        Figure(f"{what}: cost of masquerading", f"{ratio:.2f} of iptables", f"<= {TARGET}", ratio / TARGET, added),
        Figure(f"{what}: processor time in all", f"{bpf / iptables:.3f} of iptables", "", 0.0, in_all),
        Figure(
            f"{what}: against no masquerading",
            f"{bpf / plain:.3f} of routing",
            "",
            0.0,
            f"iptables {iptables / plain:.3f}",
        ),
    ]


async def measure(size: Size) -> tuple[list[Figure], dict[str, dict[str, Cost]]]:
    """Every figure, and costs by family and kind."""
    found: list[Figure] = []
    costs: dict[str, dict[str, Cost]] = {}
    async with contextlib.AsyncExitStack() as stack:
        nodes = {name: await stack.enter_async_context(node(LOADER, WORLD, POD)) for name in (ROUTED, IPTABLES, BPF)}
        for joined in nodes.values():
            join(joined)
            widen_ports(joined)
        with_iptables(nodes[IPTABLES])
        await with_bpf(nodes[BPF])
        binary = stack.enter_context(program())
        for family in size.families:
            with contextlib.ExitStack() as ends_stack:
                all_ends = {name: Ends(binary, joined.net.tag, ADDRESSES[family][3]) for name, joined in nodes.items()}
                for ends in all_ends.values():
                    ends_stack.callback(ends.close)
                    ends.ready()
                for kind in KINDS:
                    each = await asyncio.to_thread(rounds, all_ends, size, kind)
                    costs[f"IPv{family}, {KINDS[kind]}"] = each
                    found += figures(kind, family, each)
    return found, costs


def plot(costs: dict[str, dict[str, Cost]]) -> str:
    """Processor time of a transaction as bars, each group relative to plain routing."""
    colours, height, left = {ROUTED: "#9ca3af", IPTABLES: "#c2410c", BPF: "#0b6e99"}, 22, 230
    lines, top = [], 50
    longest = max(item.cpu / each[ROUTED].cpu for each in costs.values() for item in each.values())
    for title, each in costs.items():
        lines.append(f'<text x="10" y="{top + 2 * height - 4}" font-size="13">{escape(title)}</text>')
        for name, cost in each.items():
            ratio = cost.cpu / each[ROUTED].cpu
            width = 330 * ratio / longest
            label = f"{name} {ratio:.2f} ({cost.cpu / 1e3:.1f} µs)"
            lines.append(
                f'<rect x="{left}" y="{top}" width="{width:.0f}" height="{height - 4}" fill="{colours[name]}"/>'
            )
            lines.append(f'<text x="{left + width + 6:.0f}" y="{top + 14}" font-size="12">{escape(label)}</text>')
            top += height
        top += height // 2
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{top + 10}" font-family="sans-serif">'
    title = '<text x="10" y="25" font-size="15">Processor time of a transaction, plain routing = 1</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', title, *lines, "</svg>", ""])


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, IPv4 alone")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("benchmarks/masquerade.py: needs root, for namespaces and BPF programs")
    found, costs = asyncio.run(measure(QUICK if arguments.quick else FULL))
    print(table(found))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(plot(costs))
    print(f"\nplot: {OUT}")


if __name__ == "__main__":
    main()
