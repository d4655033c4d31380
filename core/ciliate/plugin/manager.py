"""The plugin manager: loads, selects, starts, swaps and stops providers.

A provider is resolved once and then called directly; hooks are for wiring and life-cycle (a hook call costs 1 to 4 µs).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pluggy

from ciliate.hints import closest
from ciliate.plugin import specs
from ciliate.plugin.contract import PROTOCOLS, missing
from ciliate.plugin.loading import FoundPlugin, PluginSettings, find_plugins
from ciliate.plugin.types import KINDS, PluginContext, PluginError, Provider, UnknownProviderError

log = logging.getLogger(__name__)
T = TypeVar("T")
ANYTHING = (Exception, SystemExit)
"""What a plugin may raise without ending the agent."""
DISPENSABLE = ("status", "metrics", "chaining")
"""Kinds of which many are active and none is needed by the others. Not features: they may be what keeps packets out."""
SLOW = 0.1
"""Seconds that an event hook may take before the log names its plugin."""


@dataclass(frozen=True)
class LoadedProvider:
    """A provider record with the plugin that it came from."""

    kind: str
    provider: Provider
    plugin: FoundPlugin

    def __str__(self) -> str:
        return f"{self.kind}/{self.provider.name} of plugin {self.plugin}"


@dataclass
class _Running:
    loaded: LoadedProvider
    instance: Any


class PluginManager:
    """Every plugin and provider of this process."""

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        self._pluggy = pluggy.PluginManager(specs.PROJECT)
        self._pluggy.add_hookspecs(specs)
        self._providers: dict[tuple[str, str], list[LoadedProvider]] = {}
        self._running: dict[tuple[str, str], _Running] = {}
        self.plugins: list[FoundPlugin] = []

    @classmethod
    def load(cls, settings: PluginSettings | None = None) -> PluginManager:
        """Import and register every plugin that is not disabled. Broken ones are recorded, never raised."""
        manager = cls(settings or PluginSettings())
        for plugin in find_plugins(manager.settings):
            manager.plugins.append(plugin)
            if not plugin.disabled:
                manager._load(plugin)
        return manager

    def register(self, module: Any, name: str, distribution: str = "local", version: str = "0") -> FoundPlugin:
        """Register a module that is already imported: for tests and for `plugins check MODULE`."""
        plugin = FoundPlugin(name, getattr(module, "__name__", name), distribution, version)
        self.plugins.append(plugin)
        self._register(plugin, module)
        return plugin

    def _load(self, plugin: FoundPlugin) -> None:
        try:
            module = _limited(lambda: importlib.import_module(plugin.module), self.settings.hook_timeout)
        except BaseException as error:  # a plugin's import may raise anything, SystemExit included
            if isinstance(error, KeyboardInterrupt):
                raise
            plugin.error = f"import of {plugin.module} failed: {_text(error)}"
            return
        self._register(plugin, module)

    def _register(self, plugin: FoundPlugin, module: Any) -> None:
        try:
            self._pluggy.register(module, name=f"{plugin.distribution}/{plugin.name}")
            self._check_hook_names(module)
        except Exception as error:  # pluggy raises its own and ValueError; a strange module raises more
            plugin.error = f"registration failed: {_text(error)}"
            self._forget(module)
            return
        for kind in KINDS:
            self._collect(plugin, module, kind)
        if plugin.error:
            self._forget(module)

    def _forget(self, module: Any) -> None:
        if self._pluggy.is_registered(module):
            self._pluggy.unregister(module)

    def _check_hook_names(self, module: Any) -> None:
        """A function named like a hook that is no hook is a misspelling, and an error."""
        known = [name for name in vars(specs) if name.startswith("ciliate_")]
        for name, value in vars(module).items():
            marked = getattr(value, f"{specs.PROJECT}_impl", None) is not None
            if marked and name not in known:
                raise PluginError(f"hook {name!r} is unknown{_closest(name, known)}")
            if marked and (inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)):
                raise PluginError(f"hook {name!r} is async, expected a plain function: hooks return at once")

    def _collect(self, plugin: FoundPlugin, module: Any, kind: str) -> None:
        hook = f"ciliate_register_{kind}"
        function = getattr(module, hook, None)
        if function is None or getattr(function, f"{specs.PROJECT}_impl", None) is None:
            return
        try:
            answer = _limited(function, self.settings.hook_timeout)
            records = list(answer) if isinstance(answer, list | tuple) else [answer]
            for record in records:
                _check_record(record, kind)
        except BaseException as error:  # a plugin's hook may raise anything, SystemExit included
            if isinstance(error, KeyboardInterrupt):
                raise
            plugin.error = f"hook {hook} failed: {_text(error)}"
            return
        for record in records:
            plugin.providers.append(record)
            key = (kind, record.name)
            self._providers.setdefault(key, []).append(LoadedProvider(kind, record, plugin))

    def providers(self, kind: str) -> Mapping[str, LoadedProvider]:
        """The usable providers of a kind by name; PluginError where two distributions clash."""
        _check_kind(kind)
        return {name: self._one(kind, name) for known, name in self._providers if known == kind}

    def loaded(self, kind: str) -> list[LoadedProvider]:
        """Every provider of a kind, clashing ones included."""
        return [item for (found, _), items in self._providers.items() if found == kind for item in items]

    def select(self, kind: str, name: str) -> LoadedProvider:
        """The provider of that kind and name.

        Raises PluginError: unknown (with the choices and the closest), clash (with both distributions), disabled, or
        broken (with the plugin's error).
        """
        _check_kind(kind)
        if (kind, name) in self._providers:
            return self._one(kind, name)
        for plugin in self.plugins:
            if plugin.name in (name, f"{kind}-{name}") and (plugin.error or plugin.disabled):
                state = f"broken: {plugin.error}" if plugin.error else "disabled by configuration"
                raise PluginError(f"{kind} {name!r}: plugin {plugin} is {state}")
        choices = sorted(known for found, known in self._providers if found == kind)
        broken = [str(plugin) for plugin in self.plugins if plugin.error]
        hint = f"; broken plugins: {', '.join(broken)}" if broken else ""
        raise UnknownProviderError(
            f"{kind} {name!r} is unknown; there are: {', '.join(choices) or 'none'}{_closest(name, choices)}{hint}"
        )

    def _one(self, kind: str, name: str) -> LoadedProvider:
        candidates = [item for item in self._providers[kind, name] if not item.plugin.error]
        if not candidates:
            broken = self._providers[kind, name][0].plugin
            raise PluginError(f"{kind} {name!r}: plugin {broken} is broken: {broken.error}")
        preferred = self.settings.prefer.get(f"{kind}/{name}")
        if preferred is not None:
            candidates = [item for item in candidates if item.plugin.distribution == preferred] or candidates
        if len(candidates) > 1:
            both = " and ".join(str(item.plugin) for item in candidates)
            remedy = f"prefer one with the option prefer-plugins={kind}/{name}=DISTRIBUTION"
            raise PluginError(f"{kind} {name!r} is provided by {both}; {remedy}")
        return candidates[0]

    async def start(self, kind: str, name: str, context: PluginContext) -> Any:
        """Make and start a provider; remembers it for ``stop``. Raises PluginError with the plugin's name."""
        loaded = self.select(kind, name)
        instance = await self.bring_up(loaded, context)
        self._running[kind, name] = _Running(loaded, instance)
        return instance

    async def bring_up(self, loaded: LoadedProvider, context: PluginContext) -> Any:
        """Make and start an instance that the caller stops; PluginError with the plugin's name."""
        provider = loaded.provider
        try:
            with_options = replace(context, options=_options(provider, context))
            instance = provider.factory(with_options)
        except ANYTHING as error:
            raise PluginError(f"{loaded}: factory failed: {_text(error)}") from error
        if lacks := missing(loaded.kind, instance):
            text = f"factory made a {type(instance).__name__} without {', '.join(lacks)}"
            raise PluginError(f"{loaded}: {text}, expected what {PROTOCOLS[loaded.kind]} says")
        await self._call(loaded, instance, "start")
        return instance

    async def start_all(self, kind: str, context: PluginContext) -> dict[str, Any]:
        """Start every provider of a kind of which many are active; a third party's that fails is left out."""
        started = {}
        for name, loaded in self.providers(kind).items():
            try:
                started[name] = await self.start(kind, name, context)
            except PluginError as error:
                if loaded.plugin.own or kind not in DISPENSABLE:
                    raise
                log.error("%s; the agent goes on without it", error)
                loaded.plugin.error = str(error)
        return started

    async def _call(self, loaded: LoadedProvider, instance: Any, method: str) -> None:
        function = getattr(instance, method, None)
        if function is None:
            return
        limit = self.settings.start_timeout
        clock = asyncio.timeout(limit)
        try:
            result = function()
            if inspect.isawaitable(result):
                async with clock:
                    await result
        except ANYTHING as error:
            if clock.expired():
                raise PluginError(f"{loaded}: {method} took longer than {limit:g} s") from error
            raise PluginError(f"{loaded}: {method} failed: {_text(error)}") from error

    async def stop(self) -> None:
        """Stop what was started, in reverse order; a provider that fails to stop is logged and the rest go on."""
        while self._running:
            _, running = self._running.popitem()
            await self._stop_one(running)

    async def _stop_one(self, running: _Running) -> None:
        try:
            await self._call(running.loaded, running.instance, "stop")
        except PluginError as error:
            log.error("%s", error)

    async def switch(
        self, kind: str, name: str, context: PluginContext, move: Callable[[Any, Any], Any] | None = None
    ) -> Any:
        """Start another provider of a kind in place of the running one; returns the new instance.

        ``move(old, new)`` carries state over, and may be async. Where the new provider fails to start or the move
        fails, the old one stays and PluginError is raised.
        """
        loaded = self.select(kind, name)
        if (kind, name) in self._running:
            return self._running[kind, name].instance
        return await self._replace(loaded, context, move)

    async def restart(self, kind: str, context: PluginContext, move: Callable[[Any, Any], Any] | None = None) -> Any:
        """As ``switch``, to a fresh instance of the provider that runs: something it builds on was switched."""
        (running,) = [running for (found, _), running in self._running.items() if found == kind]
        return await self._replace(running.loaded, context, move)

    async def _replace(
        self, loaded: LoadedProvider, context: PluginContext, move: Callable[[Any, Any], Any] | None
    ) -> Any:
        kind, name = loaded.kind, loaded.provider.name
        current = [key for key in self._running if key[0] == kind]
        instance = await self.bring_up(loaded, context)
        old = [self._running[key] for key in current]
        try:
            for running in old:
                await _maybe(move(running.instance, instance) if move else None)
        except Exception as error:
            await self._stop_one(_Running(loaded, instance))
            raise PluginError(f"{loaded}: moving state failed, the old one stays: {_text(error)}") from error
        fresh = {(kind, name): _Running(loaded, instance)}
        if current:
            # the new one takes the old one's place, so that the order of stopping stays
            pairs = [fresh.popitem() if key == current[0] else (key, item) for key, item in self._running.items()]
            self._running = {key: item for key, item in pairs if key not in current[1:]}
        self._running.update(fresh)
        for running in old:
            await self._stop_one(running)
        return instance

    def running(self, kind: str) -> list[str]:
        """Names of the running providers of a kind."""
        return [name for found, name in self._running if found == kind]

    def active(self) -> list[dict[str, str]]:
        """Every running provider as plain data."""
        return [
            {
                "kind": kind,
                "name": name,
                "distribution": running.loaded.plugin.distribution,
                "version": running.loaded.plugin.version,
                "summary": running.loaded.provider.summary,
            }
            for (kind, name), running in self._running.items()
        ]

    def notify(self, event: str, **arguments: Any) -> None:
        """Call an event hook of every plugin; one that raises is logged with its plugin's name, the rest go on."""
        caller = getattr(self._pluggy.hook, event)
        for implementation in caller.get_hookimpls():
            accepted = {name: arguments[name] for name in implementation.argnames}
            began = time.monotonic()
            try:
                implementation.function(**accepted)
            except ANYTHING:
                log.exception("plugin %s: hook %s failed", implementation.plugin_name, event)
            if (took := time.monotonic() - began) > SLOW:
                text = "plugin %s: hook %s held the agent up for %.1f s; event hooks have to return at once"
                log.warning(text, implementation.plugin_name, event, took)


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _limited(function: Callable[[], T], seconds: float) -> T:
    """Run ``function`` with a time limit, so that a plugin that hangs is reported rather than waited for."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="plugin-hook")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise PluginError(f"did not return within {seconds:g} s")
    ok, value = outcome[0]
    if not ok:
        raise value
    result: T = value
    return result


def _check_record(record: Any, kind: str) -> None:
    expected = KINDS[kind]
    if not isinstance(record, Provider):
        raise PluginError(f"returned {type(record).__name__}, expected {expected.__name__}")
    if not isinstance(record, expected):
        raise PluginError(f"returned a {type(record).__name__}, which is of kind {record.kind!r}, not {kind!r}")
    if not isinstance(record.name, str) or not record.name or record.name != record.name.lower():
        raise PluginError(f"provider name {record.name!r}: expected a lower-case name")
    if not callable(record.factory):
        raise PluginError(f"provider {record.name!r}: factory is not callable")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        choices = f"there are: {', '.join(KINDS)}{_closest(kind, list(KINDS))}"
        raise UnknownProviderError(f"kind {kind!r} is unknown; {choices}")


def _closest(name: str, choices: list[str]) -> str:
    close = closest(name, choices)
    return f"; did you mean {close!r}?" if close else ""


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


def _options(provider: Provider, context: PluginContext) -> Any:
    if provider.options is None:
        return None
    return context.config.plugin_options(provider.name, provider.options)
