"""Policies on disk: all or none, also when the disk refuses. Tier unit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from ciliate import atomicfile
from ciliate.agent.policy_service import PolicyService
from ciliate.identity import Identity
from ciliate.labels import LabelSet
from ciliate.manifest import loads
from ciliate.policy.repository import Repository

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: default}}
spec: {{endpointSelector: {{}}, ingress: [{{fromEntities: [{entity}]}}]}}
"""


class Kernel:
    """Stands where the realizer is: notes when it was asked to follow."""

    def __init__(self) -> None:
        self.calls = 0

    async def realize(self) -> None:
        self.calls += 1


def service(directory: Path) -> tuple[PolicyService, Repository, Kernel]:
    repository, kernel = Repository(), Kernel()
    return PolicyService(repository, kernel, directory), repository, kernel  # type: ignore[arg-type]


def documents(*names: str, entity: str = "world") -> list[Any]:
    return loads("---".join(POLICY.format(name=name, entity=entity) for name in names), "file.yaml")


def shown(repository: Repository) -> dict[str, Any]:
    return {item.name: item.document.object["spec"]["ingress"] for item in repository.objects()}


async def test_what_was_imported_is_there_after_a_restart(tmp_path: Path) -> None:
    first, repository, kernel = service(tmp_path)
    await first.import_documents(documents("a", "b"))
    await first.import_documents(documents("b", entity="host"))
    await first.delete(lambda item: item.name == "a")
    assert kernel.calls == 3
    second, restored, _ = service(tmp_path)
    assert second.restore() == 1
    assert shown(restored) == shown(repository) == {"b": [{"fromEntities": ["host"]}]}
    assert restored.objects()[0].document.file == "file.yaml"


@pytest.mark.parametrize("change", ["import", "delete"])
async def test_a_disk_that_refuses_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    policies, repository, kernel = service(tmp_path)
    await policies.import_documents(documents("a"))
    before, calls = shown(repository), kernel.calls

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomicfile, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left"):
        if change == "import":
            await policies.import_documents(documents("a", "b", entity="host"))
        else:
            await policies.delete(lambda item: True)
    assert shown(repository) == before
    assert kernel.calls == calls
    monkeypatch.undo()
    await policies.import_documents(documents("c"))
    assert service(tmp_path)[0].restore() == 2


async def test_a_proxy_that_comes_and_goes_is_followed(tmp_path: Path) -> None:
    policies, repository, kernel = service(tmp_path)
    revisions: list[int] = []
    policies.on_change = revisions.append
    await policies.set_proxies({"http": 10001}, {"kafka": "starting"})
    assert repository.settings.proxies == (("http", 10001),)
    assert (kernel.calls, len(revisions)) == (1, 1)
    # the same again costs nothing
    await policies.set_proxies({"http": 10001}, {"kafka": "starting"})
    assert (kernel.calls, len(revisions)) == (1, 1)
    await policies.set_proxies({}, {"http": "exited"})
    assert repository.settings.proxies == ()
    assert (kernel.calls, len(revisions)) == (2, 2)


HEAD = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy"}
PORTLESS = {"toPorts": [{"rules": {"dns": [{"matchName": "a.example"}]}}]}
ADDRESS = {"toCIDRSet": [{"cidr": "192.0.2.1"}, {"cidr": "198.51.100.0/24"}]}
LOOKS_AHEAD = {
    "fromEntities": ["world"],
    "toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"path": "(?!/admin).*"}]}}],
}


def stored(name: str, **spec: Any) -> dict[str, Any]:
    return {"object": {**HEAD, "metadata": {"name": name, "namespace": "n"}, "spec": {"endpointSelector": {}, **spec}}}


async def test_what_an_earlier_version_took_stays_in_force(tmp_path: Path) -> None:
    """As far as it can be read, and never with more allowed; it is told, and kept on disk."""
    kept = [
        stored("portless", egress=[PORTLESS]),
        stored("address", egress=[ADDRESS]),
        stored("expression", ingress=[LOOKS_AHEAD]),
        stored("unread", ingress=[{"fromNobody": []}], egress=["text"]),
        stored("requires", ingress=[{"fromRequires": [{"matchLabels": {"a": 1}}], "fromEntities": ["all"]}]),
        {"object": {**HEAD, "metadata": {"name": "Not A Name"}, "spec": {"endpointSelector": {}, "ingress": [{}]}}},
        stored("good", ingress=[{"fromEntities": ["host"]}]),
    ]
    atomicfile.write_json(tmp_path / "policies.json", kept)
    policies, repository, _ = service(tmp_path)
    assert policies.restore() == 7
    rules = {item.name: item.rules for item in repository.objects()}
    assert {name for name, found in rules.items() if len(found) == 1} == {
        *("portless", "address", "expression", "unread", "requires", "good")
    }
    assert rules["unread"][0].ingress is not None and rules["unread"][0].egress is not None
    repository.upsert_identities([Identity(1001, LabelSet.parse(["k8s:io.kubernetes.pod.namespace=n"]))])
    repository.upsert_identities([Identity(1002, LabelSet.parse(["reserved:world", "cidr:198.51.100.0/24"]))])
    repository.register_endpoint(1, 1001)
    resolved = repository.resolve(1)
    assert resolved.enforce_ingress and resolved.enforce_egress
    allowed = {(key.direction, key.identity) for key, entry in resolved.map_state.items() if entry.verdict == 0}
    # an unmet requirement forbids all but the node; of egress one block is left
    assert allowed == {(0, 1), (1, 1002)}
    told = "\n".join(policies.unread())
    assert all(name in told for name in ("portless", "address", "expression", "unread", "requires", "Not A Name"))
    assert "good" not in told
    # nothing is lost from the disk by another change, until it is replaced or deleted
    await policies.import_documents(documents("new"))
    again, _, _ = service(tmp_path)
    assert again.restore() == 8
    await again.delete(lambda item: True)
    assert again.unread() == []
    last, _, _ = service(tmp_path)
    assert last.restore() == 0
