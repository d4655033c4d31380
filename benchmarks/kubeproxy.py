"""The rules of kube-proxy, as it writes them in its iptables and nftables modes, for services with their backends."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

POD_RANGE = "10.77.0.0/16"
MASQUERADE = "0x4000"


class Service(NamedTuple):
    """A TCP service: its address and port, and its backends."""

    ip: str
    port: int
    backends: Sequence[tuple[str, int]]


def _hash(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16].upper()


def iptables(services: Sequence[Service]) -> str:
    """Input of iptables-restore."""
    nat: list[str] = []
    chains = ["KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-NODEPORTS"]
    for number, service in enumerate(services):
        name = f"default/service-{number}"
        chain = f"KUBE-SVC-{_hash(name)}"
        chains.append(chain)
        to = f"-d {service.ip}/32 -p tcp -m comment --comment"
        nat.append(f'-A KUBE-SERVICES {to} "{name} cluster IP" -m tcp --dport {service.port} -j {chain}')
        nat.append(
            f'-A {chain} ! -s {POD_RANGE} {to} "{name} cluster IP" -m tcp --dport {service.port} -j KUBE-MARK-MASQ'
        )
        for index, (ip, port) in enumerate(service.backends):
            endpoint = f"KUBE-SEP-{_hash(name, ip, port)}"
            chains.append(endpoint)
            left = len(service.backends) - index
            share = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
            note = f'-m comment --comment "{name} -> {ip}:{port}"'
            nat.append(f"-A {chain} {note} {share}-j {endpoint}")
            nat.append(f'-A {endpoint} -s {ip}/32 -m comment --comment "{name}" -j KUBE-MARK-MASQ')
            nat.append(
                f'-A {endpoint} -p tcp -m comment --comment "{name}" -m tcp -j DNAT --to-destination {ip}:{port}'
            )
    return "\n".join(
        [
            "*nat",
            *(f":{chain} - [0:0]" for chain in chains),
            '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
            '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
            '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
            f"-A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE}/{MASQUERADE} -j RETURN",
            f"-A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE}",
            "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
            f"-A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE}",
            *nat,
            '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports" '
            "-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
            "COMMIT",
            "*filter",
            *(
                f":{name} - [0:0]"
                for name in ("KUBE-FORWARD", "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL")
            ),
            "-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
            "-A FORWARD -j KUBE-FORWARD",
            "-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES",
            "-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES",
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
            f"-A KUBE-FORWARD -m mark --mark {MASQUERADE}/{MASQUERADE} -j ACCEPT",
            "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "COMMIT\n",
        ]
    )


def nftables(services: Sequence[Service], full: int = 1) -> Iterator[str]:
    """Input of nft. The last ``full`` services have a chain for each backend; the others one backend, as a chain more
    or less that no packet comes to costs only the time to load it (nft takes a minute for 20,000)."""
    yield "table ip kube-proxy {"
    yield f"chain mark-for-masquerade {{ mark set mark or {MASQUERADE}; }}"
    first = len(services) - full
    for number, service in enumerate(services):
        backends = service.backends if number >= first else service.backends[:1]
        for index, (ip, port) in enumerate(backends):
            rules = f"ip saddr {ip} jump mark-for-masquerade; meta l4proto tcp dnat to {ip}:{port}"
            yield f"chain endpoint-{number}-{index} {{ {rules}; }}"
        pick = ", ".join(f"{index} : goto endpoint-{number}-{index}" for index in range(len(backends)))
        to = f"ip daddr {service.ip} tcp dport {service.port} ip saddr != {POD_RANGE} jump mark-for-masquerade"
        yield f"chain service-{number} {{ {to}; numgen random mod {len(backends)} vmap {{ {pick} }}; }}"
    yield "map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = {"
    yield ",\n".join(f"{item.ip} . tcp . {item.port} : goto service-{number}" for number, item in enumerate(services))
    yield "}; }"
    yield "chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }"
    yield "chain firewall-check { }"
    yield "chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }"
    yield "chain nat-output { type nat hook output priority -100; jump services; }"
    masquerade = f"mark and {MASQUERADE} == 0 return; mark set mark xor {MASQUERADE}; masquerade fully-random"
    yield f"chain masquerading {{ {masquerade}; }}"
    yield "chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }"
    yield "chain filter-forward { type filter hook forward priority -110; ct state new jump firewall-check; }"
    yield "}\n"


def load_iptables(netns: str, services: Sequence[Service]) -> None:
    """Replace the rules of a namespace."""
    _run(netns, ["iptables-legacy-restore"], iptables(services))


def load_nftables(netns: str, services: Sequence[Service]) -> None:
    """Replace the ruleset of a namespace."""
    _run(netns, ["nft", "-f", "-"], "flush ruleset\n" + "\n".join(nftables(services)))


def _run(netns: str, command: Sequence[str], text: str) -> None:
    line = ["nsenter", f"--net=/run/netns/{netns}", *command]
    done = subprocess.run(line, input=text, text=True, capture_output=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()[:500]}")
