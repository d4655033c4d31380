"""Features of plugins: C at the hooks of the programs, with maps of their own. Tier bpf."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from bpf_harness import NODE_MAC, PEER4, POD4, POD_MAC, Programs
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from ciliate.datapath import kernel
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.feature import HOOKS, feature_defines
from ciliate.datapath.libbpf import BpfObject, read
from ciliate_loader.template_loader import DEFINES as TEMPLATE

HEADER = """
MAP(lucky_count, BPF_MAP_TYPE_ARRAY, 1, __u32, __u64, 0);

/* Drops what goes to UDP port 13 and counts everything else. */
static always_inline int lucky_egress(struct __sk_buff *skb, struct pkt *pkt)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&lucky_count, &zero);

	if (pkt->proto == IPPROTO_UDP && pkt->tuple.dport == bpf_htons(13))
		return 213;
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}
"""


class Lucky(NamedTuple):
    """The feature."""

    header: Path
    name: str = "lucky"
    hooks: tuple[str, ...] = ("egress",)


@pytest.fixture
def lucky(tmp_path: Path) -> Lucky:
    header = tmp_path / "lucky.h"
    header.write_text(HEADER)
    return Lucky(header)


def test_a_feature_drops_and_counts(lucky: Lucky, tmp_path: Path) -> None:
    defines = feature_defines([lucky], tmp_path / "cache")
    programs = Programs(tmp_path / "cache", "shared", defines=defines)
    try:
        programs.endpoint(10)
        programs.endpoint(11)
        frames = [Ether(src=POD_MAC, dst=NODE_MAC) / IP(src=POD4, dst=PEER4) / UDP(dport=port) for port in (13, 14, 15)]
        assert [programs.why(frame) for frame in frames] == [213, 0, 0]
        assert "lucky_count" in programs.object.maps
    finally:
        programs.close()


def test_every_hook_verifies_in_every_build(tmp_path: Path) -> None:
    functions = "".join(
        f"static always_inline int all_{hook}(struct __sk_buff *skb, struct pkt *pkt)\n"
        "{\n\treturn pkt->ttl == 77 ? 200 : 0;\n}\n"
        for hook in HOOKS
    )
    header = tmp_path / "all.h"
    header.write_text(functions)
    defines = feature_defines([Lucky(header, "all", HOOKS)], tmp_path)
    for build, extra in itertools.product((kernel.select().defines, kernel.COMPAT), ((), TEMPLATE)):
        loaded = BpfObject(read(Compiler(tmp_path).compile("endpoint", (*build, *defines, *extra))), "endpoint")
        loaded.load()
        loaded.close()


def test_no_feature_leaves_nothing_behind(lucky: Lucky, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    assert feature_defines([], tmp_path) == ()
    with_it = compiler.digest("endpoint", feature_defines([lucky], tmp_path))
    lucky.header.write_text(HEADER.replace("13", "17"))
    changed = compiler.digest("endpoint", feature_defines([lucky], tmp_path))
    assert len({compiler.digest("endpoint"), with_it, changed}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Lucky!"}, "feature 'Lucky!': expected a name"),
        ({"hooks": ("sideways",)}, "feature lucky: sideways given, expected hooks of egress, ingress, leave"),
        ({"hooks": ()}, "feature lucky: no hook given"),
        ({"header": Path("/nowhere.h")}, "feature lucky: header /nowhere.h is not there"),
    ],
)
def test_a_wrong_feature_is_told(lucky: Lucky, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(DatapathError, match=message):
        feature_defines([lucky._replace(**change)], tmp_path)


def test_a_feature_that_does_not_compile_names_its_header(lucky: Lucky, tmp_path: Path) -> None:
    lucky.header.write_text(
        "static always_inline int lucky_egress(struct __sk_buff *skb, struct pkt *pkt) { return x; }"
    )
    with pytest.raises(DatapathError, match=r"lucky\.h:1:.*undeclared identifier 'x'"):
        Compiler(tmp_path).compile("endpoint", feature_defines([lucky], tmp_path))


@pytest.mark.parametrize("loader", ["shared", "template"])
def test_the_example_joins_two_namespaces(loader: str) -> None:
    example = Path(__file__).parents[2] / "examples" / "two-namespaces.py"
    done = subprocess.run([sys.executable, example, loader], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok  ") == 10
    assert "drop Policy denied ingress endpoint 1 identity 3002 -> 3001" in done.stdout
    assert "policy-verdict allow ingress endpoint 1 identity 3002 -> 3001" in done.stdout
