"""The registry through which a plugin reaches core's public services, by type."""

from __future__ import annotations

from typing import Any, TypeVar, cast

T = TypeVar("T")


class ServiceMissingError(LookupError):
    """A service was asked for that is not there (yet); the text names it and those that are."""


class Services:
    """Typed look-up: ``services.get(Kvstore)`` gives the running key-value store."""

    def __init__(self) -> None:
        self._instances: dict[type[Any], Any] = {}

    def add(self, service: type[T], instance: T) -> None:
        """Offer ``instance`` as ``service``; a later one takes the place of an earlier one."""
        self._instances[service] = instance

    def __contains__(self, service: type[Any]) -> bool:
        """Whether somebody offers ``service``."""
        return service in self._instances

    def get(self, service: type[T]) -> T:
        """The instance of ``service``. Raises ServiceMissingError where nobody offers it."""
        try:
            return cast("T", self._instances[service])
        except KeyError:
            known = ", ".join(sorted(item.__name__ for item in self._instances)) or "none"
            raise ServiceMissingError(f"service {service.__name__} is not available; there are: {known}") from None
