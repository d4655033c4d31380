"""Every switch of masquerading under traffic, the first and the last of an engine too: nothing is lost. Tier node."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from lab_harness import new_lab

from ciliate.cli.bpf import command
from ciliate.datapath import kernelct
from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns
from ciliate.lab.command import ip_batch, run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, WORLD
from ciliate.lab.traffic import EchoServer, NewFlows, TcpStream, UdpFlow, namespace
from ciliate.lab.world import NODE_ADDRESSES, WORLD_LINK
from ciliate.manifest import loads

MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: talker}
spec: {containers: [{name: c, image: c}]}
"""
POD, PORT, UPLINK = "default/talker", 7171, "uplink"
PATIENCE = 30.0
ENGINES = ("iptables", "bpf")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Its agent begins with iptables, so that no program was ever on the uplink."""
    with new_lab("masqsw", loads(MANIFESTS, "switch"), options={"masquerade": "iptables"}) as made:
        ip_batch(made.namespace_of(WORLD), [f"route del default via {address}" for address in NODE_ADDRESSES])
        yield made


def switch(lab: Lab, name: str) -> None:
    lab.request("POST", "/v1/plugins/switch", {"kind": "masquerade", "name": name})


def wait_for(condition: Callable[[], Any], text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def uplink(lab: Lab) -> str:
    return run(*netns.inside(lab.namespace_of(NODE)), "tc", "qdisc", "show", "dev", UPLINK)


@contextlib.contextmanager
def undisturbed(lab: Lab) -> Iterator[Callable[[], None]]:
    """Streams, datagrams, new flows and 500 pings a second, of both families, of which nothing may be lost."""
    pod, world = (netns.path(lab.namespace_of(place)) for place in (POD, WORLD))
    server = EchoServer(world, PORT)
    kinds = (TcpStream, UdpFlow, UdpFlow, NewFlows)
    flows: list[Any] = [kind(pod, address, PORT) for address in WORLD_LINK for kind in kinds]
    floods = [pings(lab, address) for address in WORLD_LINK]

    def further() -> None:
        before = [flow.records for flow in flows]
        met = lambda: all(flow.records > count + 3 for flow, count in zip(flows, before, strict=True))  # noqa: E731
        wait_for(met, "a flow stands still")

    further()
    try:
        yield further
        further()
    finally:
        lost = {f"{number} {flow.name}": flow.stop() for number, flow in enumerate(flows)}
        echoes = [lost_pings(flood) for flood in floods]
        server.stop()
    assert not any(lost.values()), lost
    # the last one may be under way when the flood is ended
    assert all(sent > 50 and missing <= 1 for sent, missing in echoes), echoes


def pings(lab: Lab, address: str) -> subprocess.Popen[str]:
    words = [*netns.inside(lab.namespace_of(POD)), "ping", "-i", "0.004", "-q", "-W", "2", address]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def lost_pings(process: subprocess.Popen[str]) -> tuple[int, int]:
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=PATIENCE)[0]
    sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", text).groups())  # type: ignore[union-attr]
    return sent, sent - received


def nudge(lab: Lab) -> None:
    """Let the agent look at masquerading now and not within 10 s, as it does when services of the node come or go."""
    spec = {"frontend-address": {"ip": NODE_ADDRESSES[0], "port": 31999, "protocol": "TCP"}, "type": "NodePort"}
    lab.request("PUT", "/v1/service", {"services": [spec]})
    lab.request("DELETE", "/v1/service?all=true")


def over(lab: Lab) -> None:
    """The flows of engines that were in use before end, and what those had in the kernel is gone."""
    flush = ["--bpf-root", str(lab.directory.bpf_dir), "nat", "flush"]

    def alone() -> bool:
        if "bpf on" not in masquerading(lab):
            CliRunner().invoke(command, flush)
        else:
            with namespace(netns.path(lab.namespace_of(NODE))) as node:
                in_netns(node, lambda: kernelct.forget(lambda flow: flow.translated))
        nudge(lab)
        return "end by themselves" not in masquerading(lab)

    wait_for(alone, "an engine is still at work for flows that ended")


def masquerading(lab: Lab) -> str:
    return str(lab.request("GET", "/v1/healthz?detail=true"))


def moments(lab: Lab) -> list[str]:
    """What the kernel says of the uplink's queueing disciplines while the context lasts."""
    return [line for line in uplink(lab).splitlines() if "clsact" in line]


def test_the_uplink_has_its_hooks_before_any_program_and_keeps_them(lab: Lab) -> None:
    """To add or remove clsact stops a device for a moment and drops what it holds."""
    before = moments(lab)
    assert len(before) == 1
    watch = subprocess.Popen(
        [*netns.inside(lab.namespace_of(NODE)), "tc", "monitor"], stdout=subprocess.PIPE, text=True
    )
    try:
        for name in ("bpf", "iptables"):
            switch(lab, name)
        over(lab)
        assert moments(lab) == before
    finally:
        watch.terminate()
        told = watch.communicate(timeout=PATIENCE)[0]
    # to ask for it again where it is tells of it, too; to take it away is what loses packets
    assert not [line for line in told.splitlines() if "clsact" in line and line.startswith("deleted")], told


@pytest.mark.parametrize("names", list(itertools.permutations(ENGINES)), ids="-".join)
def test_the_first_switch_to_an_engine_and_the_end_of_the_one_before_lose_nothing(
    lab: Lab, names: tuple[str, str]
) -> None:
    switch(lab, names[0])
    over(lab)
    with undisturbed(lab) as further:
        switch(lab, names[1])
        further()
    with undisturbed(lab):
        over(lab)
