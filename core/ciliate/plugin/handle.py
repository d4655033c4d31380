"""A lasting reference to the provider that is active now, so that a switch reaches everybody who holds it."""

from __future__ import annotations

import inspect
from typing import Any


class Handle:
    """Stands for a provider's instance. Its methods are bound into the handle: a call costs what it costs there.

    ``bind`` puts another instance in its place in one step of the event loop.
    """

    def __init__(self, instance: Any) -> None:
        self.bind(instance)

    def bind(self, instance: Any) -> None:
        """From now on stand for ``instance``."""
        methods = {
            name: getattr(instance, name)
            for name in dir(type(instance))
            if not name.startswith("_") and inspect.isroutine(inspect.getattr_static(instance, name))
        }
        self.__dict__.clear()
        self.__dict__.update(methods, _instance=instance)

    def __getattr__(self, name: str) -> Any:
        """Properties and attributes: asked of the instance each time."""
        return getattr(self.__dict__["_instance"], name)


def current(handle: Any) -> Any:
    """The instance behind a handle; anything else is itself."""
    return handle.__dict__["_instance"] if isinstance(handle, Handle) else handle
