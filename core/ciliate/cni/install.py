"""Puts the CNI executable and its configuration where a container runtime looks for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from ciliate import atomicfile
from ciliate.cni import launcher

EXECUTABLE = "ciliate-cni"
CONFIGURATION = "05-ciliate.conflist"
DEFAULT_BIN_DIR = Path("/opt/cni/bin")
DEFAULT_CONF_DIR = Path("/etc/cni/net.d")
DEFAULT_SOCKET = "/run/ciliate/cni.sock"
CAPABILITIES = ("bandwidth", "portMappings")
"""What a runtime is to tell us of a container."""
CONF_VERSION = "1.0.0"
"""Runtimes in the field know it; 1.1.0 is answered as well where a configuration asks for it."""


class InstallError(Exception):
    """The executable's source is not installed; the text says what is missing."""


def shim_source() -> Path:
    """The executable's source file, found without importing the plugin; InstallError where it is missing."""
    spec = importlib.util.find_spec("ciliate_cni")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        source = Path(directory) / "shim.py"
        if source.is_file():
            return source
    raise InstallError("package ciliate_cni: not installed, expected with its file shim.py")


def install_executable(bin_dir: Path, socket: str = DEFAULT_SOCKET, native: bool = True) -> list[Path]:
    """Write the executable, mode 0755, with the agent's CNI socket as its default; returns what was written.

    ``native``: where a C compiler is there, a launcher (``ciliate-cni``) stands before the executable in Python
    (``ciliate-cni.py`` then).
    """
    shim = shim_source()
    source = shim.read_text(encoding="utf-8")
    line = f'DEFAULT_SOCKET = "{DEFAULT_SOCKET}"'
    if source.count(line) != 1:
        raise InstallError(f"shim.py: expected the line {line!r} exactly once")
    python = source.replace(line, f"DEFAULT_SOCKET = {json.dumps(socket)}").encode()
    bin_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = bin_dir / EXECUTABLE
    binary = launcher.build(shim.with_name("launcher.c"), socket) if native else None
    if binary is None:
        return [_executable(target, python)]
    return [_executable(target.with_name(f"{EXECUTABLE}.py"), python), _executable(target, binary)]


def _executable(target: Path, content: bytes) -> Path:
    atomicfile.write_bytes(target, content, 0o755)
    # the umask may have taken bits away
    target.chmod(0o755)
    return target


def install_configuration(conf_dir: Path, name: str = "ciliate", mtu: int = 0) -> Path:
    """Write the network configuration list; returns its path."""
    plugin: dict[str, object] = {"type": EXECUTABLE, "capabilities": dict.fromkeys(CAPABILITIES, True)}
    if mtu:
        plugin["mtu"] = mtu
    conf_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = conf_dir / CONFIGURATION
    document = {"cniVersion": CONF_VERSION, "name": name, "plugins": [plugin]}
    atomicfile.write_bytes(target, json.dumps(document, indent=2).encode() + b"\n", 0o644)
    return target
