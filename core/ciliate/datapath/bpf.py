"""bpf(2) through ctypes: maps, pins, batches, test runs. Layout-free: keys and values are bytes.

Calls and their cost are described in the project's measurements: one attribute buffer per call site, batches of some
thousand entries (1.5 million updates a second), and no copy that is not needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ciliate.datapath.errors import DatapathError
from ciliate.measure import FAILURE, MAP_OPS, MAP_TIMES, SUCCESS, SYSCALLS

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PIN, _GET, _TEST_RUN = 0, 1, 2, 3, 4, 6, 7, 10
_PROG_BY_ID, _GET_INFO, _ENABLE_STATS = 13, 15, 32
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27
OPERATIONS = {
    **{_MAP_CREATE: "mapCreate", _LOOKUP: "lookup", _UPDATE: "update", _DELETE: "delete", _NEXT_KEY: "getNextKey"},
    **{_PIN: "objPin", _GET: "objGet", _TEST_RUN: "progTestRun", _GET_INFO: "objGetInfo"},
    **{_LOOKUP_BATCH: "lookupBatch", _UPDATE_BATCH: "updateBatch", _DELETE_BATCH: "deleteBatch"},
}
"""Names of commands in metrics; others are ``other``."""
ANY, NOEXIST, EXIST = 0, 1, 2
NO_PREALLOC = 1
"""Flag of a map whose entries take room only once they are there."""
BATCH = 4096
REFILL_PAUSES = (*(0.001 * 2**step for step in range(8)), 0.0)
"""Entries of maps that are not allocated beforehand come from a small store of each CPU's own (since Linux 6.1), which
is refilled soon after; until then an update has no memory. Seconds between attempts; 0 is the last."""

HASH, ARRAY, PROG_ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LPM_TRIE, RINGBUF = 1, 2, 3, 5, 6, 9, 11, 27
_PER_CPU = frozenset({PERCPU_HASH, PERCPU_ARRAY})

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _number() -> int:
    machine = platform.machine()
    try:
        return _SYSCALL[machine]
    except KeyError:
        raise DatapathError(f"bpf(2): its number on {machine} is not known; known are {', '.join(_SYSCALL)}") from None


def call(command: int, attribute: bytearray) -> int:
    """One bpf(2) call; returns its result. Raises OSError with the kernel's errno."""
    buffer = (ctypes.c_char * len(attribute)).from_buffer(attribute)
    began = time.perf_counter()
    result: int = _syscall(
        ctypes.c_long(_number()), ctypes.c_int(command), ctypes.byref(buffer), ctypes.c_uint(len(attribute))
    )
    seconds, operation = time.perf_counter() - began, OPERATIONS.get(command, "other")
    SYSCALLS.observe(operation, SUCCESS if result >= 0 else FAILURE, seconds=seconds)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf command {command}: {os.strerror(code)}")
    return result


def address(buffer: bytearray | bytes) -> int:
    """The address of a buffer's content; the caller keeps the buffer alive."""
    if isinstance(buffer, bytearray):
        return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    return ctypes.cast(ctypes.c_char_p(buffer), ctypes.c_void_p).value or 0


def pin(descriptor: int, path: Path) -> None:
    """Pin an object. OSError(EEXIST) where the path is taken."""
    name = os.fsencode(path) + b"\0"
    call(_PIN, bytearray(struct.pack("=QIIi", address(name), descriptor, 0, 0)))


def get_pinned(path: Path) -> int:
    """A descriptor of a pinned object. FileNotFoundError where there is none."""
    name = os.fsencode(path) + b"\0"
    return call(_GET, bytearray(struct.pack("=QIIi", address(name), 0, 0, 0)))


def program_by_id(number: int) -> int:
    """A descriptor of the program of this number. FileNotFoundError where there is none (any more)."""
    return call(_PROG_BY_ID, bytearray(struct.pack("=III", number, 0, 0)))


def possible_cpus() -> int:
    """How many values a per-CPU map has."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.rsplit("-", 1)[-1].rsplit(",", 1)[-1]) + 1


def object_info(descriptor: int, info: bytearray) -> None:
    """Fill ``info`` with what the kernel says of a map or program (struct bpf_map_info, bpf_prog_info)."""
    call(_GET_INFO, bytearray(struct.pack("=IIQ", descriptor, len(info), address(info))))


class MapInfo:
    """What the kernel says of a map."""

    def __init__(self, descriptor: int) -> None:
        info = bytearray(96)
        object_info(descriptor, info)
        self.type, self.id, self.key_size, self.value_size, self.max_entries, self.flags = struct.unpack_from(
            "=6I", info
        )
        self.name = bytes(info[24:40]).split(b"\0", 1)[0].decode()


class ProgramInfo:
    """What the kernel says of a program: its size, and how often and how long (ns) it ran while statistics were on.

    ``verified`` is how many instructions the verifier walked. Programs reached by tail calls count with their caller.
    """

    def __init__(self, descriptor: int) -> None:
        info = bytearray(232)
        call(_GET_INFO, bytearray(struct.pack("=IIQ", descriptor, len(info), address(info))))
        self.id, self.jited_bytes, self.instructions = struct.unpack_from("=4xI8xII", info)
        self.instructions //= 8
        self.run_time, self.runs, self.verified = struct.unpack_from("=QQ8xI", info, 192)


def maps_of(program: int) -> set[int]:
    """The kernel's numbers of the maps that a program uses."""
    info = bytearray(232)
    object_info(program, info)
    (count,) = struct.unpack_from("=I", info, 52)
    numbers, info = bytearray(4 * count), bytearray(232)
    struct.pack_into("=IQ", info, 52, count, address(numbers) if count else 0)
    object_info(program, info)
    return set(struct.unpack(f"={count}I", numbers))


def enable_statistics() -> int:
    """Let the kernel time every program; it does until the descriptor that this returns is closed."""
    return call(_ENABLE_STATS, bytearray(4))


class Map:
    """An open map. Not for use by two threads at once on the same key buffers; descriptors are closed by ``close``."""

    def __init__(self, descriptor: int, name: str = "") -> None:
        self.descriptor = descriptor
        info = MapInfo(descriptor)
        self.name = name or info.name
        self.type, self.key_size, self.max_entries = info.type, info.key_size, info.max_entries
        self.per_cpu = info.type in _PER_CPU
        self.width = width = info.value_size
        self.value_size = ((width + 7) // 8 * 8) * possible_cpus() if self.per_cpu else width

    @classmethod
    def open(cls, path: Path) -> Map:
        """Open a pinned map; DatapathError names the path where there is none."""
        try:
            return cls(get_pinned(path), path.name)
        except OSError as error:
            raise DatapathError(error.errno, f"map {path}: {os.strerror(error.errno or 0)}") from error

    @classmethod
    def create(cls, kind: int, key_size: int, value_size: int, entries: int, flags: int = 0, name: str = "") -> Map:
        """Create a map."""
        text = name.encode()[:15].ljust(16, b"\0")
        attribute = bytearray(struct.pack("=5III16s", kind, key_size, value_size, entries, flags, 0, 0, text))
        return cls(call(_MAP_CREATE, attribute), name)

    def close(self) -> None:
        """Close the descriptor; a pinned map stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def lookup(self, key: bytes) -> bytes | None:
        """The value of ``key``, or None."""
        value = bytearray(self.value_size)
        try:
            self._call(_LOOKUP, self._element(key, value))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise self._error("look-up", error) from error
        return bytes(value)

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Write one entry; DatapathError names the map (E2BIG or ENOSPC: it is full)."""
        for pause in REFILL_PAUSES:
            try:
                self._call(_UPDATE, self._element(key, value, flags))
                return
            except OSError as error:
                if error.errno != errno.ENOMEM or not pause:
                    raise self._error("update", error) from error
            time.sleep(pause)

    def delete(self, key: bytes) -> bool:
        """Delete one entry; False where there is none."""
        try:
            self._call(_DELETE, self._element(key, b""))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise self._error("delete", error) from error
        return True

    def keys(self) -> Iterator[bytes]:
        """Every key, one call each; for maps without batch operations."""
        key, following = bytearray(self.key_size), bytearray(self.key_size)
        first = True
        while True:
            attribute = struct.pack("=I4xQQQ", self.descriptor, 0 if first else address(key), address(following), 0)
            try:
                self._call(_NEXT_KEY, bytearray(attribute))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise self._error("iteration", error) from error
            first = False
            key[:] = following
            yield bytes(following)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry, by batches where the map has them. Entries that come or go meanwhile may or may not be seen."""
        if self.per_cpu or self.type == ARRAY:
            for key in self.keys():
                value = self.lookup(key)
                if value is not None:
                    yield key, value
            return
        for keys, values, count in self.batches():
            for index in range(count):
                start, place = index * self.key_size, index * self.value_size
                yield bytes(keys[start : start + self.key_size]), bytes(values[place : place + self.value_size])

    def batches(self) -> Iterator[tuple[bytearray, bytearray, int]]:
        """Key and value buffers of up to BATCH entries each, reused between steps."""
        size = min(BATCH, self.max_entries)
        token, following = bytearray(max(self.key_size, 8)), bytearray(max(self.key_size, 8))
        first = True
        while True:
            keys, values = bytearray(size * self.key_size), bytearray(size * self.value_size)
            attribute = bytearray(
                struct.pack(
                    "=QQQQIIQQ",
                    0 if first else address(token),
                    address(following),
                    address(keys),
                    address(values),
                    size,
                    self.descriptor,
                    0,
                    0,
                )
            )
            ended = False
            try:
                self._call(_LOOKUP_BATCH, attribute)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    size *= 2  # one bucket holds more than a whole batch
                    continue
                if error.errno != errno.ENOENT:
                    raise self._error("batch look-up", error) from error
                ended = True
            (count,) = struct.unpack_from("=I", attribute, 32)
            if count:
                yield keys, values, count
            if ended:
                return
            first = False
            token[:] = following

    def update_batch(self, keys: bytes, values: bytes, count: int) -> None:
        """Write ``count`` entries that lie one behind the other. On an error those before it are written."""
        done, pauses = 0, iter(REFILL_PAUSES)
        while done < count:
            try:
                done += self._batch(_UPDATE_BATCH, keys, values, done, count)
                continue
            except DatapathError as error:
                pause = next(pauses)
                if error.errno != errno.ENOMEM or not pause:
                    raise
            if self._processed:
                done, pauses = done + self._processed, iter(REFILL_PAUSES)
            time.sleep(pause)

    def add(self, key: bytes, value: bytes) -> bool:
        """Write one entry unless there is one; whether there was none."""
        try:
            self.update(key, value, NOEXIST)
        except DatapathError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Write entries by batches."""
        pairs = list(entries)
        self.update_batch(b"".join(key for key, _ in pairs), b"".join(value for _, value in pairs), len(pairs))

    def delete_many(self, keys: Iterable[bytes]) -> int:
        """Delete entries by batches; those that are gone already do not count. Returns how many went."""
        wanted = list(keys)
        packed, done, missing = b"".join(wanted), 0, 0
        while done < len(wanted):
            try:
                done += self._batch(_DELETE_BATCH, packed, b"", done, len(wanted))
            except DatapathError as error:
                if error.errno != errno.ENOENT:
                    raise
                done += self._processed
                if not self.delete(wanted[done]):
                    missing += 1
                done += 1
        return len(wanted) - missing

    def _call(self, command: int, attribute: bytearray) -> None:
        outcome, began = FAILURE, time.perf_counter()
        try:
            call(command, attribute)
            outcome = SUCCESS
        except OSError as error:
            if error.errno == errno.ENOENT:
                outcome = SUCCESS  # that there is none is an answer
            raise
        finally:
            operation = OPERATIONS[command]
            MAP_TIMES.observe(self.name, operation, outcome, seconds=time.perf_counter() - began)
            MAP_OPS.add(self.name, operation, outcome)

    def _batch(self, command: int, keys: bytes, values: bytes, start: int, count: int) -> int:
        size = min(BATCH, count - start)
        attribute = bytearray(
            struct.pack(
                "=QQQQIIQQ",
                0,
                0,
                address(keys) + start * self.key_size,
                address(values) + start * self.value_size if values else 0,
                size,
                self.descriptor,
                0,
                0,
            )
        )
        try:
            self._call(command, attribute)
        except OSError as error:
            (self._processed,) = struct.unpack_from("=I", attribute, 32)
            raise self._error("batch", error) from error
        return size

    _processed = 0

    def _element(self, key: bytes, value: bytes | bytearray, flags: int = 0) -> bytearray:
        if len(key) != self.key_size:
            raise DatapathError(errno.EINVAL, f"map {self.name}: key of {len(key)} bytes, expected {self.key_size}")
        self._held = (key, value)  # the kernel reads them by address during the call
        return bytearray(struct.pack("=I4xQQQ", self.descriptor, address(key), address(value) if value else 0, flags))

    def _error(self, action: str, error: OSError) -> DatapathError:
        full = " (the map is full)" if error.errno in (errno.E2BIG, errno.ENOSPC) else ""
        text = f"map {self.name}: {action} failed: {os.strerror(error.errno or 0)}{full}"
        return DatapathError(error.errno, text)


def test_run(
    descriptor: int, packet: bytes, context: bytes | bytearray = b"", repeat: int = 1, flags: int = 0
) -> tuple[int, bytes, int]:
    """Run a program on a packet: its return value, the packet afterwards, and nanoseconds per run.

    Repeats run on the same packet, so edits persist (only idempotent paths can be timed). A context that is a bytearray
    is what the program left of it afterwards.
    """
    packet_in, packet_out = bytearray(packet), bytearray(len(packet) + 512)
    context_in = context if isinstance(context, bytearray) else bytearray(context)
    context_out = context_in if isinstance(context, bytearray) else bytearray()
    attribute = bytearray(
        struct.pack(
            "=IIIIQQIIIIQQIII4x",
            descriptor,
            0,
            len(packet_in),
            len(packet_out),
            address(packet_in),
            address(packet_out),
            repeat,
            0,
            len(context_in),
            len(context_out),
            address(context_in) if context_in else 0,
            address(context_out) if context_out else 0,
            flags,
            0,
            0,
        )
    )
    call(_TEST_RUN, attribute)
    _, result, _, size = struct.unpack_from("=IIII", attribute)
    (duration,) = struct.unpack_from("=I", attribute, 36)
    return result, bytes(packet_out[:size]), duration
