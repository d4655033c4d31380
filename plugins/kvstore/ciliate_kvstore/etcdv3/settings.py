"""Options of the etcd provider, and what they come to: endpoints, TLS, user. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from ciliate.config import ConfigError, Problem

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of both etcd stores (``plugins.etcd``, ``plugins.etcd3``, or ``kvstore-opt`` with that name first)."""

    address: str | list[str] = ""
    """Endpoints: URLs or host:port, several separated by spaces or semicolons; default 127.0.0.1:2379."""
    config: str = ""
    """YAML file of etcd's own clients: endpoints, trusted-ca-file, cert-file, key-file, username, password."""
    ca_file: str = ""
    """CA certificates (PEM) that the server's certificate is checked against; switches TLS on."""
    cert_file: str = ""
    """This client's certificate (PEM)."""
    key_file: str = ""
    """Its key (PEM)."""
    server_name: str = ""
    """Name that the server's certificate has, where it is not the endpoint's."""
    username: str = ""
    """User, where the store asks for one."""
    password: str = ""
    """Its password; better in a file."""
    password_file: str = ""
    """File with the password."""
    qps: NotNegative = 20.0
    """Operations a second on average; 0 is no limit."""
    burst: Annotated[int, msgspec.Meta(ge=1)] = 20
    """Operations at once after a rest."""
    timeout: Positive = 10.0
    """Seconds that one operation may take, with attempts on other endpoints."""
    prefix: str = ""
    """Namespace: all keys are below it, for several clusters in one etcd."""


class Endpoint(msgspec.Struct, frozen=True):
    """One member: what people call it, and the target for gRPC."""

    name: str
    target: str
    tls: bool


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the client works with."""

    endpoints: tuple[Endpoint, ...]
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    server_name: str = ""
    username: str = ""
    password: str = msgspec.field(default="")
    qps: float = 20.0
    burst: int = 20
    timeout: float = 10.0
    prefix: str = ""


class Problems:
    """What is wrong with the options of a section."""

    def __init__(self, section: str) -> None:
        self.found: list[Problem] = []
        self._section = section

    def add(self, field: str, value: str, text: str) -> None:
        """Note one."""
        self.found.append(Problem(f"{self._section}.{field}", value, text))


_CONFIG_FIELDS = {
    "endpoints": "address",
    "trusted-ca-file": "ca_file",
    "ca-file": "ca_file",
    "cert-file": "cert_file",
    "key-file": "key_file",
    "username": "username",
    "password": "password",
}


def settings_of(options: Options, provider: str = "etcd") -> Settings:
    """Read files and endpoints of ``provider``'s options. ConfigError names every field that is wrong."""
    problems = Problems(f"plugins.{provider}")
    options = _with_config(options, problems)
    ca, cert, key = (_read(options, field, problems) for field in ("ca_file", "cert_file", "key_file"))
    if bool(cert) != bool(key) and not problems.found:
        missing = "key_file" if cert else "cert_file"
        problems.add(missing, "", "expected together with the other half of the pair")
    password = (_read(options, "password_file", problems) or b"").decode(errors="replace").strip() or options.password
    if bool(options.username) != bool(password):
        missing = "password" if options.username else "username"
        problems.add(missing, "", "expected: user and password go together")
    endpoints = _endpoints(options, bool(ca or cert), problems)
    if problems.found:
        raise ConfigError(problems.found)
    return Settings(
        endpoints=tuple(endpoints),
        ca=ca,
        cert=cert,
        key=key,
        server_name=options.server_name,
        username=options.username,
        password=password,
        qps=options.qps,
        burst=options.burst,
        timeout=options.timeout,
        prefix=options.prefix,
    )


def _with_config(options: Options, problems: Problems) -> Options:
    """Fill in from etcd's own configuration file what is not given."""
    if not options.config:
        return options
    import yaml

    try:
        data = yaml.safe_load(Path(options.config).read_text())
        if not isinstance(data, dict):
            raise ValueError("a mapping is expected at the top")
        fields: dict[str, Any] = {
            _CONFIG_FIELDS[key]: value
            for key, value in data.items()
            if key in _CONFIG_FIELDS and not getattr(options, _CONFIG_FIELDS[key])
        }
        return msgspec.structs.replace(options, **msgspec.convert(fields, dict[str, str | list[str]]))
    except yaml.YAMLError as error:
        # its own text quotes the line, which may be that of the password
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1} is none" if mark is not None else ""
        problems.add("config", options.config, f"expected etcd's client options in YAML{where}")
        return options
    except (OSError, ValueError) as error:
        problems.add("config", options.config, f"expected etcd's client options in YAML: {error}")
        return options


def _read(options: Options, field: str, problems: Problems) -> bytes | None:
    path = getattr(options, field)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        problems.add(field, path, f"expected a readable file: {error.strerror}")
        return None


def _endpoints(options: Options, tls: bool, problems: Problems) -> list[Endpoint]:
    address = options.address or "127.0.0.1:2379"
    texts = address if isinstance(address, list) else address.replace(";", " ").replace(",", " ").split()
    found = []
    for text in texts:
        try:
            found.append(_endpoint(text, tls))
        except ValueError as error:
            problems.add("address", text, f"expected [http[s]://]host:port: {error}")
    return found


def _endpoint(text: str, tls: bool) -> Endpoint:
    url = urlsplit(text if "://" in text else f"{'https' if tls else 'http'}://{text}")
    if url.scheme not in ("http", "https"):
        raise ValueError(f"scheme {url.scheme!r}")
    if not url.hostname or url.port is None or url.path not in ("", "/"):
        raise ValueError("host or port is missing")
    secure = url.scheme == "https"
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return Endpoint(f"{url.scheme}://{host}:{url.port}", f"{host}:{url.port}", secure)
