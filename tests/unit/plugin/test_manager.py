"""The plugin manager with plugins that misbehave in every way: each is reported, the rest goes on."""

from __future__ import annotations

import asyncio
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ciliate.config import load_config
from ciliate.plugin import (
    KvstoreProvider,
    LoaderProvider,
    PluginContext,
    PluginError,
    PluginManager,
    PluginSettings,
    hookimpl,
)
from ciliate.plugin.contract import contract
from ciliate.plugin.types import StatusProvider
from ciliate.services import Services

SETTINGS = PluginSettings(hook_timeout=0.3, start_timeout=0.3)


def plugin(**functions: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType("test_plugin")
    for name, function in functions.items():
        function.__name__ = name
        setattr(module, name, hookimpl(function))
    return module


def provider(name: str = "mine", instance: Any = None, **changes: Any) -> KvstoreProvider:
    return KvstoreProvider(name=name, summary="test", factory=lambda context: instance, **changes)


def context(tmp_path: Path) -> PluginContext:
    return PluginContext(load_config().config, None, tmp_path, tmp_path, Services())


def raises() -> Any:
    raise RuntimeError("boom")


def exits() -> Any:
    sys.exit(3)


def hangs() -> Any:
    import threading

    threading.Event().wait(5)


async def _async(node_name: str) -> None:
    """A hook that would never be awaited."""


BAD = [
    ("raises", {"ciliate_register_kvstore": raises}, "hook ciliate_register_kvstore failed: RuntimeError: boom"),
    ("exits", {"ciliate_register_kvstore": exits}, "SystemExit: 3"),
    ("hangs", {"ciliate_register_kvstore": hangs}, "did not return within 0.3 s"),
    ("wrong type", {"ciliate_register_kvstore": lambda: "store"}, "returned str, expected KvstoreProvider"),
    ("nothing", {"ciliate_register_kvstore": lambda: None}, "returned NoneType, expected KvstoreProvider"),
    ("wrong kind", {"ciliate_register_loader": lambda: provider()}, "which is of kind 'kvstore', not 'loader'"),
    ("no name", {"ciliate_register_kvstore": lambda: provider("")}, "expected a lower-case name"),
    ("upper case", {"ciliate_register_kvstore": lambda: provider("Mine")}, "expected a lower-case name"),
    ("misspelt hook", {"ciliate_register_kvstor": lambda: provider()}, "did you mean 'ciliate_register_kvstore'"),
    ("async", {"ciliate_agent_started": _async}, "is async, expected a plain function"),
    ("unknown argument", {"ciliate_agent_started": lambda node: None}, "registration failed"),
]


@pytest.mark.parametrize(("name", "functions", "message"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_plugin_is_reported_and_the_rest_goes_on(name: str, functions: Any, message: str) -> None:
    manager = PluginManager(SETTINGS)
    bad = manager.register(plugin(**functions), "bad")
    good = manager.register(plugin(ciliate_register_kvstore=lambda: provider("good")), "good")
    assert message in bad.error
    assert not good.error
    assert manager.select("kvstore", "good").plugin is good
    with pytest.raises(PluginError, match="bad"):
        manager.select("kvstore", "bad")


def test_an_unknown_name_lists_the_choices_and_the_closest() -> None:
    manager = PluginManager(SETTINGS)
    manager.register(plugin(ciliate_register_kvstore=lambda: [provider("etcd"), provider("embedded")]), "stores")
    with pytest.raises(PluginError, match=r"'embeded' is unknown; there are: embedded, etcd; did you mean 'embedded'"):
        manager.select("kvstore", "embeded")
    with pytest.raises(PluginError, match=r"kind 'kvstores' is unknown; .*did you mean 'kvstore'"):
        manager.select("kvstores", "etcd")


def test_a_clash_names_both_and_a_preference_decides() -> None:
    for prefer, expected in (({}, None), ({"kvstore/mine": "two"}, "two")):
        manager = PluginManager(PluginSettings(prefer=prefer))
        for distribution in ("one", "two"):
            manager.register(plugin(ciliate_register_kvstore=lambda: provider()), f"store-{distribution}", distribution)
        if expected:
            assert manager.select("kvstore", "mine").plugin.distribution == expected
            continue
        with pytest.raises(PluginError, match=r"store-one \(one 0\) and store-two \(two 0\).*prefer-plugins"):
            manager.select("kvstore", "mine")


class Recorder:
    """A provider instance that notes what happens to it."""

    def __init__(self, log: list[str], name: str, fail: str = "") -> None:
        self.log, self.name, self.fail = log, name, fail

    async def start(self) -> None:
        self.log.append(f"start {self.name}")
        if self.fail == "hang":
            await asyncio.Event().wait()
        if self.fail:
            raise OSError(self.fail)

    async def stop(self) -> None:
        self.log.append(f"stop {self.name}")
        if self.name == "stubborn":
            raise OSError("does not stop")


for _name in contract("kvstore"):
    setattr(Recorder, _name, None)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (exits, "factory failed: SystemExit: 3"),
        (raises, "factory failed: RuntimeError: boom"),
        (object, "factory made a object without get, get_prefix"),
    ],
)
async def test_a_factory_that_makes_no_store_is_named(tmp_path: Path, factory: Any, message: str) -> None:
    manager = PluginManager(SETTINGS)
    record = KvstoreProvider(name="mine", summary="", factory=lambda context: factory())
    manager.register(plugin(ciliate_register_kvstore=lambda: record), "store-plugin")
    with pytest.raises(PluginError, match="store-plugin") as caught:
        await manager.start("kvstore", "mine", context(tmp_path))
    assert message in str(caught.value)


async def test_a_time_out_of_the_plugins_own_is_told_as_such(tmp_path: Path) -> None:
    manager = PluginManager(SETTINGS)

    class Slow(Recorder):
        async def start(self) -> None:
            raise TimeoutError("no answer from 192.0.2.1")

    manager.register(plugin(ciliate_register_kvstore=lambda: provider("mine", Slow([], "mine"))), "store-plugin")
    with pytest.raises(PluginError, match=r"start failed: TimeoutError: no answer from 192\.0\.2\.1"):
        await manager.start("kvstore", "mine", context(tmp_path))


async def test_what_nobody_chose_is_left_out_where_it_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Source:
        def status(self) -> tuple[str, str]:
            return "ok", ""

    manager = PluginManager(SETTINGS)
    for name, factory in (("broken", raises), ("good", Source)):
        record = StatusProvider(name=name, summary="", factory=lambda context, factory=factory: factory())
        manager.register(plugin(ciliate_register_status=lambda record=record: record), f"status-{name}", name)
    assert list(await manager.start_all("status", context(tmp_path))) == ["good"]
    assert "status/broken of plugin status-broken" in caplog.text and "goes on without it" in caplog.text
    assert [item.name for item in manager.plugins if item.error] == ["status-broken"]


async def test_started_in_order_stopped_in_reverse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    manager = PluginManager(SETTINGS)
    names = ("first", "stubborn", "last")
    records = [provider(name, Recorder(log, name)) for name in names]
    manager.register(plugin(ciliate_register_kvstore=lambda: records), "stores")
    for name in names:
        await manager.start("kvstore", name, context(tmp_path))
    with caplog.at_level(logging.ERROR):
        await manager.stop()
    assert log == ["start first", "start stubborn", "start last", "stop last", "stop stubborn", "stop first"]
    assert "stubborn" in caplog.text
    assert "does not stop" in caplog.text


@pytest.mark.parametrize(
    ("fail", "message"), [("no route", "start failed: OSError: no route"), ("hang", "took longer")]
)
async def test_a_failed_start_names_the_plugin(tmp_path: Path, fail: str, message: str) -> None:
    manager = PluginManager(SETTINGS)
    record = provider("mine", Recorder([], "mine", fail))
    manager.register(plugin(ciliate_register_kvstore=lambda: record), "store-plugin")
    with pytest.raises(PluginError, match="store-plugin") as caught:
        await manager.start("kvstore", "mine", context(tmp_path))
    assert message in str(caught.value)
    assert manager.running("kvstore") == []


@pytest.mark.parametrize("fail", ["", "no route", "move"])
async def test_switch_keeps_the_old_one_where_the_new_one_fails(tmp_path: Path, fail: str) -> None:
    log: list[str] = []
    manager = PluginManager(SETTINGS)
    records = [
        provider("old", Recorder(log, "old")),
        provider("new", Recorder(log, "new", "no route" if fail == "no route" else "")),
    ]
    manager.register(plugin(ciliate_register_kvstore=lambda: records), "stores")
    await manager.start("kvstore", "old", context(tmp_path))

    def move(old: Recorder, new: Recorder) -> None:
        log.append("move")
        if fail == "move":
            raise ValueError("state does not fit")

    if fail:
        with pytest.raises(PluginError):
            await manager.switch("kvstore", "new", context(tmp_path), move)
        assert manager.running("kvstore") == ["old"]
        assert "stop old" not in log
    else:
        await manager.switch("kvstore", "new", context(tmp_path), move)
        assert manager.running("kvstore") == ["new"]
        assert log == ["start old", "start new", "move", "stop old"]


def test_an_event_hook_that_raises_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    manager = PluginManager(SETTINGS)
    manager.register(plugin(ciliate_policy_changed=lambda revision: heard.append(revision)), "listener")
    manager.register(plugin(ciliate_policy_changed=lambda revision: raises()), "broken")
    manager.register(plugin(ciliate_policy_changed=lambda: heard.append(0)), "incurious")
    manager.register(plugin(ciliate_policy_changed=lambda revision: exits()), "exiting")
    monkeypatch.setattr("ciliate.plugin.manager.SLOW", -1.0)  # now everybody is
    with caplog.at_level(logging.WARNING):
        manager.notify("ciliate_policy_changed", revision=7)
    assert sorted(heard) == [0, 7]
    assert "broken: hook ciliate_policy_changed failed" in caplog.text
    assert "exiting: hook ciliate_policy_changed failed" in caplog.text
    assert "listener: hook ciliate_policy_changed held the agent up" in caplog.text


def test_every_shipped_plugin_loads_and_none_is_imported_to_list_them() -> None:
    manager = PluginManager.load()
    shipped = [item for item in manager.plugins if item.own]
    assert {item.name for item in shipped} >= {
        "kvstore-embedded",
        "identity-kvstore",
        "ipam-host-scope",
        "loader-shared",
        "chaining-generic-veth",
        "chaining-none",
    }
    assert [item.error for item in shipped if item.error] == []


def test_a_disabled_plugin_is_not_imported_and_says_so() -> None:
    manager = PluginManager.load(PluginSettings(disabled=("kvstore-embedded",)))
    with pytest.raises(PluginError, match="disabled by configuration"):
        manager.select("kvstore", "embedded")


def test_a_loader_record_is_no_kvstore() -> None:
    record = LoaderProvider(name="x", summary="", factory=lambda context: None)
    manager = PluginManager(SETTINGS)
    manager.register(plugin(ciliate_register_loader=lambda: record), "loader")
    assert list(manager.providers("loader")) == ["x"]
    assert dict(manager.providers("kvstore")) == {}
