"""After a crash: what was half-made is undone, what was lost is rebuilt from what the kernel has, no guesses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ciliate import atomicfile
from ciliate.cni.modes import AttachmentStore
from ciliate.datapath import Datapath, devices, layout
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.identity import INIT, is_local, reserved_identity
from ciliate.identity.backend import IdentityBackend
from ciliate.ipam import RESERVED_OWNERS, Ipam, IpamError, attachment_owner
from ciliate.statefile import StateFile

if TYPE_CHECKING:
    from ciliate.datapath import EndpointConfig

log = logging.getLogger(__name__)


class Recovery:
    """What the agent does around the restoring of endpoints. ``state`` is the state directory."""

    def __init__(self, state: Path, datapath: Datapath, backend: IdentityBackend, ipam: Ipam) -> None:
        self._records = state / "endpoints"
        self._attachments = AttachmentStore(state / "cni")
        self._datapath = datapath
        self._backend = backend
        self._ipam = ipam

    async def prefix_identities(self, file: StateFile) -> Mapping[str, Any]:
        """Prefix -> number as stored; as the kernel has them where the file is damaged."""
        try:
            data = await asyncio.to_thread(file.read)
        except atomicfile.DamagedError as error:
            log.error("%s; the numbers are taken from the kernel", error)
            file.owed = True
            kernel = await self._datapath.ipcache()
            found = {key: layout.ipcache_identity(value) for key, value in kernel.items()}
            return {str(layout.ipcache_prefix(key)): number for key, number in found.items() if is_local(number)}
        return data if isinstance(data, dict) else {}

    async def mend_records(self) -> None:
        """Write damaged endpoint records anew, from the kernel's maps and what addresses and attachments say."""
        for path in await asyncio.to_thread(lambda: sorted(self._records.glob("*.json"))):
            try:
                await asyncio.to_thread(lambda path=path: Endpoint.from_stored(atomicfile.read_json(path)))  # type: ignore[misc]
            except atomicfile.SchemaError:
                raise
            except (ValueError, msgspec.ValidationError) as error:
                await self._mend(path, str(error))

    async def _mend(self, path: Path, problem: str) -> None:
        endpoint = await self._rebuild(int(path.stem)) if path.stem.isdigit() else None
        if endpoint is None:
            log.error("endpoint record %s is damaged and the kernel knows no such endpoint: %s", path, problem)
            return
        log.error("endpoint record %s is damaged and was written anew from what the kernel has: %s", path, problem)
        await asyncio.to_thread(path.rename, path.with_suffix(".broken"))
        await asyncio.to_thread(atomicfile.write_json, path, endpoint.stored())

    async def _rebuild(self, number: int) -> Endpoint | None:
        config = await self._datapath.left_behind(number)
        present = await asyncio.to_thread(devices.list_endpoint_devices)
        name = next((name for name, index in present.items() if config and index == config.ifindex), "")
        attachment = await asyncio.to_thread(self._attachments.of_device, name) if name else None
        identity = reserved_identity(INIT) if config and config.identity == INIT else None
        if config and identity is None:
            identity = self._backend.identities().get(config.identity)
        if config is None or attachment is None or identity is None:
            return None
        namespace, _, pod = self._pod_of(config).partition("/")
        request = EndpointRequest(
            container_id=attachment.container_id,
            container_ifname=attachment.ifname,
            host_ifname=name,
            host_ifindex=config.ifindex,
            host_mac=config.node_mac,
            mac=config.mac,
            ipv4=config.ipv4,
            ipv6=config.ipv6,
            pod_namespace=namespace if pod else "",
            pod_name=pod,
            # labels that came with the CNI call are lost as such; those of the identity hold until the pod's are told
            labels={label.key: label.value for label in identity.labels if label.source == "k8s"} if not pod else {},
            mode=attachment.mode,
        )
        endpoint = Endpoint(number, request, identity.labels)
        endpoint.identity = identity.id
        return endpoint

    def _pod_of(self, config: EndpointConfig) -> str:
        owners = self._ipam.owners()
        found = next((owners[address] for address in config.addresses if address in owners), "")
        return found.partition(" ")[0]

    async def clean(self, endpoints: Iterable[Endpoint]) -> None:
        """Undo half-made endpoints: devices, addresses, attachments and entries of maps that no endpoint owns."""
        known = list(endpoints)
        await self._claim_addresses(known)
        await self._remove_devices({endpoint.request.host_ifname for endpoint in known})
        await self._release_addresses({address for endpoint in known for address in endpoint.addresses})
        forgotten = await self._datapath.forget_unknown({endpoint.id for endpoint in known})
        if forgotten:
            log.warning("the kernel's entries of endpoints %s, which are gone, were removed", forgotten)
        await asyncio.to_thread(
            self._attachments.keep,
            {(endpoint.request.container_id, endpoint.request.container_ifname) for endpoint in known},
        )
        await self._backend.settle()

    async def _claim_addresses(self, endpoints: Iterable[Endpoint]) -> None:
        """Addresses that an endpoint has but the allocator does not know, as after the loss of its file."""
        held = self._ipam.owners()
        for endpoint in endpoints:
            request = endpoint.request
            if request.mode != "none" or all(address in held for address in endpoint.addresses):
                continue
            owner = attachment_owner(endpoint.pod, request.container_id, request.container_ifname)
            log.warning("endpoint %d: its addresses were free and are claimed for %s", endpoint.id, owner)
            try:
                await self._ipam.claim(owner, endpoint.addresses)
            except IpamError as error:
                log.error("endpoint %d (%s): %s", endpoint.id, endpoint.pod, error)

    async def _remove_devices(self, names: set[str]) -> None:
        for name in await asyncio.to_thread(devices.list_endpoint_devices):
            if name not in names:
                log.warning("device %s belongs to no endpoint and is removed", name)
                await asyncio.to_thread(devices.delete_device, name)

    async def _release_addresses(self, used: set[Any]) -> None:
        orphans = {owner for address, owner in self._ipam.owners().items() if address not in used}
        for owner in sorted(orphans - RESERVED_OWNERS):
            log.warning("addresses of %s belong to no endpoint and are released", owner)
            await self._ipam.release(owner)


def remove_temporary_files(state: Path) -> None:
    """Remove what an agent that was killed while it wrote left; only the holder of the state's lock may."""
    for pattern in (".*.tmp", "endpoints/.*.tmp", "cni/*.tmp", "templates/*/*.tmp.o", "templates/*/.*.tmp"):
        for path in state.glob(pattern):
            path.unlink(missing_ok=True)
