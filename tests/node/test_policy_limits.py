"""Policies that take too much, at a running agent: it answers, says who it is, and comes back with them on disk. Tier
node, root."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_harness import ciliate, new_lab

from ciliate.lab.lab import Lab
from ciliate.manifest import loads

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bystander, namespace: other, labels: {app: bystander}}
spec: {containers: [{name: c, image: c}]}
"""


def policy(name: str, namespace: str, blocks: list[dict[str, Any]], ports: list[dict[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {"from": [{"ipBlock": block} for block in blocks]}
    if ports:
        section["ports"] = ports
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    spec = {"podSelector": {}, "ingress": [section]}
    return {**head, "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def blocks(count: int, network: int = 18) -> list[dict[str, Any]]:
    return [{"cidr": f"198.{network}.{number // 128}.{number % 128 * 2}/32"} for number in range(count)]


RANGES = [{"protocol": "TCP", "port": 1000 + 100 * number, "endPort": 1050 + 100 * number} for number in range(600)]
PRODUCT = policy("product", "shop", blocks(1500), RANGES)
MANY = policy("many", "nobody", blocks(17000), [])
WIDE = policy("wide", "other", [{"cidr": "0.0.0.0/0", "except": ["192.168.0.0/16"]}], [])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("limits", loads(PODS, "pods")) as made:
        yield made


def put(lab: Lab, folder: Path, document: dict[str, Any]) -> tuple[int, str]:
    file = folder / f"{document['metadata']['name']}.yaml"
    file.write_text(json.dumps(document))
    done = ciliate(lab, "policy", "import", str(file))
    return done.returncode, done.stdout + done.stderr


def status(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ciliate(lab, "status", "-o", "json").stdout)
    return found


def part(found: dict[str, Any], name: str) -> str:
    return next(str(item["message"]) for item in found["parts"] if item["name"] == name)


def test_a_policy_that_takes_too_much_concerns_its_endpoints_alone_over_a_restart(lab: Lab, tmp_path: Path) -> None:
    assert put(lab, tmp_path, WIDE)[0] == 0
    code, text = put(lab, tmp_path, PRODUCT)
    assert code == 1 and "does not fit" in text and "shop/web" in text and "bystander" not in text
    code, text = put(lab, tmp_path, MANY)
    assert code == 1 and "many.yaml:1" in text and "names 17000 prefixes, expected at most 16384" in text
    for _ in range(2):
        found = status(lab)
        problem = part(found, "policy")
        assert "(shop/web): revision" in problem and "(other/bystander)" not in problem
        assert "most by NetworkPolicy shop/product" in problem
        shares = {item["namespace"]: item for item in found["policy-shares"]}
        assert shares["shop"]["prefixes"] == 1500 and shares["shop"]["largest"] == "NetworkPolicy shop/product"
        assert 3000 <= shares["other"]["entries"] <= 3010
        metrics = ciliate(lab, "metrics", "list").stdout
        assert "ciliate_policy_usage" in metrics and "ciliate_policy_share" in metrics
        # and again with all of it on disk
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
    assert ciliate(lab, "policy", "delete", "shop/product").returncode == 0
    assert "does not fit" not in part(status(lab), "policy")
