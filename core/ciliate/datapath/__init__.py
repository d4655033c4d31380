"""The datapath: from intent to the kernel. The only room with bpf(2), libbpf and netlink."""

from ciliate.datapath.errors import DatapathError
from ciliate.datapath.model import DatapathConfig, EndpointConfig, PolicyChange, Present
from ciliate.datapath.node import Datapath
from ciliate.datapath.policymap import PolicyTooLargeError
from ciliate.policy.mapstate import MAX_ENTRIES

__all__ = [
    "MAX_ENTRIES",
    "Datapath",
    "DatapathConfig",
    "DatapathError",
    "EndpointConfig",
    "PolicyChange",
    "PolicyTooLargeError",
    "Present",
]
