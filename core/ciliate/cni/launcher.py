"""Builds the launcher of the CNI executable, once per node, like the datapath. Without a compiler there is none."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

from ciliate import atomicfile

log = logging.getLogger(__name__)
CACHE = Path("/var/cache/ciliate")
COMPILERS = ("clang-16", "clang", "cc", "gcc")
FLAGS = ("-O2", "-s", "-Wall", "-Wextra", "-Werror", "-std=gnu11")
LINKING = (("-static",), ())
"""A static executable starts in half the time; not every node has the libraries for one."""
MARK = b"@ciliate-cni-socket@"
PLACE = 108
"""Bytes that the launcher has for the socket's path: as many as a socket's address has."""
TIMEOUT = 60.0


def build(source: Path, socket: str) -> bytes | None:
    """The launcher for an agent's CNI socket; None where it cannot be built, or the path is too long for a socket."""
    path = socket.encode()
    if len(path) >= PLACE:
        return None
    binary = _cached(source.read_bytes())
    if binary is None or binary.count(MARK) != 1:
        return None
    return binary.replace(MARK + bytes(PLACE - len(MARK)), path + bytes(PLACE - len(path)))


def _cached(code: bytes) -> bytes | None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    digest = hashlib.sha256(b"\0".join([code, compiler.encode(), *(flag.encode() for flag in FLAGS)])).hexdigest()
    kept = CACHE / f"ciliate-cni-{digest[:16]}"
    try:
        if kept.stat().st_uid == 0:
            return kept.read_bytes()
    except OSError:
        pass  # not built yet
    binary = _compile(compiler, code)
    if binary is not None:
        _keep(kept, binary)
    return binary


def _compile(compiler: str, code: bytes) -> bytes | None:
    errors = ""
    with tempfile.TemporaryDirectory(prefix="ciliate-cni-") as directory:
        target = Path(directory) / "ciliate-cni"
        for linking in LINKING:
            command = [compiler, *FLAGS, *linking, "-x", "c", "-", "-o", str(target)]
            done = subprocess.run(command, input=code, capture_output=True, timeout=TIMEOUT, check=False)
            if not done.returncode:
                return target.read_bytes()
            errors = done.stderr.decode(errors="replace").strip()
    log.warning("%s builds no launcher, the executable in Python stands alone: %s", compiler, errors[-300:])
    return None


def _keep(path: Path, binary: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        atomicfile.write_bytes(path, binary, 0o600)
    except OSError as error:
        log.info("%s: %s; the launcher is built anew next time", path, error.strerror)
