"""A thin, typed binding of the part of libbpf that loads objects."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ciliate.datapath.errors import DatapathError

LOG_SIZE = 1 << 20
LOG_LINES = 12


class _OpenOptions(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("pad", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("log_buffer", ctypes.c_void_p),
        ("log_size", ctypes.c_size_t),
        ("log_level", ctypes.c_uint32),
    )


_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _PRINT(lambda level, text, arguments: 0)
_P, _I, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bpf_object__open_mem": (_P, (_P, ctypes.c_size_t, ctypes.POINTER(_OpenOptions))),
    "bpf_object__load": (_I, (_P,)),
    "bpf_object__close": (None, (_P,)),
    "bpf_object__next_map": (_P, (_P, _P)),
    "bpf_object__next_program": (_P, (_P, _P)),
    "bpf_map__name": (_S, (_P,)),
    "bpf_map__fd": (_I, (_P,)),
    "bpf_map__is_internal": (ctypes.c_bool, (_P,)),
    "bpf_map__key_size": (ctypes.c_uint32, (_P,)),
    "bpf_map__value_size": (ctypes.c_uint32, (_P,)),
    "bpf_map__max_entries": (ctypes.c_uint32, (_P,)),
    "bpf_map__reuse_fd": (_I, (_P, _I)),
    "bpf_map__set_max_entries": (_I, (_P, ctypes.c_uint32)),
    "bpf_map__set_initial_value": (_I, (_P, _P, ctypes.c_size_t)),
    "bpf_map__initial_value": (_P, (_P, ctypes.POINTER(ctypes.c_size_t))),
    "bpf_program__name": (_S, (_P,)),
    "bpf_program__fd": (_I, (_P,)),
    "bpf_program__set_autoload": (_I, (_P, ctypes.c_bool)),
    "bpf_program__set_flags": (_I, (_P, ctypes.c_uint32)),
    "libbpf_set_print": (_P, (_PRINT,)),
}


def _library() -> ctypes.CDLL:
    for candidate in (os.environ.get("LIBBPF"), "libbpf.so.1", ctypes.util.find_library("bpf")):
        if not candidate:
            continue
        try:
            library = ctypes.CDLL(candidate, use_errno=True)
        except OSError:
            continue
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.libbpf_set_print(_silent)
        return library
    raise DatapathError(
        errno.ENOENT, "libbpf.so.1 is not installed; install the package libbpf1, or name the library in LIBBPF"
    )


_loaded: list[ctypes.CDLL] = []


def library() -> ctypes.CDLL:
    """The library, loaded once; DatapathError where it is missing."""
    if not _loaded:
        _loaded.append(_library())
    return _loaded[0]


class BpfObject:
    """One compiled object: open, change constants and maps, load, take what is wanted, close."""

    def __init__(self, elf: bytes, name: str) -> None:
        self.name = name
        self._lib = library()
        self._elf = elf
        # pages of a mapping cost nothing until the verifier writes to them
        self._log = mmap.mmap(-1, LOG_SIZE)
        options = _OpenOptions(
            size=ctypes.sizeof(_OpenOptions),
            object_name=name.encode(),
            log_buffer=ctypes.addressof(ctypes.c_char.from_buffer(self._log)),
            log_size=LOG_SIZE,
            log_level=0,
        )
        self._handle = self._lib.bpf_object__open_mem(elf, len(elf), ctypes.byref(options))
        if not self._handle:
            raise DatapathError(ctypes.get_errno(), f"object {name}: libbpf cannot open it: {self._errno_text()}")
        self.maps = self._walk(self._lib.bpf_object__next_map, self._lib.bpf_map__name)
        self.programs = self._walk(self._lib.bpf_object__next_program, self._lib.bpf_program__name)

    def _walk(self, following: Callable[[Any, Any], Any], name_of: Callable[[Any], bytes]) -> dict[str, int]:
        found, item = {}, following(self._handle, None)
        while item:
            found[name_of(item).decode()] = item
            item = following(self._handle, item)
        return found

    def set_constants(self, offsets: Mapping[str, tuple[int, int]], values: Mapping[str, bytes]) -> None:
        """Write constants of ``.rodata``. ``offsets`` maps names to (offset, size), as BTF or symbols give them."""
        rodata = next((item for name, item in self.maps.items() if name.endswith(".rodata")), None)
        if rodata is None:
            raise DatapathError(errno.ENOENT, f"object {self.name}: has no constants")
        size = ctypes.c_size_t()
        start = self._lib.bpf_map__initial_value(rodata, ctypes.byref(size))
        data = bytearray(ctypes.string_at(start, size.value))
        for name, value in values.items():
            if name not in offsets:
                raise DatapathError(errno.ENOENT, f"object {self.name}: has no constant {name}")
            offset, width = offsets[name]
            if len(value) != width:
                raise DatapathError(errno.EINVAL, f"constant {name}: {len(value)} bytes given, expected {width}")
            data[offset : offset + width] = value
        buffer = (ctypes.c_char * len(data)).from_buffer(data)
        self._check(self._lib.bpf_map__set_initial_value(rodata, buffer, len(data)), "constants")

    def reuse_map(self, name: str, descriptor: int) -> None:
        """Let the object use an existing map."""
        self._check(self._lib.bpf_map__reuse_fd(self.maps[name], descriptor), f"map {name}")

    def shape(self, name: str) -> tuple[int, int, int]:
        """Key size, value size and number of entries that the object asks for."""
        handle, lib = self.maps[name], self._lib
        return lib.bpf_map__key_size(handle), lib.bpf_map__value_size(handle), lib.bpf_map__max_entries(handle)

    def set_max_entries(self, name: str, entries: int) -> None:
        """Change the size of a map that is yet to be made."""
        self._check(self._lib.bpf_map__set_max_entries(self.maps[name], entries), f"map {name}")

    def skip_program(self, name: str) -> None:
        """Leave a program out."""
        self._check(self._lib.bpf_program__set_autoload(self.programs[name], False), f"program {name}")

    def demand_alignment(self) -> None:
        """Let the verifier refuse what processors without unaligned access cannot do (BPF_F_STRICT_ALIGNMENT)."""
        for name, program in self.programs.items():
            self._check(self._lib.bpf_program__set_flags(program, 1), f"program {name}")

    def load(self) -> None:
        """Create what maps are missing and load the programs.

        DatapathError has the end of the verifier's log where it rejects a program.
        """
        result = self._lib.bpf_object__load(self._handle)
        if result < 0:
            lines = self._log[:].split(b"\0", 1)[0].decode(errors="replace").strip().splitlines()
            useful = [line for line in lines if not line.startswith(("processed ", "verification time"))]
            tail = "\n".join(useful[-LOG_LINES:])
            text = f"object {self.name}: the kernel rejects it: {os.strerror(-result)}"
            raise DatapathError(-result, f"{text}\n{tail}" if tail else text)

    def map_fd(self, name: str) -> int:
        """A map's descriptor, which belongs to this object; duplicate it to keep it."""
        return self._check(self._lib.bpf_map__fd(self.maps[name]), f"map {name}")

    def program_fd(self, name: str) -> int:
        """A program's descriptor, which belongs to this object; duplicate it to keep it."""
        return self._check(self._lib.bpf_program__fd(self.programs[name]), f"program {name}")

    def close(self) -> None:
        """Give everything back; what is pinned, attached or duplicated lives on."""
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None

    def _check(self, result: int, what: str) -> int:
        if result < 0:
            raise DatapathError(-result, f"object {self.name}: {what}: {os.strerror(-result)}")
        return result

    @staticmethod
    def _errno_text() -> str:
        return os.strerror(ctypes.get_errno())


def constants(elf: bytes) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) of every object symbol in ``.rodata`` of a 64-bit little- or big-endian ELF file."""
    return _Elf(elf).symbols_of(".rodata")


def without_lines(elf: bytes) -> bytes:
    """The object without the source lines of its instructions (.BTF.ext, kernel's Documentation/bpf/btf.rst 3.2).

    Loading takes a little less time and memory; messages of the verifier then quote no source.
    """
    file = _Elf(elf)
    start = file.offset_of(".BTF.ext")
    if start is None:
        return elf
    data = bytearray(elf)
    # magic, version, flags, header length, function info (offset, length), line info (offset, length)
    struct.pack_into(file.order + "I", data, start + 20, 0)
    return bytes(data)


class _Elf:
    """As much of ELF-64 as finding symbols needs (System V ABI, chapters 4 and 5)."""

    def __init__(self, data: bytes) -> None:
        if data[:5] != b"\x7fELF\x02":
            raise DatapathError(errno.ENOEXEC, "object: is no 64-bit ELF file")
        self._data = data
        self.order = "<" if data[5] == 1 else ">"
        self._unpack = struct.unpack_from
        (self._table,) = self._unpack(self.order + "Q", data, 40)
        self._entry, self._count, self._names = self._unpack(self.order + "HHH", data, 58)

    def _section(self, index: int) -> tuple[int, int, int, int, int]:
        base = self._table + index * self._entry
        name, kind = self._unpack(self.order + "II", self._data, base)
        offset, size = self._unpack(self.order + "QQ", self._data, base + 24)
        (link,) = self._unpack(self.order + "I", self._data, base + 40)
        return name, kind, offset, size, link

    def _text(self, section: int, offset: int) -> str:
        start = self._section(section)[2] + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _find(self, wanted: str) -> int | None:
        return next((i for i in range(self._count) if self._text(self._names, self._section(i)[0]) == wanted), None)

    def offset_of(self, wanted: str) -> int | None:
        """Where a section begins in the file; None where there is none of that name."""
        index = self._find(wanted)
        return None if index is None else self._section(index)[2]

    def symbols_of(self, wanted: str) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size) of every object symbol in a section."""
        found = {}
        target = self._find(wanted)
        for index in range(self._count):
            _, kind, offset, size, link = self._section(index)
            if kind != 2:
                continue
            for place in range(offset, offset + size, 24):
                name, info, _, section = self._unpack(self.order + "IBBH", self._data, place)
                value, width = self._unpack(self.order + "QQ", self._data, place + 8)
                if section == target and info & 0xF == 1:
                    found[self._text(link, name)] = (value, width)
        return found


def read(path: Path) -> bytes:
    """The content of an object file; DatapathError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatapathError(error.errno, f"object {path}: {os.strerror(error.errno or 0)}") from error
