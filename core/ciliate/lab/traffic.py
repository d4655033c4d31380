"""Traffic that runs while something happens to the agent, and counts what did not arrive as it should.

All sockets live in the namespaces of a lab's pods; every flow has one thread here. A flow that is allowed loses
nothing: neither a datagram's answer, nor a segment that TCP had to send again. A flow that is denied gets no answer of
any kind.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ciliate.datapath.netlink import in_netns

PACE = 0.01
"""Seconds between two packets of one flow."""
PATIENCE = 5.0
"""Seconds after which a packet that did not arrive is lost."""
RECORD = 256
_TOTAL_RETRANSMITS = struct.Struct("=100xI")


class Flow(Protocol):
    """Something that runs in the background until it is stopped, and says then what went wrong."""

    name: str

    def stop(self) -> int:
        """End; returns how many packets were lost (of an allowed flow) or got through (of a denied one)."""


@contextlib.contextmanager
def namespace(path: Path) -> Iterator[int]:
    """An open network namespace."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_socket(path: Path, make: Callable[[], socket.socket]) -> socket.socket:
    """A socket that ``make`` makes inside a namespace."""
    with namespace(path) as descriptor:
        made: socket.socket = in_netns(descriptor, make)
        return made


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class _Background:
    """A thread that calls ``_run`` until ``_ending`` is set; what it raises is raised again by ``_join``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._error = error

    def _run(self) -> None:
        raise NotImplementedError

    def _join(self) -> None:
        self._ending.set()
        self._thread.join(PATIENCE * 4)
        if self._error is not None:
            raise self._error


class EchoServer(_Background):
    """Echoes TCP and UDP on one port of both families in a pod."""

    def __init__(self, netns: Path, port: int) -> None:
        super().__init__(f"echo {port}")
        self._tcp = make_socket(netns, lambda: _listener(port, socket.SOCK_STREAM))
        self._udp = make_socket(netns, lambda: _listener(port, socket.SOCK_DGRAM))
        self._tcp.listen(256)
        self._thread.start()

    def _run(self) -> None:
        connections: dict[int, socket.socket] = {}
        poll = select.epoll()
        for server in (self._tcp, self._udp):
            server.setblocking(False)
            poll.register(server, select.EPOLLIN)
        try:
            while not self._ending.is_set():
                for number, _ in poll.poll(0.2):
                    self._ready(number, connections, poll)
        finally:
            poll.close()
            for connection in [*connections.values(), self._tcp, self._udp]:
                connection.close()

    def _ready(self, number: int, connections: dict[int, socket.socket], poll: select.epoll) -> None:
        # a peer that has gone, or gave up meanwhile, is no fault of the server
        with contextlib.suppress(OSError):
            if number == self._udp.fileno():
                data, peer = self._udp.recvfrom(2048)
                self._udp.sendto(data, peer)
            elif number == self._tcp.fileno():
                connection, _ = self._tcp.accept()
                connections[connection.fileno()] = connection
                poll.register(connection, select.EPOLLIN)
            elif data := connections[number].recv(65536):
                connections[number].sendall(data)
                return
            else:
                raise ConnectionError("the peer closed")
            return
        if number in connections:
            poll.unregister(number)
            connections.pop(number).close()

    def stop(self) -> None:
        """End."""
        self._join()


def _listener(port: int, kind: socket.SocketKind) -> socket.socket:
    server = socket.socket(socket.AF_INET6, kind)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", port))
    except OSError:
        server.close()
        raise
    return server


class TcpStream(_Background):
    """One connection that sends records and checks their echoes; counts segments that had to be sent again."""

    def __init__(self, netns: Path, address: str, port: int) -> None:
        super().__init__(f"TCP stream to {address}")
        self._socket = make_socket(netns, lambda: socket.create_connection((address, port), PATIENCE))
        self._before = retransmits(self._socket)
        self.records = 0
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(PACE):
            record = self.records.to_bytes(8, "big").ljust(RECORD, b"s")
            self._socket.sendall(record)
            echo = b""
            while len(echo) < RECORD:
                chunk = self._socket.recv(RECORD - len(echo))
                if not chunk:
                    raise ConnectionError(f"{self.name}: closed after {self.records} records")
                echo += chunk
            if echo != record:
                raise ConnectionError(f"{self.name}: record {self.records} came back otherwise")
            self.records += 1

    def stop(self) -> int:
        """End; returns how many segments were lost. OSError where the connection broke."""
        try:
            self._join()
            return retransmits(self._socket) - self._before
        finally:
            self._socket.close()


def retransmits(connection: socket.socket) -> int:
    """How many segments of a connection were sent again so far."""
    count: int = _TOTAL_RETRANSMITS.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))[0]
    return count


class UdpFlow(_Background):
    """Numbered requests of one UDP socket and their answers; counts those that got none."""

    def __init__(self, netns: Path, address: str, port: int) -> None:
        super().__init__(f"UDP flow to {address}")
        self._socket = make_socket(netns, lambda: _connected(address, port))
        self._missing: set[bytes] = set()
        self.records = 0
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(PACE):
            self._missing.add(number := self.records.to_bytes(8, "big"))
            self._socket.send(number)
            self.records += 1
            self._collect(0.0)
        deadline = time.monotonic() + PATIENCE
        while self._missing and time.monotonic() < deadline:
            self._collect(0.1)

    def _collect(self, wait: float) -> None:
        while select.select([self._socket], [], [], wait)[0]:
            self._missing.discard(self._socket.recv(64))
            wait = 0.0

    def stop(self) -> int:
        """End; returns how many requests were never answered."""
        try:
            self._join()
            return len(self._missing)
        finally:
            self._socket.close()


def _connected(address: str, port: int) -> socket.socket:
    client = socket.socket(_family(address), socket.SOCK_DGRAM)
    client.connect((address, port))
    return client


class PingFlow(_Background):
    """Echo requests of one identifier and their answers; counts those that got none."""

    def __init__(self, netns: Path, address: str) -> None:
        super().__init__(f"ping of {address}")
        self._v6 = ":" in address
        self._socket = make_socket(netns, lambda: _raw(address))
        self._identifier = os.urandom(2)
        self._missing: set[bytes] = set()
        self.records = 0
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(PACE):
            number = (self.records % 65536).to_bytes(2, "big")
            request, checksum = bytes([128 if self._v6 else 8, 0]), 0
            if not self._v6:  # of ICMPv6 the kernel writes it
                words = struct.unpack("!4H", request + b"\0\0" + self._identifier + number)
                checksum = 0xFFFF ^ ((total := sum(words)) + (total >> 16) & 0xFFFF)
            self._missing.add(number)
            self._socket.send(request + checksum.to_bytes(2, "big") + self._identifier + number)
            self.records += 1
            self._collect(0.0)
        deadline = time.monotonic() + PATIENCE
        while self._missing and time.monotonic() < deadline:
            self._collect(0.1)

    def _collect(self, wait: float) -> None:
        while select.select([self._socket], [], [], wait)[0]:
            packet = self._socket.recv(2048)
            message = packet if self._v6 else packet[(packet[0] & 15) * 4 :]
            if message[0] == (129 if self._v6 else 0) and message[4:6] == self._identifier:
                self._missing.discard(message[6:8])
            wait = 0.0

    def stop(self) -> int:
        """End; returns how many requests were never answered."""
        try:
            self._join()
            return len(self._missing)
        finally:
            self._socket.close()


def _raw(address: str) -> socket.socket:
    protocol = socket.IPPROTO_ICMPV6 if ":" in address else socket.IPPROTO_ICMP
    client = socket.socket(_family(address), socket.SOCK_RAW, protocol)
    client.connect((address, 0))
    return client


class NewFlows(_Background):
    """A new TCP connection and a new UDP flow again and again; counts those that lost a packet or got no answer."""

    def __init__(self, netns: Path, address: str, port: int, pace: float = 0.1) -> None:
        super().__init__(f"new flows to {address}")
        self._netns, self._target, self._pace = netns, (address, port), pace
        self.records = self._lost = 0
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(self._pace):
            self._lost += self._connect() + self._ask()
            self.records += 2

    def _connect(self) -> int:
        try:
            connection = make_socket(self._netns, lambda: socket.create_connection(self._target, PATIENCE))
        except OSError:
            return 1
        with connection:
            try:
                connection.sendall(b"new")
                return int(connection.recv(16) != b"new") or retransmits(connection)
            except OSError:
                return 1

    def _ask(self) -> int:
        with make_socket(self._netns, lambda: _connected(*self._target)) as client:
            client.settimeout(PATIENCE)
            try:
                client.send(b"new")
                return int(client.recv(16) != b"new")
            except OSError:
                return 1

    def stop(self) -> int:
        """End; returns how many flows failed or lost a packet."""
        self._join()
        return self._lost


class DeniedProber(_Background):
    """Datagrams and connection attempts that policy denies; counts every answer, a refusal included."""

    def __init__(self, netns: Path, address: str, port: int) -> None:
        super().__init__(f"denied flow to {address}")
        self._netns, self._target = netns, (address, port)
        self._udp = make_socket(netns, lambda: _connected(address, port))
        self._udp.setblocking(False)
        self.records = self._through = 0
        self._attempts: list[tuple[float, socket.socket]] = []
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ending.wait(PACE):
                self._datagram()
                if self.records % 8 == 0:
                    self._attempt()
                self._look()
                self.records += 1
        finally:
            for _, attempt in self._attempts:
                attempt.close()

    def _datagram(self) -> None:
        try:
            self._udp.send(b"denied")
            self._through += bool(self._udp.recv(64))
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            self._through += 1  # somebody answered that nobody listens

    def _attempt(self) -> None:
        attempt = make_socket(self._netns, lambda: socket.socket(_family(self._target[0]), socket.SOCK_STREAM))
        attempt.setblocking(False)
        attempt.connect_ex(self._target)
        self._attempts.append((time.monotonic(), attempt))

    def _look(self) -> None:
        """Whatever makes a connecting socket writable is an answer."""
        answered = set(select.select([], [attempt for _, attempt in self._attempts], [], 0)[1])
        self._through += len(answered)
        old = time.monotonic() - 1.0
        gone = [item for item in self._attempts if item[1] in answered or item[0] < old]
        self._attempts = [item for item in self._attempts if item not in gone]
        for _, attempt in gone:
            attempt.close()

    def stop(self) -> int:
        """End; returns how many packets were answered."""
        try:
            self._join()
            return self._through
        finally:
            self._udp.close()


class Traffic:
    """The flows of a fault test: from an allowed pod and from a denied one to a server, both families."""

    def __init__(self, server: Path, allowed: Path, denied: Path, addresses: list[str], port: int) -> None:
        self._server = EchoServer(server, port)
        self.allowed: list[TcpStream | UdpFlow | NewFlows] = []
        self.denied: list[DeniedProber] = []
        for address in addresses:
            self.allowed += [kind(allowed, address, port) for kind in (TcpStream, UdpFlow, NewFlows)]
            self.denied.append(DeniedProber(denied, address, port))

    def stop(self) -> tuple[dict[str, int], dict[str, int]]:
        """End; returns what was lost of each allowed flow and what got through of each denied one."""
        try:
            lost = {flow.name: flow.stop() for flow in self.allowed}
            return lost, {flow.name: flow.stop() for flow in self.denied}
        finally:
            self._server.stop()
