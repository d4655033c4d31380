"""A small synchronous client of the agent's REST API over its UNIX socket (standard library only)."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULT_SOCKET = Path("/run/ciliate/ciliate.sock")


class AgentUnavailable(Exception):
    """The agent's socket cannot be reached; the text says which and why."""


class ApiError(Exception):
    """The agent refused a request. ``problem`` is its problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.problem = problem
        super().__init__(str(problem.get("detail") or problem.get("title") or f"HTTP status {status}"))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ApiClient:
    """Requests to one agent. ``timeout`` is in seconds, per request."""

    def __init__(self, socket_path: Path | str = DEFAULT_SOCKET, timeout: float = 30.0) -> None:
        self.socket_path = Path(socket_path)
        self.timeout = timeout

    def request(self, method: str, path: str, body: Any = None, wait: float = 0.0) -> Any:
        """Send one request and return the decoded JSON answer (None where it is empty).

        ``wait`` is how many seconds more than usual the agent may take. Raises AgentUnavailable where nobody answers,
        ApiError on a status of 400 or more.
        """
        connection, response = self._open(method, path, body, self.timeout + wait)
        try:
            return _decode(response, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnavailable(f"the agent on {self.socket_path} went away: {error}") from error
        finally:
            connection.close()

    def stream(self, path: str) -> Iterator[Any]:
        """Yield the JSON lines of an endless answer until the agent ends it."""
        connection, response = self._open("GET", path, None, None)
        try:
            if response.status >= 400:
                _decode(response, response.read())
            while line := self._line(response):
                yield json.loads(line)
        finally:
            connection.close()

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnavailable(f"the agent on {self.socket_path} went away: {error}") from error

    def _open(
        self, method: str, path: str, body: Any, timeout: float | None
    ) -> tuple[_UnixConnection, http.client.HTTPResponse]:
        connection = _UnixConnection(self.socket_path, timeout)
        payload = None if body is None else json.dumps(body)
        headers = {} if payload is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, payload, headers)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise AgentUnavailable(f"no agent answers on {self.socket_path}: {error}") from error


def _decode(response: http.client.HTTPResponse, data: bytes) -> Any:
    if "json" in (response.getheader("Content-Type") or ""):
        value = json.loads(data) if data else None
    else:
        value = data.decode("utf-8", "replace")
    if response.status >= 400:
        raise ApiError(response.status, value if isinstance(value, dict) else {"detail": value})
    return value
