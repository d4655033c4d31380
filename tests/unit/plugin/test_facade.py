"""The typed facade holds what the specifications say, and a handle follows a switch. Tier unit."""

from __future__ import annotations

import inspect

import pytest

from ciliate.plugin import Handle, Hooks, PluginManager, PluginSettings, specs
from ciliate.plugin.specs import hookimpl

EVENTS = {
    name: inspect.signature(value)
    for name, value in vars(specs).items()
    if name.startswith("ciliate_") and not name.startswith("ciliate_register_")
}


def test_every_event_has_a_method_with_the_same_parameters() -> None:
    methods = {
        f"ciliate_{name}": inspect.signature(value)
        for name, value in vars(Hooks).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert {name: [*sign.parameters.values()][1:] for name, sign in methods.items()} == {
        name: [*sign.parameters.values()] for name, sign in EVENTS.items()
    }


@pytest.mark.parametrize("event", EVENTS)
def test_each_method_reaches_the_plugin(event: str) -> None:
    heard = []
    arguments = {name: f"<{name}>" for name in EVENTS[event].parameters}
    body = f"def {event}({', '.join(arguments)}): heard.append(dict({', '.join(f'{n}={n}' for n in arguments)}))"
    scope: dict = {"heard": heard}
    exec(body, scope)
    plugin = type("plugin", (), {event: staticmethod(hookimpl(scope[event]))})
    manager = PluginManager(PluginSettings())
    assert manager.register(plugin, "listener").error == ""
    getattr(Hooks(manager), event.removeprefix("ciliate_"))(**arguments)
    assert heard == [arguments]


class One:
    """A provider."""

    limit = 1

    def __init__(self) -> None:
        self.calls = 0

    @property
    def size(self) -> int:
        return self.calls

    def call(self) -> str:
        self.calls += 1
        return "one"


class Two(One):
    """Another."""

    limit = 2

    def call(self) -> str:
        return "two"


def test_a_handle_stands_for_the_instance_and_follows() -> None:
    first = One()
    handle = Handle(first)
    assert (handle.call(), handle.size, handle.limit) == ("one", 1, 1)
    assert handle.call == first.call
    handle.bind(Two())
    assert (handle.call(), handle.size, handle.limit) == ("two", 0, 2)
    with pytest.raises(AttributeError, match="missing"):
        _ = handle.missing
