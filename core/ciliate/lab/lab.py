"""A lab: one node with its agent, pods, and the world outside; every one of them a network namespace."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ciliate.api_client import AgentUnavailable, ApiClient, ApiError
from ciliate.lab import agent, helper, netns, processes, world
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.runtime import Runtime
from ciliate.lab.state import NODE, ROOT, WORLD, LabDirectory, LabPod, LabState

PARALLEL = 4
"""Pods that are made or removed at once."""


class Lab:
    """One lab on this machine. Made by ``create`` or ``open``; all its work is done in the caller's thread."""

    def __init__(self, directory: LabDirectory, state: LabState) -> None:
        self.directory = directory
        self.state = state
        self._runtime = Runtime(directory)
        self._client: ApiClient | None = None

    @classmethod
    def create(
        cls, name: str, root: Path = ROOT, enforcement: str = "default", options: Mapping[str, str] | None = None
    ) -> Lab:
        """Build a lab without pods, its agent with these further options.

        LabError where one of that name exists. A failure leaves nothing behind.
        """
        directory = LabDirectory(name, root)
        if directory.exists():
            raise LabError(f"lab {name!r}: exists already; `ciliate lab down --name {name}` removes it")
        lab = cls(directory, LabState(name=name, enforcement=enforcement, options=dict(options or {})))
        try:
            lab._build()
        except BaseException:
            lab.destroy()
            raise
        return lab

    @classmethod
    def open(cls, name: str, root: Path = ROOT) -> Lab:
        """A lab that is up; LabError where there is none."""
        directory = LabDirectory(name, root)
        return cls(directory, directory.load())

    @staticmethod
    def lock(name: str, root: Path = ROOT) -> contextlib.AbstractContextManager[None]:
        """Keep other commands away from a lab of that name while this holds."""
        return LabDirectory(name, root).locked()

    @staticmethod
    def exists(name: str, root: Path = ROOT) -> bool:
        """Whether a lab of that name is up, or what is left of one."""
        return LabDirectory(name, root).exists()

    @staticmethod
    def take_down(name: str, force: bool = False, root: Path = ROOT) -> list[str]:
        """Remove a lab; returns what could not be removed.

        With ``force`` also what a crash left, known to the state file or by its name, and nothing there is no error.
        """
        directory = LabDirectory(name, root)
        if force:
            state = directory.load_or_empty()
            found = netns.named(directory.namespace(""))
            state.namespaces = list(dict.fromkeys([*state.namespaces, *found]))
            return Lab(directory, state).destroy()
        return Lab.open(name, root).destroy()

    @property
    def nodes(self) -> list[str]:
        """The names of the lab's nodes."""
        return [NODE]

    def _build(self) -> None:
        node, outside = self.directory.namespace(NODE), self.directory.namespace(WORLD)
        self.state.namespaces = [node, outside]
        self.save()
        for namespace in self.state.namespaces:
            netns.create(namespace)
        world.connect(node, outside)
        run("mount", "-t", "bpf", "bpffs", str(self.directory.bpf_dir))
        self._start_agent()
        self._runtime.install()
        self._start_helper(node, NODE)
        self._start_helper(outside, WORLD)
        self.add_world_addresses(world.WORLD_ADDRESSES)
        self.save()
        self.client()

    def save(self) -> None:
        """Write the state to disk."""
        self.directory.save(self.state)

    def _start_agent(self) -> None:
        self.state.processes.append(agent.start(self.directory, self.state.enforcement, self.state.options))
        self.save()

    def _start_helper(self, namespace: str, name: str) -> None:
        self.state.processes.append(helper.start(namespace, self.directory.helper_socket(namespace), name))

    def client(self) -> ApiClient:
        """A client of the node's agent, once it is ready."""
        if self._client is None:
            self._client = agent.wait_ready(self.directory, self.agent_process())
        return self._client

    def agent_process(self) -> processes.Process:
        """The agent's process as last started."""
        found = [process for process in self.state.processes if process.role == agent.ROLE]
        if not found:
            raise LabError(f"lab {self.state.name!r}: has no agent")
        return found[-1]

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the agent; the pods' traffic goes on as it was."""
        process = self.agent_process()
        processes.end([process], number=number)
        self.state.processes.remove(process)
        self._client = None
        self.save()

    def start_agent(self) -> ApiClient:
        """Start the agent again; returns once it is ready."""
        self._start_agent()
        return self.client()

    def set_enforcement(self, mode: str) -> None:
        """Make the agent enforce policy in another mode; returns once every endpoint does."""
        if mode == self.state.enforcement:
            return
        self.request("PATCH", "/v1/config", {"options": {"enable-policy": mode}})
        self.state.enforcement = mode
        self.save()

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the agent's API; LabError with the agent's own words where it refuses."""
        try:
            return self.client().request(method, path, body)
        except ApiError as error:
            raise LabError(f"{method} {path}: the agent refused: {error}") from error
        except AgentUnavailable as error:
            raise LabError(str(error)) from error

    def add_world_addresses(self, addresses: Iterable[str]) -> None:
        """Give the world outside more addresses."""
        new = [address for address in dict.fromkeys(addresses) if address not in self.state.world_addresses]
        world.add_addresses(self.directory.namespace(WORLD), new)
        self.state.world_addresses += new
        self.save()

    def add_pods(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Make pods from their manifests: namespace, CNI ADD, helper. Host-network pods live on the node."""
        pods = [self._plan_pod(manifest) for manifest in manifests]
        # on disk first, so that a crash in between leaves nothing that nobody knows of
        self.state.pods.update((pod.name, pod) for pod in pods)
        self.state.namespaces += [pod.netns for pod in pods if not pod.host_network]
        self.save()
        try:
            self._in_parallel(self._make_pod, [pod for pod in pods if not pod.host_network])
        finally:
            self.save()

    def _plan_pod(self, manifest: Mapping[str, Any]) -> LabPod:
        metadata = manifest["metadata"]
        namespace, short = metadata.get("namespace") or "default", metadata["name"]
        name = f"{namespace}/{short}"
        if name in self.state.pods:
            raise LabError(f"pod {name}: exists already in lab {self.state.name!r}")
        if (manifest.get("spec") or {}).get("hostNetwork"):
            node = self.directory.namespace(NODE)
            return LabPod(name, "", node, list(world.NODE_ADDRESSES), host_network=True)
        return LabPod(name, secrets.token_hex(32), self.directory.namespace(f"{namespace}.{short}"))

    def _make_pod(self, pod: LabPod) -> None:
        netns.create(pod.netns)
        result = self._runtime.add(pod.container_id, pod.netns, pod.name)
        pod.addresses = [item["address"].partition("/")[0] for item in result["ips"]]
        self._start_helper(pod.netns, pod.name)

    def remove_pods(self, names: Iterable[str] | None = None) -> None:
        """Remove pods (all where none are named): CNI DEL, helper, namespace."""
        pods = [self.state.pods[name] for name in (list(self.state.pods) if names is None else names)]
        own = [pod for pod in pods if not pod.host_network]
        self._in_parallel(self._unmake_pod, own)
        for pod in pods:
            del self.state.pods[pod.name]
        gone = {pod.netns for pod in own}
        self.state.namespaces = [name for name in self.state.namespaces if name not in gone]
        self.save()

    def _unmake_pod(self, pod: LabPod) -> None:
        self._runtime.delete(pod.container_id, pod.netns, pod.name)
        helpers = [process for process in self.state.processes if process.role == f"helper {pod.name}"]
        processes.end(helpers, number=signal.SIGKILL)
        for process in helpers:
            self.state.processes.remove(process)
        netns.remove(pod.netns)
        self.directory.helper_socket(pod.netns).unlink(missing_ok=True)

    def _in_parallel(self, function: Any, items: Sequence[Any]) -> None:
        with ThreadPoolExecutor(PARALLEL, "lab") as pool:
            for done in [pool.submit(function, item) for item in items]:
                done.result()

    def helper(self, place: str) -> helper.Helper:
        """The helper of a pod (``namespace/name``), of ``node1`` or of ``world``."""
        return helper.Helper(self.directory.helper_socket(self.namespace_of(place)), place)

    def namespace_of(self, place: str) -> str:
        """The network namespace of a pod, of ``node1`` or of ``world``; LabError lists what there is."""
        if place in (NODE, WORLD):
            return self.directory.namespace(place)
        name = place if "/" in place else f"default/{place}"
        if name not in self.state.pods:
            there = ", ".join([*self.state.pods, NODE, WORLD])
            raise LabError(f"{place!r}: not in lab {self.state.name!r}, expected one of {there}")
        return self.state.pods[name].netns

    def reset(self) -> None:
        """Remove every pod, policy and workload; node, agent and world stay."""
        self.remove_pods()
        self.request("DELETE", "/v1/policy?all=true")
        self.request("DELETE", "/v1/workloads")

    def destroy(self) -> list[str]:
        """Remove everything that the state lists; returns what could not be removed. Works on a broken lab too."""
        problems: list[str] = []
        processes.end([process for process in self.state.processes if process.role == agent.ROLE])
        processes.end(self.state.processes, number=signal.SIGKILL)
        for namespace in self.state.namespaces:
            try:
                netns.remove(namespace)
            except (OSError, LabError) as error:
                problems.append(f"namespace {namespace}: {error}")
        if self.directory.bpf_dir.is_mount():
            try:
                run("umount", str(self.directory.bpf_dir))
            except LabError as error:
                problems.append(str(error))
        if not problems:
            self.directory.remove()
        return problems


def describe(name: str, root: Path = ROOT) -> dict[str, Any]:
    """A lab with its places (node, world, pods), as plain data."""
    lab = Lab.open(name, root)
    running = {process.role: processes.alive(process) for process in lab.state.processes}
    places = [
        _place(NODE, "node", world.NODE_ADDRESSES, running.get(agent.ROLE, False)),
        _place(WORLD, "world", lab.state.world_addresses, running.get(f"helper {WORLD}", False)),
    ]
    for pod in lab.state.pods.values():
        up = running.get(f"helper {pod.name if not pod.host_network else NODE}", False)
        places.append(_place(pod.name, "pod", pod.addresses, up))
    return {"name": name, "directory": str(lab.directory.path), "places": places}


def _place(name: str, kind: str, addresses: Iterable[str], up: bool) -> dict[str, Any]:
    return {"name": name, "kind": kind, "addresses": list(addresses), "state": "up" if up else "down"}
