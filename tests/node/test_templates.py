"""Fifty pods at once, one template; the loader changes under them. Needs root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from lab_harness import ciliate as run_ciliate
from lab_harness import new_lab

from ciliate.lab.agent import TEMPLATES
from ciliate.lab.lab import Lab
from ciliate.manifest import loads

COUNT = 50
PODS = "\n---\n".join(
    f"apiVersion: v1\nkind: Pod\nmetadata: {{name: pod{number}, labels: {{app: many}}}}\n"
    "spec: {containers: [{name: c, image: c}]}"
    for number in range(COUNT)
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        # what the lab itself compiled is what it lists
        patch.delenv(TEMPLATES, raising=False)
        with new_lab("templates", loads(PODS, "pods")) as made:
            yield made


def ciliate(lab: Lab, *arguments: str, code: int = 0) -> str:
    done = run_ciliate(lab, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def templates(lab: Lab) -> dict[str, list[int]]:
    listed = json.loads(ciliate(lab, "bpf", "template", "list", "-o", "json"))
    return {item["sha"]: item["endpoints"] for item in listed}


def test_one_template_and_fifty_endpoints(lab: Lab) -> None:
    ((sha, endpoints),) = templates(lab).items()
    assert endpoints == list(range(1, COUNT + 1))
    shown = ciliate(lab, "bpf", "template", "get", sha[:12])
    assert f"sha: {sha}" in shown
    assert "compiler: " in shown
    assert "0 templates begin so" in ciliate(lab, "bpf", "template", "get", "nosuch", code=1)


def test_switching_the_loader_moves_every_endpoint(lab: Lab) -> None:
    (shared,) = templates(lab)
    address = next(text for text in lab.state.pods["default/pod1"].addresses if "." in text)
    try:
        assert "template" in ciliate(lab, "plugins", "switch", "loader", "template")
        found = templates(lab)
        assert found.pop(shared) == []
        assert list(found.values()) == [list(range(1, COUNT + 1))]
        assert "loader template" in ciliate(lab, "status")
        inside = ["nsenter", f"--net=/run/netns/{lab.state.pods['default/pod0'].netns}"]
        ping = [*inside, "ping", "-c1", "-W1", "-n", "-q", address]
        assert subprocess.run(ping, capture_output=True, check=False).returncode == 0
    finally:
        ciliate(lab, "plugins", "switch", "loader", "shared")
    assert templates(lab)[shared] == list(range(1, COUNT + 1))
