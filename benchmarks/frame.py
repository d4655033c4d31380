"""What the plugin frame costs: commands, loading plugins, a resolved provider against a direct call.

Usage: python benchmarks/frame.py    (needs no root)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from report import Figure, seconds, table

from ciliate.plugin import Handle, Hooks, PluginManager, PluginSettings, hookimpl

ROUNDS = 11
CALLS = 200_000
BIN = Path(sys.executable).parent


def cpu_of(command: Sequence[str]) -> float:
    """Processor time of a command in seconds: user and system, median of several runs."""
    found = []
    for _ in range(ROUNDS):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        found.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return median(found)


def loading() -> float:
    """Wall time in seconds of importing and registering every shipped plugin, in fresh processes."""
    code = (
        "import time; from ciliate.plugin import PluginManager; start = time.perf_counter(); "
        "manager = PluginManager.load(); took = time.perf_counter() - start; "
        "assert not [p for p in manager.plugins if p.error]; print(took)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(ROUNDS)]
    return median(float(run.stdout) for run in runs)


class Provider:
    """A provider with one method that does nothing."""

    def call(self, key: str) -> None:
        """Nothing."""


def cost(target: Provider) -> float:
    """Seconds per call when the method is looked up each time, as code that holds a provider does."""
    start = time.perf_counter()
    for _ in range(CALLS):
        target.call("key")
    return (time.perf_counter() - start) / CALLS


def hook_cost() -> float:
    """Seconds per call of an event hook with one listener, through the typed facade."""

    @hookimpl
    def ciliate_policy_changed(revision: int) -> None:
        """Nothing."""

    manager = PluginManager(PluginSettings())
    manager.register(SimpleNamespace(ciliate_policy_changed=ciliate_policy_changed), "listener")
    hooks = Hooks(manager)
    start = time.perf_counter()
    for number in range(CALLS // 10):
        hooks.policy_changed(number)
    return (time.perf_counter() - start) / (CALLS // 10)


def calls() -> tuple[float, float]:
    """Seconds per call of an instance and of a handle on it, interleaved, medians."""
    direct: list[float] = []
    handled: list[float] = []
    instance = Provider()
    handle = Handle(instance)
    for _ in range(ROUNDS):
        direct.append(cost(instance))
        handled.append(cost(handle))  # type: ignore[arg-type]
    return median(direct), median(handled)


def main() -> None:
    """Measure and print."""
    listing = cpu_of([str(BIN / "ciliate"), "plugins", "list"])
    usage = cpu_of([str(BIN / "ciliate"), "--help"])
    nothing = cpu_of([sys.executable, "-c", "pass"])
    loaded = loading()
    direct, handled = calls()
    hook = hook_cost()
    extra = f"the target is a method call without a handle; a handle adds {seconds(handled - direct)}"
    beside = f"an empty Python: {seconds(nothing)}"
    figures = [
        Figure("ciliate plugins list, CPU", seconds(listing), "< 250 ms", listing / 0.25, beside),
        Figure("ciliate --help, CPU", seconds(usage), "< 150 ms", usage / 0.15, beside),
        Figure("loading every shipped plugin", seconds(loaded), "< 50 ms", loaded / 0.05),
        Figure("call of a provider through its handle", seconds(handled), seconds(direct), handled / direct, extra),
        Figure("the same as a hook", seconds(hook), "", 0.0, "for wiring only"),
    ]
    print(table(figures))


if __name__ == "__main__":
    main()
