"""Which build a kernel gets, and that every build verifies with every combination of constants. Tier bpf."""

from __future__ import annotations

import itertools
import json
import os
from ipaddress import ip_address
from pathlib import Path

import pytest
from bpf_harness import POD, ROUTER4, ROUTER6, ep_config
from click.testing import CliRunner

from ciliate.cli.bpf import command
from ciliate.datapath import kernel
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.libbpf import BpfObject, constants, read
from ciliate_loader.template_loader import DEFINES as TEMPLATE

EVERYTHING = {feature.name: True for feature in kernel.FEATURES}
FUNCTIONS = ["global", "inline"]
SWITCHES = list(itertools.product([False, True], repeat=3))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("builds"))


def defines_of(functions: str) -> tuple[str, ...]:
    if functions == "global" and kernel.select().name != "global":
        pytest.skip(f"build global: {kernel.select().reason}")
    return kernel.select(functions).defines


@pytest.mark.parametrize(("ipv4", "ipv6", "router"), SWITCHES)
@pytest.mark.parametrize("functions", FUNCTIONS)
def test_every_combination_of_constants_verifies(
    compiler: Compiler, build: str, functions: str, ipv4: bool, ipv6: bool, router: bool
) -> None:
    template = TEMPLATE if build == "template" else ()
    elf = read(compiler.compile("endpoint", (*defines_of(functions), *template)))
    own = {"own_endpoint": ep_config(POD)} if template else {"test_endpoint": bytes(4)}
    values = {"enable_ipv4": bytes([ipv4]), "enable_ipv6": bytes([ipv6])}
    if router:
        values |= {"router_ipv4": ip_address(ROUTER4).packed, "router_ipv6": ip_address(ROUTER6).packed}
    loaded = BpfObject(elf, "endpoint")
    try:
        loaded.set_constants(constants(elf), {**own, **values})
        for name in ("ciliate_ct_tcp", "ciliate_ct_any"):
            loaded.set_max_entries(name, 4096)
        if functions == "inline":
            loaded.demand_alignment()  # as in User-mode Linux
        loaded.load()
        assert loaded.program_fd("from_container") > 0
        assert loaded.program_fd("to_container") > 0
    finally:
        loaded.close()


@pytest.mark.parametrize("functions", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("netdev", ("CILIATE_MASQUERADE", "CILIATE_SERVICES")),
        ("host", ("CILIATE_SERVICES",)),
        ("overlay", ("CILIATE_SERVICES",)),
    ],
)
def test_the_nodes_own_programs_verify_with_their_features(
    compiler: Compiler, functions: str, features: tuple[str, ...], name: str
) -> None:
    elf = read(compiler.compile(name, (*defines_of(functions), *features)))
    loaded = BpfObject(elf, name)
    try:
        values = {"tunnel_ifindex": (1).to_bytes(4, "little"), "lb_client_share": (7000).to_bytes(4, "little")}
        known = constants(elf)
        loaded.set_constants(known, {key: value for key, value in values.items() if key in known})
        if functions == "inline":
            loaded.demand_alignment()
        loaded.load()
    finally:
        loaded.close()


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_the_dispatchers_verify(compiler: Compiler, functions: str) -> None:
    loaded = BpfObject(read(compiler.compile("dispatch", defines_of(functions))), "dispatch")
    try:
        loaded.load()
    finally:
        loaded.close()


def test_each_build_is_another_object(compiler: Compiler) -> None:
    assert compiler.digest("endpoint", kernel.COMPAT) != compiler.digest("endpoint")


@pytest.mark.parametrize(
    ("wanted", "lacking", "name", "reason"),
    [
        ("auto", [], "global", "the kernel has global functions, bpf_loop and a JIT"),
        ("global", [], "global", "asked for"),
        ("inline", [], "inline", "asked for"),
        ("auto", ["JIT"], "inline", "the kernel has no JIT"),
        ("auto", ["global functions"], "inline", "the kernel has no global functions"),
        ("auto", ["bpf_loop"], "inline", "the kernel has no bpf_loop"),
        ("auto", ["global functions", "JIT"], "inline", "the kernel has no global functions and no JIT"),
        ("inline", ["JIT"], "inline", "asked for"),
        ("auto", ["kernel BTF", "tcx links"], "global", "the kernel has global functions, bpf_loop and a JIT"),
    ],
)
def test_choice_of_a_build(wanted: str, lacking: list[str], name: str, reason: str) -> None:
    build = kernel.choose(wanted, EVERYTHING | dict.fromkeys(lacking, False))
    assert (build.name, build.reason) == (name, reason)
    assert build.defines == (kernel.COMPAT if name == "inline" else ())


def test_a_build_that_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(DatapathError, match=r"datapath-build global: kernel .* has no JIT; auto or inline will do"):
        kernel.choose("global", EVERYTHING | {"JIT": False})
    with pytest.raises(DatapathError, match="datapath-build fast: expected one of auto, global, inline"):
        kernel.select("fast")


def test_what_a_kernel_lacks_is_told_with_the_first_linux_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EVERYTHING | {"ring buffers": False, "bpf_redirect_peer": False, "tcx links": False}
    monkeypatch.setattr(kernel, "probed", lambda: found)
    with pytest.raises(DatapathError) as error:
        kernel.select()
    assert error.value.strerror == (
        f"kernel {os.uname().release} lacks ring buffers (Linux 5.8), bpf_redirect_peer (Linux 5.10); "
        "the datapath needs Linux 5.13 or newer"
    )


@pytest.mark.parametrize(("lacking", "status", "build"), [([], 0, "global"), (["ring buffers"], 1, None)])
def test_features_are_listed(
    monkeypatch: pytest.MonkeyPatch, lacking: list[str], status: int, build: str | None
) -> None:
    monkeypatch.setattr(kernel, "probed", lambda: EVERYTHING | dict.fromkeys(lacking, False))
    done = CliRunner().invoke(command, ["features", "-o", "json"])
    assert done.exit_code == status
    shown = json.loads(done.output)
    assert (shown["build"], shown["minimum"]) == (build, "5.13")
    assert [item["feature"] for item in shown["features"] if not item["available"]] == lacking
    assert "the datapath needs Linux 5.13" in CliRunner().invoke(command, ["features"]).output


def test_probes_leave_nothing_behind() -> None:
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    for feature in kernel.FEATURES:
        feature.probe()
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    assert not Path("/sys/class/net/probe0").exists()


def test_a_helper_that_no_kernel_has_is_not_found() -> None:
    assert not kernel.probe.has_helper(9999)
    assert not kernel.probe.has_map(9999, 4, 4, 1)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("program", ["netdev", "host", "overlay"])
def test_every_combination_of_features_compiles(
    compiler: Compiler, program: str, switches: tuple[bool, bool, bool]
) -> None:
    names = ("CILIATE_GENEVE", "CILIATE_MASQUERADE", "CILIATE_SERVICES")
    chosen = tuple(name for name, on in zip(names, switches, strict=True) if on)
    assert compiler.compile(program, (*defines_of("global"), *chosen)).stat().st_size
