"""The agent's configuration: one typed model; flag > environment > config directory > file > default.

Every wrong value is reported at once, with field, value and expectation; unknown keys warn and name the closest one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ciliate.configvalues import (
    SHAPES,
    addresses,
    boolean,
    check_text,
    contradictions,
    network,
    networks,
    node_address,
    node_ports,
)
from ciliate.duration import parse_duration
from ciliate.hints import closest, did_you_mean
from ciliate.identity.filter import prefix_rules, read_prefixes
from ciliate.identity.fixed import parse_mapping
from ciliate.redaction import HIDDEN, is_secret, shown

ENV_PREFIX = "CILIATE_"
OTHER_VARIABLES = ("CILIATE_CNI_SOCKET", "CILIATE_CNI_WAIT")
"""Of the CNI executable."""
PROVIDER_OPTIONS = {
    "kvstore": "kvstore",
    "identity": "identity_allocation_mode",
    "ipam": "ipam",
    "loader": "datapath_loader",
    "masquerade": "masquerade",
}
"""Kinds of which one provider is active, with the field that names it."""
T = TypeVar("T")


class Doc(msgspec.Struct, frozen=True):
    """What a field means, its unit, and which part reads it."""

    text: str
    reader: str
    unit: str = ""


def _doc(text: str, reader: str, unit: str = "") -> msgspec.Meta:
    return msgspec.Meta(description=text, extra={"doc": Doc(text, reader, unit)})


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every option of the agent. Names on the command line and in files have dashes."""

    node_name: Annotated[str, _doc("Name of this node in the cluster", "agent")] = ""
    cluster_name: Annotated[str, _doc("Name of the cluster; part of every pod's identity", "identity")] = "default"
    instance: Annotated[str, _doc("Name of this node's maps below bpf-root and of its devices", "datapath")] = "default"
    state_dir: Annotated[str, _doc("Directory of what survives a restart", "agent")] = "/var/lib/ciliate"
    run_dir: Annotated[str, _doc("Directory of sockets and the like", "agent")] = "/run/ciliate"
    socket_path: Annotated[str, _doc("API socket; default RUN-DIR/ciliate.sock", "agent")] = ""
    cni_socket_path: Annotated[str, _doc("CNI socket; default RUN-DIR/cni.sock", "cni")] = ""
    socket_group: Annotated[str, _doc("Group that may use the API socket; empty: root alone", "agent")] = ""
    bpf_root: Annotated[str, _doc("Where the BPF file system is, or is to be mounted", "datapath")] = "/sys/fs/bpf"
    kvstore: Annotated[str, _doc("Key-value store provider", "kvstore")] = "embedded"
    kvstore_opt: Annotated[
        str, _doc("Options of the store: PROVIDER.OPTION=value,… or a JSON object; before those of the file", "kvstore")
    ] = ""
    kvstore_lease_ttl: Annotated[
        float, msgspec.Meta(ge=1), _doc("How long this node's keys outlive its last contact", "kvstore", "duration")
    ] = 900.0
    kvstore_periodic_sync: Annotated[
        float,
        msgspec.Meta(ge=1),
        _doc(
            "Time between comparisons of this node's keys with the store; grows with the cluster", "kvstore", "duration"
        ),
    ] = 300.0
    identity_allocation_mode: Annotated[str, _doc("Identity backend provider", "identity")] = "kvstore"
    ipam: Annotated[str, _doc("Address allocation provider", "ipam")] = "host-scope"
    address_reuse_grace: Annotated[
        float,
        msgspec.Meta(ge=0),
        _doc(
            "How long an address rests once the store knows that its pod is gone; not on a node alone",
            "ipam",
            "duration",
        ),
    ] = 30.0
    datapath_loader: Annotated[str, _doc("Datapath loader provider", "datapath")] = "shared"
    datapath_build: Annotated[
        Literal["auto", "global", "inline"],
        _doc("Build of the programs; auto is global, or inline where the kernel has no BTF or JIT", "datapath"),
    ] = "auto"
    devices: Annotated[
        str, _doc("Devices that lead out of the node, comma-separated; empty: those of default routes", "datapath")
    ] = ""
    masquerade: Annotated[str, _doc("Masquerade provider: bpf, iptables or none", "masquerade")] = "none"
    non_masquerade_cidrs: Annotated[
        str, _doc("Where pods' packets go unmasqueraded, comma-separated; empty: this node's pod ranges", "masquerade")
    ] = ""
    snat_addresses: Annotated[
        str, _doc("Addresses to masquerade with, at most one of each family; empty: each device's own", "masquerade")
    ] = ""
    bpf_snat_max: Annotated[
        int, msgspec.Meta(ge=1024, le=16777216), _doc("Entries of the table of mappings, two a flow", "masquerade")
    ] = 524288
    encryption: Annotated[Literal["none"], _doc("Encryption provider; none is shipped yet", "encryption")] = "none"
    enable_policy: Annotated[
        Literal["default", "always", "never"],
        _doc("Where policy is enforced: on endpoints that a rule selects, on all, on none", "policy"),
    ] = "default"
    allow_localhost: Annotated[
        Literal["auto", "always", "policy"],
        _doc("Whether the node itself may always reach its pods; auto means always", "policy"),
    ] = "auto"
    enable_ipv4: Annotated[bool, _doc("Give pods IPv4 addresses", "ipam, datapath")] = True
    enable_ipv6: Annotated[bool, _doc("Give pods IPv6 addresses", "ipam, datapath")] = True
    ipv4_range: Annotated[IPv4Network, _doc("IPv4 range of this node's pods", "ipam", "CIDR")] = IPv4Network(
        "10.200.0.0/16"
    )
    ipv6_range: Annotated[IPv6Network, _doc("IPv6 range of this node's pods", "ipam", "CIDR")] = IPv6Network(
        "fd00:c11:a7e::/112"
    )
    ipv4_node: Annotated[str, _doc("IPv4 address by which other nodes reach this one; auto finds it", "node")] = "auto"
    ipv6_node: Annotated[str, _doc("IPv6 address by which other nodes reach this one; auto finds it", "node")] = "auto"
    tunnel: Annotated[
        Literal["disabled", "vxlan", "geneve"],
        _doc("How packets reach pods of other nodes: by the network's routes, or encapsulated", "node, datapath"),
    ] = "disabled"
    tunnel_port: Annotated[
        int,
        msgspec.Meta(ge=0, le=65535),
        _doc("UDP port of the tunnel, the same on all nodes; 0: 8472 for vxlan, 6081 for geneve", "node, datapath"),
    ] = 0
    enable_health_checking: Annotated[
        Literal["auto", "true", "false"],
        _doc("Probe other nodes and answer theirs at port 4240; auto: while other nodes are known", "health"),
    ] = "auto"
    auto_direct_node_routes: Annotated[
        bool, _doc("Without a tunnel: route to other nodes' pods, all nodes being on one link", "node, datapath")
    ] = False
    mtu: Annotated[int, msgspec.Meta(ge=0, le=65520), _doc("MTU of pod devices; 0 detects it", "cni", "bytes")] = 0
    conntrack_gc_interval: Annotated[
        float, msgspec.Meta(ge=0), _doc("Time between conntrack collections; 0 is automatic", "datapath", "duration")
    ] = 0.0
    bpf_ct_global_tcp_max: Annotated[
        int, msgspec.Meta(ge=1024, le=16777216), _doc("Entries of the TCP conntrack map", "datapath", "entries")
    ] = 524288
    bpf_ct_global_any_max: Annotated[
        int, msgspec.Meta(ge=1024, le=16777216), _doc("Entries of the other conntrack map", "datapath", "entries")
    ] = 262144
    bpf_lb_services_max: Annotated[
        int, msgspec.Meta(ge=256, le=1048576), _doc("Services that the node can have", "services", "entries")
    ] = 65536
    bpf_lb_backends_max: Annotated[
        int, msgspec.Meta(ge=256, le=4194304), _doc("Backends that the node can have", "services", "entries")
    ] = 262144
    bpf_lb_slots_max: Annotated[
        int,
        msgspec.Meta(ge=256, le=8388608),
        _doc("Backends of all services, each counted for each", "services", "entries"),
    ] = 524288
    bpf_lb_flows_max: Annotated[
        int,
        msgspec.Meta(ge=1024, le=16777216),
        _doc("Flows and sockets whose backend is remembered; the oldest go first", "services", "entries"),
    ] = 131072
    bpf_lb_client_share: Annotated[
        int,
        msgspec.Meta(ge=1, le=100),
        _doc("How many of the node's ports towards other nodes' backends one client outside may have", "services", "%"),
    ] = 25
    enable_socket_lb: Annotated[
        Literal["auto", "true", "false"],
        _doc("Services at sockets; auto: where cgroup-root is given, or the node is the machine itself", "services"),
    ] = "auto"
    cgroup_root: Annotated[
        str, _doc("Directory of cgroup2 with the node's processes; empty: where cgroup2 is mounted", "services")
    ] = ""
    loadbalancer_algorithm: Annotated[
        Literal["random", "maglev"], _doc("How a new flow gets its backend: by its hash, or by tables", "services")
    ] = "random"
    node_port_range: Annotated[
        str,
        _doc("Ports that node ports may get: no mapping and no socket of the node's own choice has one", "services"),
    ] = "30000-32767"
    service_external_ranges: Annotated[
        str, _doc("Where external addresses of services may be, CIDRs separated by commas; empty: nowhere", "services")
    ] = ""
    monitor_aggregation: Annotated[
        Literal["none", "low", "medium", "maximum"], _doc("How many trace events the datapath sends", "datapath")
    ] = "medium"
    datapath_debug: Annotated[
        bool, _doc("Events for each step that a packet takes; built into the programs, nothing without", "datapath")
    ] = False
    labels: Annotated[
        str, _doc("Identity label filter: prefixes, `!` excludes; empty is the default set", "identity")
    ] = ""
    label_prefix_file: Annotated[
        str, _doc("JSON file of identity label prefixes in place of the default set", "identity")
    ] = ""
    fixed_identity_mapping: Annotated[
        str,
        _doc(
            "Identities with numbers 128 to 255: NUMBER=[NAMESPACE/]NAME,… or a JSON object; same everywhere",
            "identity",
        ),
    ] = ""
    k8s_namespace: Annotated[
        str,
        msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"),
        _doc("Namespace of the networking's own pods, which have well-known identities", "identity"),
    ] = "kube-system"
    prometheus_serve_addr: Annotated[
        str, msgspec.Meta(pattern=r"^$|^.*:\d{1,5}$"), _doc("Address:port of /metrics; empty: not served", "agent")
    ] = ""
    debug: Annotated[bool, _doc("Log more", "agent")] = False
    disabled_plugins: Annotated[str, _doc("Plugins not to import, by entry-point name, comma-separated", "plugins")] = (
        ""
    )
    prefer_plugins: Annotated[str, _doc("Distribution to prefer: kind/name=distribution,…", "plugins")] = ""
    no_third_party_plugins: Annotated[bool, _doc("Safe mode: only plugins of this distribution", "plugins")] = False
    identity_change_grace_period: Annotated[
        float, msgspec.Meta(ge=0), _doc("How long an old identity stays after a label change", "identity", "duration")
    ] = 5.0
    identity_gc_interval: Annotated[
        float,
        msgspec.Meta(ge=1),
        _doc("Time between removals of identities that no node uses", "operator", "duration"),
    ] = 900.0
    nodes_gc_interval: Annotated[
        float, msgspec.Meta(ge=1), _doc("Time between looks for what dead nodes left", "operator", "duration")
    ] = 120.0
    operator_api_serve_addr: Annotated[
        str,
        msgspec.Meta(pattern=r"^$|^.*:\d{1,5}$"),
        _doc("Address:port of /healthz and /metrics; empty: none", "operator"),
    ] = "127.0.0.1:9234"
    plugins: Annotated[
        dict[str, dict[str, Any]], _doc("Options of plugins, one section per provider name (file only)", "plugins")
    ] = {}

    def plugin_options(self, name: str, options: type[T]) -> T:
        """The section ``plugins.<name>`` decoded as ``options``; ConfigError names the field that is wrong."""
        section = {**self.plugins.get(name, {}), **store_options(self.kvstore_opt).get(name, {})}
        section = {key.replace("-", "_"): value for key, value in section.items()}
        try:
            return msgspec.convert(section, options, strict=False)
        except msgspec.ValidationError as error:
            # of what is no option nobody knows whether it is a secret whose name was mistyped
            known = getattr(options, "__struct_fields__", ())
            section = {key: value if key in known else HIDDEN for key, value in section.items()}
            raise ConfigError([Problem(f"plugins.{name}", section, str(error))]) from error

    @property
    def pod_ranges(self) -> list[IPv4Network | IPv6Network]:
        """The ranges of this node's pods, of the families that are on."""
        return [self.ipv4_range] * self.enable_ipv4 + [self.ipv6_range] * self.enable_ipv6

    def chosen_providers(self) -> dict[str, str]:
        """The provider that is chosen for each exclusive kind."""
        return {kind: str(getattr(self, field)) for kind, field in PROVIDER_OPTIONS.items()}

    def preferences(self) -> dict[str, str]:
        """``prefer-plugins`` as a mapping from kind/name to distribution."""
        pairs = (item.partition("=") for item in self.prefer_plugins.split(",") if item)
        return {key.strip(): value.strip() for key, _, value in pairs}


def store_options(text: str) -> dict[str, dict[str, Any]]:
    """``kvstore-opt`` as sections by provider. ValueError where it is malformed."""
    if text.lstrip().startswith("{"):
        try:
            pairs = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ValueError(f"expected PROVIDER.OPTION=value,… or a JSON object: {error}") from error
    else:
        parts = [part for part in text.split(",") if part.strip()]
        if any("=" not in part for part in parts):
            raise ValueError("expected PROVIDER.OPTION=value,…")
        pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in pairs.items():
        provider, dot, option = name.partition(".")
        if not dot or not option:
            # a part of a secret with a comma in it would look like this, too
            which = "an option" if any(is_secret(key) for key in pairs) else f"option {name!r}"
            raise ValueError(f"{which}: expected PROVIDER.OPTION, as in etcd.address")
        sections.setdefault(provider, {})[option] = value
    return sections


class Problem(msgspec.Struct, frozen=True):
    """One wrong value: the field, what was given (and where), what was expected."""

    field: str
    value: Any
    expected: str
    origin: str = ""

    def __str__(self) -> str:
        where = f" (from {self.origin})" if self.origin else ""
        return f"{self.field}: {self.value!r} given{where}, {self.expected}"


class ConfigError(Exception):
    """The configuration cannot be used; ``problems`` has every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = [_showable(problem) for problem in problems]
        super().__init__("configuration refused:\n" + "\n".join(f"  {problem}" for problem in self.problems))


def _showable(problem: Problem) -> Problem:
    """Errors end up in logs and in answers: no secret may."""
    return msgspec.structs.replace(problem, value=shown(problem.field, problem.value))


class ConfigResult(msgspec.Struct, frozen=True):
    """The effective configuration, where each field comes from, and warnings."""

    config: AgentConfig
    origins: dict[str, str]
    warnings: list[str]


NODE_ADDRESSES: dict[str, Any] = {"ipv4_node": IPv4Address, "ipv6_node": IPv6Address}
_FIELDS: dict[str, Any] = get_type_hints(AgentConfig, include_extras=True)


def dashed(field: str) -> str:
    """``node_name`` -> ``node-name``."""
    return field.replace("_", "-")


def documentation() -> dict[str, Doc]:
    """Every field's documentation by Python name; a choice is told from its type, so that no value is made up."""
    docs = {}
    for field, hint in _FIELDS.items():
        choices = _choices(hint)
        for item in getattr(hint, "__metadata__", ()):
            if isinstance(item, msgspec.Meta) and item.extra:
                doc: Doc = item.extra["doc"]
                text = f"{doc.text}; one of {', '.join(choices)}" if len(choices) > 1 else doc.text
                docs[field] = msgspec.structs.replace(doc, text=text)
    return docs


def _choices(hint: Any) -> tuple[str, ...]:
    kind = getattr(hint, "__origin__", hint)
    return get_args(kind) if get_origin(kind) is Literal else ()


DURATIONS = frozenset(field for field, doc in documentation().items() if doc.unit == "duration")


def load_config(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    config_dir: Path | None = None,
    config_file: Path | None = None,
) -> ConfigResult:
    """Merge every source. Raises ConfigError with all wrong values at once."""
    problems: list[Problem] = []
    warnings: list[str] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_FIELDS, "default")
    for origin, source in _sources(flags or {}, environ or {}, config_dir, config_file, problems):
        spelt: dict[str, str] = {}
        for key, value in source.items():
            field = key.replace("-", "_")
            if field not in _FIELDS:
                _unknown(key, value, origin, warnings, problems)
            elif field in spelt:
                problems.append(Problem(key, value, f"expected once: {spelt[field]} is the same option", origin))
            else:
                values[field], origins[field], spelt[field] = value, origin, key
    warnings += _misspelt(environ or {})
    decoded = _decode(values, origins, problems)
    if problems:
        raise ConfigError(problems)
    config = _completed(AgentConfig(**decoded))
    problems += [Problem(*item, origins[item[0].replace("-", "_")]) for item in contradictions(config)]
    if problems:
        raise ConfigError(problems)
    return ConfigResult(config, origins, warnings)


def changed(config: AgentConfig, changes: Mapping[str, Any], mutable: Collection[str]) -> AgentConfig:
    """``config`` with some options changed while the agent runs. Raises ConfigError with all wrong ones at once."""
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for key, value in changes.items():
        field = key.replace("-", "_")
        if field not in mutable:
            expected = f"expected one of {', '.join(map(dashed, mutable))}: others need a restart"
            problems.append(Problem(key, value, expected))
        elif field in values:
            problems.append(Problem(key, value, "expected once: it is given with '-' and with '_'"))
        else:
            values[field] = value
    decoded = _decode(values, dict.fromkeys(values, ""), problems)
    if problems:
        raise ConfigError(problems)
    return msgspec.structs.replace(config, **decoded)


def _misspelt(environ: Mapping[str, str]) -> list[str]:
    """Warnings of variables that are nearly those of options; others may well be somebody else's."""
    names = {ENV_PREFIX + field.upper(): field for field in _FIELDS}
    unknown = [key for key in environ if key.startswith(ENV_PREFIX) and key not in names and key not in OTHER_VARIABLES]
    close = ((key, closest(key, names)) for key in unknown)
    return [
        f"variable {key} of the environment is unknown and ignored; did you mean {found}?"
        for key, found in close
        if found
    ]


def _sources(
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    directory: Path | None,
    file: Path | None,
    problems: list[Problem],
) -> list[tuple[str, Mapping[str, Any]]]:
    environment = {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in environ.items()
        if key.startswith(ENV_PREFIX) and key[len(ENV_PREFIX) :].lower() in _FIELDS
    }
    return [
        (f"file {file}", _read_file(file, problems) if file else {}),
        (f"directory {directory}", _read_directory(directory, problems) if directory else {}),
        ("environment", environment),
        ("flag", flags),
    ]


def _read_file(path: Path, problems: list[Problem]) -> Mapping[str, Any]:
    from ciliate import manifest

    try:
        return manifest.mapping(path)
    except manifest.ManifestError as error:
        problems.append(Problem("config", str(path), f"expected a YAML file with options: {error}"))
        return {}


def _read_directory(path: Path, problems: list[Problem]) -> Mapping[str, Any]:
    """One file per option, as a mounted ConfigMap has them; hidden entries are its own machinery."""
    try:
        entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".") and entry.is_file()]
        return {entry.name: entry.read_text().rstrip("\n") for entry in entries}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("config-dir", str(path), f"expected a readable directory: {error}"))
        return {}


def _unknown(key: str, value: Any, origin: str, warnings: list[str], problems: list[Problem]) -> None:
    hint = did_you_mean(key, [dashed(field) for field in _FIELDS])
    if origin == "flag":
        # a flag was typed by a person just now: better to stop than to go on without it
        problems.append(Problem(key, value, f"but there is no such option{hint}", origin))
    else:
        warnings.append(f"option {key!r} from {origin} is unknown and ignored{hint}")


def _decode(values: Mapping[str, Any], origins: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    decoded = {}
    for field, value in values.items():
        try:
            decoded[field] = _convert(field, value)
        except msgspec.ValidationError:
            problems.append(Problem(dashed(field), value, expectation(field), origins[field]))
        except ValueError as error:
            text = str(error)[:1].lower() + str(error)[1:]
            problems.append(Problem(dashed(field), value, text, origins[field]))
    return decoded


def _convert(field: str, value: Any) -> Any:
    hint = _FIELDS[field]
    if field in DURATIONS:
        value = parse_duration(value)
    if field in NODE_ADDRESSES:
        return node_address(value, NODE_ADDRESSES[field])
    if field == "kvstore_opt":
        store_options(str(value))
    if field in _LISTS:
        _LISTS[field](str(value))
    if _is_network(hint):
        return network(hint.__origin__, value)
    if isinstance(value, str) and hint.__origin__ is bool:
        value = boolean(value)
    found = msgspec.convert(value, hint, strict=not isinstance(value, str))
    if isinstance(found, str):
        check_text(field, found)
    return found


def expectation(field: str) -> str:
    """What a value of the field has to be, for people."""
    hint = _FIELDS[field]
    limits: dict[str, Any] = {}
    for item in hint.__metadata__:
        limits.update({name: getattr(item, name) for name in ("ge", "le") if getattr(item, name, None) is not None})
    kind = hint.__origin__
    if choices := _choices(hint):
        return f"expected one of {', '.join(choices)}"
    if field in SHAPES:
        return f"expected {SHAPES[field]}"
    words = {bool: "true or false", int: "a whole number", float: "a duration like 5s or 1m30s", str: "text"}
    bounds = "".join(f" {word} {limits[name]}" for name, word in (("ge", "from"), ("le", "to")) if name in limits)
    return f"expected {words.get(kind, 'a mapping of options')}{bounds}"


_LISTS: dict[str, Callable[[str], object]] = {
    "non_masquerade_cidrs": networks,
    "snat_addresses": addresses,
    "fixed_identity_mapping": parse_mapping,
    "node_port_range": node_ports,
    "labels": prefix_rules,
    "label_prefix_file": read_prefixes,
}


def _is_network(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) in (IPv4Network, IPv6Network)


def _completed(config: AgentConfig) -> AgentConfig:
    """Fill in what depends on the machine or on other fields."""
    return msgspec.structs.replace(
        config,
        node_name=config.node_name or socket.gethostname(),
        socket_path=config.socket_path or os.path.join(config.run_dir, "ciliate.sock"),  # noqa: PTH118
        cni_socket_path=config.cni_socket_path or os.path.join(config.run_dir, "cni.sock"),  # noqa: PTH118
    )
