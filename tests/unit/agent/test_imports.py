"""What the agent does not import, because it costs memory and time at every start. Tier unit."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "pyroute2.ndb",
        "pyroute2.ipdb",
        "pyroute2.netlink.generic.wireguard",
        "click",
        "scapy",
        "jsonschema",
        "grpc",
        "yaml",
        "ciliate.manifest",
        "ciliate.lab.lab",
        "ciliate.operator.main",
    ],
)
def test_it_is_not_imported(module: str) -> None:
    ours = "ciliate.agent.main, ciliate.agent.daemon, ciliate.datapath.netlink"
    code = f"import sys, {ours}; print({module!r} in sys.modules)"
    assert python(code) == "False\n"


def test_the_whole_of_pyroute2_can_be_imported_afterwards() -> None:
    code = (
        "import ciliate.datapath.netlink as ours, pyroute2\n"
        "from pyroute2 import NDB\n"
        "print(pyroute2.IPRoute is ours.IPRoute, pyroute2.NetlinkError is ours.NetlinkError)"
    )
    assert python(code) == "True True\n"
    assert (
        python("import pyroute2, ciliate.datapath.netlink as ours; print(pyroute2.IPRoute is ours.IPRoute)") == "True\n"
    )
