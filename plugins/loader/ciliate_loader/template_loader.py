"""Programs of each endpoint's own: the compiled object with the endpoint's constants put in, verified and loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging

from ciliate.datapath import bpf, devices, layout
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.libbpf import BpfObject, read
from ciliate.datapath.loader import LoadPlan, Template, load_object

log = logging.getLogger(__name__)
DEFINES = ("CILIATE_TEMPLATE",)
_CONSTANT = "own_endpoint"
# no constant is zero in it, so that the verifier sees every branch that it sees for any endpoint
_SAMPLE = b"\xff" * layout.EP_CONFIG.size


class TemplateLoader:
    """Filters run the endpoint's own programs; a filter is all that holds them, so nothing is left when it goes.

    What is fixed of an endpoint is taken from its entry in the pinned ``ciliate_ep`` when the programs are loaded. What
    changes, the programs read there, so a change of policy or identity needs no load.
    """

    def __init__(self) -> None:
        self._attached: dict[int, int] = {}  # interface index -> endpoint
        self._endpoints: bpf.Map | None = None
        self._programs: Template | None = None
        self._ready: dict[int, BpfObject] = {}
        self._template = ""

    def prepare(self, plan: LoadPlan) -> None:
        """Compile, check that the kernel takes it, and give every attached endpoint new programs, each in one step.

        DatapathError where it does not compile or the kernel rejects it; all endpoints go on by the old programs then.
        """
        path = Compiler(plan.cache).compile("endpoint", (*plan.defines, *DEFINES))
        elf = read(path)
        load_object(elf, "endpoint", _with_constant(plan, _SAMPLE)).close()
        self.close()
        self._endpoints = bpf.Map.open(plan.pins.of("ciliate_ep"))
        self._programs, self._template = Template(elf, "endpoint", plan), path.parent.name
        for ifindex, endpoint in list(self._attached.items()):
            self._renew(ifindex, endpoint)

    def template(self) -> str:
        """The name in the compiler's cache."""
        return self._template

    def _renew(self, ifindex: int, endpoint: int) -> None:
        """Programs of the current template, unless the endpoint or its device is gone since it was attached."""
        try:
            self.attach(ifindex, endpoint)
        except DatapathError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT):
                raise
            del self._attached[ifindex]
            log.info("endpoint %d on device %d is gone and keeps no programs: %s", endpoint, ifindex, error)

    def ready(self, ifindex: int, endpoint: int) -> None:
        """Load the endpoint's programs ahead; an endpoint or device that is gone is told of by ``attach``."""
        with contextlib.suppress(DatapathError):
            self._ready[ifindex] = self._load(ifindex, endpoint)

    def _load(self, ifindex: int, endpoint: int) -> BpfObject:
        if self._programs is None:
            raise DatapathError(errno.EINVAL, f"endpoint {endpoint}: the loader is not prepared")
        return self._programs.load({_CONSTANT: self._constant_of(ifindex, endpoint)})

    def attach(self, ifindex: int, endpoint: int) -> None:
        """Load the endpoint's programs and put them on its device, or replace those there in one step per direction.

        DatapathError: ENOENT where ``ciliate_ep`` has no valid entry of this endpoint on this device, ENODEV where
        the device is gone.
        """
        programs = self._ready.pop(ifindex, None) or self._load(ifindex, endpoint)
        try:
            for name, egress in (("to_container", True), ("from_container", False)):
                # the class id is not read, but the programs of loader "shared" may stand here next
                devices.attach_filter(ifindex, egress, programs.program_fd(name), endpoint, f"ciliate_{name}")
        finally:
            programs.close()
        self._attached[ifindex] = endpoint

    def _constant_of(self, ifindex: int, endpoint: int) -> bytes:
        """The endpoint's entry without what changes."""
        value = self._endpoints.lookup(endpoint.to_bytes(4, "little")) if self._endpoints else None
        if value is not None:
            device, _, ipv4, ipv6, mac, node_mac, number, flags, *_ = layout.EP_CONFIG.unpack(value)
            if flags & layout.EP_VALID and device == ifindex:
                return layout.EP_CONFIG.pack(device, 0, ipv4, ipv6, mac, node_mac, number, 0, 0, 0, 0)
        raise DatapathError(errno.ENOENT, f"endpoint {endpoint}: ciliate_ep has no valid entry with device {ifindex}")

    def detach(self, ifindex: int) -> None:
        """Remove both filters and with them the programs."""
        devices.detach_filters(ifindex)
        self._attached.pop(ifindex, None)

    def close(self) -> None:
        """Close the maps; the programs live on by their filters."""
        while self._ready:
            self._ready.popitem()[1].close()
        if self._endpoints is not None:
            self._endpoints.close()
            self._endpoints = None
        if self._programs is not None:
            self._programs.close()
            self._programs = None


def _with_constant(plan: LoadPlan, value: bytes) -> LoadPlan:
    return dataclasses.replace(plan, constants={**plan.constants, _CONSTANT: value})
