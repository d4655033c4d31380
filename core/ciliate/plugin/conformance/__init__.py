"""The conformance kits: black-box cases that any provider of a kind must pass; the shipped ones pass them too.

`ciliate plugins check TARGET` runs them. Every case gets a stage of its own: fresh directories, and the shipped
providers of what the kind builds on (an identity backend gets a store).
"""

from __future__ import annotations

import asyncio
import importlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from ciliate.config import AgentConfig, load_config
from ciliate.plugin.loading import PluginSettings
from ciliate.plugin.manager import LoadedProvider, PluginManager
from ciliate.plugin.types import KINDS, PluginContext, PluginError
from ciliate.services import Services

CASE_TIMEOUT = 30.0
KITS = ("kvstore", "identity", "ipam")


class Outcome(msgspec.Struct, frozen=True):
    """What one case gave: passed, failed (with the reason) or skipped (no kit for the kind)."""

    kind: str
    provider: str
    case: str
    state: str
    message: str = ""


class Stage:
    """Makes instances of the provider under test, as many as a case wants, over the same directories."""

    def __init__(self, loaded: LoadedProvider, manager: PluginManager, directory: Path, stack: AsyncExitStack) -> None:
        self._loaded = loaded
        self._manager = manager
        self._directory = directory
        self._stack = stack
        self._services = Services()

    def context(self, **changes: Any) -> PluginContext:
        """A context in the case's directories; ``changes`` are fields of the configuration."""
        config = msgspec.structs.replace(_config(self._directory), **changes)
        return PluginContext(config, None, self._directory / "state", self._directory / "run", self._services)

    async def make(self, **changes: Any) -> Any:
        """A started instance; it is stopped at the end of the case, or by ``end``."""
        instance = await self._manager.bring_up(self._loaded, self.context(**changes))
        self._stack.push_async_callback(_stop, instance)
        return instance

    async def end(self, instance: Any) -> None:
        """Stop an instance now."""
        await _stop(instance)

    async def provide(self, kind: str, name: str, service: type[Any]) -> Any:
        """Start a shipped provider that the one under test builds on."""
        instance = await self._manager.bring_up(self._manager.select(kind, name), self.context())
        self._stack.push_async_callback(_stop, instance)
        self._services.add(service, instance)
        return instance


Case = Callable[[Stage], Awaitable[None]]
"""A case: its name is the function's, its promise the first line of its docstring; it raises AssertionError."""


def cases_of(kind: str) -> list[Case]:
    """The cases of a kind; empty where there is no kit yet."""
    if kind not in KITS:
        return []
    cases: list[Case] = importlib.import_module(f"ciliate.plugin.conformance.{kind}").CASES
    return cases


async def run_kit(loaded: LoadedProvider, manager: PluginManager) -> list[Outcome]:
    """Run every case of the provider's kind."""
    kind, name = loaded.kind, loaded.provider.name
    cases = cases_of(kind)
    if not cases:
        return [Outcome(kind, name, "-", "skipped", f"there is no kit for kind {kind!r} yet")]
    return [await _run_case(loaded, manager, case) for case in cases]


async def _run_case(loaded: LoadedProvider, manager: PluginManager, case: Case) -> Outcome:
    kind, provider = loaded.kind, loaded.provider.name
    name = getattr(case, "__name__", str(case)).replace("_", " ")
    try:
        async with asyncio.timeout(CASE_TIMEOUT), _stage(loaded, manager) as stage:
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
async def _stage(loaded: LoadedProvider, manager: PluginManager) -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="ciliate-check-") as text:
        directory = Path(text)
        for name in ("state", "run"):
            (directory / name).mkdir()
        async with AsyncExitStack() as stack:
            yield Stage(loaded, manager, directory, stack)


async def _stop(instance: Any) -> None:
    stop = getattr(instance, "stop", None)
    if stop is not None:
        await stop()


def _config(directory: Path) -> AgentConfig:
    flags = {"state-dir": str(directory / "state"), "run-dir": str(directory / "run"), "node-name": "checked"}
    return load_config(flags).config


async def check_target(target: str) -> list[dict[str, Any]]:
    """Check a module by its import name, or every provider of a plugin or provider name; outcomes as plain data.

    Raises PluginError where nothing of that name is found or the plugin is broken.
    """
    manager = PluginManager.load(PluginSettings())
    found = _of_name(manager, target) or _of_module(manager, target)
    outcomes = [outcome for loaded in found for outcome in await run_kit(loaded, manager)]
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
    except ImportError as error:
        raise PluginError(f"{target!r} is neither an installed plugin nor a module: {error}") from error
    plugin = manager.register(module, target)
    if plugin.error:
        raise PluginError(f"plugin {plugin} is broken: {plugin.error}")
    if not plugin.providers:
        raise PluginError(f"module {target!r} registers no provider: it has no ciliate_register_<kind> hook")
    return [LoadedProvider(provider.kind, provider, plugin) for provider in plugin.providers]
