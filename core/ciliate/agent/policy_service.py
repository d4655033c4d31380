"""Policy documents of the node: imported through the API, kept on disk, realised in the kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ciliate import atomicfile
from ciliate.endpoint.realize import Realizer
from ciliate.manifest import Document
from ciliate.policy.repository import ImportResult, Repository


class PolicyService:
    """Imports and deletes policies one change at a time; the file on disk is written before the kernel is."""

    def __init__(self, repository: Repository, realizer: Realizer, state_dir: Path) -> None:
        self._repository = repository
        self._realizer = realizer
        self._file = state_dir / "policies.json"
        self._lock = asyncio.Lock()
        self.on_change: Callable[[int], None] = lambda revision: None

    def restore(self) -> int:
        """Import what the last run kept; returns how many documents. Nothing is written to the kernel yet."""
        data = atomicfile.read_json(self._file)
        documents = msgspec.convert(data or [], list[Document])
        if documents:
            self._repository.import_documents(documents, source="api")
        return len(documents)

    async def import_documents(self, documents: Sequence[Document]) -> ImportResult:
        """Import all or none, store, and return once the kernel follows; PolicyError lists every problem."""
        async with self._lock:
            result = self._repository.import_documents(documents, source="api")
            await self._commit()
            return result

    async def delete(self, select: Callable[[Any], bool]) -> tuple[int, int]:
        """Delete the objects that ``select`` picks; returns how many and the revision."""
        async with self._lock:
            refs = [stored.ref for stored in self._repository.objects() if select(stored)]
            if refs:
                self._repository.delete(refs)
                await self._commit()
            return len(refs), self._repository.revision

    async def _commit(self) -> None:
        documents = [msgspec.to_builtins(stored.document) for stored in self._repository.objects()]
        await asyncio.to_thread(atomicfile.write_json, self._file, documents)
        await self._realizer.realize()
        self.on_change(self._repository.revision)
