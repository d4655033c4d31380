"""Policy documents of the node: imported through the API, kept on disk, realised in the kernel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ciliate.document import Document
from ciliate.endpoint.realize import Realizer
from ciliate.labels import Label
from ciliate.measure import POLICY_DELAY
from ciliate.policy.importer import PolicyObject, only, parse_documents, parse_stored
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.reader import title
from ciliate.policy.repository import ImportResult, Repository
from ciliate.statefile import StateFile


class PolicyService:
    """Imports and deletes policies one change at a time; the file on disk is written before the kernel is."""

    def __init__(self, repository: Repository, realizer: Realizer, state_dir: Path) -> None:
        self._repository = repository
        self._realizer = realizer
        self.file = StateFile(state_dir / "policies.json", pretty=False)
        self._lock = asyncio.Lock()
        self._encoded: dict[int, tuple[Document, msgspec.Raw]] = {}
        self.import_errors = 0
        self._problems: list[Problem] = []
        self._unread: list[PolicyObject] = []
        """Stored documents of which nothing can be read: kept as they are."""
        self.on_change: Callable[[int], None] = lambda revision: None

    def restore(self) -> int:
        """Import what the last run kept; returns how many documents. Nothing is written to the kernel yet.

        What takes more than there may be by now is kept: it concerns but the endpoints that it selects. What would be
        refused by now is in force as far as it can be read, see ``unread``.
        """
        data = self.file.read()
        documents = msgspec.convert(data or [], list[Document])
        if documents:
            self._restore(documents)
        return len(documents)

    def _restore(self, documents: Sequence[Document]) -> None:
        found, self._problems, unread = parse_stored(documents, self._repository.settings.cluster, "api")
        self._unread = [_unread(document) for document in unread]
        self._repository.import_objects(found, bounded=False)

    def unread(self) -> list[str]:
        """What of the stored policies is not taken any more as it is written, a line for each mistake."""
        places = {title(document.object) for document in self._documents()}
        return [problem.text for problem in self._problems if problem.object in places]

    async def import_documents(self, documents: Sequence[Document]) -> ImportResult:
        """Import all or none, store, and return once the kernel follows; PolicyError lists every problem."""
        began = time.monotonic()
        async with self._lock:
            before = self._documents()
            try:
                # thousands of objects are read beside the loop: others are answered meanwhile
                cluster = self._repository.settings.cluster
                found = await asyncio.to_thread(parse_documents, documents, cluster, "api")
                result = self._repository.import_objects(found)
            except PolicyError:
                self.import_errors += 1
                raise
            told = {title(document.object) for document in documents}
            self._problems = [problem for problem in self._problems if problem.object not in told]
            self._unread = [item for item in self._unread if title(item.document.object) not in told]
            await self._commit(before)
        POLICY_DELAY.observe("api", seconds=time.monotonic() - began)
        return result

    async def delete(self, select: Callable[[Any], bool]) -> tuple[int, int]:
        """Delete the objects that ``select`` picks; returns how many and the revision."""
        async with self._lock:
            refs = [stored.ref for stored in self._repository.objects() if select(stored)]
            unread = [item for item in self._unread if select(item)]
            if refs or unread:
                before = self._documents()
                self._repository.delete(refs)
                self._unread = [item for item in self._unread if item not in unread]
                await self._commit(before)
            return len(refs) + len(unread), self._repository.revision

    async def delete_labelled(self, wanted: Sequence[Label]) -> tuple[int, int]:
        """Delete the rules that carry every wanted label; returns how many and the revision.

        An object keeps its other rules; one without any counts as one.
        """
        async with self._lock:
            found = self._repository.labelled(wanted)
            whole = [item.ref for item, paths in found if len(paths) == len(item.rules)]
            reduced = [
                only(item.document, item.labels_by_rule().keys() - set(paths))
                for item, paths in found
                if len(paths) < len(item.rules)
            ]
            if found:
                before = self._documents()
                self._repository.delete(whole)
                objects = parse_documents(reduced, self._repository.settings.cluster, "api")
                self._repository.import_objects(objects, bounded=False)
                await self._commit(before)
            return sum(max(len(paths), 1) for _, paths in found), self._repository.revision

    async def set_proxies(self, ports: Mapping[str, int], down: Mapping[str, str]) -> None:
        """Say which layer-7 parsers a proxy serves, and at which port; and which of them are down, with the reason.

        Returns once the kernel follows: what counts on a parser that is not served is dropped, in trace too.
        """
        async with self._lock:
            proxies, unserved = tuple(sorted(ports.items())), tuple(sorted(down.items()))
            settings = self._repository.settings
            if (settings.proxies, settings.proxies_down) == (proxies, unserved):
                return
            self._repository.reconfigure(msgspec.structs.replace(settings, proxies=proxies, proxies_down=unserved))
            await self._realizer.realize()
            self.on_change(self._repository.revision)

    async def save(self) -> None:
        """Write the file as it should be."""
        async with self._lock:
            await self._write()

    def _encode(self, document: Document) -> msgspec.Raw:
        known = self._encoded.get(id(document))
        if known is None:
            # the document is kept beside its text, so that no other can get its id
            known = self._encoded[id(document)] = (document, msgspec.Raw(msgspec.json.encode(document)))
        return known[1]

    def _documents(self) -> list[Document]:
        return [stored.document for stored in (*self._repository.objects(), *self._unread)]

    async def _commit(self, before: list[Document]) -> None:
        """Write the file, then the kernel. Where the file cannot be written everything is as ``before``."""
        try:
            await self._write()
        except OSError:
            self._repository.delete([stored.ref for stored in self._repository.objects()])
            self._restore(before)
            raise
        finally:
            kept = {id(document) for document in self._documents()}
            self._encoded = {key: value for key, value in self._encoded.items() if key in kept}
        await self._realizer.realize()
        self.on_change(self._repository.revision)

    async def _write(self) -> None:
        # each document is encoded once in its life: a change costs what changed, and the writing of one file
        await self.file.write(lambda: [self._encode(document) for document in self._documents()])


def _unread(document: Document) -> PolicyObject:
    """Stands for a stored document of which nothing can be read, so that it can be deleted by its name."""
    meta = document.object.get("metadata")
    names = {key: value for key, value in (meta if isinstance(meta, dict) else {}).items() if isinstance(value, str)}
    kind = str(document.object.get("kind"))
    return PolicyObject("", kind, names.get("namespace", ""), names.get("name", ""), (), document)
