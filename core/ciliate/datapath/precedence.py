"""What others put before our programs on an endpoint's device: whoever comes first may let pass what policy denies.

Nothing of it is removed, as it is somebody's intent; but nobody should have to find out by himself. Blocking.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ciliate.datapath import bpf
from ciliate.datapath.devices import PRIORITY

if TYPE_CHECKING:
    from ciliate.datapath.model import EndpointConfig

_QUERY, _COUNT = 16, 24
_TCX = {False: 46, True: 47}


def strangers(config: EndpointConfig, egress: bool, filters: Iterable[Any]) -> Iterator[str]:
    """In words, what comes before our filter among ``filters`` (as the kernel lists them), and programs of TCX."""
    where = f"at {'egress' if egress else 'ingress'} of {config.ifname}"
    count = _tcx_programs(config.ifindex, egress)
    if count:
        yield f"{count} TCX program{'s' * (count > 1)} {where}"
    found = dict[str, None]()
    for message in filters:
        priority, kind = message["info"] >> 16, message.get("TCA_KIND")
        if priority >= PRIORITY and class_of(message) in (config.id, None):
            break
        found[f"a {kind} filter of priority {priority} {where}"] = None
    yield from found


def class_of(message: Any) -> int | None:
    """The class id of a filter; None where the message is of no filter, but of what holds those of one priority."""
    options = message.get("TCA_OPTIONS")
    return int(options.get("TCA_BPF_CLASSID") or 0) if options is not None else None


def _tcx_programs(index: int, egress: bool) -> int:
    """How many programs are attached where they run before every filter; 0 before Linux 6.6, which has none."""
    attribute = bytearray(struct.pack("=II56x", index, _TCX[egress]))
    try:
        bpf.call(_QUERY, attribute)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOENT):
            return 0
        raise
    return int(struct.unpack_from("=I", attribute, _COUNT)[0])
