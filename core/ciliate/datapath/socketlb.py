"""Programs of the cgroup: services at the sockets of the node's processes (`sock.c`).

Each hook has a link that is pinned beside the maps: it survives the agent, and a new agent puts its own program into it
in one step. Blocking; runs in the datapath's thread.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from ciliate.datapath import bpf
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.libbpf import BpfObject, read
from ciliate.datapath.loader import LoadPlan, load_object
from ciliate.datapath.pins import PinDirectory

log = logging.getLogger(__name__)
HOOKS = {
    "sock_connect4": 10,
    "sock_connect6": 11,
    "sock_sendmsg4": 14,
    "sock_sendmsg6": 15,
    "sock_recvmsg4": 19,
    "sock_recvmsg6": 20,
    "sock_getpeername4": 29,
    "sock_getpeername6": 30,
}
"""Program -> where it is attached (enum bpf_attach_type)."""
_LINK_CREATE, _LINK_UPDATE = 28, 29
_ALLOW_MULTI = 2
_SO_NETNS_COOKIE = 71


def cgroup2_mount(mounts: str | None = None) -> Path | None:
    """Where the unified hierarchy is mounted; None where it is not. ``mounts`` in the format of /proc/self/mounts."""
    for line in (mounts if mounts is not None else Path("/proc/self/mounts").read_text()).splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


def own_netns_cookie() -> int:
    """The number by which programs know this process's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        (cookie,) = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
        return int(cookie)


def in_initial_netns() -> bool:
    """Whether this process is in the machine's own network namespace."""
    try:
        return Path("/proc/self/ns/net").stat().st_ino == Path("/proc/1/ns/net").stat().st_ino
    except PermissionError:
        return False  # who may not look at the first process is in a container


def attach(plan: LoadPlan, cgroup: Path, when: Callable[[Callable[[], None]], None] = lambda step: step()) -> None:
    """Load the programs and make the links of this instance lead to them, on this cgroup. May raise DatapathError.

    ``when`` is given what makes the links, to be done at once or later.
    """
    compiler = Compiler(plan.cache)
    constants = {**plan.constants, "host_netns_cookie": struct.pack("=Q", own_netns_cookie())}
    own = dataclasses.replace(plan, constants=constants)
    loaded = load_object(read(compiler.compile("sock", plan.defines)), "sock", own)

    def link() -> None:
        try:
            directory = _open(cgroup)
            try:
                for name, kind in HOOKS.items():
                    _link(loaded, name, kind, directory, plan.pins)
            finally:
                os.close(directory)
        finally:
            loaded.close()
        plan.pins.follow()
        log.info("services at sockets: programs on cgroup %s", cgroup)

    when(link)


def detach(pins: PinDirectory) -> None:
    """Take the programs off: a link without pin and holder is gone."""
    for name in HOOKS:
        pins.unlink(name)


def _open(cgroup: Path) -> int:
    try:
        return os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        text = f"cgroup-root {cgroup}: {os.strerror(error.errno or 0)}; expected a directory of cgroup2"
        raise DatapathError(error.errno, text) from error


def _link(loaded: BpfObject, name: str, kind: int, cgroup: int, pins: PinDirectory) -> None:
    program, path = loaded.program_fd(name), pins.of(name)
    if path.exists():
        link = bpf.get_pinned(path)
        try:
            if _cgroup_of(link) == os.fstat(cgroup).st_ino:
                bpf.call(_LINK_UPDATE, bytearray(struct.pack("=IIII", link, program, 0, 0)))
                return
        except OSError as error:
            if error.errno != errno.ENOLINK:  # its cgroup went
                raise _problem(name, error) from error
        finally:
            os.close(link)
        pins.unlink(name)
    try:
        link = bpf.call(_LINK_CREATE, bytearray(struct.pack("=IIII16x", program, cgroup, kind, 0)))
    except OSError as error:
        raise _problem(name, error) from error
    try:
        bpf.pin(link, path)
    finally:
        os.close(link)


def _problem(name: str, error: OSError) -> DatapathError:
    return DatapathError(error.errno, f"program {name}: cannot be attached: {os.strerror(error.errno or 0)}")


def _cgroup_of(link: int) -> int:
    """The inode of the cgroup that a link is attached to (struct bpf_link_info)."""
    info = bytearray(32)
    bpf.object_info(link, info)
    return int(struct.unpack_from("=Q", info, 16)[0])
