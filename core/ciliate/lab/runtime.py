"""Does what a container runtime does with a pod's network: a namespace, and the CNI executable run by the book."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from ciliate.cni.install import EXECUTABLE, install_configuration, install_executable
from ciliate.lab import netns
from ciliate.lab.errors import LabError
from ciliate.lab.helper import interpreter
from ciliate.lab.state import NodeDirectory
from ciliate.policy.world import WORKLOAD_PEER

NETWORK = "lab"
IFNAME = "eth0"
TIMEOUT = 120.0


class Runtime:
    """The CNI side of one node."""

    def __init__(self, directory: NodeDirectory) -> None:
        self._bin = directory.path / "cni-bin"
        self._conf = directory.path / "net.d"
        self._socket = directory.cni_socket

    def install(self) -> None:
        """Write executable and configuration, as `ciliate cni install` does on a node."""
        install_executable(self._bin, str(self._socket))
        install_configuration(self._conf, NETWORK)

    def add(self, container_id: str, namespace: str, pod: str) -> dict[str, Any]:
        """ADD; returns the result. LabError with the plugin's own words where it refuses."""
        result: dict[str, Any] = json.loads(self._call("ADD", container_id, namespace, pod))
        return result

    def delete(self, container_id: str, namespace: str, pod: str) -> None:
        """DEL."""
        self._call("DEL", container_id, namespace, pod)

    def _call(self, command: str, container_id: str, namespace: str, pod: str) -> str:
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": str(netns.path(namespace)),
            "CNI_IFNAME": IFNAME,
            "CNI_PATH": str(self._bin),
            "CNI_ARGS": _arguments(pod),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        done = subprocess.run(
            self._executable(),
            input=self._configuration(),
            env=environment,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
        if done.returncode:
            raise LabError(f"pod {pod}: CNI {command} failed: {_message(done.stdout, done.stderr)}")
        return done.stdout.decode()

    def _executable(self) -> list[str]:
        """The executable; the one in Python by its interpreter where /run, where labs live, is mounted noexec."""
        if not os.statvfs(self._bin).f_flag & os.ST_NOEXEC:
            return [str(self._bin / EXECUTABLE)]
        behind_launcher = self._bin / f"{EXECUTABLE}.py"
        script = behind_launcher if behind_launcher.exists() else self._bin / EXECUTABLE
        return [interpreter(), "-IS", str(script)]

    def _configuration(self) -> bytes:
        """What a runtime makes of the configuration list for its one plugin."""
        (path,) = self._conf.glob("*.conflist")
        listed = json.loads(path.read_bytes())
        (plugin,) = listed["plugins"]
        return json.dumps({**plugin, "name": listed["name"], "cniVersion": listed["cniVersion"]}).encode()


def _arguments(pod: str) -> str:
    """What a runtime tells of a pod; nothing where no orchestrator speaks for the container."""
    namespace, _, name = pod.partition("/")
    known = "" if namespace == WORKLOAD_PEER else f";K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"
    return f"IgnoreUnknown=1{known}"


def _message(output: bytes, errors: bytes) -> str:
    try:
        answer = json.loads(output)
        return f"{answer['msg']} (code {answer['code']})"
    except (ValueError, KeyError, TypeError):
        return (errors or output).decode("utf-8", "replace").strip() or "no message"
