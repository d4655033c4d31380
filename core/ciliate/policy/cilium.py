"""CiliumNetworkPolicy (and bare rules) into the rule model: inventory 3.1, 3.2, 3.3 and PO-K06.

Where the seed system refused something only because it could not do it (CIDR with ports on ingress, named ports,
SCTP, ICMP, ranges) it is accepted here; `docs/policy.md` lists each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

from ciliate.labels import CLUSTER as CLUSTER_LABEL
from ciliate.labels import NAMESPACE, NAMESPACE_LABELS_PREFIX, SOURCE_ANY, SOURCE_GENERATED, SOURCE_K8S, SOURCE_RESERVED
from ciliate.policy import ports
from ciliate.policy.bounds import joined_peers, joined_ports
from ciliate.policy.l7 import conflicting, dns_rule, l7_rules
from ciliate.policy.l7rules import L7Rules
from ciliate.policy.model import TCP, CidrPeer, FqdnPeer, Network, Peer, PortItem, Rule, Section, ServicePeer, Special
from ciliate.policy.reader import ABSENT, Reader
from ciliate.policy.selector import EXISTS, Requirement, Selector, equals, reserved

RULE_FIELDS = ("endpointSelector", "ingress", "egress", "labels", "description")
INGRESS_FIELDS = ("fromEndpoints", "fromRequires", "toPorts", "fromCIDR", "fromCIDRSet", "fromEntities")
EGRESS_FIELDS = (
    *("toEndpoints", "toRequires", "toPorts", "toCIDR", "toCIDRSet"),
    *("toEntities", "toServices", "toFQDNs", "toGroups"),
)
PREFIX_FIELDS = ("fromCIDR", "fromCIDRSet", "toCIDR", "toCIDRSet", "toServices", "toFQDNs")
GROUP_FIELDS = ("labels", "securityGroupsIds", "securityGroupsNames", "region")
ENTITIES = ("all", "world", "cluster", "host", "init", "none")
POD_SOURCES = (SOURCE_ANY, SOURCE_K8S)


class CiliumParser:
    """Reads the rules of one object. ``namespace`` is empty for rules that belong to no namespace.

    ``bare`` rules are no objects of Kubernetes: their selectors of peers mean everything that they match.
    """

    def __init__(
        self, reader: Reader, namespace: str, cluster: str, policy_cluster: str = "", bare: bool = False
    ) -> None:
        self.reader = reader
        self.bare = bare
        self.namespace = namespace
        self.cluster = cluster
        self.policy_cluster = policy_cluster

    def rules(self, obj: dict[str, Any]) -> list[Rule]:
        """Every rule of ``spec`` and ``specs``; mistakes go to the reader. An object may have lost all its rules."""
        found = []
        if obj.get("spec") is not None:
            found.append(self._rule(obj["spec"], "spec"))
        found.extend(self._rule(item, path) for item, path in self.reader.items(obj.get("specs"), "specs"))
        return [rule for rule in found if rule is not None]

    def _rule(self, value: Any, path: str) -> Rule | None:
        fields = self.reader.mapping(value, path, RULE_FIELDS)
        if fields is None:
            return None
        if (description := fields.get("description")) is not None:
            self.reader.text(description, f"{path}.description")
        self._labels(fields.get("labels"), f"{path}.labels")
        subject = self._subject(fields.get("endpointSelector"), f"{path}.endpointSelector")
        init = subject is not None and subject.names(SOURCE_RESERVED, "init")
        ingress = self._sections(fields.get("ingress"), f"{path}.ingress", self._ingress, init)
        egress = self._sections(fields.get("egress"), f"{path}.egress", self._egress, init)
        if subject is None:
            return None
        return Rule(subject, ingress, egress)

    def _labels(self, value: Any, path: str) -> None:
        for item, below in self.reader.items(value, path):
            if isinstance(item, str) and item:
                if item.startswith(SOURCE_GENERATED + ":"):
                    self._generated(item, below)
                continue
            fields = self.reader.mapping(item, below, ("key", "value", "source"))
            if fields is None:
                continue
            key = self.reader.text(fields.get("key", ABSENT), f"{below}.key", "a label key")
            if key == "":
                self.reader.problem(f"{below}.key", key, "expected a label key")
            for name in ("value", "source"):
                if fields.get(name) is not None:
                    self.reader.text(fields[name], f"{below}.{name}")
            if fields.get("source") == SOURCE_GENERATED:
                self._generated(fields["source"], f"{below}.source")

    def _generated(self, value: str, path: str) -> None:
        self.reader.problem(path, value, "the source cilium-generated is the system's own, expected another")

    def _subject(self, value: Any, path: str) -> Selector | None:
        if value is None:
            self.reader.problem(path, ABSENT, "expected a selector ({} selects every endpoint)")
            return None
        found = self.reader.selector(value, path)
        if found is None:
            return None
        found = found.without_all()
        if self.policy_cluster:
            found = found.extended(equals(SOURCE_K8S, CLUSTER_LABEL, self.policy_cluster))
        if self.namespace and not found.names(SOURCE_RESERVED, "init"):
            # pinned last and always: no policy reaches into another namespace (GO-2023-2080)
            found = found.extended(equals(SOURCE_K8S, NAMESPACE, self.namespace))
        self.reader.selectors.append((path, found))
        return found

    def _sections(
        self, value: Any, path: str, read: Callable[[dict[str, Any], str, bool], Section], init: bool
    ) -> tuple[Section, ...] | None:
        found = []
        given = False
        fields = INGRESS_FIELDS if read == self._ingress else EGRESS_FIELDS
        for item, below in self.reader.items(value, path):
            given = True
            mapping = self.reader.mapping(item, below, fields)
            if mapping is not None:
                found.append(read(mapping, below, init))
        # an empty list is as good as none: it does not switch enforcement on
        return tuple(found) or (() if given else None)

    def _ingress(self, fields: dict[str, Any], path: str, init: bool) -> Section:
        return self._section(fields, path, INGRESS_PEERS, "fromRequires", init)

    def _egress(self, fields: dict[str, Any], path: str, init: bool) -> Section:
        return self._section(fields, path, EGRESS_PEERS, "toRequires", init)

    def _section(
        self,
        fields: dict[str, Any],
        path: str,
        members: dict[str, PeerReader],
        requires_name: str,
        init: bool,
    ) -> Section:
        given = [name for name in members if fields.get(name)]
        if len(given) > 1:
            self.reader.problem(path, ABSENT, f"combining {' and '.join(given)} is not supported, expected one of them")
        found: list[Peer] = []
        for name in fields:
            read = members.get(name)
            if read is not None and fields[name] is not None:
                found.extend(read(self, fields[name], f"{path}.{name}", init))
        requires: tuple[Selector, ...] = ()
        if requires_name in fields:
            requires = tuple(self._selectors(fields[requires_name], f"{path}.{requires_name}", init))
        items = self._to_ports(fields.get("toPorts"), f"{path}.toPorts")
        prefixes = bool(given) and given[0] in PREFIX_FIELDS
        return Section(path, _peers(found, bool(given), items is not None), items, requires, prefixes)

    def _selectors(self, value: Any, path: str, init: bool) -> Iterator[Selector]:
        for item, below in self.reader.items(value, path):
            found = self.reader.selector(item, below)
            if found is None:
                yield _NOBODY
                continue
            meant = self._peers_of(found, init)
            self.reader.selectors.append((below, meant))
            yield meant

    def _peers_of(self, found: Selector, init: bool) -> Selector:
        """Whom a selector of peers means in an object of Kubernetes: managed endpoints of the policy's namespace.

        It goes beyond the namespace where it says where it looks (PO-K06), and beyond managed endpoints only where it
        asks for a reserved label: what merely rules something out must not admit host and world.
        """
        if self.bare or found.names(SOURCE_RESERVED):
            return found.without_all()
        found = found.without_all()
        said = [item for item in found.requirements if _of_namespaces(item)]
        if self.namespace and not init and not said and not any(map(_of_reserved, found.requirements)):
            return found.extended(equals(SOURCE_K8S, NAMESPACE, self.namespace))
        # pods alone have a namespace
        return found if any(item.asks for item in said) else found.extended(_MANAGED)

    def _endpoints(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for found in self._selectors(value, path, init):
            yield found if found.requirements else Special.ANYTHING

    def _cidrs(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            found = cidr(self.reader, item, below)
            if found is not None:
                yield CidrPeer(found)

    def _cidr_sets(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            found = cidr_block(self.reader, item, below, pods=False)
            if found is not None:
                yield found

    def _entities(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            if item in ENTITIES:
                yield from entity_peers(item, self.cluster)
            else:
                self.reader.problem(below, item, f"expected one of {', '.join(ENTITIES)}")

    def _services(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            fields = self.reader.mapping(item, below, ("k8sService", "k8sServiceSelector"))
            if fields is None:
                continue
            given = [name for name in ("k8sService", "k8sServiceSelector") if fields.get(name) is not None]
            if len(given) != 1:
                self.reader.problem(below, ABSENT, "expected one of k8sService and k8sServiceSelector")
                continue
            peer = self._service(fields[given[0]], f"{below}.{given[0]}", given[0] == "k8sService")
            if peer is not None:
                yield peer

    def _service(self, value: Any, path: str, named: bool) -> ServicePeer | None:
        fields = self.reader.mapping(value, path, ("serviceName", "namespace") if named else ("selector", "namespace"))
        if fields is None:
            return None
        namespace = fields.get("namespace") or self.namespace
        if self.reader.text(namespace, f"{path}.namespace", "a namespace") is None:
            return None
        if not named:
            labels = self.reader.selector(fields.get("selector", ABSENT), f"{path}.selector")
            return ServicePeer(namespace, "", labels.without_all()) if labels is not None else None
        name = self.reader.text(fields.get("serviceName", ABSENT), f"{path}.serviceName", "the name of a service")
        if name == "":
            self.reader.problem(f"{path}.serviceName", name, "expected the name of a service")
        return ServicePeer(namespace, name) if name else None

    def _fqdns(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            found = dns_rule(self.reader, item, below)
            if found is not None:
                yield FqdnPeer(found.pattern, found.exact)

    def _groups(self, value: Any, path: str, init: bool) -> Iterator[Peer]:
        for item, below in self.reader.items(value, path):
            fields = self.reader.mapping(item, below, ("aws",))
            if fields is None:
                continue
            group = self.reader.mapping(fields.get("aws", ABSENT), f"{below}.aws", GROUP_FIELDS)
            if group is None:
                continue
            if not any(group.get(name) for name in ("labels", "securityGroupsIds", "securityGroupsNames")):
                expected = "expected labels, securityGroupsIds or securityGroupsNames"
                self.reader.problem(f"{below}.aws", group, expected)
            self._group_fields(group, f"{below}.aws")
            self.reader.notes.append((below, "nothing resolves groups here: the peer allows nothing"))
            # nothing resolves groups yet, and a group that resolves to nothing allows nothing (GO-2025-4167)
            yield Special.NOTHING

    def _group_fields(self, group: dict[str, Any], path: str) -> None:
        if (labels := group.get("labels")) is not None:
            for key, item in (self.reader.mapping(labels, f"{path}.labels") or {}).items():
                self.reader.text(item, f"{path}.labels.{key}")
        for name in ("securityGroupsIds", "securityGroupsNames"):
            for item, below in self.reader.items(group.get(name), f"{path}.{name}"):
                self.reader.text(item, below)
        if group.get("region") is not None:
            self.reader.text(group["region"], f"{path}.region")

    def _to_ports(self, value: Any, path: str) -> tuple[PortItem, ...] | None:
        found: list[PortItem] = []
        given = False
        for item, below in self.reader.items(value, path):
            given = True
            fields = self.reader.mapping(item, below, ("ports", "rules"))
            if fields is None:
                continue
            l7 = l7_rules(self.reader, fields.get("rules"), f"{below}.rules")
            items = list(self.reader.items(fields.get("ports"), f"{below}.ports"))
            if not items:
                self.reader.notes.append((f"{below}.ports", "no port is given: the item allows nothing"))
            if len(items) > ports.MAX_PORTS:
                expected = f"{len(items)} ports given, expected at most {ports.MAX_PORTS}"
                self.reader.problem(f"{below}.ports", ABSENT, expected)
            if l7 is not None and not items:
                ports_expected = 'port "53"' if l7.parser == "dns" else "ports"
                self.reader.problem(f"{below}.rules", ABSENT, f"expected {ports_expected} beside rules of {l7.parser}")
            for port, port_path in items:
                found.extend(self._port(port, port_path, l7))
        if (conflict := conflicting(found)) is not None:
            expected = f"rules of {conflict[0]} and {conflict[1]} given for one port, expected one parser for each"
            self.reader.problem(path, ABSENT, expected)
        return joined_ports(found) if given else None

    def _port(self, value: Any, path: str, l7: L7Rules | None) -> list[PortItem]:
        found = list(ports.cilium_port(self.reader, value, path, l7))
        if l7 is None or not found:
            return found
        if l7.parser == "dns":
            if any(item.first != 53 or item.last != 53 for item in found):
                self.reader.problem(f"{path}.port", value.get("port"), 'expected "53" beside DNS rules')
            if any(item.protocol not in (6, 17) for item in found):
                given = value.get("protocol")
                self.reader.problem(f"{path}.protocol", given, "expected TCP, UDP or ANY beside DNS rules")
        elif any(item.protocol != TCP for item in found):
            given = value.get("protocol", "ANY")
            self.reader.problem(f"{path}.protocol", given, f"expected TCP beside {l7.parser} rules")
        return found


_NOBODY = reserved("none")
"""What a selector that cannot be read stands for: of requirements it must not be left out."""
_MANAGED = Requirement(SOURCE_K8S, NAMESPACE, EXISTS)


def _of_namespaces(item: Requirement) -> bool:
    return item.source in POD_SOURCES and (item.key == NAMESPACE or item.key.startswith(NAMESPACE_LABELS_PREFIX))


def _of_reserved(item: Requirement) -> bool:
    return item.source == SOURCE_RESERVED


PeerReader = Callable[[CiliumParser, Any, str, bool], Iterator[Peer]]
INGRESS_PEERS: dict[str, PeerReader] = {
    "fromEndpoints": CiliumParser._endpoints,
    "fromCIDR": CiliumParser._cidrs,
    "fromCIDRSet": CiliumParser._cidr_sets,
    "fromEntities": CiliumParser._entities,
}
EGRESS_PEERS: dict[str, PeerReader] = {
    "toEndpoints": CiliumParser._endpoints,
    "toCIDR": CiliumParser._cidrs,
    "toCIDRSet": CiliumParser._cidr_sets,
    "toEntities": CiliumParser._entities,
    "toServices": CiliumParser._services,
    "toFQDNs": CiliumParser._fqdns,
    "toGroups": CiliumParser._groups,
}


def _peers(found: list[Peer], given: bool, with_ports: bool) -> tuple[Peer, ...] | None:
    """An empty peer list means anyone where ports are given, and no one otherwise (PO-R02)."""
    if not given:
        return None if with_ports else ()
    if Special.ANYTHING in found:
        return None
    return joined_peers(found)


def cidr(reader: Reader, value: Any, path: str) -> Network | None:
    """A CIDR; a bare address stands for itself. Bits behind the prefix are cleared."""
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        if "/" not in value:
            return ip_network(ip_address(value))
        _plain_length(value)
        return ip_network(value, strict=False)
    except ValueError:
        reader.problem(path, value, "expected a CIDR such as 192.0.2.0/24 or 2001:db8::/32")
        return None


def _plain_length(text: str) -> None:
    length = text.rpartition("/")[2]
    if not (length.isascii() and length.isdigit()):
        raise ValueError(text)


def cidr_block(reader: Reader, value: Any, path: str, pods: bool) -> CidrPeer | None:
    """``{cidr, except}``; every exception must lie inside."""
    fields = reader.mapping(value, path, ("cidr", "except"))
    if fields is None:
        return None
    base = _prefix(reader, fields.get("cidr", ABSENT), f"{path}.cidr")
    excluded = []
    good = base is not None
    for item, below in reader.items(fields.get("except"), f"{path}.except"):
        found = _prefix(reader, item, below)
        if found is None:
            good = False
        elif base is not None and (not _inside(found, base) or (pods and found == base)):
            reader.problem(below, item, f"expected a {'smaller ' if pods else ''}CIDR inside {base}")
            good = False
        else:
            excluded.append(found)
    if base is None or not good:
        return None
    return CidrPeer(base, tuple(sorted(set(excluded), key=str)), pods)


def _prefix(reader: Reader, value: Any, path: str) -> Network | None:
    """A CIDR that says its prefix length, as blocks and their exceptions must."""
    found = cidr(reader, value, path)
    if found is not None and "/" not in value:
        reader.problem(path, value, "expected a CIDR with its prefix length")
        return None
    return found


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def entity_peers(name: str, cluster: str) -> list[Peer]:
    """What an entity stands for (PO-S10)."""
    if name == "all":
        return [Special.ANYTHING]
    if name == "none":
        return [Special.NOTHING]
    if name == "cluster":
        inside = Selector((equals(SOURCE_K8S, CLUSTER_LABEL, cluster),))
        return [reserved("host"), reserved("init"), reserved("unmanaged"), inside]
    return [reserved(name)]
