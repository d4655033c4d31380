"""Services at sockets: what processes of the node and of pods see, with and without an agent. Tier node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate import manifest
from ciliate.datapath.socketlb import HOOKS, cgroup2_mount
from ciliate.lab import cgroups, netns
from ciliate.lab.lab import Lab
from ciliate.lab.traffic import EchoServer

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default}
spec: {containers: [{name: main, image: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default}
spec: {containers: [{name: main, image: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: default}
spec: {containers: [{name: main, image: app}]}
"""
VIPS = {4: "10.96.8.1", 6: "fd00:c11:96::8:1"}
FAMILIES = [4, 6]
PLACES = ["node1", "client"]
pytestmark = pytest.mark.skipif(cgroup2_mount() is None, reason="no cgroup2 is mounted")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("sk", manifest.loads(PODS)) as made, ExitStack() as servers:
        for pod, port in (("web-1", 8081), ("web-2", 8082)):
            servers.callback(EchoServer(netns.path(made.namespace_of(pod)), port).stop)
        put(made, [("web-1", 8081)])
        yield made
    mount = cgroup2_mount()
    assert mount and not (mount / f"{cgroups.PREFIX}{made.state.name}").exists()


def address(lab: Lab, pod: str, family: int) -> str:
    return next(text for text in lab.state.pods[f"default/{pod}"].addresses if (":" in text) == (family == 6))


def put(lab: Lab, pods: list[tuple[str, int]]) -> None:
    """One service of each family and protocol."""
    specs = [
        {
            "frontend-address": {"ip": VIPS[family], "port": 80, "protocol": protocol},
            "backend-addresses": [{"ip": address(lab, pod, family), "port": port} for pod, port in pods],
        }
        for family in FAMILIES
        for protocol in ("TCP", "UDP")
    ]
    lab.request("PUT", "/v1/service", {"services": specs})


PRELUDE = """
import json, os, socket, sys
vip, six = sys.argv[1], ":" in sys.argv[1]
family = socket.AF_INET6 if six else socket.AF_INET
def say(**what):
    print(json.dumps(what), flush=True)
"""


def run(lab: Lab, place: str, family: int, body: str) -> Any:
    """What a Python program prints that runs as a process of a place."""
    process = start(lab, place, family, body)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    return json.loads(out)


def start(lab: Lab, place: str, family: int, body: str) -> subprocess.Popen[str]:
    code = PRELUDE + textwrap.dedent(body)
    line = [*netns.inside(lab.namespace_of(place)), sys.executable, "-IS", "-c", code, VIPS[family]]
    moved = ["sh", "-c", f'echo $$ > {lab.cgroup_of(place)}/cgroup.procs && exec "$@"', "sh", *line]
    return subprocess.Popen(moved, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_sees_the_service_as_its_peer(lab: Lab, family: int, place: str) -> None:
    found = run(
        lab,
        place,
        family,
        """
        s = socket.create_connection((vip, 80), 5)
        s.sendall(b"x")
        say(peer=s.getpeername()[:2], data=s.recv(10).decode())
        """,
    )
    assert found == {"peer": [VIPS[family], 80], "data": "x"}


def test_a_socket_of_both_families_meets_ipv4_services(lab: Lab) -> None:
    found = run(
        lab,
        "node1",
        4,
        """
        s = socket.socket(socket.AF_INET6)
        s.settimeout(5)
        s.connect(("::ffff:" + vip, 80))
        s.sendall(b"x")
        u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        u.settimeout(5)
        u.sendto(b"u", ("::ffff:" + vip, 80))
        data, peer = u.recvfrom(10)
        say(peer=s.getpeername()[0], data=s.recv(10).decode(), udp=peer[0])
        """,
    )
    assert found == {"peer": f"::ffff:{VIPS[4]}", "data": "x", "udp": f"::ffff:{VIPS[4]}"}


@pytest.mark.parametrize("connected", [False, True], ids=["sendto", "connect"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_come_from_the_service(lab: Lab, family: int, place: str, connected: bool) -> None:
    found = run(
        lab,
        place,
        family,
        f"""
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(5)
        if {connected}:
            s.connect((vip, 80))
            s.send(b"x")
        else:
            s.sendto(b"x", (vip, 80))
        data, peer = s.recvfrom(10)
        say(peer=peer[:2], data=data.decode())
        """,
    )
    assert found == {"peer": [VIPS[family], 80], "data": "x"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_socket_moves_on_when_its_backend_goes(lab: Lab, family: int, place: str) -> None:
    """One UDP socket that is not connected: its backend stays the same as long as that is there."""
    process = start(
        lab,
        place,
        family,
        """
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(5)
        for line in sys.stdin:
            s.sendto(line.strip().encode(), (vip, 80))
            data, peer = s.recvfrom(10)
            say(peer=peer[0], data=data.decode())
        """,
    )
    assert process.stdin and process.stdout

    def ask(text: str) -> Any:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        put(lab, [("web-1", 8081)])
        assert ask("one") == {"peer": VIPS[family], "data": "one"}
        put(lab, [("web-2", 8082)])
        assert ask("two") == {"peer": VIPS[family], "data": "two"}
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
        process.stderr and process.stderr.close()
        put(lab, [("web-1", 8081)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_backends_means_refused(lab: Lab, family: int, place: str) -> None:
    put(lab, [])
    try:
        found = run(
            lab,
            place,
            family,
            """
            import errno
            s, u = socket.socket(family), socket.socket(family, socket.SOCK_DGRAM)
            s.settimeout(5)
            tcp = s.connect_ex((vip, 80))
            try:
                udp = u.sendto(b"x", (vip, 80))
            except OSError as error:
                udp = error.errno
            say(tcp=errno.errorcode[tcp], udp=errno.errorcode[udp])
            """,
        )
    finally:
        put(lab, [("web-1", 8081)])
    assert found == {"tcp": "ECONNREFUSED", "udp": "ECONNREFUSED"}


def test_what_is_no_service_is_left_alone(lab: Lab) -> None:
    found = run(
        lab,
        "node1",
        4,
        f"""
        s = socket.create_connection(("{address(lab, "web-1", 4)}", 8081), 5)
        say(peer=s.getpeername()[0])
        """,
    )
    assert found == {"peer": address(lab, "web-1", 4)}


def test_links_outlive_the_agent_and_a_new_one_takes_them_over(lab: Lab) -> None:
    pins = lab.directory.node("node1").bpf_dir / "ciliate" / "default"

    def connects() -> Any:
        return run(lab, "node1", 4, "s = socket.create_connection((vip, 80), 5); say(peer=s.getpeername()[0])")

    before = {name: (pins / name).stat().st_ino for name in HOOKS}
    lab.stop_agent(signal.SIGKILL)
    assert connects() == {"peer": VIPS[4]}
    lab.start_agent()
    assert connects() == {"peer": VIPS[4]}
    assert {name: (pins / name).stat().st_ino for name in HOOKS} == before


def test_off_means_off(lab: Lab) -> None:
    """Without programs at sockets pods still reach services, by their packets; the node's own processes do not."""
    pins = lab.directory.node("node1").bpf_dir / "ciliate" / "default"
    lab.stop_agent()
    lab.state.options["enable-socket-lb"] = "false"
    try:
        lab.start_agent()
        assert not any((pins / name).exists() for name in HOOKS)
        probe = "s = socket.socket(family); s.settimeout(1); say(code=s.connect_ex((vip, 80)))"
        assert run(lab, "client", 4, probe) == {"code": 0}
        assert run(lab, "node1", 4, probe)["code"] != 0
    finally:
        lab.stop_agent()
        lab.state.options.clear()
        lab.start_agent()
    assert all((pins / name).exists() for name in HOOKS)


NODE_PORT = 30090


@pytest.fixture
def node_port(lab: Lab) -> Iterator[None]:
    """A node port of both families and protocols, with a pod as its backend."""
    names = {"kubernetes.io/service-name": "home"}
    ports = [{"name": kind, "port": 8081, "protocol": kind} for kind in ("TCP", "UDP")]
    slices = [
        {
            "kind": "EndpointSlice",
            "metadata": {"name": f"home-{family}", "labels": names},
            "endpoints": [{"addresses": [address(lab, "web-1", family)]}],
            "ports": ports,
        }
        for family in FAMILIES
    ]
    spec = {"type": "NodePort", "ports": [{**port, "port": 80, "nodePort": NODE_PORT} for port in ports]}
    service = {"kind": "Service", "metadata": {"name": "home"}, "spec": spec}
    lab.request("PUT", "/v1/service-objects", {"objects": [service, *slices]})
    yield
    lab.request("DELETE", "/v1/service-objects?all=true")


def asked() -> str:
    """Ask the node port at an address by TCP, by a connected socket of UDP and by one that is not."""
    return ASK.replace("PORT", str(NODE_PORT))


ASK = """
found = []
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for connected in (True, False) if kind == socket.SOCK_DGRAM else (True,):
        s = socket.socket(family, kind)
        s.settimeout(5)
        try:
            if connected:
                s.connect((home, PORT))
                s.send(b"x")
                found.append([s.recv(10).decode(), s.getpeername()[0]])
            else:
                s.sendto(b"x", (home, PORT))
                data, source = s.recvfrom(10)
                found.append([data.decode(), source[0]])
        except OSError as error:
            found.append([type(error).__name__, home])
say(found=found)
"""


@pytest.mark.parametrize("home", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_node_ports_are_served_at_the_nodes_loopback_addresses(lab: Lab, node_port: None, home: str) -> None:
    """Without a packet that bears such an address: ``route_localnet`` stays off."""
    found = run(lab, "node1", 6 if ":" in home else 4, f"home = {home!r}\n" + asked())
    assert found == {"found": [["x", home]] * 3}
    inside = netns.inside(lab.namespace_of("node1"))
    command = [*inside, "cat", "/proc/sys/net/ipv4/conf/all/route_localnet"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "0"


@pytest.mark.parametrize("home", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_pods_loopback_addresses_are_its_own(lab: Lab, node_port: None, home: str) -> None:
    found = run(lab, "client", 6 if ":" in home else 4, f"home = {home!r}\n" + asked())
    assert {answer for answer, _ in found["found"]} <= {"ConnectionRefusedError", "TimeoutError"}
