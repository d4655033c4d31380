"""`make demo`: the main job told step by step with real packets; exits 1 where any step differs from what is told."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ciliate import interrupts, manifest
from ciliate.datapath.netlink import in_netns
from ciliate.lab.changes import populate
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import WORLD, LabPod
from ciliate.lab.world import NODE_ADDRESSES, WORLD_LINK

ROOT = Path(__file__).resolve().parents[3]
PODS = ROOT / "examples" / "demo" / "pods.yaml"
POLICY = ROOT / "examples" / "policies" / "deathstar.yaml"
PORT = 80
SERVICE = ("10.104.0.1", "fd00:c11:96::104:1")
"""The addresses of the deathstar's service."""
TRACE = ("policy", "trace", "--src-k8s-pod", "default/xwing", "--dst-k8s-pod", "default/deathstar", "--dport", "80/TCP")
PATIENCE = 10.0
"""Seconds that something which must happen may take."""
TIMEOUT = 1.0
"""Seconds without an answer that count as "timed out"."""


class StepError(Exception):
    """A step of the story went otherwise than told."""


class Deathstar:
    """Serves TCP 80 in its pod: lands ships, and echoes what comes on a connection that stays open."""

    def __init__(self, namespace: int) -> None:
        self._server = in_netns(namespace, self._listen)
        threading.Thread(target=self._accept, daemon=True, name="deathstar").start()

    @staticmethod
    def _listen() -> socket.socket:
        server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", PORT))
        server.listen(16)
        return server

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @staticmethod
    def _serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1024):
                connection.sendall(b"Ship landed\n" if data.startswith(b"POST /v1/request-landing") else data)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


class Story:
    """The lab, the actors, and how to print."""

    def __init__(self, lab: Lab, stack: ExitStack, quiet: bool = False) -> None:
        self.lab = lab
        self.quiet = quiet
        self._stack = stack
        self._number = 0

    def tell(self, text: str) -> None:
        """Begin a step."""
        self._number += 1
        self._print(
            f"\n\033[1m{self._number:2}. {text}\033[0m" if sys.stdout.isatty() else f"\n{self._number:2}. {text}"
        )

    def show(self, text: str) -> None:
        """Print what a step gave."""
        for line in text.rstrip().splitlines():
            self._print(f"      {line}")

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def expect(self, what: str, holds: bool) -> None:
        """Check one statement of the story; StepError where it does not hold."""
        self._print(f"    {'ok ' if holds else 'NO '} {what}")
        if not holds:
            raise StepError(f"step {self._number}: {what}: it did not")

    def command(self, *arguments: str, code: int = 0) -> str:
        """Run the `ciliate` command against the lab's agent, showing what it prints; StepError at another exit code."""
        self._print(f"    $ ciliate {' '.join(arguments)}")
        line = [sys.executable, "-m", "ciliate.cli.main", "-H", str(self.lab.directory.api_socket), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        self.show(done.stdout + done.stderr)
        if done.returncode != code:
            raise StepError(f"step {self._number}: `ciliate {' '.join(arguments)}` gave exit code {done.returncode}")
        return done.stdout

    def pod(self, name: str) -> LabPod:
        """One of the actors."""
        return self.lab.state.pods[f"default/{name}"]

    def namespace(self, name: str) -> int:
        """A descriptor of an actor's network namespace, open until the story ends."""
        descriptor = os.open(f"/run/netns/{self.pod(name).netns}", os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def addresses(self, name: str) -> list[str]:
        """An actor's addresses, IPv4 first."""
        return sorted(self.pod(name).addresses, key=lambda text: ":" in text)

    def connect(self, name: str, address: str, timeout: float) -> socket.socket:
        """A connection from a ship to the deathstar; TimeoutError where nobody answers."""

        def dial() -> socket.socket:
            return socket.create_connection((address, PORT), timeout)

        connection: socket.socket = in_netns(self.namespace(name), dial)
        return connection

    def lands(self, name: str) -> list[str]:
        """What each address of the deathstar answers to a ship: ``Ship landed`` or ``timed out``."""
        return [self._land(name, address) for address in self.addresses("deathstar")]

    def _land(self, name: str, address: str) -> str:
        try:
            with self.connect(name, address, TIMEOUT) as connection:
                connection.sendall(b"POST /v1/request-landing HTTP/1.0\r\n\r\n")
                return connection.recv(100).decode().strip()
        except TimeoutError:
            return "timed out"

    def pings(self, name: str) -> list[bool]:
        """Whether each address of the deathstar answers a ship's ping."""
        return [self._ping(name, address) for address in self.addresses("deathstar")]

    def _ping(self, name: str, address: str) -> bool:
        enter = ["nsenter", f"--net=/run/netns/{self.pod(name).netns}"]
        command = [*enter, "ping", "-c1", "-W1", "-n", "-q", address]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def service_landing(self, name: str, expected: str) -> None:
        """Try to land through the service, over both families, and compare."""
        for address in SERVICE:
            answer = self._land(name, address)
            self.expect(f"{name} -> service [{address}]:{PORT}: {answer}", answer == expected)

    def landing(self, name: str, expected: str) -> None:
        """Try to land over both families and compare."""
        answers = self.lands(name)
        for address, answer in zip(self.addresses("deathstar"), answers, strict=True):
            self.expect(f"{name} -> deathstar [{address}]:{PORT}: {answer}", answer == expected)

    def pinging(self, name: str, expected: bool) -> None:
        """Ping over both families and compare."""
        for address, answered in zip(self.addresses("deathstar"), self.pings(name), strict=True):
            text = "answered" if answered else "no answer"
            self.expect(f"{name} pings {address}: {text}", answered == expected)


class Monitor:
    """`ciliate monitor --type drop` in the background."""

    def __init__(self, story: Story) -> None:
        socket_path = str(story.lab.directory.api_socket)
        line = [sys.executable, "-m", "ciliate.cli.main", "-H", socket_path, "monitor", "--json"]
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        if not self._listening.wait(PATIENCE):
            raise StepError("the monitor does not listen")

    def _read(self) -> None:
        import json

        for line in self._process.stdout or ():
            self._listening.set()
            self.events.append(json.loads(line))

    def drops(self) -> list[dict[str, Any]]:
        """Drops so far."""
        return [event for event in self.events if event["type"] == "drop"]

    def close(self) -> None:
        """End the command."""
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def tell(story: Story, policy: Path = POLICY) -> None:
    """The story, from the agent's start to its end."""
    story.tell("An agent runs on a node, with its plugins.")
    story.command("status")
    story.command("plugins", "list", "--agent")
    story.tell("Three pods were added by CNI: a deathstar and a TIE fighter of the empire, an X-wing of the alliance.")
    listing = story.command("endpoint", "list")
    story.expect("all three are ready", listing.count("ready") == 3)
    deathstar = Deathstar(story.namespace("deathstar"))
    try:
        _without_policy(story)
        _service(story)
        _world(story)
        connection = story.connect("tiefighter", story.addresses("deathstar")[0], PATIENCE)
        with connection:
            _with_policy(story, policy, connection)
            _agent_killed(story, connection)
        _policy_deleted(story)
    finally:
        deathstar.close()


def _without_policy(story: Story) -> None:
    story.tell("Without a policy everybody reaches everybody.")
    for ship in ("tiefighter", "xwing"):
        story.landing(ship, "Ship landed")
        story.pinging(ship, True)


def _service(story: Story) -> None:
    story.tell("The deathstar gets a service, in both families. Ships land through its address.")
    for number, (front, back) in enumerate(zip(SERVICE, story.addresses("deathstar"), strict=True), 1):
        places = [f"[{ip}]:{PORT}" if ":" in ip else f"{ip}:{PORT}" for ip in (front, back)]
        options = ["--id", str(number), "--name", "default/deathstar", "--frontend", places[0], "--backends", places[1]]
        story.command("service", "update", *options)
    story.service_landing("tiefighter", "Ship landed")
    story.service_landing("xwing", "Ship landed")


def _world(story: Story) -> None:
    story.tell(
        "The world outside knows the node, not the pods. A TIE fighter goes there; the world sees the node's address."
    )
    story.lab.helper(WORLD).serve([("TCP", PORT)], WORLD_LINK)
    for target, node in zip(WORLD_LINK, NODE_ADDRESSES, strict=True):
        request = {"id": 0, "protocol": "TCP", "address": target, "port": PORT, "source": None, "timeout": PATIENCE}
        (result,) = story.lab.helper("default/tiefighter").probe([request], PATIENCE * 2)
        story.expect(f"the world at {target} saw {result['saw'] or 'nobody'}", result["saw"] == node)
    root = str(story.lab.directory.bpf_dir)
    listing = story.command("bpf", "--bpf-root", root, "nat", "list")
    story.expect("both connections are listed", all(f"{address} {PORT}" in listing for address in WORLD_LINK))


def _with_policy(story: Story, policy: Path, connection: socket.socket) -> None:
    story.tell("The policy: only ships of the empire, and only on port 80. It is imported.")
    monitor = Monitor(story)
    try:
        story.command(
            "policy", "import", str(policy.relative_to(Path.cwd()) if policy.is_relative_to(Path.cwd()) else policy)
        )
        story.tell("The TIE fighter still lands. The X-wing times out: its packets are dropped, not refused.")
        story.landing("tiefighter", "Ship landed")
        story.landing("xwing", "timed out")
        story.tell("The same through the service: policy looks behind it.")
        story.service_landing("tiefighter", "Ship landed")
        story.service_landing("xwing", "timed out")
        story.tell("The monitor shows each drop with its reason, both identities and what isolates the deathstar.")
        seen = wait_for(lambda: len(monitor.drops()) >= 2)
        for event in monitor.drops()[:2]:
            story.show(event["text"])
        story.expect("the monitor saw the X-wing's packets dropped", seen and all(map(_is_xwing, monitor.drops())))
        story.tell("Why? The policy engine explains it, from the same rules that the kernel has.")
        text = story.command(*TRACE, code=1)
        story.expect("it says that no rule allows it", "Found no allow rule" in text and text.count("DENIED") == 1)
        story.expect(
            "trace and monitor name the same policy, file and line",
            all(name in text for event in monitor.drops() for name in event["isolated_by"]),
        )
        story.tell("A ping from the X-wing is dropped too.")
        story.pinging("xwing", False)
    finally:
        monitor.close()
    story.tell("A connection that the TIE fighter had opened before the policy lives on.")
    story.expect("it still carries data", _echo(connection, b"before the policy\n"))


def _is_xwing(event: dict[str, Any]) -> bool:
    named = "k8s:org=alliance" in event["src_labels"] and "k8s:class=deathstar" in event["dst_labels"]
    return bool(named and event["isolated_by"] and event["reason_text"] == "Policy denied")


def _agent_killed(story: Story, connection: socket.socket) -> None:
    story.tell("The agent is killed with -9. Traffic and policy stay as they were: they are in the kernel.")
    before = _endpoints(story)
    story.lab.stop_agent(signal.SIGKILL)
    story.expect("the open connection still carries data", _echo(connection, b"without an agent\n"))
    story.landing("tiefighter", "Ship landed")
    story.landing("xwing", "timed out")
    story.tell("The agent comes back with the same endpoints: ids, identities and addresses.")
    story.lab.start_agent()
    story.command("endpoint", "list")
    story.expect("they are the same", _endpoints(story) == before)
    story.expect("the open connection still carries data", _echo(connection, b"agent is back\n"))
    story.landing("xwing", "timed out")


def _policy_deleted(story: Story) -> None:
    story.tell("The policy is deleted, and the X-wing lands.")
    story.command("policy", "delete", "--all")
    story.landing("xwing", "Ship landed")


def _endpoints(story: Story) -> list[Any]:
    documents = story.lab.client().request("GET", "/v1/endpoint")
    status = [document["status"] for document in documents]
    return [
        (document["id"], item["identity"]["id"], item["networking"]["addressing"])
        for document, item in zip(documents, status, strict=True)
    ]


def _echo(connection: socket.socket, data: bytes) -> bool:
    connection.settimeout(PATIENCE)
    connection.sendall(data)
    return connection.recv(100) == data


@contextmanager
def staged(name: str, quiet: bool = False) -> Iterator[Story]:
    """A lab with the three pods, taken down at the end whatever happened."""
    with ExitStack() as stack:
        lab = Lab.create(name, options={"masquerade": "bpf"})
        stack.callback(lab.destroy)
        populate(lab, manifest.load([PODS]))
        yield Story(lab, stack, quiet)


def left_behind(name: str) -> list[str]:
    """Namespaces, pins and directories of a lab that are still there."""
    found = [str(path) for path in Path("/run/netns").glob(f"*{name}*")] if Path("/run/netns").is_dir() else []
    directory = Path("/run/ciliate-lab") / name
    return [*found, *([str(directory)] if directory.exists() else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story; 0 where every step went as told."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--policy", type=Path, default=POLICY, help="another policy, to see a step fail")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("demo: run as root: it makes network namespaces and loads eBPF programs", file=sys.stderr)
        return 2
    interrupts.watch()
    name = f"demo-{os.getpid()}"
    begin = time.monotonic()
    try:
        with staged(name) as story:
            tell(story, options.policy)
            story.tell("Everything is taken down.")
        story.expect("nothing stays behind", left_behind(name) == [])
    except (StepError, LabError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    print(f"\nThe whole story took {time.monotonic() - begin:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
