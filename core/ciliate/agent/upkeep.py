"""Keeps the kernel as the agent left it: hears of losses, mends them, and tells what cannot be mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ciliate.datapath import Datapath
from ciliate.datapath.losswatch import LossWatch

if TYPE_CHECKING:
    from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)
SHOWN = 5


class Upkeep:
    """A duty (``mend``) and a status source. ``endpoints`` gives every endpoint by id; ``resync`` compares policies."""

    def __init__(
        self, datapath: Datapath, endpoints: Callable[[], Mapping[int, Endpoint]], resync: Callable[[], None]
    ) -> None:
        self._datapath = datapath
        self._endpoints = endpoints
        self._resync = resync
        self._watch: LossWatch | None = None
        self._gone: frozenset[int] = frozenset()
        self._before: list[str] = []
        self._mended = 0

    def start(self, notify: Callable[[], None], moved: Callable[[], None]) -> None:
        """Call ``notify``, which should run ``mend``, when the kernel says that something went, and ``moved`` when the
        node's own addresses changed.
        """
        self._watch = LossWatch(self._datapath.endpoint_devices, notify, self._datapath.programs.devices, moved)
        self._watch.start()

    def stop(self) -> None:
        """Listen no more."""
        if self._watch is not None:
            self._watch.stop()

    async def mend(self) -> None:
        """Compare and put back; DatapathError where something cannot be put back."""
        found = await self._datapath.mend()
        if found.mended:
            self._resync()  # whoever took this may have changed policy entries too
        for text in found.mended:
            self._mended += 1
            log.warning("somebody changed the kernel: %s; it was put back", text)
        for number in found.gone - self._gone:
            self._tell_gone(number)
        self._gone = found.gone
        for text in found.before:
            if text not in self._before:
                log.warning("somebody put %s, before policy is asked: what it lets pass, passes", text)
        self._before = found.before

    def _tell_gone(self, number: int) -> None:
        endpoint = self._endpoints().get(number)
        if endpoint is not None:
            text = f"its device {endpoint.request.host_ifname} was removed; delete the pod, a new one gets a new device"
            log.error("endpoint %d (%s): %s", number, endpoint.pod, text)
            endpoint.note(text)

    def status(self) -> tuple[str, str]:
        """State and one line for people; devices that are gone show as failures of their endpoints."""
        if self._before:
            shown = ", ".join(self._before[:SHOWN]) + ", …" * (len(self._before) > SHOWN)
            return "warning", f"policy is not asked of what others let pass before: {shown}; whose is it?"
        if not self._mended:
            return "ok", "filters, routes and entries of endpoints are in place"
        return "ok", f"filters, routes and entries of endpoints are in place, {self._mended} times put back"
