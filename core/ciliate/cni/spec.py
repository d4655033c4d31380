"""CNI requests, results and errors by the specification, versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0.

Pure data: nothing here touches the kernel or a socket. Every refusal names the variable or field at fault and what
was expected, with the error code that the specification gives it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ciliate import labels as lbl
from ciliate.datapath.shaping import MAX_RATE, Limits
from ciliate.workload import reserved_key

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEFAULT_MODE = "none"


class Command(enum.StrEnum):
    """What a runtime asks for."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


_SINCE = {Command.CHECK: "0.4.0", Command.GC: "1.1.0", Command.STATUS: "1.1.0"}
_NEEDS = {
    Command.ADD: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.CHECK: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.DEL: ("CNI_CONTAINERID", "CNI_IFNAME"),
}


_READ = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")


class ErrorCode(enum.IntEnum):
    """Codes below 100 are the specification's, the others ours."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_CONFIGURATION = 7
    TRY_AGAIN = 11
    UNAVAILABLE = 50
    ADDRESSES_USED_UP = 100
    ALREADY_CONNECTED = 101
    DATAPATH_FAILURE = 102
    CHECK_FAILED = 103
    INTERNAL = 110


class CniError(Exception):
    """An answer that is an error object."""

    def __init__(self, code: ErrorCode, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def document(self, version: str) -> dict[str, Any]:
        """The error object of the specification."""
        document = {"cniVersion": version, "code": int(self.code), "msg": self.message}
        return {**document, "details": self.details} if self.details else document


class NetworkConfig(msgspec.Struct, frozen=True):
    """The network configuration that the runtime hands over on standard input."""

    version: str
    name: str
    mode: str
    mtu: int
    labels: dict[str, str]
    prev_result: dict[str, Any] | None
    valid_attachments: frozenset[tuple[str, str]]
    raw: dict[str, Any]
    limits: Limits = Limits()
    port_mappings: bool = False
    """Whether the runtime maps ports of the node to this container, which is another plugin's work."""


class Request(msgspec.Struct, frozen=True):
    """One valid request. ``netns`` is a path to show, ``netns_fd`` the open namespace (None where it is gone)."""

    command: Command
    config: NetworkConfig
    container_id: str = ""
    ifname: str = ""
    netns: str = ""
    netns_fd: int | None = None
    pod_namespace: str = ""
    pod_name: str = ""

    @property
    def attachment(self) -> tuple[str, str]:
        """Container id and interface name: what the specification calls an attachment."""
        return self.container_id, self.ifname


def parse_request(environment: Mapping[str, str], configuration: bytes, netns_fd: int | None = None) -> Request:
    """Read one request; CniError where the specification does not allow it."""
    _check_text(environment)
    command = _command(environment)
    _check_names(environment, command)
    config = parse_config(configuration, command)
    arguments = _arguments(environment.get("CNI_ARGS", ""))
    netns = environment.get("CNI_NETNS", "")
    if "CNI_NETNS" in _NEEDS.get(command, ()) and netns_fd is None:
        raise _environment("CNI_NETNS", netns, "an open network namespace sent with the request")
    pod_name = _part(arguments, "K8S_POD_NAME", "")
    return Request(
        command=command,
        config=config,
        container_id=environment.get("CNI_CONTAINERID", ""),
        ifname=environment.get("CNI_IFNAME", ""),
        netns=netns,
        netns_fd=netns_fd,
        pod_namespace=_namespace(arguments, command, "default" if pod_name else ""),
        pod_name=pod_name,
    )


def _check_text(environment: Mapping[str, str]) -> None:
    for name in _READ:
        value = environment.get(name, "")
        # what was no UTF-8 has come as lone surrogates
        if not value.isprintable():
            raise _environment(name, value, "text in UTF-8 without control characters")


def _command(environment: Mapping[str, str]) -> Command:
    text = environment.get("CNI_COMMAND", "")
    try:
        return Command(text)
    except ValueError:
        raise _environment("CNI_COMMAND", text, f"one of {', '.join(Command)}") from None


IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\Z")
_IFNAME = re.compile(r"[^\s/:\\\0]+\Z")
_IFNAME_BYTES = 15


def _check_names(environment: Mapping[str, str], command: Command) -> None:
    for name in _NEEDS.get(command, ()):
        if not environment.get(name):
            raise _environment(name, "", f"a value, {command} needs it")
    container, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if container and (not IDENTIFIER.match(container) or ".." in container):
        expected = "letters, digits, '_', '.' and '-' with a letter or digit first and no '..'"
        raise _environment("CNI_CONTAINERID", container, expected)
    if ifname and (
        not _IFNAME.match(ifname) or len(ifname.encode()) > _IFNAME_BYTES or ".." in ifname or ifname == "."
    ):
        expected = f"1 to {_IFNAME_BYTES} bytes without white space, ':', path separators and '..'"
        raise _environment("CNI_IFNAME", ifname, expected)


def _arguments(text: str) -> dict[str, str]:
    arguments: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise _environment("CNI_ARGS", pair, "KEY=VALUE pairs separated by ';'")
        arguments[key] = value
    return arguments


def _part(arguments: Mapping[str, str], name: str, default: str) -> str:
    """A pod's name or namespace: each is one part of a key."""
    value = arguments.get(name, default)
    if "/" in value or " " in value:
        raise _environment("CNI_ARGS", f"{name}={value}", "a name without '/' and white space")
    return value


def _namespace(arguments: Mapping[str, str], command: Command, default: str) -> str:
    """The pod's namespace, which becomes the value of a label; what is there already may always be taken away."""
    value = _part(arguments, "K8S_POD_NAMESPACE", default)
    if command is Command.ADD and value and not lbl.valid_namespace(value):
        expected = f"at most {lbl.MAX_NAME} lower-case letters, digits and '-'"
        raise _environment("CNI_ARGS", f"K8S_POD_NAMESPACE={value}", expected)
    return value


def _environment(name: str, value: str, expected: str) -> CniError:
    given = f"{value!r} given" if value else "not set"
    return CniError(ErrorCode.INVALID_ENVIRONMENT, f"{name}: {given}, expected {expected}")


def parse_config(data: bytes, command: Command) -> NetworkConfig:
    """Read the configuration for one command; CniError names the field that is wrong."""
    raw = _decode(data)
    version = _version(raw, command)
    name = raw.get("name")
    if not isinstance(name, str) or not IDENTIFIER.match(name):
        raise _field("name", name, "letters, digits, '_', '.' and '-' with a letter or digit first")
    if not isinstance(raw.get("type"), str):
        raise _field("type", raw.get("type"), "the name of the plugin's executable")
    prev_result = raw.get("prevResult")
    if prev_result is not None and not isinstance(prev_result, dict):
        raise _field("prevResult", prev_result, "an object")
    if command is Command.CHECK and prev_result is None:
        raise _field("prevResult", None, "the result of ADD, CHECK needs it")
    runtime = _runtime(raw)
    return NetworkConfig(
        version=version,
        name=name,
        mode=_mode(raw),
        mtu=_mtu(raw),
        labels=_labels(raw),
        prev_result=prev_result,
        valid_attachments=_attachments(raw) if command is Command.GC else frozenset(),
        raw=raw,
        limits=_limits(runtime),
        port_mappings=bool(runtime.get("portMappings")),
    )


def _decode(data: bytes) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CniError(ErrorCode.DECODING_FAILURE, f"network configuration: not JSON: {error}") from error
    if not isinstance(raw, dict):
        text = f"network configuration: {type(raw).__name__} given, expected a JSON object"
        raise CniError(ErrorCode.DECODING_FAILURE, text)
    return raw


def _version(raw: Mapping[str, Any], command: Command) -> str:
    version = raw.get("cniVersion")
    if command is Command.VERSION:
        return version if isinstance(version, str) else VERSIONS[-1]
    if version not in VERSIONS:
        text = f"cniVersion: {version!r} given, expected one of {', '.join(VERSIONS)}"
        raise CniError(ErrorCode.INCOMPATIBLE_VERSION, text)
    since = _SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(version) < VERSIONS.index(since):
        text = f"cniVersion: {version!r} given, {command} exists since {since}"
        raise CniError(ErrorCode.INCOMPATIBLE_VERSION, text)
    return str(version)


def _mode(raw: Mapping[str, Any]) -> str:
    mode = raw.get("chaining-mode", DEFAULT_MODE)
    if not isinstance(mode, str) or not mode:
        raise _field("chaining-mode", mode, "the name of a chaining mode")
    return mode


def _mtu(raw: Mapping[str, Any]) -> int:
    mtu = raw.get("mtu", 0)
    if not isinstance(mtu, int) or isinstance(mtu, bool) or (mtu and not 1280 <= mtu <= 65535):
        raise _field("mtu", mtu, "0 (the node's) or 1280 to 65535")
    return mtu


def _runtime(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the runtime says of this container, as far as the configuration has the capability."""
    given = raw.get("runtimeConfig")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _field("runtimeConfig", given, "an object")
    mappings = given.get("portMappings")
    if mappings is not None and not isinstance(mappings, list):
        raise _field("runtimeConfig.portMappings", mappings, "a list")
    return given


def _limits(runtime: Mapping[str, Any]) -> Limits:
    """``runtimeConfig.bandwidth`` by the CNI conventions, in bits a second and bits."""
    given, field = runtime.get("bandwidth"), "runtimeConfig.bandwidth"
    if given is None:
        return Limits()
    if not isinstance(given, dict):
        raise _field(field, given, "an object")
    found = {}
    for name in ("ingressRate", "ingressBurst", "egressRate", "egressBurst"):
        value = given.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_RATE:
            raise _field(f"{field}.{name}", value, f"a number of bits from 0 (no limit) to {MAX_RATE}")
        found[name] = value
    for way in ("ingress", "egress"):
        rate, burst = found[f"{way}Rate"], found[f"{way}Burst"]
        if bool(rate) != bool(burst) or 0 < rate < 8:
            raise _field(f"{field}.{way}Rate", rate, f"8 or more with {way}Burst ({burst} given) above 0, or both 0")
    return Limits(found["ingressRate"], found["ingressBurst"], found["egressRate"], found["egressBurst"])


def _labels(raw: Mapping[str, Any]) -> dict[str, str]:
    """``args.cni.labels`` by the CNI conventions: a list of key and value; keys of the system are refused."""
    args = raw.get("args")
    cni = args.get("cni") if isinstance(args, dict) else None
    given = cni.get("labels") if isinstance(cni, dict) else None
    if given is None:
        return {}
    if not isinstance(given, list):
        raise _field("args.cni.labels", given, "a list of objects with key and value")
    labels: dict[str, str] = {}
    for index, item in enumerate(given):
        key, value = _label(item, f"args.cni.labels[{index}]")
        labels[key] = value
    return labels


def _label(item: Any, field: str) -> tuple[str, str]:
    key = item.get("key") if isinstance(item, dict) else None
    value = item.get("value", "") if isinstance(item, dict) else None
    if not isinstance(key, str) or not key or not isinstance(value, str):
        raise _field(field, item, "an object with the strings key and value")
    if reserved_key(key):
        raise _field(f"{field}.key", key, "a key that the system does not keep for itself")
    if not lbl.valid_key(key):
        raise _field(f"{field}.key", key, lbl.KEY_FORM)
    if not lbl.valid_value(value):
        raise _field(f"{field}.value", value, lbl.VALUE_FORM)
    return key, value


def _attachments(raw: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    field = "cni.dev/valid-attachments"
    given = raw.get(field)
    if given is None and field in raw:
        return frozenset()  # what libcni sends where no container is left
    if not isinstance(given, list):
        raise _field(field, given, "a list of objects with containerID and ifname")
    found = set()
    for index, item in enumerate(given):
        pair = (item.get("containerID"), item.get("ifname")) if isinstance(item, dict) else (None, None)
        if not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise _field(f"{field}[{index}]", item, "an object with the strings containerID and ifname")
        found.add((pair[0], pair[1]))
    return frozenset(found)


def _field(field: str, value: Any, expected: str) -> CniError:
    given = "missing" if value is None else f"{value!r} given"
    return CniError(ErrorCode.INVALID_CONFIGURATION, f"{field}: {given}, expected {expected}")


class Interface(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device that ADD made; ``sandbox`` is empty for one of the node's."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""


class Address(msgspec.Struct, frozen=True):
    """An address with prefix length; ``interface`` is an index into the result's interfaces."""

    address: str
    gateway: str = ""
    interface: int | None = None


class Route(msgspec.Struct, frozen=True):
    """A route that ADD made inside the container."""

    dst: str
    gw: str = ""


class CniResult(msgspec.Struct, frozen=True):
    """What ADD gives back; ``document`` writes it in the form of one version."""

    interfaces: Sequence[Interface] = ()
    ips: Sequence[Address] = ()
    routes: Sequence[Route] = ()
    dns: Mapping[str, Any] = {}

    def document(self, version: str) -> dict[str, Any]:
        """The result object of the specification's ``version``."""
        return {
            "cniVersion": version,
            "interfaces": [_interface(item, version) for item in self.interfaces],
            "ips": [_address(item, version) for item in self.ips],
            "routes": [{"dst": item.dst, **({"gw": item.gw} if item.gw else {})} for item in self.routes],
            "dns": dict(self.dns),
        }


def _interface(item: Interface, version: str) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(item)
    if version != "1.1.0":
        # an interface's MTU is told since 1.1.0
        document.pop("mtu", None)
    return document


def _address(item: Address, version: str) -> dict[str, Any]:
    document: dict[str, Any] = {"address": item.address}
    if version in ("0.3.1", "0.4.0"):
        # up to 0.4.0 each address says its family
        document["version"] = "6" if ":" in item.address else "4"
    if item.gateway:
        document["gateway"] = item.gateway
    if item.interface is not None:
        document["interface"] = item.interface
    return document
