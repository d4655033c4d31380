"""The build for kernels without BTF or JIT, here on this kernel: the packets and a pair of the other files. Tier bpf.

Where the kernel takes nothing else, the other files have this build already, and this one is left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from bpf_harness import Programs
from live_harness import InNode, Net, started
from test_flows import *  # noqa: F403
from test_link import *  # noqa: F403
from test_live_pair import test_policy_decides_real_packets  # noqa: F401
from test_packets import *  # noqa: F403

from ciliate.datapath import kernel

pytestmark = pytest.mark.skipif(
    kernel.select().name == "inline", reason="this kernel's own build is inline, as in the other files"
)


@pytest.fixture(scope="module")
def loaded(templates: Path, build: str) -> Iterator[Programs]:
    """The programs with everything inlined."""
    programs = Programs(templates, build, functions="inline")
    yield programs
    programs.close()


@pytest.fixture
async def node(net: Net, tmp_path: Path, templates: Path, build: str) -> AsyncIterator[InNode]:
    """A datapath with everything inlined."""
    async with started(InNode(net, tmp_path, build, templates, "inline")) as running:
        yield running
