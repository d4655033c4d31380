"""The process that lives in each of a lab's namespaces: answers on ports and sends probes when it is told to.

Standard library only, one file: it is run by path, before anything is installed where it runs. One JSON object a line
comes in over the control socket and one goes out for each:
``{"op": "serve", "ports": [["TCP", 80]], "addresses": ["10.0.0.1"]}`` -> ``{"problems": []}``
``{"op": "probe", "probes": [{"protocol": "TCP", "address": "10.0.0.1", "port": 80, "source": null, "timeout": 1.0}]}``
-> ``{"results": [{"reached": true, "who": "default/web", "saw": "10.0.0.7", "note": "answered", "ms": 1.2}]}``
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

AT_ONCE = 128
"""Probes under way at once; more wait their turn."""
RESEND = 0.25
"""Seconds between repetitions of a datagram that may have got lost before its neighbour was known."""
QUESTION = b"ciliate-probe\n"
IDLE_LIMIT = 30.0
SOCK_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
SOCK_DGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
SOCK_RAW = socket.SOCK_RAW | socket.SOCK_NONBLOCK
SCTP = 132
INIT, INIT_ACK, COOKIE = 1, 2, 7
FREEBIND = 15
IP_PKTINFO = 8
Callback = Callable[[int], None]


class Loop:
    """Readiness callbacks and deadlines; nothing else runs in this process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: dict[object, tuple[float, Callable[[], None]]] = {}

    def watch(self, file: socket.socket, events: int, callback: Callback) -> None:
        """Call ``callback`` with the events of a socket; a second call replaces the first."""
        number = file.fileno()
        (self._epoll.modify if number in self._callbacks else self._epoll.register)(number, events)
        self._callbacks[number] = callback

    def forget(self, file: socket.socket) -> None:
        """Stop watching a socket and close it."""
        if file.fileno() in self._callbacks:
            del self._callbacks[file.fileno()]
            self._epoll.unregister(file.fileno())
        file.close()

    def at(self, key: object, when: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` once at a monotonic time; a second call for the same key replaces the first."""
        self._timers[key] = (when, callback)

    def cancel(self, key: object) -> None:
        """Forget a deadline."""
        self._timers.pop(key, None)

    def run(self) -> None:
        """Work for ever."""
        while True:
            next_time = min((when for when, _ in self._timers.values()), default=None)
            pause = -1.0 if next_time is None else max(0.0, next_time - time.monotonic())
            for number, events in self._epoll.poll(pause):
                if number in self._callbacks:
                    self._callbacks[number](events)
            now = time.monotonic()
            for key, (when, callback) in list(self._timers.items()):
                if when <= now and key in self._timers:
                    del self._timers[key]
                    callback()


def family_of(address: str) -> socket.AddressFamily:
    """The address family of a literal address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Server:
    """Answers on ports: a line of JSON that says who answers and whom it saw, or the same by HTTP."""

    def __init__(self, loop: Loop, name: str) -> None:
        self._loop = loop
        self._name = name
        self._open: set[tuple[str, int, str]] = set()
        self._raw: set[socket.AddressFamily] = set()

    def serve(self, ports: list[list[Any]], addresses: list[str]) -> list[str]:
        """Listen on every port of every address; returns what could not be done."""
        problems = []
        for protocol, port in ports:
            for address in addresses:
                try:
                    self._listen(protocol, port, address)
                except OSError as error:
                    problems.append(f"{protocol} port {port} of {address}: {error.strerror}")
        return problems

    def _listen(self, protocol: str, port: int, address: str) -> None:
        if (protocol, port, address) in self._open:
            return
        if protocol == "SCTP" and not kernel_has_sctp():
            self._open.add((protocol, port, address))
            self._listen_raw(family_of(address))
            return
        stream = protocol != "UDP"
        server = socket.socket(
            family_of(address), SOCK_STREAM if stream else SOCK_DGRAM, SCTP if protocol == "SCTP" else 0
        )
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.IPPROTO_IP, FREEBIND, 1)
            server.bind((address, port))
            if stream:
                server.listen(256)
        except OSError:
            server.close()
            raise
        self._loop.watch(server, select.EPOLLIN, lambda _: self._accept(server) if stream else self._datagram(server))
        self._open.add((protocol, port, address))

    def _listen_raw(self, family: socket.AddressFamily) -> None:
        """Answer the first chunk of associations, where the kernel has no SCTP."""
        if family in self._raw:
            return
        self._raw.add(family)
        server = socket.socket(family, SOCK_RAW, SCTP)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self._loop.watch(server, select.EPOLLIN, lambda _: self._chunk(server, family))

    def _chunk(self, server: socket.socket, family: socket.AddressFamily) -> None:
        """INIT ACK for an INIT to a served port, from the address that it was sent to."""
        try:
            data, ancillary, _, peer = server.recvmsg(4096, 128)
            packet = sctp_of(family, data)
            port = int.from_bytes(packet[2:4], "big")
            own = own_address(family, ancillary)
            if packet[12:13] == bytes([INIT]) and ("SCTP", port, own) in self._open and len(packet) >= 20:
                cookie = self._answer(peer[0]).strip()
                chunk = init_chunk(INIT_ACK, os.urandom(4), parameter(COOKIE, cookie))
                answer = sctp_packet(packet[2:4], packet[:2], packet[16:20], chunk)
                send_from(server, family, answer, own, peer[0])
        except OSError:
            # the peer is gone or the packet was refused on its way: it will see no answer, which is what it measures
            return

    def _answer(self, peer: str) -> bytes:
        return json.dumps({"who": self._name, "saw": peer}).encode() + b"\n"

    def _datagram(self, server: socket.socket) -> None:
        try:
            _, peer = server.recvfrom(2048)
            server.sendto(self._answer(peer[0]), peer)
        except OSError:
            # the peer is gone or the packet was refused on its way: it will see no answer, which is what it measures
            return

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, peer = server.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._loop.watch(connection, select.EPOLLIN, lambda _: self._talk(connection, peer[0]))
        self._loop.at(connection, time.monotonic() + IDLE_LIMIT, lambda: self._loop.forget(connection))

    def _talk(self, connection: socket.socket, peer: str) -> None:
        """Answer each line; close after HTTP, and where the peer closes."""
        try:
            data = connection.recv(4096)
            if data:
                connection.send(self._reply(data, peer))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or is_http(data):
            self._loop.cancel(connection)
            self._loop.forget(connection)
        else:
            self._loop.at(connection, time.monotonic() + IDLE_LIMIT, lambda: self._loop.forget(connection))

    def _reply(self, data: bytes, peer: str) -> bytes:
        body = self._answer(peer)
        if not is_http(data):
            return body
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + body


def is_http(data: bytes) -> bool:
    """Whether a request's first bytes look like HTTP."""
    return b" HTTP/1." in data.split(b"\r\n", 1)[0]


class Probe:
    """One packet, or connection, that gets there or does not."""

    def __init__(self, loop: Loop, request: dict[str, Any], done: Callable[[dict[str, Any]], None]) -> None:
        self._loop = loop
        self._request = request
        self._done = done
        self._protocol: str = request["protocol"]
        self._target = (request["address"], request.get("port") or 0)
        self._started = time.monotonic()
        self._deadline = self._started + request["timeout"]
        self._token = os.urandom(16)
        self._raw_sctp = self._protocol == "SCTP" and not kernel_has_sctp()
        self._source_port = (32768 + int.from_bytes(self._token[:2], "big") % 28000).to_bytes(2, "big")
        self._socket: socket.socket | None = None
        self._note = "no answer"

    def start(self) -> None:
        """Send; the result comes through ``done``, at the latest after the time limit."""
        try:
            self._socket = self._make_socket()
            self._loop.at(self, self._deadline, lambda: self._finish(False, self._note))
            self._begin(self._socket)
        except OSError as error:
            self._failed(error)

    def _make_socket(self) -> socket.socket:
        family = family_of(self._target[0])
        if self._protocol == "ICMP":
            return socket.socket(family, SOCK_RAW, icmp_protocol(family))
        if self._raw_sctp:
            return socket.socket(family, SOCK_RAW, SCTP)
        kind = SOCK_DGRAM if self._protocol == "UDP" else SOCK_STREAM
        return socket.socket(family, kind, SCTP if self._protocol == "SCTP" else 0)

    def _begin(self, probe: socket.socket) -> None:
        if self._request.get("source"):
            probe.bind((self._request["source"], 0))
        stream = self._protocol in ("TCP", "SCTP") and not self._raw_sctp
        # a raw socket has no port; IPv6 refuses any but the protocol's number there
        outcome = probe.connect_ex((self._target[0], 0) if self._raw_sctp else self._target)
        if outcome not in (0, errno.EINPROGRESS):
            raise OSError(outcome, os.strerror(outcome))
        if stream:
            self._loop.watch(probe, select.EPOLLOUT, lambda _: self._connected(probe))
        else:
            self._loop.watch(probe, select.EPOLLIN, lambda _: self._receive(probe))
            self._send(probe)

    def _connected(self, probe: socket.socket) -> None:
        outcome = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if outcome:
            self._failed(OSError(outcome, os.strerror(outcome)))
            return
        self._note = "connected, but no answer"
        self._loop.watch(probe, select.EPOLLIN, lambda _: self._receive(probe))
        try:
            probe.send(QUESTION)
        except OSError as error:
            self._failed(error)

    def _send(self, probe: socket.socket) -> None:
        """Send a datagram, and again until the answer is there."""
        try:
            probe.send(self._echo() if self._protocol == "ICMP" else self._init() if self._raw_sctp else QUESTION)
        except OSError as error:
            self._failed(error)
            return
        if time.monotonic() + RESEND < self._deadline:
            self._loop.at((self, "resend"), time.monotonic() + RESEND, lambda: self._send(probe))

    def _init(self) -> bytes:
        port = self._target[1].to_bytes(2, "big")
        return sctp_packet(self._source_port, port, bytes(4), init_chunk(INIT, self._token[:4], b""))

    def _associated(self, data: bytes) -> None:
        """An INIT ACK for this probe's INIT names who sent it in its cookie."""
        packet = sctp_of(family_of(self._target[0]), data)
        if packet[2:4] != self._source_port or packet[4:8] != self._token[:4] or packet[12:13] != bytes([INIT_ACK]):
            return
        length = int.from_bytes(packet[34:36], "big")
        if crc32c(packet[:8] + bytes(4) + packet[12:]) == packet[8:12]:
            self._answered(packet[36 : 32 + length])
        else:
            self._finish(False, "the answer's checksum is wrong")

    def _echo(self) -> bytes:
        six = family_of(self._target[0]) == socket.AF_INET6
        head = bytes([128 if six else 8, 0])
        identifier: int = self._request["id"]
        rest = identifier.to_bytes(2, "big") + b"\0\1" + self._token
        # the kernel fills in the checksum of ICMPv6 only
        return head + (b"\0\0" if six else checksum(head + b"\0\0" + rest)) + rest

    def _receive(self, probe: socket.socket) -> None:
        try:
            data = probe.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(error)
            return
        if self._protocol == "ICMP":
            self._echo_reply(data)
        elif self._raw_sctp:
            self._associated(data)
        elif data:
            self._answered(data)
        else:
            self._finish(False, "connected, but closed without an answer")

    def _echo_reply(self, data: bytes) -> None:
        six = family_of(self._target[0]) == socket.AF_INET6
        message = data if six else data[(data[0] & 15) * 4 :]
        if message[0] == (129 if six else 0) and message[8:] == self._token:
            self._finish(True, "echo reply")

    def _answered(self, data: bytes) -> None:
        try:
            answer = json.loads(data)
            self._finish(True, "answered", answer["who"], answer["saw"])
        except (ValueError, KeyError, TypeError):
            self._finish(True, f"answered {data[:40]!r}")

    def _failed(self, error: OSError) -> None:
        # a refusal comes from the far end itself: the packet got there
        reached = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)
        self._finish(reached, os.strerror(error.errno or 0).lower())

    def _finish(self, reached: bool, note: str, who: str = "", saw: str = "") -> None:
        self._loop.cancel(self)
        self._loop.cancel((self, "resend"))
        if self._socket is not None:
            self._loop.forget(self._socket)
            self._socket = None
        spent = round((time.monotonic() - self._started) * 1000, 2)
        self._done({"reached": reached, "who": who, "saw": saw, "note": note, "ms": spent})


def kernel_has_sctp() -> bool:
    """Whether this kernel can speak SCTP; found out once."""
    if not _HAS_SCTP:
        try:
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP).close()
            _HAS_SCTP.append(True)
        except OSError:
            _HAS_SCTP.append(False)
    return _HAS_SCTP[0]


_HAS_SCTP: list[bool] = []


def sctp_of(family: int, data: bytes) -> bytes:
    """The SCTP packet of what a raw socket received: that of IPv4 has the IP header before it."""
    return data if family == socket.AF_INET6 else data[(data[0] & 15) * 4 :]


def own_address(family: int, ancillary: list[tuple[int, int, bytes]]) -> str:
    """The address that a packet was sent to."""
    for level, kind, data in ancillary:
        if family == socket.AF_INET6 and (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return socket.inet_ntop(family, data[:16])
        if family == socket.AF_INET and (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            return socket.inet_ntop(family, data[8:12])
    return ""


def send_from(server: socket.socket, family: int, packet: bytes, own: str, peer: str) -> None:
    """Send from one of the machine's addresses."""
    packed = socket.inet_pton(family, own)
    if family == socket.AF_INET6:
        control = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, packed + bytes(4))
    else:
        control = (socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + packed + bytes(4))
    server.sendmsg([packet], [control], 0, (peer, 0))


def init_chunk(kind: int, tag: bytes, parameters: bytes) -> bytes:
    """INIT or INIT ACK (RFC 9260 section 3.3.2): one stream each way, a window of 64 KiB."""
    body = tag + (65536).to_bytes(4, "big") + b"\0\1\0\1" + tag + parameters
    return bytes([kind, 0]) + (4 + len(body)).to_bytes(2, "big") + body + bytes(-len(body) % 4)


def parameter(kind: int, value: bytes) -> bytes:
    """A parameter of a chunk."""
    return kind.to_bytes(2, "big") + (4 + len(value)).to_bytes(2, "big") + value


def sctp_packet(source: bytes, target: bytes, tag: bytes, chunk: bytes) -> bytes:
    """One packet: ports as bytes, the receiver's verification tag, the checksum, the chunk."""
    head = source + target + tag
    return head + crc32c(head + bytes(4) + chunk) + chunk


def crc32c(data: bytes) -> bytes:
    """SCTP's checksum as it stands in a packet (RFC 9260 appendix A)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return (register ^ 0xFFFFFFFF).to_bytes(4, "little")


def icmp_protocol(family: int) -> int:
    """ICMP's protocol number of a family."""
    return 58 if family == socket.AF_INET6 else 1


def checksum(data: bytes) -> bytes:
    """The Internet checksum of an even number of bytes."""
    total = sum(int.from_bytes(data[index : index + 2], "big") for index in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


class Batch:
    """The probes of one request, a bounded number at once."""

    def __init__(self, loop: Loop, requests: list[dict[str, Any]], done: Callable[[list[Any]], None]) -> None:
        self._loop = loop
        self._requests = requests
        self._results: list[Any] = [None] * len(requests)
        self._done = done
        self._next = 0
        self._left = len(requests)

    def start(self) -> None:
        """Send the first ones; each that ends starts another."""
        for _ in range(min(AT_ONCE, len(self._requests))):
            self._start_one()
        if not self._requests:
            self._done([])

    def _start_one(self) -> None:
        index = self._next
        if index == len(self._requests):
            return  # others that failed at once had theirs started already
        self._next += 1
        Probe(self._loop, self._requests[index], lambda result: self._ended(index, result)).start()

    def _ended(self, index: int, result: dict[str, Any]) -> None:
        self._results[index] = result
        self._left -= 1
        if self._next < len(self._requests):
            # from the loop, not from here: a thousand immediate failures must not nest
            self._loop.at((self, index), time.monotonic(), self._start_one)
        if not self._left:
            self._done(self._results)


class Control:
    """The control socket: one request a line, one answer a line."""

    def __init__(self, loop: Loop, path: str, server: Server) -> None:
        self._loop = loop
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX, SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)  # noqa: PTH101 (pathlib would double the time to start)
        self._listener.listen(16)
        loop.watch(self._listener, select.EPOLLIN, lambda _: self._accept())

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        buffer = bytearray()
        self._loop.watch(connection, select.EPOLLIN, lambda _: self._read(connection, buffer))

    def _read(self, connection: socket.socket, buffer: bytearray) -> None:
        try:
            data = connection.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.forget(connection)
            return
        buffer += data
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            self._perform(connection, json.loads(line))

    def _perform(self, connection: socket.socket, request: dict[str, Any]) -> None:
        if request["op"] == "serve":
            problems = self._server.serve(request["ports"], request["addresses"])
            self._reply(connection, {"problems": problems})
        elif request["op"] == "probe":
            batch = Batch(self._loop, request["probes"], lambda results: self._reply(connection, {"results": results}))
            batch.start()
        else:
            self._reply(connection, {"error": f"op: {request['op']!r} given, expected serve or probe"})

    def _reply(self, connection: socket.socket, answer: dict[str, Any]) -> None:
        connection.setblocking(True)
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.setblocking(False)
        except OSError:
            self._loop.forget(connection)


def main() -> None:
    """Run until killed: arguments are the control socket's path and the name to answer with."""
    path, name = sys.argv[1:3]
    loop = Loop()
    Control(loop, path, Server(loop, name))
    # whoever started this waits for the line before it connects
    os.write(1, b"ready\n")
    os.close(1)
    loop.run()


if __name__ == "__main__":
    main()
