"""Tier bpf: needs root, clang, libbpf and a kernel with BPF; skips, saying which of these is missing."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from bpf_harness import Programs
    from live_harness import InNode, Net
    from nodes_harness import Mode, PodNode
    from snat_harness import Snat

packets_tried = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="tier bpf needs root"))


@pytest.fixture(scope="session", params=["shared", "template"])
def build(request: pytest.FixtureRequest) -> str:
    """The name of a loader, whose build of the programs is meant."""
    return str(request.param)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every test finds what another one compiled, those of other workers of the same run too."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bpf-templates"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def loaded(templates: Path, build: str) -> Iterator[Programs]:
    from bpf_harness import Programs

    programs = Programs(templates, build)
    yield programs
    programs.close()


@pytest.fixture
def programs(loaded: Programs) -> Iterator[Programs]:
    """The loaded programs with both endpoints fresh; counters go on over tests."""
    loaded.reset()
    before = loaded.runs
    yield loaded
    global packets_tried
    packets_tried += loaded.runs - before


@pytest.fixture(scope="session", params=["auto", "inline"])
def masquerading(request: pytest.FixtureRequest, templates: Path) -> Iterator[Snat]:
    from snat_harness import Snat

    programs = Snat(templates, request.param)
    yield programs
    programs.close()


@pytest.fixture
def nat(masquerading: Snat) -> Snat:
    """The programs of masquerading, loaded, with empty tables."""
    masquerading.reset()
    return masquerading


@pytest.fixture
def net() -> Iterator[Net]:
    """Namespaces of a node and of three pods."""
    from live_harness import IDENTITY, Net

    made = Net(f"ct{uuid.uuid4().hex[:6]}")
    try:
        made.add("node")
        for number in IDENTITY:
            made.add(f"pod{number}")
        yield made
    finally:
        made.remove()


@pytest.fixture
async def node(net: Net, tmp_path: Path, templates: Path, build: str) -> AsyncIterator[InNode]:
    """A datapath with this loader in the node's namespace."""
    from live_harness import InNode, started

    async with started(InNode(net, tmp_path, build, templates)) as running:
        yield running


@pytest.fixture
def between() -> Iterator[Net]:
    """Namespaces of two nodes and their pods, the nodes joined by a link."""
    import nodes_harness as harness

    net = harness.make_net(f"cn{uuid.uuid4().hex[:6]}")
    try:
        yield net
    finally:
        net.remove()


@pytest.fixture
async def pair(between: Net, mode: Mode, tmp_path: Path, templates: Path) -> AsyncIterator[tuple[PodNode, PodNode]]:
    """Both nodes running in a routing mode."""
    from nodes_harness import two_nodes

    async with two_nodes(between, mode, tmp_path, templates) as nodes:
        yield nodes


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["packets"] = packets_tried


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of a run in parallel has ended."""
    global packets_tried
    packets_tried += getattr(node, "workeroutput", {}).get("packets", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if packets_tried:
        terminalreporter.write_line(f"tier bpf: {packets_tried} packets tried through BPF_PROG_TEST_RUN")
