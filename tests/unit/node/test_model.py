"""A node's document in the store."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec
import pytest

from ciliate.node.model import Node, decode, encode

NODE = Node(
    name="n1",
    cluster="c1",
    ipv4=IPv4Address("192.0.2.1"),
    ipv6=IPv6Address("2001:db8::1"),
    router4=IPv4Address("10.1.0.1"),
    pods4=IPv4Network("10.1.0.0/24"),
    pods6=IPv6Network("fd00:1::/112"),
    health4=IPv4Address("10.1.0.2"),
    key=3,
)


def test_a_node_comes_back_as_it_went() -> None:
    assert decode(encode(NODE)) == NODE
    assert decode(encode(Node(name="bare"))) == Node(name="bare")


def test_the_document_has_the_documented_members() -> None:
    document = msgspec.json.decode(encode(NODE))
    assert document == {
        "Name": "n1",
        "Cluster": "c1",
        "IPAddresses": [
            {"Type": "InternalIP", "IP": "192.0.2.1"},
            {"Type": "InternalIP", "IP": "2001:db8::1"},
            {"Type": "RouterIP", "IP": "10.1.0.1"},
        ],
        "IPv4AllocCIDR": "10.1.0.0/24",
        "IPv6AllocCIDR": "fd00:1::/112",
        "IPv4HealthIP": "10.1.0.2",
        "Source": "kvstore",
        "EncryptionKey": 3,
    }


@pytest.mark.parametrize(
    "value", [b"", b"[]", b'{"Name": "x"}', b'{"Name": "x", "Cluster": "c", "IPv4AllocCIDR": "10.0.0.1/24"}']
)
def test_malformed_documents_are_refused(value: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        decode(value)
