"""Policies that do not fit the map: compressed where that helps, else refused whole, with the reason. Needs root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_harness import ciliate, new_lab

from ciliate.lab.lab import Lab
from ciliate.manifest import loads

PODS = "\n---\n".join(
    f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\n"
    "spec: {containers: [{name: c, image: c}]}"
    for name in ("web", "friend", "stranger")
)
PREFIXES = [f"198.18.{index // 125}.{2 * (index % 125) + 1}/32" for index in range(420)]
"""No two of them are one wider prefix."""
NEIGHBOURS, SCATTERED = range(8000, 8040), range(8000, 8080, 2)


def policy(ports: Iterable[int]) -> dict[str, Any]:
    items = [{"port": str(port), "protocol": "TCP"} for port in ports]
    sections = [
        {"fromEndpoints": [{"matchLabels": {"app": "friend"}}]},
        {"fromCIDR": PREFIXES, "toPorts": [{"ports": items}]},
    ]
    spec = {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": sections}
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "web"}, "spec": spec}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("limit", loads(PODS)) as made:
        yield made


def put(lab: Lab, folder: Path, ports: Iterable[int]) -> subprocess.CompletedProcess[str]:
    file = folder / "web.json"
    file.write_text(json.dumps(policy(ports)))
    return ciliate(lab, "policy", "import", str(file))


def status(lab: Lab) -> dict[str, Any]:
    (web,) = [
        item["status"]["policy"]
        for item in lab.request("GET", "/v1/endpoint")
        if item["status"]["external-identifiers"]["pod-name"] == "default/web"
    ]
    return dict(web)


def entries(lab: Lab) -> int:
    arguments = ["--bpf-root", str(lab.directory.bpf_dir), "policy", "list", "-o", "json"]
    done = ciliate(lab, "bpf", *arguments)
    assert done.returncode == 0, done.stderr
    return len(json.loads(done.stdout))


def reaches(lab: Lab, name: str) -> bool:
    addresses = lab.state.pods["default/web"].addresses
    lab.helper("default/web").serve([("TCP", 8000)], addresses)
    probes = [
        {"id": index, "protocol": "TCP", "address": address, "port": 8000, "source": None, "timeout": 1.0}
        for index, address in enumerate(addresses)
    ]
    (answer,) = {result["reached"] for result in lab.helper(f"default/{name}").probe(probes, 30)}
    return bool(answer)


def test_what_does_not_fit_is_compressed_or_refused_whole(lab: Lab, tmp_path: Path) -> None:
    done = put(lab, tmp_path, NEIGHBOURS)
    assert (done.returncode, done.stderr) == (0, "")
    assert status(lab)["problem"] == ""
    compressed = entries(lab)
    assert compressed < 2 * len(PREFIXES) + 10, "16,800 entries became two for each prefix"
    assert (reaches(lab, "friend"), reaches(lab, "stranger")) == (True, False)
    known = status(lab)["policy-revision"]

    done = put(lab, tmp_path, SCATTERED)
    assert done.returncode == 1
    assert "(default/web)" in done.stderr and "one endpoint may have 16384" in done.stderr
    assert "the older policy stays" in done.stderr
    assert status(lab)["policy-revision"] == known
    assert "does not fit" in ciliate(lab, "status").stdout
    assert entries(lab) == compressed, "nothing of it was written"
    assert (reaches(lab, "friend"), reaches(lab, "stranger")) == (True, False)

    _restart(lab)
    assert entries(lab) == compressed, "a restart keeps the older policy too"
    assert "does not fit" in status(lab)["problem"]

    assert put(lab, tmp_path, range(8000, 8002)).returncode == 0
    assert status(lab)["problem"] == ""
    assert "does not fit" not in ciliate(lab, "status").stdout
    lab.request("GET", "/v1/policy/wait?revision=1&timeout=10")
    assert entries(lab) < compressed + len(PREFIXES)


def _restart(lab: Lab) -> None:
    lab.stop_agent()
    lab.start_agent()
