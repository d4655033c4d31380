"""What a container runtime does: runs the plugins of a list one after the other, each with the result before it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ciliate.lab import helper, netns, processes
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

DEBIAN = Path("/usr/lib/cni")
_NUMBERS = itertools.count()
"""Every ping is a flow of its own, told apart by its identifier."""
SEARCH = f"{DEBIAN}:/usr/sbin:/usr/bin:/sbin:/bin"


class Refused(Exception):
    """A plugin's error object."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer.get('code')}: {answer.get('msg')}")
        self.code = answer.get("code")
        self.text = str(answer.get("msg"))


class Pod:
    """A network namespace, the list of plugins that connect it, and a helper inside that answers and asks."""

    def __init__(self, lab: Lab, plugins: Sequence[dict[str, Any]], version: str = "1.0.0", **labels: str) -> None:
        self.lab = lab
        self.plugins = list(plugins)
        self.version = version
        self.labels = labels
        self.id = uuid.uuid4().hex
        self.namespace = f"cni-test-{os.getpid()}-{self.id[:8]}"
        self.result: dict[str, Any] | None = None
        self._process: processes.Process | None = None
        netns.create(self.namespace)

    def call(self, command: str, plugin: dict[str, Any], previous: Any = None, **changes: str) -> Any:
        """One call of one plugin; its answer, or Refused."""
        name = plugin["type"]
        ours = name == "ciliate-cni"
        executable = self.lab.directory.path / "cni-bin" / name if ours else DEBIAN / name
        config = {"cniVersion": self.version, "name": "net", **plugin}
        if ours and self.labels:
            config["args"] = {"cni": {"labels": [{"key": key, "value": self.labels[key]} for key in self.labels]}}
        if previous is not None:
            config["prevResult"] = previous
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.id,
            "CNI_NETNS": str(netns.path(self.namespace)),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(DEBIAN),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p{self.id[:8]}",
            "PATH": SEARCH,
            **changes,
        }
        # the plugins of others work in the namespace that they are started in
        line = [*netns.inside(self.lab.directory.namespace(NODE)), str(executable)]
        done = subprocess.run(
            line, env=environment, input=json.dumps(config).encode(), capture_output=True, timeout=120, check=False
        )
        answer = json.loads(done.stdout) if done.stdout else None
        if done.returncode:
            raise Refused(answer or {"msg": done.stderr.decode()})
        return answer

    def add(self) -> dict[str, Any]:
        """ADD of every plugin, in order; the last result."""
        for plugin in self.plugins:
            self.result = self.call("ADD", plugin, self.result)
        assert self.result is not None
        return self.result

    def check(self) -> None:
        """CHECK of every plugin, in order."""
        for plugin in self.plugins:
            self.call("CHECK", plugin, self.result)

    def delete(self) -> None:
        """DEL of every plugin, the last one first."""
        for plugin in reversed(self.plugins):
            self.call("DEL", plugin, self.result)
        self.result = None

    def addresses(self) -> list[str]:
        """The addresses of the last result, without prefix length."""
        return [item["address"].partition("/")[0] for item in (self.result or {})["ips"]]

    def helper(self) -> helper.Helper:
        """The helper inside, started at first use."""
        control = self.lab.directory.path / "h" / self.id[:12]
        if self._process is None:
            self._process = helper.start(self.namespace, control, self.id[:8])
        return helper.Helper(control, self.id[:8])

    def serve(self, *ports: int) -> None:
        """Answer on these TCP ports of the pod's addresses."""
        self.helper().serve([("TCP", port) for port in ports], self.addresses())

    def inside(self, *command: str) -> Any:
        """The JSON that a command inside prints."""
        return json.loads(run(*netns.inside(self.namespace), *command))

    def remove(self) -> None:
        """Take everything down, whatever state it is in."""
        if self._process is not None:
            processes.end([self._process], number=signal.SIGKILL)
        with ExitStack() as undo:
            undo.callback(netns.remove, self.namespace)
            self.delete()


def reached(asker: helper.Helper, addresses: Sequence[str], port: int | None, timeout: float = 1.0) -> list[bool]:
    """Whether each address answers on a TCP port, or to a ping where the port is None."""
    return [item["reached"] for item in answers(asker, addresses, port, timeout)]


def answers(
    asker: helper.Helper, addresses: Sequence[str], port: int | None, timeout: float = 1.0
) -> list[dict[str, Any]]:
    """What comes back from each address."""
    protocol = "ICMP" if port is None else "TCP"
    probes = [
        {"id": next(_NUMBERS) % 65535 + 1, "protocol": protocol, "address": address, "port": port, "timeout": timeout}
        for address in addresses
    ]
    return asker.probe(probes, 30)


def put_policy(lab: Lab, **spec: Any) -> None:
    """Make this the only policy, about the pods with label role=server; in force when this returns."""
    lab.request("DELETE", "/v1/policy?all=true")
    policy = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "server", "namespace": "default"},
        "spec": {"endpointSelector": {"matchLabels": {"role": "server"}}, **spec},
    }
    answer = lab.request("PUT", "/v1/policy", {"documents": [{"object": policy}]})
    lab.request("GET", f"/v1/policy/wait?revision={answer['revision']}")
