"""An agent on a disk that takes its time: what waits for the disk waits, nothing else does, and nothing is taken for
lost. Tier node; a preloaded library holds every flush (slowdisk.c)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import pytest

from ciliate.datapath.compiler import find_clang
from ciliate.lab.lab import Lab
from ciliate.manifest import loads

from .faults_harness import Container, looks, part, wait_for
from .lab_harness import new_lab

HELD = 600_000
"""Milliseconds: longer than any test."""
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a, namespace: default}
spec: {endpointSelector: {}, ingress: [{fromCIDR: [192.0.2.0/24]}]}
"""
POD = "{kind: Pod, metadata: {name: a, namespace: default, labels: {app: a}}}"


class Disk:
    """How long each flush of the agents takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.take(0)

    def take(self, milliseconds: int) -> None:
        """From now on, also of those that run."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(str(milliseconds))
        fresh.replace(self._path)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("disk")
    library, source = directory / "slowdisk.so", Path(__file__).with_name("slowdisk.c")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [find_clang()[0], "-O2", *warnings, "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    made = Disk(directory / "milliseconds")
    with pytest.MonkeyPatch.context() as preloaded:
        preloaded.setenv("SLOW_DISK", str(directory / "milliseconds"))
        preloaded.setenv("LD_PRELOAD", str(library))
        yield made


@pytest.fixture(scope="module")
def lab(disk: Disk) -> Iterator[Lab]:
    with new_lab("slow") as made:
        yield made


def test_nothing_is_lost_that_the_disk_has_not_taken_yet(lab: Lab, disk: Disk) -> None:
    container, before = Container(lab), looks(lab)
    pods = [item.object for item in loads(POD, "pod.yaml")]
    policies = [msgspec.to_builtins(item) for item in loads(POLICY, "policy.yaml")]
    disk.take(HELD)
    with ThreadPoolExecutor() as threads:
        try:
            acts = [
                threads.submit(lab.client().request, "PUT", "/v1/workloads", {"objects": pods}),
                threads.submit(lab.client().request, "PUT", "/v1/policy", {"documents": policies}),
                threads.submit(container.add),
            ]
            wait_for(lambda: looks(lab) > before + 1)
            assert not wait(acts, 0).done
            assert part(lab, "state")["state"] == "ok"
        finally:
            disk.take(0)
        for act in acts:
            act.result()
    after = looks(lab)
    wait_for(lambda: looks(lab) > after)
    assert part(lab, "state")["state"] == "ok"
    container.remove()
