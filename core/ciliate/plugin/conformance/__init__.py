"""The conformance kits: black-box cases that any provider of a kind must pass; the shipped ones pass them too.

`ciliate plugins check TARGET` runs them. Every case gets a stage of its own: fresh directories, and the configured
providers of what the kind builds on (an identity backend gets a store). A store that is a server elsewhere has an
option ``prefix``, a namespace below which all its keys are: each case gets a fresh one, which is emptied at the end.
"""

from __future__ import annotations

import asyncio
import importlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ciliate.config import AgentConfig, load_config
from ciliate.kvstore import Kvstore
from ciliate.plugin.loading import PluginSettings
from ciliate.plugin.manager import LoadedProvider, PluginManager
from ciliate.plugin.types import KINDS, PluginContext, PluginError
from ciliate.services import Services

T = TypeVar("T")
CASE_TIMEOUT = 60.0
NAMESPACE = "ciliate-check-"
KITS = ("kvstore", "identity", "ipam", "masquerade")


class Outcome(msgspec.Struct, frozen=True):
    """What one case gave: passed, failed (with the reason) or skipped (no kit for the kind)."""

    kind: str
    provider: str
    case: str
    state: str
    message: str = ""


class Stage:
    """Makes instances of the provider under test, as many as a case wants, over the same directories."""

    def __init__(
        self, loaded: LoadedProvider, manager: PluginManager, config: AgentConfig, stack: AsyncExitStack
    ) -> None:
        self._loaded = loaded
        self._manager = manager
        self._config = config
        self._stack = stack
        self._services = Services()

    def context(self, **changes: Any) -> PluginContext:
        """A context in the case's directories; ``changes`` are fields of the configuration."""
        config = msgspec.structs.replace(self._config, **changes)
        return PluginContext(config, None, Path(config.state_dir), Path(config.run_dir), self._services)

    async def make(self, **changes: Any) -> Any:
        """A started instance; it is stopped at the end of the case, or by ``end``."""
        instance = await self._manager.bring_up(self._loaded, self.context(**changes))
        self._stack.push_async_callback(_stop, instance)
        return instance

    async def another(self) -> Any:
        """A started instance of another provider of the same kind that works here, one of those that are shipped.

        AssertionError where there is none.
        """
        idle = {self._loaded.provider.name, "none"}
        for loaded in self._manager.loaded(self._loaded.kind):
            if loaded.provider.name not in idle and loaded.plugin.own:
                instance = await self._manager.bring_up(loaded, self.context())
                self._stack.push_async_callback(_stop, instance)
                return instance
        raise AssertionError(f"there is no other provider of kind {self._loaded.kind} to check it with")

    async def end(self, instance: Any) -> None:
        """Stop an instance now."""
        await _stop(instance)

    def offer(self, service: type[T], instance: T) -> None:
        """Let instances that are made from now on find this service."""
        self._services.add(service, instance)

    async def provide(self, kind: str, service: type[Any]) -> Any:
        """Start the configured provider that the one under test builds on."""
        loaded = self._manager.select(kind, self._config.chosen_providers()[kind])
        instance = await self._manager.bring_up(loaded, self.context())
        self._stack.push_async_callback(_stop, instance)
        self._services.add(service, instance)
        return instance

    async def empty(self) -> None:
        """Remove what the case left in a namespace of a server."""
        for loaded in self._manager.loaded("kvstore"):
            name = loaded.provider.name
            below = Kvstore in self._services and name == self._config.kvstore
            if (below or loaded.provider is self._loaded.provider) and self._config.plugins.get(name, {}).get(
                "prefix", ""
            ).startswith(NAMESPACE):
                store = await self._manager.bring_up(loaded, self.context())
                await store.delete_prefix("")
                await _stop(store)


Case = Callable[[Stage], Awaitable[None]]
"""A case: its name is the function's, its promise the first line of its docstring; it raises AssertionError."""


def cases_of(kind: str) -> list[Case]:
    """The cases of a kind; empty where there is no kit yet."""
    if kind not in KITS:
        return []
    cases: list[Case] = importlib.import_module(f"ciliate.plugin.conformance.{kind}").CASES
    return cases


async def run_kit(loaded: LoadedProvider, manager: PluginManager, base: AgentConfig | None = None) -> list[Outcome]:
    """Run every case of the provider's kind; ``base`` is the configuration where it needs one."""
    kind, name = loaded.kind, loaded.provider.name
    cases = cases_of(kind)
    if not cases:
        return [Outcome(kind, name, "-", "skipped", f"there is no kit for kind {kind!r} yet")]
    if (kind, name) == ("masquerade", "none"):
        return [Outcome(kind, name, "-", "skipped", "it promises nothing")]
    base = base or load_config().config
    return [await _run_case(loaded, manager, case, base) for case in cases]


async def _run_case(loaded: LoadedProvider, manager: PluginManager, case: Case, base: AgentConfig) -> Outcome:
    kind, provider = loaded.kind, loaded.provider.name
    name = getattr(case, "__name__", str(case)).replace("_", " ")
    try:
        async with asyncio.timeout(CASE_TIMEOUT), _stage(loaded, manager, base) as stage:
            await case(stage)
    except AssertionError as error:
        return Outcome(kind, provider, name, "failed", f"{_promise(case)} But: {error}")
    except TimeoutError:
        return Outcome(kind, provider, name, "failed", f"{_promise(case)} But: no end within {CASE_TIMEOUT:g} s")
    except Exception as error:  # a provider under test may raise anything
        return Outcome(kind, provider, name, "failed", f"{_promise(case)} But: {type(error).__name__}: {error}")
    return Outcome(kind, provider, name, "passed")


def _promise(case: Case) -> str:
    return (case.__doc__ or "").strip().splitlines()[0]


@asynccontextmanager
async def _stage(loaded: LoadedProvider, manager: PluginManager, base: AgentConfig) -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="ciliate-check-") as text:
        config = _config(base, Path(text), manager)
        stack = AsyncExitStack()
        stage = Stage(loaded, manager, config, stack)
        async with stack:
            yield stage
        await stage.empty()


async def _stop(instance: Any) -> None:
    stop = getattr(instance, "stop", None)
    if stop is not None:
        await stop()


def _config(base: AgentConfig, directory: Path, manager: PluginManager) -> AgentConfig:
    """The configuration of a case: directories of its own, and a namespace in every store that has some."""
    for name in ("state", "run"):
        (directory / name).mkdir()
    plugins = dict(base.plugins)
    for loaded in manager.loaded("kvstore"):
        options = loaded.provider.options
        if options is not None and any(field.name == "prefix" for field in msgspec.structs.fields(options)):
            section = plugins.get(loaded.provider.name, {})
            plugins[loaded.provider.name] = {**section, "prefix": f"{NAMESPACE}{uuid.uuid4().hex}/"}
    places = {"state_dir": str(directory / "state"), "run_dir": str(directory / "run")}
    return msgspec.structs.replace(base, **places, plugins=plugins, node_name="checked")


async def check_target(target: str, config: AgentConfig | None = None) -> list[dict[str, Any]]:
    """Check a module by its import name, or every provider of a plugin or provider name; outcomes as plain data.

    ``config`` says where servers are, and which store an identity backend gets.
    Raises PluginError where nothing of that name is found or the plugin is broken.
    """
    manager = PluginManager.load(PluginSettings())
    found = _of_name(manager, target) or _of_module(manager, target)
    outcomes = [outcome for loaded in found for outcome in await run_kit(loaded, manager, config)]
    report: list[dict[str, Any]] = msgspec.to_builtins(outcomes)
    return report


def _of_name(manager: PluginManager, target: str) -> list[LoadedProvider]:
    for plugin in manager.plugins:
        if target in (plugin.name, plugin.module) and plugin.error:
            raise PluginError(f"plugin {plugin} is broken: {plugin.error}")
    return [
        loaded
        for kind in KINDS
        for loaded in manager.loaded(kind)
        if target in (loaded.provider.name, loaded.plugin.name, loaded.plugin.module)
    ]


def _of_module(manager: PluginManager, target: str) -> list[LoadedProvider]:
    try:
        module = importlib.import_module(target)
    except (ImportError, TypeError, ValueError) as error:  # the last two for what is no module's name
        raise PluginError(f"{target!r} is neither an installed plugin nor a module: {error}") from error
    plugin = manager.register(module, target)
    if plugin.error:
        raise PluginError(f"plugin {plugin} is broken: {plugin.error}")
    if not plugin.providers:
        raise PluginError(f"module {target!r} registers no provider: it has no ciliate_register_<kind> hook")
    return [LoadedProvider(provider.kind, provider, plugin) for provider in plugin.providers]
