"""What a lab is made of, on disk: enough to use it from another command and to remove it after a crash."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ciliate import atomicfile
from ciliate.lab.errors import LabError
from ciliate.lab.processes import Process

ROOT = Path("/run/ciliate-lab")
NODE = "node1"
WORLD = "world"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\Z")


class LabPod(msgspec.Struct):
    """A pod that a lab made. ``addresses`` are those that CNI gave it; a host-network pod has its node's.

    A host-network pod that names no node has ``node`` empty: it counts as one on every node.
    """

    name: str
    container_id: str = ""
    netns: str = ""
    addresses: list[str] = []
    host_network: bool = False
    node: str = NODE


class LabState(msgspec.Struct):
    """Everything that has to go when the lab goes. A namespace is listed before it is made."""

    name: str
    namespaces: list[str] = []
    processes: list[Process] = []
    pods: dict[str, LabPod] = {}
    world_addresses: list[str] = []
    enforcement: str = "default"
    options: dict[str, str] = {}
    """Options of the agents beyond those that the lab needs."""
    nodes: list[str] = msgspec.field(default_factory=lambda: [NODE])
    tunnel: str = "disabled"
    kvstore: str = "embedded"

    @property
    def joined(self) -> bool:
        """Whether the nodes are joined by a network of their own, rather than one node to the world by a link."""
        return len(self.nodes) > 1 or self.kvstore != "embedded"


class NodeDirectory:
    """What one node of a lab has on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state_dir(self) -> Path:
        """The agent's state directory."""
        return self.path / "state"

    @property
    def run_dir(self) -> Path:
        """The agent's run directory, with its sockets."""
        return self.path / "run"

    @property
    def bpf_dir(self) -> Path:
        """The node's own BPF file system: what is pinned there goes with the mount."""
        return self.path / "bpf"

    @property
    def api_socket(self) -> Path:
        """The agent's API socket."""
        return self.run_dir / "ciliate.sock"

    @property
    def cni_socket(self) -> Path:
        """The agent's CNI socket."""
        return self.run_dir / "cni.sock"

    @property
    def agent_log(self) -> Path:
        """Where the agent's messages go."""
        return self.path / "agent.log"

    def make(self) -> None:
        """Make the directories."""
        for directory in (self.path, self.state_dir, self.run_dir, self.bpf_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


class LabDirectory:
    """A lab's directory and its state file."""

    def __init__(self, name: str, root: Path = ROOT) -> None:
        if not _NAME.match(name):
            raise LabError(f"--name: {name!r} given, expected up to 32 of a-z, 0-9 and '-', no '-' at the ends")
        self.name = name
        self.path = root / name

    def node(self, name: str) -> NodeDirectory:
        """The directory of one node; the first one's is that of the lab itself."""
        return NodeDirectory(self.path if name == NODE else self.path / name)

    @property
    def state_dir(self) -> Path:
        """The first agent's state directory."""
        return self.node(NODE).state_dir

    @property
    def run_dir(self) -> Path:
        """The first agent's run directory."""
        return self.node(NODE).run_dir

    @property
    def bpf_dir(self) -> Path:
        """The first node's BPF file system."""
        return self.node(NODE).bpf_dir

    @property
    def api_socket(self) -> Path:
        """The first agent's API socket."""
        return self.node(NODE).api_socket

    @property
    def cni_socket(self) -> Path:
        """The first agent's CNI socket."""
        return self.node(NODE).cni_socket

    @property
    def agent_log(self) -> Path:
        """Where the first agent's messages go."""
        return self.node(NODE).agent_log

    def helper_socket(self, namespace: str) -> Path:
        """The control socket of the helper in a namespace (short: such paths have at most 107 characters)."""
        return self.path / "h" / f"{hash_name(namespace):x}"

    def namespace(self, what: str) -> str:
        """The name of one of the lab's namespaces. A lab's name has no dot, so no two labs can meet."""
        return f"cl-{self.name}.{what}"

    def exists(self) -> bool:
        """Whether there is a lab of this name, or what is left of one."""
        return (self.path / "lab.json").exists()

    def load(self) -> LabState:
        """Read the state; LabError where there is no such lab."""
        try:
            data = atomicfile.read_json(self.path / "lab.json")
            if data is None:
                raise LabError(f"lab {self.name!r}: there is none of this name; `ciliate lab up` makes one")
            return msgspec.convert(data, LabState)
        except (ValueError, msgspec.ValidationError) as error:
            raise LabError(f"lab {self.name!r}: {error}") from error

    def load_or_empty(self) -> LabState:
        """Read the state; an empty one where there is none, or none that can be read."""
        try:
            return self.load()
        except LabError:
            return LabState(name=self.name)

    def save(self, state: LabState) -> None:
        """Write the state."""
        for name in state.nodes:
            self.node(name).make()
        (self.path / "h").mkdir(mode=0o700, parents=True, exist_ok=True)
        atomicfile.write_json(self.path / "lab.json", msgspec.to_builtins(state))

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands away from this lab; LabError where one is at work on it."""
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self.path.parent / f".{self.name}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _take(file, path):
                raise LabError(f"lab {self.name!r}: another command works on it")
            try:
                yield
            finally:
                if not self.path.exists():
                    path.unlink(missing_ok=True)
        finally:
            os.close(file)


def _take(file: int, path: Path) -> bool:
    """Lock a file; False where somebody else has it, or has removed it while we came."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def hash_name(text: str) -> int:
    """A short stable number for a name."""
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=6).digest(), "big")


def all_labs(root: Path = ROOT) -> list[str]:
    """The names of the labs on this machine."""
    return sorted(path.parent.name for path in root.glob("*/lab.json"))
