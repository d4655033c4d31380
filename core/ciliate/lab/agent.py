"""The agent of a lab's node: a real `ciliate-agent` inside the node's network namespace."""

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
from ciliate.lab.state import NODE, LabDirectory

ROLE = "agent"
READY_TIMEOUT = 60.0
POLL = 0.02
LOG_LINES = 15


def start(directory: LabDirectory, enforcement: str, options: Mapping[str, str]) -> processes.Process:
    """Start the agent; it is not ready yet when this returns (see ``wait_ready``)."""
    command = [
        *netns.inside(directory.namespace(NODE)),
        sys.executable,
        "-P",
        "-m",
        "ciliate.agent.main",
        f"--node-name={NODE}",
        f"--state-dir={directory.state_dir}",
        f"--run-dir={directory.run_dir}",
        f"--bpf-root={directory.bpf_dir}",
        f"--enable-policy={enforcement}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    # the lab's agent takes no option from the environment of whoever started the lab
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CILIATE_")}
    with directory.agent_log.open("ab") as log:
        return processes.spawn(command, ROLE, log.fileno(), log.fileno(), environment)


def wait_ready(directory: LabDirectory, process: processes.Process) -> ApiClient:
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


def _tail(directory: LabDirectory) -> str:
    try:
        lines = directory.agent_log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "  (empty)"
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
