"""An etcd that belongs to a lab: a namespace of its own in the network of the nodes, a directory, a process."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns, processes
from ciliate.lab.errors import LabError
from ciliate.lab.state import LabDirectory
from ciliate.lab.underlay import STORE, STORE_ADDRESSES

ROLE = "etcd"
PORT, PEER_PORT = 2379, 2380
ADDRESS = f"http://{STORE_ADDRESSES[0]}:{PORT}"
READY_TIMEOUT = 30.0
_POLL = 0.05


def executable() -> str:
    """Where etcd is; LabError where it is not installed."""
    found = shutil.which("etcd") or shutil.which("etcd", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise LabError("--kvstore etcd: the program etcd is not installed (Debian: etcd-server)")
    return found


def start(directory: LabDirectory) -> processes.Process:
    """Start it; returns once it takes connections. LabError where it does not come up."""
    namespace, data = directory.namespace(STORE), directory.path / "etcd"
    peer = f"http://127.0.0.1:{PEER_PORT}"
    command = [
        *netns.inside(namespace),
        executable(),
        f"--name=lab-{directory.name}",
        f"--data-dir={data}",
        f"--listen-client-urls={ADDRESS},http://127.0.0.1:{PORT}",
        f"--advertise-client-urls={ADDRESS}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=lab-{directory.name}={peer}",
        "--logger=zap",
        "--log-level=warn",
        # a lab's data live as long as the lab: nothing is lost by not waiting for the disk
        "--unsafe-no-fsync",
    ]
    if not _knows(command[-1]):
        command.pop()
    log = directory.path / "etcd.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
    _wait_free(namespace)
    with log.open("ab") as output:
        process = processes.spawn(command, ROLE, output.fileno(), output.fileno(), environment)
    _wait(namespace, process, log)
    return process


def _knows(option: str) -> bool:
    """Whether this version has an option (3.5 and later have this one)."""
    import subprocess

    done = subprocess.run([executable(), "--help"], capture_output=True, text=True, check=False)
    return option in done.stdout + done.stderr


def _wait_free(namespace: str) -> None:
    """Wait until nobody has its ports: a killed one counts as gone while its last threads still hold them."""
    descriptor = os.open(netns.path(namespace), os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + READY_TIMEOUT
        while not in_netns(descriptor, _free):
            if time.monotonic() > deadline:
                raise LabError(f"etcd: port {PORT} or {PEER_PORT} of {namespace} is in use by another process")
            time.sleep(_POLL)
    finally:
        os.close(descriptor)


def _free() -> bool:
    for port in (PORT, PEER_PORT):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def _wait(namespace: str, process: processes.Process, log: Path) -> None:
    descriptor = os.open(netns.path(namespace), os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + READY_TIMEOUT
        while time.monotonic() < deadline:
            if not processes.alive(process):
                break
            if in_netns(descriptor, _listens):
                return
            time.sleep(_POLL)
    finally:
        os.close(descriptor)
    processes.end([process])
    lines = log.read_text(errors="replace").splitlines()[-5:]
    raise LabError("etcd did not come up; the end of its log:\n" + "\n".join(f"  {line}" for line in lines))


def _listens() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((STORE_ADDRESSES[0], PORT)) == 0
