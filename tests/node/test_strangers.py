"""Processes without rights on the node: what they can take keeps no agent from starting. Tier node."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ciliate.lab import netns
from ciliate.lab.agent import ROLE
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

from .faults_harness import part, wait_for
from .lab_harness import new_lab

ADDRESS = "127.0.0.1", 9964
TAKE = """
import socket, sys
name = socket.socket(socket.AF_UNIX)
name.bind("\\0ciliate-agent")
name.listen(1)
port = socket.socket()
port.bind(%r)
port.listen(1)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("strange", options={"prometheus-serve-addr": "{}:{}".format(*ADDRESS)}) as made:
        yield made


@contextmanager
def stranger(lab: Lab) -> Iterator[None]:
    """A process of nobody's in the node's network namespace that takes what it can, until the block ends."""
    rights = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    # the test's own interpreter may be where nobody else can read it
    command = [
        *netns.inside(lab.directory.namespace(NODE)),
        *rights,
        "/usr/bin/python3",
        "-IS",
        "-c",
        TAKE % (ADDRESS,),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "taken\n"
        yield
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_an_agent_starts_whatever_strangers_took(lab: Lab) -> None:
    lab.stop_agent(signal.SIGKILL)
    try:
        with stranger(lab):
            lab.start_agent()
            assert part(lab, "metrics")["state"] == "warning"
            assert "prometheus-serve-addr 127.0.0.1:9964" in part(lab, "metrics")["message"]
        wait_for(lambda: part(lab, "metrics")["state"] == "ok")
        assert scrape(lab).startswith("# HELP")
    finally:
        if all(item.role != ROLE for item in lab.state.processes):
            lab.start_agent()


def scrape(lab: Lab) -> str:
    """What whoever scrapes the node gets."""
    code = "import urllib.request as r; print(r.urlopen('http://{}:{}/metrics').read().decode())".format(*ADDRESS)
    command = [*netns.inside(lab.directory.namespace(NODE)), sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
