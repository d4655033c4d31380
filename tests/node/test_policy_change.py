"""A policy that changes under traffic: what both versions allow goes on, what neither allows never passes; root."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate.datapath.netlink import in_netns
from ciliate.lab.changes import populate
from ciliate.lab.lab import Lab
from ciliate.manifest import loads

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client, team: blue}}
spec: {containers: [{name: c, image: c}]}
"""
# both allow 8080/TCP and 8053/UDP to the client, by other rules and entries; only the first allows 8054/UDP
FIRST = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}, {port: "8053", protocol: UDP}, {port: "8054", protocol: UDP}]}]
"""
SECOND = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
  - fromEndpoints: [{matchExpressions: [{key: team, operator: In, values: [blue]}]}]
    toPorts: [{ports: [{port: "8053", protocol: UDP}]}]
  - fromCIDR: [198.51.100.0/24]
"""
CHANGES = 50
KEPT, ONCE, NEVER = 8053, 8054, 8055


@pytest.fixture
def lab() -> Iterator[Lab]:
    with new_lab("change", loads(PODS, "pods")) as made:
        yield made


class Ends:
    """Sockets in the pods of a lab, and their addresses."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._files: dict[str, int] = {}
        for name in ("server", "client"):
            file = os.open(f"/run/netns/{lab.state.pods[f'default/{name}'].netns}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            self._files[name] = file
        addresses = lab.state.pods["default/server"].addresses
        self.addresses = sorted(addresses, key=lambda text: ":" in text)

    def make(self, name: str, function: Callable[[], socket.socket]) -> socket.socket:
        made: socket.socket = in_netns(self._files[name], function)
        self._stack.callback(made.close)
        return made

    def server(self, kind: socket.SocketKind, port: int) -> socket.socket:
        def listen() -> socket.socket:
            sock = socket.socket(socket.AF_INET6, kind)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
            if kind == socket.SOCK_STREAM:
                sock.listen(64)
            sock.settimeout(0.1)
            return sock

        return self.make("server", listen)

    def client(self, kind: socket.SocketKind, address: str, port: int, timeout: float) -> socket.socket:
        def connect() -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, kind)
            sock.settimeout(timeout)
            sock.connect((address, port))
            return sock

        return self.make("client", connect)


class Traffic:
    """Background traffic; each counter is written by one thread."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.stop = threading.Event()
        self.counts: dict[str, int] = {"udp": 0, "udp lost": 0, "connections": 0, "connections slow": 0, "leaked": 0}
        self._threads: list[threading.Thread] = []
        self.streams: list[socket.socket] = []

    def start(self) -> None:
        stream = self.ends.server(socket.SOCK_STREAM, 8080)
        self._run(self._accept, stream)
        for port in (KEPT, ONCE):
            self._run(self._answer, self.ends.server(socket.SOCK_DGRAM, port))
        self._run(self._leak, self.ends.server(socket.SOCK_DGRAM, NEVER))
        for address in self.ends.addresses:
            self._run(self._ask, self.ends.client(socket.SOCK_DGRAM, address, KEPT, 1.0))
            self._run(self._probe, self.ends.client(socket.SOCK_DGRAM, address, NEVER, 1.0))
            self._run(self._connect, address)
            connection = self.ends.client(socket.SOCK_STREAM, address, 8080, 1.0)
            self.streams.append(connection)
            self._run(self._talk, connection)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self, server: socket.socket) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                self._run(self._echo, connection)

    def _echo(self, connection: socket.socket) -> None:
        connection.settimeout(0.1)
        with connection:
            while not self.stop.is_set():
                try:
                    data = connection.recv(4096)
                except TimeoutError:
                    continue
                if not data:
                    return
                connection.sendall(data)

    def _answer(self, server: socket.socket) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = server.recvfrom(100)
                server.sendto(data, peer)

    def _leak(self, server: socket.socket) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                server.recvfrom(100)
                self.counts["leaked"] += 1

    def _ask(self, sock: socket.socket) -> None:
        while not self.stop.is_set():
            self.counts["udp"] += 1
            self.counts["udp lost"] += not ask(sock, self.counts["udp"])
            time.sleep(0.001)

    def _probe(self, sock: socket.socket) -> None:
        while not self.stop.is_set():
            sock.send(b"never")
            time.sleep(0.002)

    def _connect(self, address: str) -> None:
        while not self.stop.is_set():
            start = time.monotonic()
            self.ends.client(socket.SOCK_STREAM, address, 8080, 5.0).close()
            self.counts["connections"] += 1
            # a lost SYN is sent again after a second
            self.counts["connections slow"] += time.monotonic() - start > 0.9
            time.sleep(0.01)

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        while not self.stop.is_set():
            connection.sendall(b"x" * 1000)
            left = 1000
            while left:
                left -= len(connection.recv(left))
            time.sleep(0.001)


def ask(sock: socket.socket, number: int) -> bool:
    """Send a datagram and wait for its answer; late answers to others are skipped."""
    wanted = struct.pack("!Q", number)
    sock.send(wanted)
    try:
        while sock.recv(100) != wanted:
            pass
    except TimeoutError:
        return False
    return True


def retransmissions(sock: socket.socket) -> int:
    """``tcpi_total_retrans`` of struct tcp_info."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0])


def apply(lab: Lab, text: str) -> None:
    populate(lab, loads(text, "policy"))


def test_changes_under_traffic_lose_nothing_and_open_nothing(lab: Lab) -> None:
    apply(lab, FIRST)
    with contextlib.ExitStack() as stack:
        ends = Ends(lab, stack)
        traffic = Traffic(ends)
        once = [ends.client(socket.SOCK_DGRAM, address, ONCE, 0.2) for address in ends.addresses]
        try:
            traffic.start()
            for number in range(CHANGES):
                apply(lab, FIRST if number % 2 else SECOND)
                if number < 6:
                    # what only the first version allows works under it, and its flow ends with it
                    assert [ask(sock, number) for sock in once] == [bool(number % 2)] * 2
        finally:
            traffic.finish()
        assert [retransmissions(sock) for sock in traffic.streams] == [0, 0]
    counts = traffic.counts
    assert (counts["udp lost"], counts["connections slow"], counts["leaked"]) == (0, 0, 0)
    assert counts["udp"] > 200
    assert counts["connections"] > 50
