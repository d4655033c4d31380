"""The agents of a lab's nodes: each a real `ciliate-agent` inside its node's network namespace."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ciliate.api_client import AgentUnavailable, ApiClient, ApiError
from ciliate.lab import netns, processes
from ciliate.lab.errors import LabError
from ciliate.lab.state import NODE, LabDirectory, NodeDirectory

ROLE = "agent"
"""What the processes of agents are called: the first node's so, the others' with their node's name behind it."""
TEMPLATES = "CILIATE_LAB_TEMPLATES"
"""The environment variable that names a directory for compiled programs, which labs share and leave behind."""
READY_TIMEOUT = 60.0
POLL = 0.02
LOG_LINES = 15


def role(node: str) -> str:
    """What the process of a node's agent is called."""
    return ROLE if node == NODE else f"{ROLE} {node}"


def share_templates(place: NodeDirectory) -> None:
    """Let a node's agent find what agents of other labs compiled, where the environment names a directory for that."""
    shared = os.environ.get(TEMPLATES)
    if shared:
        Path(shared).mkdir(parents=True, exist_ok=True)
        (place.state_dir / "templates").symlink_to(Path(shared).absolute())


def start(directory: LabDirectory, enforcement: str, options: Mapping[str, str], node: str = NODE) -> processes.Process:
    """Start a node's agent; it is not ready yet when this returns (see ``wait_ready``)."""
    place = directory.node(node)
    command = [
        *netns.inside(directory.namespace(node)),
        sys.executable,
        "-P",
        "-m",
        "ciliate.agent.main",
        f"--node-name={node}",
        f"--state-dir={place.state_dir}",
        f"--run-dir={place.run_dir}",
        f"--bpf-root={place.bpf_dir}",
        f"--enable-policy={enforcement}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    # the lab's agent takes no option from the environment of whoever started the lab
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CILIATE_")}
    with place.agent_log.open("ab") as log:
        return processes.spawn(command, role(node), log.fileno(), log.fileno(), environment)


def wait_ready(directory: NodeDirectory, process: processes.Process) -> ApiClient:
    """A client of the agent once it is ready; LabError with the end of its log where it ends or takes too long."""
    client = ApiClient(directory.api_socket)
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline:
        if not processes.alive(process):
            raise LabError(f"the agent ended while it started; the end of {directory.agent_log}:\n{_tail(directory)}")
        try:
            client.request("GET", "/v1/healthz")
            if _listens(directory.cni_socket):
                return client
        except (AgentUnavailable, ApiError):
            pass
        time.sleep(POLL)
    raise LabError(f"the agent is not ready after {READY_TIMEOUT:.0f} s; the end of its log:\n{_tail(directory)}")


def _listens(path: Path) -> bool:
    """Whether somebody listens there; the file alone may be what a killed agent left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _tail(directory: NodeDirectory) -> str:
    try:
        lines = directory.agent_log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "  (empty)"
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
