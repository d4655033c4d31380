"""Traffic for tests: request and response without pause, floods that must not arrive, flows that talk both ways."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from ciliate.datapath.netlink import in_netns
from ciliate.lab.lab import Lab

PAUSE = 0.004
"""Seconds between two packets of a flow."""
PATIENCE = 5.0
TOTAL_RETRANSMISSIONS = 100
"""Offset of tcpi_total_retrans in struct tcp_info (linux/tcp.h)."""


def retransmissions(connection: socket.socket) -> int:
    """Segments that a TCP socket had to send again."""
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANSMISSIONS + 4)
    count: int = struct.unpack_from("=I", data, TOTAL_RETRANSMISSIONS)[0]
    return count


class Place:
    """A pod's network namespace and its addresses by family."""

    def __init__(self, lab: Lab, name: str, stack: ExitStack) -> None:
        pod = lab.state.pods[f"default/{name}"]
        self.name = name
        self._descriptor = os.open(f"/run/netns/{pod.netns}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._descriptor)
        self._stack = stack
        self.addresses = {6 if ":" in text else 4: text for text in pod.addresses}

    def socket(self, kind: int) -> socket.socket:
        """A socket in here for both families, closed at the end."""
        made = self.short_lived(kind)
        self._stack.callback(made.close)
        return made

    def short_lived(self, kind: int) -> socket.socket:
        """A socket in here for both families, closed by the caller."""
        made = in_netns(self._descriptor, lambda: socket.socket(socket.AF_INET6, kind))
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    def address(self, family: int, port: int) -> tuple[str, int]:
        """Where others reach this place, for a socket of both families."""
        text = self.addresses[family]
        return (f"::ffff:{text}" if family == 4 else text), port


class Worker:
    """A thread that repeats one step until stopped; what it raises is raised by ``stop``."""

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self._step = step
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self._step()
        except BaseException as error:
            if not self._end.is_set():
                self._error = error

    def stop(self) -> None:
        """End the thread; raises what ended it before."""
        self._end.set()
        self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error


class Server:
    """Answers UDP and TCP on one port of a pod, and remembers from whom anything came.

    A UDP datagram that begins with ``late`` is answered after a while, so that answers are under way at any time. A TCP
    connection that begins with ``talk`` is spoken to without being asked.
    """

    def __init__(self, place: Place, port: int, stack: ExitStack) -> None:
        self.heard: dict[str, int] = {}
        self.accepted: list[socket.socket] = []
        self._late: list[tuple[float, bytes, tuple[str, int]]] = []
        self._stack = stack
        self._udp, self._tcp = place.socket(socket.SOCK_DGRAM), place.socket(socket.SOCK_STREAM)
        self._udp.bind(("::", port))
        self._tcp.bind(("::", port))
        self._tcp.listen(64)
        self._udp.settimeout(0.01)
        self._tcp.settimeout(0.1)
        for name, step in (("udp", self._answer), ("tcp", self._accept)):
            stack.callback(Worker(f"server-{name}", step).stop)

    def _note(self, address: str) -> None:
        self.heard[address] = self.heard.get(address, 0) + 1

    def _answer(self) -> None:
        now = time.monotonic()
        while self._late and self._late[0][0] <= now:
            _, data, peer = self._late.pop(0)
            self._udp.sendto(data, peer)
        with contextlib.suppress(TimeoutError):
            data, peer = self._udp.recvfrom(2048)
            self._note(peer[0])
            if data.startswith(b"late"):
                self._late.append((now + 0.03, data, peer))
            else:
                self._udp.sendto(data, peer)

    def _accept(self) -> None:
        with contextlib.suppress(TimeoutError):
            connection, peer = self._tcp.accept()
            self._note(peer[0])
            self.accepted.append(connection)
            self._stack.callback(connection.close)
            connection.settimeout(0.01)
            worker = Worker("server-connection", lambda: self._serve(connection, peer[0]))
            self._stack.callback(lambda: _stop_quietly(worker))

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            data = connection.recv(2048)
        except TimeoutError:
            return
        if not data:
            raise ConnectionResetError("closed by the client")
        self._note(peer)
        connection.sendall(data)
        if data.startswith(b"talk"):
            self._stack.callback(Worker("server-talk", lambda: _talk(connection)).stop)


def _talk(connection: socket.socket) -> None:
    with contextlib.suppress(TimeoutError, OSError):
        connection.send(b"by the way")
    time.sleep(PAUSE)


def _stop_quietly(worker: Worker) -> None:
    with contextlib.suppress(OSError):
        worker.stop()


class Asking:
    """Requests one after the other from a pod to the server; counts those without an answer."""

    def __init__(self, place: Place, target: tuple[str, int], kind: int, stack: ExitStack) -> None:
        self.asked = self.lost = 0
        self.slowest = 0.0
        self.socket = place.socket(kind)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(target)
        self._stream = kind == socket.SOCK_STREAM
        stack.callback(Worker(f"{place.name}-asks", self._step).stop)

    def _step(self) -> None:
        self.asked += 1
        data = f"{self.asked:08}".encode()
        begin = time.monotonic()
        self.socket.send(data)
        if not self._answered(data):
            self.lost += 1
        self.slowest = max(self.slowest, time.monotonic() - begin)
        time.sleep(PAUSE)

    def _answered(self, data: bytes) -> bool:
        try:
            found = self.socket.recv(8)
            while self._stream and found and len(found) < 8:
                found += self.socket.recv(8 - len(found))
        except TimeoutError:
            return False
        return found == data


class Flood:
    """UDP datagrams and TCP openings from a pod, none of which may arrive."""

    def __init__(self, place: Place, target: tuple[str, int], stack: ExitStack) -> None:
        self.sent = 0
        self.opened: list[str] = []
        self._place, self._target = place, target
        self._udp = place.socket(socket.SOCK_DGRAM)
        self._tcp = self._dial()
        stack.callback(lambda: self._tcp.close())
        stack.callback(Worker(f"{place.name}-floods", self._step).stop)

    def _dial(self) -> socket.socket:
        made = self._place.short_lived(socket.SOCK_STREAM)
        made.setblocking(False)
        made.connect_ex(self._target)
        return made

    def _step(self) -> None:
        self.sent += 1
        self._udp.sendto(b"denied", self._target)
        if self.sent % 10 == 0:
            if self._is_open():
                self.opened.append(f"{self._place.name} -> {self._target}")
            self._tcp.close()
            self._tcp = self._dial()
        time.sleep(PAUSE / 2)

    def _is_open(self) -> bool:
        writable = select.select([], [self._tcp], [], 0)[1]
        return bool(writable) and self._tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


class Talking:
    """A flow on which both ends talk without being asked (TCP), or answers are always under way (UDP)."""

    def __init__(self, place: Place, target: tuple[str, int], kind: int) -> None:
        self.heard = 0
        self.socket = place.short_lived(kind)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(target)
        self._word = b"talk" if kind == socket.SOCK_STREAM else b"late"
        self.socket.settimeout(0.001)
        self._worker = Worker(f"{place.name}-talks", self._step)

    def _step(self) -> None:
        with contextlib.suppress(TimeoutError, BlockingIOError):
            self.socket.send(self._word if not self.heard or self._word == b"late" else b"more")
        with contextlib.suppress(TimeoutError):
            while self.socket.recv(65536):
                self.heard += 1
        time.sleep(PAUSE)

    def stop(self) -> None:
        """End the flow, without a word to the other end where that cannot be reached."""
        self._worker.stop()
        self.socket.close()
