"""Compiles the datapath once per (sources, flags, compiler version) into a content-addressed cache."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sysconfig
from importlib.resources import files
from pathlib import Path

from ciliate.datapath.errors import DatapathError
from ciliate.measure import SUBPROCESSES

log = logging.getLogger(__name__)
OLDEST_CLANG = 11
FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-target", "bpf", "-mcpu=v3")
COMPILE_TIMEOUT = 120


def source_directory() -> Path:
    """Where the C is: in the repository or in the installed wheel."""
    return Path(str(files("ciliate_bpf")))


@functools.cache
def find_clang() -> tuple[str, str]:
    """Path and version line of the newest clang; DatapathError where there is none or it is too old."""
    names = [os.environ.get("CILIATE_CLANG", ""), *(f"clang-{number}" for number in range(21, 10, -1)), "clang"]
    for name in names:
        path = shutil.which(name) if name else None
        if path is None:
            continue
        SUBPROCESSES.add("compiler")
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
        line = done.stdout.splitlines()[0] if done.stdout else ""
        match = re.search(r"version (\d+)", line)
        if match and int(match[1]) >= OLDEST_CLANG:
            return path, line
        raise DatapathError(errno.ENOEXEC, f"{path}: {line or 'prints no version'}; expected {OLDEST_CLANG} or newer")
    raise DatapathError(errno.ENOENT, "clang is not installed; install the package clang-16 (11 or newer will do)")


def include_directories(source: Path) -> list[str]:
    """Our own headers, then those of the architecture, which hold ``asm/types.h`` on Debian."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    return [str(source), f"/usr/include/{multiarch}"]


class Compiler:
    """The cache directory and what is compiled into it. Its methods block; call them in a thread."""

    def __init__(self, cache: Path, source: Path | None = None) -> None:
        self._cache = cache
        self._source = source or source_directory()

    def digest(self, name: str, defines: tuple[str, ...] = ()) -> str:
        """The name under which this object is cached: sources, flags, defines and compiler in one hash."""
        return self._sources(name, defines, find_clang()[1])

    def _sources(self, name: str, defines: tuple[str, ...], version: str = "") -> str:
        content = hashlib.sha256()
        for path in sorted(self._source.rglob("*.[ch]")):
            content.update(f"{path.relative_to(self._source)}\0".encode())
            content.update(path.read_bytes())
        for part in (name, *FLAGS, *defines, version):
            content.update(part.encode() + b"\0")
        return content.hexdigest()[:40]

    def compile(self, name: str, defines: tuple[str, ...] = ()) -> Path:
        """The object of ``name``.c, from the cache where it is there; concurrent callers compile it once.

        DatapathError has the compiler's messages where the source does not compile.
        """
        try:
            directory = self._cache / self.digest(name, defines)
        except DatapathError as error:
            return self._by_any_compiler(name, defines, error)
        target = directory / f"{name}.o"
        if target.exists():
            return target
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                self._run(name, defines, target)
        return target

    def _by_any_compiler(self, name: str, defines: tuple[str, ...], problem: DatapathError) -> Path:
        """What an earlier compiler made of the same sources; raises ``problem`` where there is nothing."""
        line = f"sources {self._sources(name, defines)}"
        for info in sorted(self._cache.glob(f"*/{name}.txt")):
            if line in info.read_text().splitlines() and info.with_suffix(".o").exists():
                log.warning("%s; the cached %s is used", problem.strerror, info.with_suffix(".o"))
                return info.with_suffix(".o")
        raise problem

    def _run(self, name: str, defines: tuple[str, ...], target: Path) -> None:
        clang, version = find_clang()
        includes = [part for directory in include_directories(self._source) for part in ("-I", directory)]
        temporary = target.with_suffix(".tmp.o")
        macros = [f"-D{define}" for define in defines]
        command = [clang, *FLAGS, *macros, *includes, "-c", str(self._source / f"{name}.c"), "-o", str(temporary)]
        SUBPROCESSES.add("compiler")
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
        if done.returncode:
            raise DatapathError(
                errno.EINVAL, f"{name}.c does not compile with {version}:\n{done.stderr.strip()[:4000]}"
            )
        sources = self._sources(name, defines)
        info = f"source {name}.c\ncompiler {version}\ndefines {' '.join(defines) or '-'}\nsources {sources}\n"
        # a note about the object, which counts only once that is there: no start has to wait for the disk
        target.with_suffix(".txt").write_text(info)
        temporary.replace(target)
        log.info("compiled %s.c", name)
