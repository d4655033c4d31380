"""Requests, results and errors by the specification: a table per command, version and fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ciliate.cli.cni import command as cni
from ciliate.cni.lists import mistakes
from ciliate.cni.spec import (
    VERSIONS,
    Address,
    CniError,
    CniResult,
    Command,
    ErrorCode,
    Interface,
    Route,
    parse_request,
)
from ciliate.datapath.shaping import Limits

FD = 7


def environment(command: str, **changes: str | None) -> dict[str, str]:
    values = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c0ffee",
        "CNI_NETNS": "/run/netns/x",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=xwing",
    } | {f"CNI_{key}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def configuration(version: str | None = "1.1.0", **fields: Any) -> bytes:
    document = {"cniVersion": version, "name": "net", "type": "ciliate-cni", **fields}
    return json.dumps({key: value for key, value in document.items() if value is not None}).encode()


def refused(variables: dict[str, str], config: bytes, fd: int | None = FD) -> CniError:
    with pytest.raises(CniError) as caught:
        parse_request(variables, config, fd)
    return caught.value


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_add_and_del_are_understood_in_every_version(command: str, version: str) -> None:
    request = parse_request(environment(command), configuration(version), FD)
    assert request.command is Command(command)
    assert request.config.version == version
    assert (request.container_id, request.ifname, request.netns_fd) == ("c0ffee", "eth0", FD)
    assert (request.pod_namespace, request.pod_name) == ("default", "xwing")


@pytest.mark.parametrize(
    ("command", "since"), [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")], ids=["CHECK", "GC", "STATUS"]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_commands_exist_since_a_version(command: str, since: str, version: str) -> None:
    config = configuration(version, prevResult={}, **{"cni.dev/valid-attachments": []})
    if VERSIONS.index(version) >= VERSIONS.index(since):
        assert parse_request(environment(command), config, FD).command is Command(command)
    else:
        error = refused(environment(command), config)
        assert error.code is ErrorCode.INCOMPATIBLE_VERSION
        assert since in error.message


@pytest.mark.parametrize("version", [None, "0.1.0", "0.2.0", "2.0.0", 1, ""])
def test_other_versions_are_incompatible(version: Any) -> None:
    error = refused(environment("ADD"), configuration(version))
    assert error.code is ErrorCode.INCOMPATIBLE_VERSION
    assert "cniVersion" in error.message and "1.0.0" in error.message


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        ("ADD", "CONTAINERID"),
        ("ADD", "IFNAME"),
        ("ADD", "NETNS"),
        ("CHECK", "CONTAINERID"),
        ("CHECK", "IFNAME"),
        ("CHECK", "NETNS"),
        ("DEL", "CONTAINERID"),
        ("DEL", "IFNAME"),
    ],
)
def test_a_missing_variable_is_named(command: str, variable: str) -> None:
    error = refused(environment(command, **{variable: None}), configuration(prevResult={}))
    assert error.code is ErrorCode.INVALID_ENVIRONMENT
    assert f"CNI_{variable}" in error.message


def test_del_needs_no_namespace() -> None:
    assert parse_request(environment("DEL", NETNS=None), configuration(), None).netns == ""


def test_add_needs_the_open_namespace() -> None:
    error = refused(environment("ADD"), configuration(), None)
    assert error.code is ErrorCode.INVALID_ENVIRONMENT and "CNI_NETNS" in error.message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CONTAINERID", "../../etc"),
        ("CONTAINERID", "a/b"),
        ("CONTAINERID", "a..b"),
        ("CONTAINERID", "-a"),
        ("CONTAINERID", "a b"),
        ("CONTAINERID", "a\n"),
        ("IFNAME", "sixteen-letters-"),
        ("IFNAME", "a/b"),
        ("IFNAME", ".."),
        ("IFNAME", "."),
        ("IFNAME", "eth0:1"),
        ("IFNAME", "eth 0"),
        ("COMMAND", "add"),
        ("COMMAND", ""),
        ("ARGS", "K8S_POD_NAME"),
        ("ARGS", "=x"),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_expected(variable: str, value: str) -> None:
    error = refused(environment("ADD", **{variable: value}), configuration())
    assert error.code is ErrorCode.INVALID_ENVIRONMENT
    assert f"CNI_{variable}" in error.message and "expected" in error.message


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"1"])
def test_what_is_no_json_object_cannot_be_decoded(data: bytes) -> None:
    assert refused(environment("ADD"), data).code is ErrorCode.DECODING_FAILURE


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": None}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": 1}, "name"),
        ({"type": None}, "type"),
        ({"mtu": 100}, "mtu"),
        ({"mtu": True}, "mtu"),
        ({"mtu": "1500"}, "mtu"),
        ({"chaining-mode": ""}, "chaining-mode"),
        ({"prevResult": []}, "prevResult"),
        ({"args": {"cni": {"labels": {}}}}, "args.cni.labels"),
        ({"args": {"cni": {"labels": [{"value": "x"}]}}}, "args.cni.labels[0]"),
        ({"args": {"cni": {"labels": [{"key": "a", "value": 1}]}}}, "args.cni.labels[0]"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    error = refused(environment("ADD"), configuration(**fields))
    assert error.code is ErrorCode.INVALID_CONFIGURATION
    assert error.message.startswith(f"{named}: ") and "expected" in error.message


@pytest.mark.parametrize("key", ["io.cilium.k8s.namespace.labels.team", "io.kubernetes.pod.namespace", "reserved:host"])
def test_labels_of_the_system_are_refused(key: str) -> None:
    config = configuration(args={"cni": {"labels": [{"key": "app", "value": "x"}, {"key": key, "value": "x"}]}})
    error = refused(environment("ADD"), config)
    assert error.code is ErrorCode.INVALID_CONFIGURATION
    assert "args.cni.labels[1].key" in error.message


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("user", "admin;k8s:zone=x", "value"),
        ("user", "x" * 64, "value"),
        ("user=admin", "x", "key"),
        ("a/b/c", "x", "key"),
    ],
)
def test_labels_that_kubernetes_would_refuse_are_refused(key: str, value: str, field: str) -> None:
    config = configuration(args={"cni": {"labels": [{"key": "app", "value": "x"}, {"key": key, "value": value}]}})
    error = refused(environment("ADD"), config)
    assert error.code is ErrorCode.INVALID_CONFIGURATION
    assert f"args.cni.labels[1].{field}: " in error.message and "expected" in error.message


@pytest.mark.parametrize("namespace", ["a=b", "A", "a" * 64, "a.b"])
def test_a_namespace_is_a_name_of_kubernetes_and_del_does_not_ask(namespace: str) -> None:
    arguments = f"K8S_POD_NAME=x;K8S_POD_NAMESPACE={namespace}"
    error = refused(environment("ADD", ARGS=arguments), configuration())
    assert error.code is ErrorCode.INVALID_ENVIRONMENT and "K8S_POD_NAMESPACE" in error.message
    assert parse_request(environment("DEL", ARGS=arguments), configuration(), None).pod_namespace == namespace


def test_labels_by_the_conventions() -> None:
    config = configuration(args={"cni": {"labels": [{"key": "app", "value": "x"}, {"key": "bare"}]}})
    assert parse_request(environment("ADD"), config, FD).config.labels == {"app": "x", "bare": ""}


def test_check_needs_the_previous_result() -> None:
    error = refused(environment("CHECK"), configuration())
    assert error.code is ErrorCode.INVALID_CONFIGURATION and "prevResult" in error.message


@pytest.mark.parametrize("given", [None, {}, [{}], [{"containerID": "a"}], ["a"]])
def test_gc_needs_the_valid_attachments(given: Any) -> None:
    error = refused(environment("GC"), configuration(**{"cni.dev/valid-attachments": given}))
    assert error.code is ErrorCode.INVALID_CONFIGURATION
    assert "cni.dev/valid-attachments" in error.message


def test_gc_reads_the_valid_attachments() -> None:
    config = configuration(**{"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]})
    request = parse_request({"CNI_COMMAND": "GC", "CNI_PATH": "/x"}, config)
    assert request.config.valid_attachments == {("a", "eth0")}


RESULT = CniResult(
    interfaces=[Interface("lxc1", "02:00:00:00:00:01"), Interface("eth0", "02:00:00:00:00:02", 1400, "/run/netns/x")],
    ips=[Address("10.200.0.5/32", "10.200.0.1", 1), Address("fd00::5/128", "fd00::1", 1)],
    routes=[Route("0.0.0.0/0", "10.200.0.1"), Route("10.0.0.0/8")],
)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_result_has_the_form_of_its_version(version: str) -> None:
    document = RESULT.document(version)
    assert document["cniVersion"] == version
    assert document["interfaces"][0] == {"name": "lxc1", "mac": "02:00:00:00:00:01"}
    assert ("mtu" in document["interfaces"][1]) == (version == "1.1.0")
    assert [ip.get("version") for ip in document["ips"]] == (
        ["4", "6"] if version in ("0.3.1", "0.4.0") else [None, None]
    )
    assert document["ips"][1]["interface"] == 1 and document["ips"][1]["gateway"] == "fd00::1"
    assert document["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.200.0.1"}, {"dst": "10.0.0.0/8"}]
    assert document["dns"] == {}
    assert [ip["address"].partition("/")[0] for ip in document["ips"]] == ["10.200.0.5", "fd00::5"]


def test_the_error_object() -> None:
    error = CniError(ErrorCode.TRY_AGAIN, "later", "why")
    assert error.document("1.0.0") == {"cniVersion": "1.0.0", "code": 11, "msg": "later", "details": "why"}


LIMITS = {"ingressRate": 8000, "ingressBurst": 80_000, "egressRate": 16_000, "egressBurst": 160_000}


def test_what_the_runtime_tells_of_a_container() -> None:
    told = {"bandwidth": LIMITS, "portMappings": [{"hostPort": 80, "containerPort": 80}], "ips": ["10.0.0.1"]}
    config = parse_request(environment("ADD"), configuration("1.0.0", runtimeConfig=told), FD).config
    assert config.limits == Limits(8000, 80_000, 16_000, 160_000) and config.port_mappings
    for empty in (None, {}, {"bandwidth": None, "portMappings": None}, {"bandwidth": {}, "portMappings": []}):
        config = parse_request(environment("ADD"), configuration("1.0.0", runtimeConfig=empty), FD).config
        assert config.limits == Limits() and not config.port_mappings


@pytest.mark.parametrize(
    ("told", "field"),
    [
        (3, "runtimeConfig"),
        ({"portMappings": {}}, "runtimeConfig.portMappings"),
        ({"bandwidth": [1]}, "runtimeConfig.bandwidth"),
        ({"bandwidth": {**LIMITS, "ingressRate": "8M"}}, "runtimeConfig.bandwidth.ingressRate"),
        ({"bandwidth": {**LIMITS, "egressBurst": -1}}, "runtimeConfig.bandwidth.egressBurst"),
        ({"bandwidth": {**LIMITS, "egressRate": 1 << 40}}, "runtimeConfig.bandwidth.egressRate"),
        ({"bandwidth": {**LIMITS, "egressRate": True}}, "runtimeConfig.bandwidth.egressRate"),
        ({"bandwidth": {**LIMITS, "ingressBurst": 0}}, "runtimeConfig.bandwidth.ingressRate"),
        ({"bandwidth": {**LIMITS, "egressRate": 0}}, "runtimeConfig.bandwidth.egressRate"),
        ({"bandwidth": {**LIMITS, "egressRate": 7}}, "runtimeConfig.bandwidth.egressRate"),
    ],
)
def test_what_the_runtime_may_not_tell(told: Any, field: str) -> None:
    error = refused(environment("ADD"), configuration("1.0.0", runtimeConfig=told))
    assert error.code is ErrorCode.INVALID_CONFIGURATION and error.message.startswith(f"{field}: ")


def test_no_attachment_is_left_where_the_list_is_null() -> None:
    config = json.dumps({**json.loads(configuration("1.1.0")), "cni.dev/valid-attachments": None}).encode()
    assert parse_request(environment("GC"), config).config.valid_attachments == frozenset()
    assert "cni.dev/valid-attachments: missing" in refused(environment("GC"), configuration("1.1.0")).message


OURS, CAPABLE = {"type": "ciliate-cni"}, {"type": "ciliate-cni", "capabilities": {"portMappings": True}}
CHAINED = {"type": "ciliate-cni", "chaining-mode": "generic-veth"}


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ([OURS, {"type": "firewall"}, {"type": "tuning"}, {"type": "sbr"}], []),
        ([OURS, {"type": "portmap"}], ["plugins[1] (portmap): pods of the node"]),
        ([CAPABLE, {"type": "portmap"}], []),
        ([{**OURS, "chaining-mode": "portmap"}, {"type": "portmap"}], []),
        ([{"type": "bridge"}, CHAINED, {"type": "portmap"}], []),
        ([OURS, {"type": "bandwidth"}], ["plugins[1] (bandwidth): cannot work"]),
        ([{"type": "bridge"}, {"type": "tuning"}, CHAINED], []),
        ([{"type": "bridge"}, CHAINED, {"type": "tuning"}], ["plugins[2] (tuning): a MAC address"]),
        ([{"type": "bridge"}, {"type": "bandwidth"}], []),
        ("none", []),
    ],
)
def test_what_cannot_work_beside_us_in_a_list(plugins: Any, words: list[str], tmp_path: Path) -> None:
    found = list(mistakes({"plugins": plugins}))
    assert len(found) == len(words) and all(text.startswith(word) for text, word in zip(found, words, strict=True))
    (tmp_path / "10-x.conflist").write_text(json.dumps({"plugins": plugins}))
    (tmp_path / "20-x.conf").write_text("{")
    done = CliRunner().invoke(cni, ["check", "--conf-dir", str(tmp_path)])
    assert done.exit_code == 1 and "20-x.conf: is no JSON" in done.output
    assert all(word in done.output for word in words)
    (tmp_path / "20-x.conf").unlink()
    assert CliRunner().invoke(cni, ["check", "--conf-dir", str(tmp_path)]).exit_code == bool(words)
