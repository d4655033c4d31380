"""Chaining modes: how a container gets, or already has, its device. Providers of the plugin kind ``chaining``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from ciliate.cni.spec import CniResult, Request

INTERFACE_PREFIX = "lxc"


@runtime_checkable
class ChainingMode(Protocol):
    """One way to connect a container.

    The server calls these for one container at a time, for different containers at once. Each may raise CniError;
    any other exception is answered as an internal error and logged.
    """

    async def add(self, request: Request) -> CniResult | dict[str, Any]:
        """Connect the container; on failure nothing that was made may stay. A dict is a finished result object."""

    async def delete(self, request: Request) -> None:
        """Disconnect the container; succeeds where nothing is left, also when its namespace is gone."""

    async def check(self, request: Request) -> None:
        """Raise CniError where the container's network is not as ADD left it."""

    async def collect(self, network: str, valid: frozenset[tuple[str, str]]) -> None:
        """Remove what belongs to ``network`` and to no valid attachment (container id, interface name)."""


@runtime_checkable
class ReportingMode(Protocol):
    """A chaining mode that can say beforehand that ADD would fail; one without this always answers STATUS with yes."""

    async def status(self, request: Request) -> None:
        """Raise CniError with code UNAVAILABLE where no ADD can be served now."""


def host_interface_name(container_id: str, ifname: str) -> str:
    """The node's name for a container interface: always the same, 15 characters, distinct by a 48-bit hash."""
    digest = hashlib.blake2s(f"{container_id}\0{ifname}".encode(), digest_size=6).hexdigest()
    return INTERFACE_PREFIX + digest


class Attachment(msgspec.Struct, frozen=True):
    """Which network a container interface was attached to."""

    network: str
    container_id: str
    ifname: str
    mode: str


class AttachmentStore:
    """The attachments on disk, one small file each: what garbage collection needs to tell networks apart.

    Blocking: call it in a thread.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, attachment: Attachment) -> None:
        """Write one attachment; OSError where the disk refuses."""
        path = self._path(attachment.container_id, attachment.ifname)
        temporary, data = path.with_suffix(".tmp"), msgspec.json.encode(attachment)
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(data)
        temporary.replace(path)

    def load(self) -> list[Attachment]:
        """Every attachment; ValueError naming the file where one is malformed."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Attachment))
            except FileNotFoundError:
                continue
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}: {error}") from error
        return found

    def of_device(self, name: str) -> Attachment | None:
        """The attachment whose device of ours has this name; None where there is none, or it cannot be read."""
        try:
            return msgspec.json.decode((self._directory / f"{name}.json").read_bytes(), type=Attachment)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def keep(self, known: Collection[tuple[str, str]]) -> None:
        """Forget every attachment but these (container id, interface name): those of a crash, and damaged ones."""
        wanted = {f"{host_interface_name(*attachment)}.json" for attachment in known}
        for path in self._directory.glob("*.json"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def remove(self, container_id: str, ifname: str) -> None:
        """Forget one attachment; nothing happens where it is unknown."""
        with contextlib.suppress(FileNotFoundError):
            self._path(container_id, ifname).unlink()

    def _path(self, container_id: str, ifname: str) -> Path:
        return self._directory / f"{host_interface_name(container_id, ifname)}.json"
