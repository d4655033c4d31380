"""A lab: nodes with their agents, pods, and the world outside; every one of them a network namespace."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ciliate.api_client import AgentUnavailable, ApiClient, ApiError
from ciliate.lab import agent, cgroups, etcd, helper, netns, processes, underlay, world
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.placement import ONE_NODE, Placement, Shape
from ciliate.lab.runtime import Runtime
from ciliate.lab.state import NODE, ROOT, WORLD, LabDirectory, LabPod, LabState

PARALLEL = 4
"""Pods that are made or removed at once."""


class Lab:
    """One lab on this machine. Made by ``create`` or ``open``; all its work is done in the caller's thread."""

    def __init__(self, directory: LabDirectory, state: LabState) -> None:
        self.directory = directory
        self.state = state
        self._runtimes = {node: Runtime(directory.node(node)) for node in state.nodes}
        self._clients: dict[str, ApiClient] = {}

    @classmethod
    def create(
        cls,
        name: str,
        root: Path = ROOT,
        enforcement: str = "default",
        options: Mapping[str, str] | None = None,
        shape: Shape = ONE_NODE,
    ) -> Lab:
        """Build a lab without pods, its agents with these further options.

        LabError where one of that name exists. A failure leaves nothing behind.
        """
        directory = LabDirectory(name, root)
        if directory.exists():
            raise LabError(f"lab {name!r}: exists already; `ciliate lab down --name {name}` removes it")
        if shape.kvstore == "etcd":
            etcd.executable()
        state = LabState(
            name=name,
            enforcement=enforcement,
            options=dict(options or {}),
            nodes=underlay.names(shape.nodes),
            tunnel=shape.tunnel,
            kvstore=shape.kvstore,
        )
        lab = cls(directory, state)
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
        return self.state.nodes

    def _build(self) -> None:
        state, places = self.state, [*self.nodes, WORLD]
        others = [underlay.NET] * state.joined + [underlay.STORE] * (state.kvstore == "etcd")
        state.namespaces = [self.directory.namespace(place) for place in (*places, *others)]
        self.save()
        for namespace in state.namespaces:
            netns.create(namespace)
        self._connect()
        for node in self.nodes:
            home = self.directory.node(node)
            run("mount", "-t", "bpf", "bpffs", str(home.bpf_dir))
            agent.share_templates(home)
            self._start_agent(node)
            self._runtimes[node].install()
        for place in places:
            self._start_helper(self.directory.namespace(place), place, place)
        self.add_world_addresses(world.WORLD_ADDRESSES)
        self.save()
        for node in self.nodes:
            self.client(node)

    def _connect(self) -> None:
        if not self.state.joined:
            world.connect(self.directory.namespace(NODE), self.directory.namespace(WORLD))
            return
        underlay.connect(self.directory, self.nodes, self.state.kvstore == "etcd")
        if self.state.kvstore == "etcd":
            self.start_store()

    def start_store(self) -> None:
        """Start the lab's etcd; returns once it takes connections."""
        self.state.processes.append(etcd.start(self.directory))
        self.save()

    def stop_store(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the lab's etcd; its data stay for `start_store`."""
        found = [process for process in self.state.processes if process.role == etcd.ROLE]
        processes.end(found, number=number)
        for process in found:
            self.state.processes.remove(process)
        self.save()

    def save(self) -> None:
        """Write the state to disk."""
        self.directory.save(self.state)

    def _start_agent(self, node: str) -> None:
        cgroup = cgroups.create(self.state.name, node)
        own = {"cgroup-root": str(cgroup)} if cgroup else {}
        options = {**own, **self._joining(node), **self.state.options}
        self.state.processes.append(agent.start(self.directory, self.state.enforcement, options, node))
        self.save()

    def _joining(self, node: str) -> dict[str, str]:
        """Options that make an agent the one of this node in this cluster."""
        state = self.state
        if not state.joined:
            return {}
        (ipv4, ipv6), (range4, range6) = underlay.addresses(node), underlay.pod_ranges(node)
        stores = {"embedded": f"embedded.path={self.directory.path}/kvstore.db", "etcd": f"etcd.address={etcd.ADDRESS}"}
        return {
            "ipv4-node": ipv4,
            "ipv6-node": ipv6,
            "ipv4-range": range4,
            "ipv6-range": range6,
            "tunnel": state.tunnel,
            "auto-direct-node-routes": str(state.tunnel == "disabled").lower(),
            "kvstore": state.kvstore,
            "kvstore-opt": stores[state.kvstore],
        }

    def _start_helper(self, namespace: str, name: str, node: str) -> None:
        cgroup = cgroups.path(self.state.name, node) if node != WORLD else None
        self.state.processes.append(helper.start(namespace, self.directory.helper_socket(namespace), name, cgroup))

    def client(self, node: str = NODE) -> ApiClient:
        """A client of a node's agent, once it is ready."""
        if node not in self._clients:
            self._clients[node] = agent.wait_ready(self.directory.node(node), self.agent_process(node))
        return self._clients[node]

    def agent_process(self, node: str = NODE) -> processes.Process:
        """A node's agent's process as last started."""
        found = [process for process in self.state.processes if process.role == agent.role(node)]
        if not found:
            raise LabError(f"lab {self.state.name!r}: {node} has no agent")
        return found[-1]

    def stop_agent(self, number: signal.Signals = signal.SIGTERM, node: str = NODE) -> None:
        """End a node's agent; the pods' traffic goes on as it was."""
        process = self.agent_process(node)
        processes.end([process], number=number)
        self.state.processes.remove(process)
        self._clients.pop(node, None)
        self.save()

    def start_agent(self, node: str = NODE) -> ApiClient:
        """Start a node's agent again; returns once it is ready."""
        self.begin_agent(node)
        return self.client(node)

    def begin_agent(self, node: str = NODE) -> None:
        """Start a node's agent again; `client` waits until it is ready."""
        self._start_agent(node)

    def set_enforcement(self, mode: str) -> None:
        """Make the agents enforce policy in another mode; returns once every endpoint does."""
        if mode == self.state.enforcement:
            return
        self.everywhere("PATCH", "/v1/config", {"options": {"enable-policy": mode}})
        self.state.enforcement = mode
        self.save()

    def set_option(self, name: str, value: str) -> None:
        """Give the agents another value of an option that needs a restart; the pods' traffic goes on meanwhile."""
        if self.state.options.get(name) == value:
            return
        self.state.options[name] = value
        for node in self.nodes:
            self.stop_agent(node=node)
            self.begin_agent(node)
        for node in self.nodes:
            self.client(node)

    def everywhere(self, method: str, path: str, body: Any = None) -> list[Any]:
        """One request to every agent's API; the answers by node."""
        return [self.request(method, path, body, node) for node in self.nodes]

    def request(self, method: str, path: str, body: Any = None, node: str = NODE) -> Any:
        """One request to an agent's API; LabError with the agent's own words where it refuses."""
        try:
            return self.client(node).request(method, path, body)
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
        nodes = Placement(self.nodes, len(self.state.pods))
        pods = [self._plan_pod(manifest, nodes) for manifest in manifests]
        # on disk first, so that a crash in between leaves nothing that nobody knows of
        self.state.pods.update((pod.name, pod) for pod in pods)
        self.state.namespaces += [pod.netns for pod in pods if not pod.host_network]
        self.save()
        try:
            self._in_parallel(self._make_pod, [pod for pod in pods if not pod.host_network])
        finally:
            self.save()

    def _plan_pod(self, manifest: Mapping[str, Any], nodes: Placement) -> LabPod:
        metadata = manifest["metadata"]
        namespace, short = metadata.get("namespace") or "default", metadata["name"]
        name = f"{namespace}/{short}"
        if name in self.state.pods:
            raise LabError(f"pod {name}: exists already in lab {self.state.name!r}")
        spec = manifest.get("spec") or {}
        if spec.get("hostNetwork"):
            node = nodes.named(spec.get("nodeName")) if len(self.nodes) > 1 else NODE
            home = node or NODE
            place = self.directory.namespace(home)
            return LabPod(name, "", place, list(underlay.addresses(home)), host_network=True, node=node)
        node = nodes.named(spec.get("nodeName")) or nodes.next()
        return LabPod(name, secrets.token_hex(32), self.directory.namespace(f"{namespace}.{short}"), node=node)

    def add_workloads(self, names: Sequence[str]) -> None:
        """Make containers that no orchestrator speaks for (`workload/NAME`), in turn on the nodes."""
        nodes = Placement(self.nodes, len(self.state.pods))
        made = [
            LabPod(name, secrets.token_hex(32), self.directory.namespace(name.replace("/", ".")), node=nodes.next())
            for name in names
        ]
        self.state.pods.update((item.name, item) for item in made)
        self.state.namespaces += [item.netns for item in made]
        self.save()
        try:
            self._in_parallel(self._make_pod, made)
        finally:
            self.save()

    def set_labels(self, name: str, labels: Sequence[str]) -> None:
        """Give a container that no orchestrator speaks for exactly these labels; returns once they are in force."""
        item = self.state.pods[name]
        endpoints = self.request("GET", "/v1/endpoint", node=item.node)
        number = next(
            each["id"]
            for each in endpoints
            if each["status"]["external-identifiers"]["container-id"] == item.container_id
        )
        self.request("PATCH", f"/v1/endpoint/{number}/labels", {"user": list(labels)}, item.node)

    def _make_pod(self, pod: LabPod) -> None:
        netns.create(pod.netns)
        result = self._runtimes[pod.node].add(pod.container_id, pod.netns, pod.name)
        pod.addresses = [item["address"].partition("/")[0] for item in result["ips"]]
        self._start_helper(pod.netns, pod.name, pod.node)

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
        self._runtimes[pod.node].delete(pod.container_id, pod.netns, pod.name)
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
        """The helper of a pod (``namespace/name``), of a node or of ``world``."""
        return helper.Helper(self.directory.helper_socket(self.namespace_of(place)), place)

    def cgroup_of(self, place: str) -> Path | None:
        """The cgroup of a place's processes; None for the world, and where the machine has no cgroup2."""
        if place == WORLD:
            return None
        name = place if "/" in place else f"default/{place}"
        node = place if place in self.nodes else self.state.pods[name].node or NODE
        return cgroups.path(self.state.name, node)

    def namespace_of(self, place: str) -> str:
        """The network namespace of a pod, of a node or of ``world``; LabError lists what there is."""
        if place in (*self.nodes, WORLD):
            return self.directory.namespace(place)
        name = place if "/" in place else f"default/{place}"
        if name not in self.state.pods:
            there = ", ".join([*self.state.pods, *self.nodes, WORLD])
            raise LabError(f"{place!r}: not in lab {self.state.name!r}, expected one of {there}")
        return self.state.pods[name].netns

    def reset(self) -> None:
        """Remove every pod, policy and workload; nodes, agents and world stay."""
        self.remove_pods()
        self.everywhere("DELETE", "/v1/policy?all=true")
        self.everywhere("DELETE", "/v1/service?all=true")
        self.everywhere("DELETE", "/v1/workloads")

    def destroy(self) -> list[str]:
        """Remove everything that the state lists; returns what could not be removed. Works on a broken lab too."""
        problems: list[str] = []
        processes.end([process for process in self.state.processes if process.role.startswith(agent.ROLE)])
        processes.end(self.state.processes, number=signal.SIGKILL)
        problems += cgroups.remove(self.directory.name)
        for namespace in self.state.namespaces:
            try:
                netns.remove(namespace)
            except (OSError, LabError) as error:
                problems.append(f"namespace {namespace}: {error}")
        for mount in (self.directory.node(node).bpf_dir for node in self.nodes):
            try:
                if mount.is_mount():
                    run("umount", str(mount))
            except LabError as error:
                problems.append(str(error))
        if not problems:
            self.directory.remove()
        return problems
