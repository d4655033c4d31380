"""Drop reasons and other names of the datapath, read from the C header that defines them."""

from __future__ import annotations

import functools
import re

from ciliate.datapath.compiler import source_directory

_LINE = re.compile(r"^#define\s+\w+\s+(\d+)\s+/\*\s*(.*?)\s*\*/", re.MULTILINE)
CT_STATES = ("new", "established", "reply", "related")
DIRECTIONS = ("ingress", "egress")
OBSERVATIONS = {
    0: "to-endpoint",
    1: "to-proxy",
    2: "to-host",
    3: "to-stack",
    4: "to-overlay",
    5: "from-endpoint",
    7: "from-host",
    8: "from-stack",
    9: "from-overlay",
}
DEBUG_STEPS = {1: "flow looked up", 2: "policy asked", 3: "flow recorded", 4: "flow ended"}
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}


@functools.cache
def drop_reasons() -> dict[int, str]:
    """Number -> text of every reason; 0 stands for packets that were forwarded."""
    text = (source_directory() / "lib" / "drop.h").read_text()
    return {int(number): words for number, words in _LINE.findall(text)}


def reason_text(number: int) -> str:
    """The text of a reason, or its number where it is unknown."""
    return drop_reasons().get(number, f"reason {number}")


def protocol_name(number: int) -> str:
    """``TCP`` for 6 and so on; the number itself for others."""
    return PROTOCOLS.get(number, str(number))
