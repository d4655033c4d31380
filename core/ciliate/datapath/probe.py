"""Questions to the kernel, each answered by trying: tiny programs and maps that nothing keeps.

Version numbers say little, since distributions move features back and leave others out.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator

from ciliate.datapath import bpf, devices, netlink
from ciliate.datapath.errors import DatapathError

SCHED_CLS = 3
_PROG_LOAD, _BTF_LOAD, _LINK_CREATE = 5, 18, 28
_TCX_INGRESS = 46
_NO_DEVICE = 0x7FFFFFFF
_INFO_SIZE = 240
_ENOTSUPP = 524
_REFUSED = frozenset({errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.EACCES, errno.E2BIG, errno.ENODEV, _ENOTSUPP})
"""How kernels say that they do not know something; anything else is a failure of the question."""
_UNKNOWN_HELPER = ("invalid func ", "unknown func ", "cannot use helper ")
_libc = ctypes.CDLL(None, use_errno=True)


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, value)


def _set(register: int, value: int) -> bytes:
    return _instruction(0xB7, register, value=value)


_EXIT = _instruction(0x95)
_NOTHING = _set(0, 0) + _EXIT


def _load(program: bytes, btf: int = 0, functions: bytes = b"", log: bytearray | None = None) -> int:
    """A descriptor of a classifier of these instructions; ``functions`` is its table of (instruction, BTF type)."""
    licence = b"GPL\0"
    text = (bpf.address(log), len(log)) if log else (0, 0)
    attribute = struct.pack(
        "=IIQQIIQII16sIIIIQIIQIIII",
        *(SCHED_CLS, len(program) // 8, bpf.address(program), bpf.address(licence)),
        *(1 if log else 0, text[1], text[0], 0, 0, b"probe", 0, 0),
        *(btf, 8 if functions else 0, bpf.address(functions) if functions else 0, len(functions) // 8),
        *(0, 0, 0, 0, 0, 0),
    )
    return bpf.call(_PROG_LOAD, bytearray(attribute))


def _answered(attempt: Callable[[], int]) -> bool:
    """Whether the kernel gives a descriptor, which is closed at once; DatapathError where it may not be asked."""
    try:
        os.close(attempt())
    except OSError as error:
        if error.errno in _REFUSED:
            return False
        raise DatapathError(
            error.errno, f"kernel features: cannot be probed: {os.strerror(error.errno or 0)}"
        ) from error
    return True


def has_classifier() -> bool:
    """Programs for tc."""
    return _answered(lambda: _load(_NOTHING))


def has_map(kind: int, key: int, value: int, entries: int, flags: int = 0) -> bool:
    """Maps of a type."""
    return _answered(lambda: _create(kind, key, value, entries, flags))


def _create(kind: int, key: int, value: int, entries: int, flags: int) -> int:
    return bpf.Map.create(kind, key, value, entries, flags).descriptor


def has_batches() -> bool:
    """Look-ups and updates of many entries in one call, for every type of map that they are used on."""
    kinds = ((bpf.HASH, 4), (bpf.LRU_HASH, 4), (bpf.LPM_TRIE, 8))
    return all(_answered(lambda kind=kind, key=key: _try_batches(kind, key)) for kind, key in kinds)  # type: ignore[misc]


def _try_batches(kind: int, key: int) -> int:
    table = bpf.Map.create(kind, key, 4, 4, 1 if kind == bpf.LPM_TRIE else 0)
    try:
        table.update_batch(bytes(key), bytes(4), 1)
        for _ in table.batches():
            pass
    except BaseException:
        table.close()
        raise
    return table.descriptor


def has_helper(number: int) -> bool:
    """A helper function for classifiers: the verifier complains of its arguments where it knows it."""
    log = bytearray(4096)
    call = _instruction(0x85, value=number)
    try:
        os.close(_load(call + _EXIT, log=log))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise DatapathError(error.errno, f"kernel features: helper {number}: {error.strerror}") from error
    text = bytes(log).decode(errors="replace")
    return not any(phrase in text for phrase in _UNKNOWN_HELPER)


def has_jit() -> bool:
    """Whether programs are translated to the machine's own code."""
    descriptor = _load(_NOTHING)
    try:
        info = bytearray(_INFO_SIZE)
        bpf.object_info(descriptor, info)
    finally:
        os.close(descriptor)
    (size,) = struct.unpack_from("=I", info, 16)  # jited_prog_len
    return bool(size)


def has_global_functions() -> bool:
    """Functions that are verified once, with the packet and a pointer to a struct as arguments."""
    return _answered(_try_global_function)


def _try_global_function() -> int:
    types, names = _TYPES
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    data = header + types + names
    btf = bpf.call(_BTF_LOAD, bytearray(struct.pack("=QQIIII", bpf.address(data), 0, len(data), 0, 0, 0)))
    try:
        return _load(_GLOBAL_CALL, btf, struct.pack("=IIII", 0, 9, 5, 7))
    finally:
        os.close(btf)


def _btf() -> tuple[bytes, bytes]:
    """BTF types 1 to 9 and their names: int checked(struct __sk_buff *, struct state *), and int calls(...)."""
    names = b"\0"

    def name(text: str) -> int:
        nonlocal names
        names += text.encode() + b"\0"
        return len(names) - len(text) - 1

    def kind(number: int, text: str, size_or_type: int, members: int = 0) -> bytes:
        return struct.pack("=III", name(text) if text else 0, number << 24 | members, size_or_type)

    def member(text: str, of: int) -> bytes:
        return struct.pack("=II", name(text), of)

    integer = kind(1, "int", 4) + struct.pack("=I", 1 << 24 | 32)
    context = kind(4, "__sk_buff", 4, 1) + member("len", 1) + bytes(4) + kind(2, "", 2)
    state = kind(4, "state", 4, 1) + member("value", 1) + bytes(4) + kind(2, "", 4)
    checked = kind(13, "", 1, 2) + member("skb", 3) + member("state", 5) + kind(12, "checked", 6, 1)
    calls = kind(13, "", 1, 1) + member("ctx", 3) + kind(12, "calls", 8, 1)
    return integer + context + state + checked + calls, names


_TYPES = _btf()
_GLOBAL_CALL = b"".join(
    [
        _instruction(0x62, 10, offset=-4),  # a struct on the stack, zero
        _instruction(0xBF, 2, 10),
        _instruction(0x07, 2, value=-4),
        _instruction(0x85, source=1, value=1),  # call checked
        _EXIT,
        _instruction(0x55, 2, offset=2),  # checked: a null pointer?
        _set(0, 0),
        _EXIT,
        _instruction(0x61, 0, 1),  # only a context may be read here
        _EXIT,
    ]
)


def has_tcx() -> bool:
    """Links of programs to devices without a qdisc; asked for a device that does not exist."""
    descriptor = _load(_NOTHING)
    try:
        attribute = struct.pack("=IIIIQQQQ", descriptor, _NO_DEVICE, _TCX_INGRESS, 0, 0, 0, 0, 0)
        os.close(bpf.call(_LINK_CREATE, bytearray(attribute)))
    except OSError as error:
        return error.errno == errno.ENODEV
    finally:
        os.close(descriptor)
    return True


def has_clsact() -> bool:
    """Filters that are programs, at both sides of a device; tried on loopback in a namespace made for it."""
    return _in_new_namespace(_attach_to_loopback)


def has_veth() -> bool:
    """Pairs of devices; tried in a namespace made for it."""
    return _in_new_namespace(lambda: netlink.route().link("add", ifname="probe0", kind="veth", peer="probe1"))


def _attach_to_loopback() -> None:
    descriptor = _load(_NOTHING)
    try:
        for egress in (False, True):
            devices.attach_filter(1, egress, descriptor, 1, "probe")
    finally:
        os.close(descriptor)


def _in_new_namespace(attempt: Callable[[], object]) -> bool:
    """Whether this succeeds in a network namespace, which goes with the thread that made it."""
    outcome: list[bool | Exception] = []

    def run() -> None:
        try:
            with _new_namespace():
                attempt()
            outcome.append(True)
        except (netlink.NetlinkError, DatapathError) as error:
            code = error.code if isinstance(error, netlink.NetlinkError) else error.errno
            outcome.append(False if code in _REFUSED else error)

    thread = threading.Thread(target=run, name="probe")
    thread.start()
    thread.join()
    result = outcome[0]
    if isinstance(result, Exception):
        text = f"kernel features: cannot be probed in a network namespace: {result}"
        raise DatapathError(getattr(result, "errno", None) or errno.EIO, text) from result
    return result


@contextlib.contextmanager
def _new_namespace() -> Iterator[None]:
    if _libc.unshare(netlink.CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise DatapathError(code, f"network namespace: cannot be made: {os.strerror(code)}")
    try:
        yield
    finally:
        netlink.close()
