"""Endpoint records on disk: one file each, written atomically before the kernel is touched."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from ciliate import atomicfile
from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)


class EndpointStore:
    """The directory of endpoint records. Its methods block; call them in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self) -> None:
        """Make the directory and remove what a crash left half-written."""
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        for leftover in self._directory.glob(".*.tmp"):
            leftover.unlink()

    def save(self, endpoint: Endpoint) -> None:
        """Write one record; OSError where the disk refuses it."""
        atomicfile.write_json(self._path(endpoint.id), endpoint.stored())

    def remove(self, endpoint_id: int) -> None:
        """Remove one record."""
        atomicfile.remove(self._path(endpoint_id))

    def load(self) -> list[Endpoint]:
        """Every readable record by id; an unreadable one is set aside as ``*.broken`` and reported in the log."""
        endpoints = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                endpoints.append(Endpoint.from_stored(atomicfile.read_json(path)))
            except (ValueError, msgspec.ValidationError) as error:
                log.error("endpoint record %s cannot be read and is set aside: %s", path, error)
                path.rename(path.with_suffix(".broken"))
        return endpoints

    def _path(self, endpoint_id: int) -> Path:
        return self._directory / f"{endpoint_id:05d}.json"
