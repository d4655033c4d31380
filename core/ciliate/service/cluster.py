"""From manifests to services: keeps the objects that the API was given and makes the node's services follow them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ciliate.policy.selectors import Service as PolicyService
from ciliate.service.manager import ServiceManager
from ciliate.service.model import ServiceSpec, check
from ciliate.service.objects import Name, ServiceObjects, Surroundings
from ciliate.service.table import Key, Record, frontend_key

log = logging.getLogger(__name__)

SOURCE = "objects"
External = Mapping[Name, PolicyService]


class ClusterServices:
    """Services of Service, Endpoints and EndpointSlice objects. A reflector calls ``upsert`` and ``remove`` as the API
    does. ``around`` tells the node's surroundings at any time; ``on_external`` hears of what toServices may name.
    """

    def __init__(
        self,
        manager: ServiceManager,
        around: Callable[[], Surroundings],
        on_external: Callable[[External], None],
    ) -> None:
        self.objects = ServiceObjects()
        self.refused: dict[tuple[Name, Key], str] = {}
        self._manager = manager
        self._around = around
        self._on_external = on_external

    async def restore(self) -> None:
        """Take the objects of the last run in."""
        objects = await self._manager.stored_objects()
        self.objects.upsert(objects)
        self._on_external(self.objects.external())

    async def upsert(self, objects: Sequence[Mapping[str, Any]], keep: bool = True) -> int:
        """Take objects in, all or none; returns how many services are concerned. ServiceError names what is wrong.

        ``keep``: on disk too, as nobody else tells them again after a restart.
        """
        names = self.objects.upsert(objects)
        if keep:
            await self._manager.keep_objects({_file_name(item): item for item in objects}, ())
        await self._follow(names)
        self._on_external(self.objects.external())
        return len(names)

    def left_out(self, objects: Iterable[Mapping[str, Any]]) -> list[str]:
        """What of these objects, which were taken in, makes no backend; each with object, field and why."""
        return self.objects.left_out(_key_of(item) for item in objects)

    async def remove(self, keys: Collection[tuple[str, str, str]]) -> int:
        """Forget objects by kind, namespace and name, those that are there; returns how many were."""
        found = {key: name for key in keys if (name := self.objects.remove(key)) is not None}
        await self._manager.keep_objects({}, ["/".join(key) for key in found])
        await self._follow(set(found.values()))
        self._on_external(self.objects.external())
        return len(found)

    async def refresh(self) -> None:
        """Follow the node's surroundings: addresses of the node, which backends are on it."""
        await self._follow(self.objects.names())

    async def _follow(self, names: Collection[Name]) -> None:
        around = self._around()
        self.refused = {key: text for key, text in self.refused.items() if key[0] not in names}
        found = [spec for name in sorted(names) for spec in self.objects.specs(name, around)]
        specs = dict(self._without_taken(found))
        gone = [record.id for record in self._ours(names) if record.frontend not in specs]
        if specs or gone:
            await self._manager.upsert(list(specs.values()), gone, SOURCE)

    def _without_taken(self, specs: Iterable[ServiceSpec]) -> Iterator[tuple[Key, ServiceSpec]]:
        """A frontend that another service has stays with it: nobody's traffic is taken away. ``refused`` says which,
        and which cannot be one at all."""
        seen: dict[Key, Name] = {}
        for spec in specs:
            key, name = frontend_key(spec.frontend_address), (spec.namespace, spec.name)
            owner = self._manager.table.by_frontend(key)
            has = seen.get(key) or ((owner.namespace, owner.name) if owner else name)
            wrong = next(check(spec, self._manager.rules), None)
            text = f"belongs to {'/'.join(has)}" if has != name else str(wrong) if wrong else ""
            if text:
                self.refused[name, key] = f"service {'/'.join(name)}: {spec.frontend_address}: {text}"
                log.warning("%s", self.refused[name, key])
                continue
            seen[key] = name
            yield key, spec

    def _ours(self, names: Collection[Name]) -> list[Record]:
        return [record for name in names for record in self._manager.named(name) if record.source == SOURCE]


def _key_of(item: Mapping[str, Any]) -> tuple[str, str, str]:
    meta = item["metadata"]
    return item["kind"], meta.get("namespace") or "default", meta["name"]


def _file_name(item: Mapping[str, Any]) -> str:
    return "/".join(_key_of(item))
