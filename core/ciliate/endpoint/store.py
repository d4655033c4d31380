"""Endpoint records on disk: one file each, written atomically before the kernel is touched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ciliate import atomicfile
from ciliate.durable import DurableWriter
from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)


class EndpointStore:
    """The directory of endpoint records. ``open`` and ``load`` block; call them in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer = DurableWriter()

    def open(self) -> None:
        """Make the directory and remove what a crash left half-written."""
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        for leftover in self._directory.glob(".*.tmp"):
            leftover.unlink()

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of which there is no record (blocking)."""
        return [number for number in numbers if not self._path(number).exists()]

    def save(self, endpoint: Endpoint) -> asyncio.Future[None]:
        """Write one record as it is now; the future gets OSError where the disk refuses it."""
        return self._writer.write(self._path(endpoint.id), atomicfile.encode(endpoint.stored()))

    def remove(self, endpoint_id: int) -> asyncio.Future[None]:
        """Remove one record."""
        return self._writer.remove(self._path(endpoint_id))

    def close(self) -> None:
        """Let go of the writing thread."""
        self._writer.close()

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
