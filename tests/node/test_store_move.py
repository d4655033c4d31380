"""A node that began on its own file moves to etcd; etcd is killed, and wiped: same numbers, no packet lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.lab import netns
from ciliate.lab.etcdserver import Etcd
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import sort_documents
from ciliate.lab.state import NODE
from ciliate.manifest import loads

from .faults_harness import lab_with_pods, undisturbed, wait_for

MASTERS = "cilium/state/identities/v1/id/"
USERS = "cilium/state/identities/v1/value/"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_with_pods("move") as made:
        yield made


@pytest.fixture(scope="module")
def etcd(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd"), namespace=lab.directory.namespace(NODE)) as server:
        yield server


def ciliate(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    inside = netns.inside(lab.directory.namespace(NODE))
    command = [*inside, sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.api_socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def numbers(lab: Lab) -> dict[str, int]:
    """Every endpoint's pod with its identity."""
    found = lab.request("GET", "/v1/endpoint")
    return {item["status"]["external-identifiers"]["pod-name"]: item["status"]["identity"]["id"] for item in found}


def stored(lab: Lab, prefix: str) -> dict[str, str]:
    done = ciliate(lab, "kvstore", "get", "--recursive", prefix, "-o", "json")
    return {item["key"].removeprefix(prefix): item["value"] for item in json.loads(done.stdout or "[]")}


def add_pod(lab: Lab, name: str, app: str) -> None:
    text = f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec: {{containers: [{{name: c, image: c}}]}}
"""
    cluster = sort_documents(loads(text, "late.yaml"))
    lab.everywhere("PUT", "/v1/workloads", {"objects": cluster.workloads(cluster)})
    lab.add_pods(list(cluster.pods.values()))


def store_part(lab: Lab) -> dict[str, str]:
    parts = lab.request("GET", "/v1/healthz?detail=true")["parts"]
    found: dict[str, str] = next(item for item in parts if item["name"] == "kvstore")
    return found


def in_etcd(lab: Lab) -> set[int]:
    return {int(name) for name in stored(lab, MASTERS)}


def test_a_node_moves_to_etcd_without_a_changed_number_or_a_lost_packet(lab: Lab, etcd: Etcd) -> None:
    before = numbers(lab)
    assert len(before) == 3
    with undisturbed(lab):
        done = ciliate(lab, "kvstore", "--kvstore-opt", f"etcd.address={etcd.address}", "migrate", "--to", "etcd")
        assert done.returncode == 0, done.stderr
        assert "the agent uses etcd; 3 of 3 identities have their numbers" in done.stdout
        assert f"set kvstore=etcd kvstore-opt=etcd.address={etcd.address} there" in done.stdout
        assert numbers(lab) == before
        assert in_etcd(lab) == set(before.values())
        wait_for(lambda: len(stored(lab, USERS)) == 3, "the node's own keys in etcd")
        assert "etcd: 1/1 endpoints" in ciliate(lab, "kvstore", "status").stdout
        wait_for(lambda: "etcd: 1/1 endpoints" in store_part(lab)["message"], "the status of the store in use")
        lab.stop_agent(signal.SIGKILL)
        lab.state.options |= {
            "kvstore": "etcd",
            "kvstore-opt": f"etcd.address={etcd.address}",
            "kvstore-lease-ttl": "6s",
        }
        lab.start_agent()
        assert numbers(lab) == before


def test_a_move_that_fails_leaves_the_node_where_it_was(lab: Lab) -> None:
    before = numbers(lab)
    done = ciliate(lab, "kvstore", "--kvstore-opt", "etcd3000.address=x", "migrate", "--to", "etcd3000")
    assert done.returncode == 1
    assert "etcd3000" in done.stderr
    done = ciliate(lab, "kvstore", "--kvstore-opt", "embedded.path=/proc/nowhere/kv.db", "migrate", "--to", "embedded")
    assert done.returncode == 1
    assert "/proc/nowhere" in done.stderr
    assert numbers(lab) == before
    assert "etcd: 1/1 endpoints" in ciliate(lab, "kvstore", "status").stdout


def test_an_agent_starts_and_connects_pods_while_the_store_is_away(lab: Lab, etcd: Etcd) -> None:
    before = numbers(lab)
    with undisturbed(lab):
        etcd.kill()
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
        assert numbers(lab) == before
        # its labels are those of another pod: nobody has to be asked
        add_pod(lab, "late", "friend")
        assert numbers(lab)["default/late"] == before["default/friend"]
        wait_for(lambda: "no quorum" in store_part(lab)["message"], "the status tells of it")
        assert store_part(lab)["state"] == "warning"
        etcd.start()
        wait_for(lambda: store_part(lab)["state"] == "ok", "the status tells of the return")
        add_pod(lab, "fresh", "fresh")
        wait_for(lambda: len(stored(lab, USERS)) == 4, "all keys are in the store again")


def test_a_store_that_lost_everything_gets_the_same_numbers_again(lab: Lab, etcd: Etcd) -> None:
    before = numbers(lab)
    used = set(before.values())
    with undisturbed(lab):
        etcd.wipe()
        etcd.start()
        wait_for(lambda: in_etcd(lab) >= used, "the numbers are in the new store")
        wait_for(lambda: len(stored(lab, USERS)) == len(used), "the node's own keys are in the new store")
        assert numbers(lab) == before


def test_keys_are_read_written_and_deleted(lab: Lab, tmp_path: Path) -> None:
    opt = f"embedded.path={tmp_path}/kv.db"
    own = ("kvstore", "--kvstore", "embedded", "--kvstore-opt", opt)
    assert ciliate(lab, *own, "set", "a/1", "x").returncode == 0
    assert ciliate(lab, *own, "set", "a/2", "y").returncode == 0
    assert ciliate(lab, *own, "get", "a/1").stdout == "x\n"
    assert "a/2   y" in ciliate(lab, *own, "get", "--recursive", "a/").stdout
    missing = ciliate(lab, *own, "get", "b")
    assert (missing.returncode, missing.stderr) == (1, "ciliate: no key 'b'\n")
    assert ciliate(lab, *own, "delete", "a/1").stdout == "1 keys deleted\n"
    assert ciliate(lab, *own, "delete", "a/1").returncode == 1
    assert ciliate(lab, *own, "delete", "").returncode == 2
    assert ciliate(lab, *own, "delete", "--recursive", "a/").stdout == "1 keys deleted\n"
    away = ciliate(lab, "kvstore", "--kvstore", "etcd", "--kvstore-opt", "etcd.address=127.0.0.1:1", "status")
    assert away.returncode == 1
    assert "no quorum" in away.stdout
