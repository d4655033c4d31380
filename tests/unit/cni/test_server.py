"""The server with its socket and frames, and the executable itself, against a mode that only takes notes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ciliate.cni.install import install_configuration, install_executable, shim_source
from ciliate.cni.modes import Attachment, AttachmentStore, host_interface_name
from ciliate.cni.server import CniServer
from ciliate.cni.spec import Address, CniError, CniResult, ErrorCode, Request

CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "ciliate-cni"}


class Recorder:
    """A chaining mode that keeps what it is asked, and counts how many of one container run at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.running: dict[str, int] = {}
        self.most_together = 0
        self.most_of_one = 0
        self.ten_together = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def _note(self, request: Request) -> None:
        self.calls.append((str(request.command), request.container_id))
        self.running[request.container_id] = self.running.get(request.container_id, 0) + 1
        self.most_of_one = max(self.most_of_one, self.running[request.container_id])
        self.most_together = max(self.most_together, sum(self.running.values()))
        if self.most_together >= 10:
            self.ten_together.set()
        try:
            await self.gate.wait()
            if self.failure:
                raise self.failure
        finally:
            self.running[request.container_id] -= 1

    async def add(self, request: Request) -> CniResult:
        await self._note(request)
        return CniResult(ips=[Address("10.200.0.5/32")])

    async def delete(self, request: Request) -> None:
        await self._note(request)

    async def check(self, request: Request) -> None:
        await self._note(request)

    async def collect(self, network: str, valid: frozenset[tuple[str, str]]) -> None:
        self.calls.append(("GC", network))


@pytest.fixture
def mode() -> Recorder:
    return Recorder()


@pytest.fixture
async def server(tmp_path: Path, mode: Recorder) -> AsyncIterator[CniServer]:
    server = CniServer(tmp_path / "cni.sock", {"none": mode})
    await server.start()
    yield server
    await server.stop()


def variables(command: str, tmp_path: Path, **changes: str) -> dict[str, str]:
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "",
        "CNI_IFNAME": "eth0",
        "CILIATE_CNI_SOCKET": str(tmp_path / "cni.sock"),
        **changes,
    }


EXECUTABLE: list[str] = []


@pytest.fixture(autouse=True, params=["python", "launcher"])
def executable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both executables answer alike: the one in Python, and the launcher before it."""
    written = install_executable(tmp_path_factory.mktemp("cni-bin"), native=request.param == "launcher")
    if request.param == "launcher" and len(written) == 1:
        pytest.skip("no C compiler here")
    EXECUTABLE[:] = [str(written[-1])]
    yield
    EXECUTABLE.clear()


async def shim(environment: Mapping[str, str | bytes], config: dict[str, Any] | bytes = b"") -> tuple[int, Any]:
    process = await asyncio.create_subprocess_exec(
        *EXECUTABLE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in environment.items()},
    )
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    output, _ = await process.communicate(data or json.dumps(CONFIG).encode())
    return process.returncode or 0, json.loads(output) if output else None


async def test_del_check_gc_and_status_answer_nothing(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    assert await shim(variables("DEL", tmp_path)) == (0, None)
    assert await shim(variables("STATUS", tmp_path)) == (0, None)
    assert await shim(variables("GC", tmp_path), {**CONFIG, "cni.dev/valid-attachments": []}) == (0, None)
    assert mode.calls == [("DEL", "c1"), ("GC", "net")]


async def test_an_error_carries_code_message_and_version(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    mode.failure = CniError(ErrorCode.TRY_AGAIN, "not now")
    code, answer = await shim(variables("DEL", tmp_path), {**CONFIG, "cniVersion": "0.4.0"})
    assert (code, answer) == (1, {"cniVersion": "0.4.0", "code": 11, "msg": "not now"})


async def test_an_unforeseen_error_is_answered_too(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    mode.failure = ZeroDivisionError("oh")
    code, answer = await shim(variables("DEL", tmp_path))
    assert code == 1 and answer["code"] == ErrorCode.INTERNAL and "ZeroDivisionError" in answer["msg"]


async def test_a_descriptor_that_is_no_network_namespace_is_refused(server: CniServer, tmp_path: Path) -> None:
    for path, text in (("/etc/hostname", "expected a network namespace"), ("/proc/self/ns/net", "node's own")):
        code, answer = await shim(variables("ADD", tmp_path, CNI_NETNS=path))
        assert code == 1 and answer["code"] == 4
        assert "CNI_NETNS" in answer["msg"] and text in answer["msg"]


async def test_an_unknown_mode_lists_the_known_ones(server: CniServer, tmp_path: Path) -> None:
    code, answer = await shim(variables("DEL", tmp_path), {**CONFIG, "chaining-mode": "bridge"})
    assert code == 1 and answer["code"] == 7
    assert "chaining-mode" in answer["msg"] and "none" in answer["msg"]


async def test_many_containers_at_once_but_one_request_each(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    mode.gate.clear()
    config = json.dumps(CONFIG).encode()
    requests = [
        asyncio.create_task(server.answer(variables("DEL", tmp_path, CNI_CONTAINERID=f"c{number % 10}"), config, None))
        for number in range(30)
    ]
    await asyncio.wait_for(mode.ten_together.wait(), 10)
    mode.gate.set()
    assert {code for code, _ in await asyncio.gather(*requests)} == {0}
    assert (len(mode.calls), mode.most_of_one) == (30, 1)


async def test_garbage_on_the_socket_harms_nobody(server: CniServer, tmp_path: Path) -> None:
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"CNI1" + b"\xff" * 8):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "cni.sock")
        writer.write(garbage)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
    assert await shim(variables("DEL", tmp_path)) == (0, None)


DEEP = b"[" * 20000
HOSTILE: list[tuple[int, str, str, bytes | None, dict[str, str | bytes]]] = [
    (6, "not JSON", "DEL", DEEP, {}),
    (6, "not JSON", "DEL", b'{"cniVersion":"1.0.0","x":' + DEEP, {}),
    (6, "not JSON", "DEL", b'{"cniVersion":"\xff"}', {}),
    (6, "not JSON", "DEL", b'{"cniVersion":' + b"9" * 5000 + b"}", {}),
    (6, "not JSON", "DEL", b'{"cniVersion":NaN}', {}),
    (6, "standard input", "VERSION", DEEP, {}),
    (4, "CNI_COMMAND", "UPDATE", DEEP, {}),
    (7, "bytes given", "DEL", b'{"x":"' + b"y" * 4_200_000 + b'"}', {}),
    (4, "CNI_ARGS", "DEL", None, {"CNI_ARGS": b"K8S_POD_NAME=\xff"}),
    (4, "CNI_ARGS", "DEL", None, {"CNI_ARGS": "K8S_POD_NAME=a\nb"}),
    (4, "K8S_POD_NAMESPACE", "DEL", None, {"CNI_ARGS": "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=c"}),
    (4, "CNI_ARGS", "DEL", None, {"CNI_ARGS": "=x"}),
    (4, "CNI_CONTAINERID", "DEL", None, {"CNI_CONTAINERID": b"\xff"}),
    (4, "CNI_IFNAME", "DEL", None, {"CNI_IFNAME": "é" * 8}),
    (4, "CNI_IFNAME", "DEL", None, {"CNI_IFNAME": "a:b"}),
    (4, "CNI_IFNAME", "DEL", None, {"CNI_IFNAME": "a\x01"}),
    (4, "CNI_NETNS", "ADD", None, {"CNI_NETNS": "FIFO"}),
    (4, "CNI_NETNS", "ADD", None, {"CNI_NETNS": "/proc/self/ns/uts"}),
    (4, "CNI_NETNS", "ADD", None, {"CNI_NETNS": "/tmp"}),
    (4, "CILIATE_CNI_SOCKET", "DEL", None, {"CILIATE_CNI_SOCKET": b"/\xff"}),
    (4, "CILIATE_CNI_SOCKET", "DEL", None, {"CILIATE_CNI_SOCKET": "here"}),
    (4, "CILIATE_CNI_WAIT", "DEL", None, {"CILIATE_CNI_WAIT": "nan", "CILIATE_CNI_SOCKET": "/nowhere"}),
]


async def test_what_is_hostile_is_refused_in_json_and_never_queued(
    server: CniServer, mode: Recorder, tmp_path: Path
) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    for number, word, command, config, changes in HOSTILE:
        environment = {**variables(command, tmp_path), **changes}
        if environment["CNI_NETNS"] == "FIFO":
            environment["CNI_NETNS"] = str(fifo)
        code, answer = await shim(environment, config or b"")
        assert (code, answer["code"]) == (1, number) and word in answer["msg"], (command, changes, answer)
    assert mode.calls == [] and not (tmp_path / "cni-spool").exists()


async def test_a_queued_del_that_fails_stays_queued(mode: Recorder, tmp_path: Path) -> None:
    assert await shim(variables("DEL", tmp_path, CNI_CONTAINERID="gone")) == (0, None)
    assert await shim(variables("DEL", tmp_path), {**CONFIG, "name": "-"}) == (0, None)
    mode.failure = OSError(28, "No space left on device")
    for left in (1, 0):
        server = CniServer(tmp_path / "cni.sock", {"none": mode})
        await server.start()
        await server.stop()
        assert len(list((tmp_path / "cni-spool").iterdir())) == left
        mode.failure = None


async def test_gc_goes_on_after_a_failure_and_tells_it(mode: Recorder, tmp_path: Path) -> None:
    class Broken(Recorder):
        async def collect(self, network: str, valid: frozenset[tuple[str, str]]) -> None:
            raise CniError(ErrorCode.DATAPATH_FAILURE, "the kernel refuses")

    server = CniServer(tmp_path / "cni.sock", {"broken": Broken(), "none": mode})
    await server.start()
    try:
        code, answer = await shim(variables("GC", tmp_path), {**CONFIG, "cni.dev/valid-attachments": []})
    finally:
        await server.stop()
    assert (code, answer["code"], mode.calls) == (1, 102, [("GC", "net")])


async def test_a_del_without_an_agent_is_done_by_the_next_one(mode: Recorder, tmp_path: Path) -> None:
    assert await shim(variables("DEL", tmp_path, CNI_CONTAINERID="gone")) == (0, None)
    assert len(list((tmp_path / "cni-spool").iterdir())) == 1
    server = CniServer(tmp_path / "cni.sock", {"none": mode})
    await server.start()
    try:
        assert mode.calls == [("DEL", "gone")]
        assert list((tmp_path / "cni-spool").iterdir()) == []
    finally:
        await server.stop()


async def test_a_spoiled_queue_file_does_not_stop_the_agent(mode: Recorder, tmp_path: Path) -> None:
    (tmp_path / "cni-spool").mkdir()
    (tmp_path / "cni-spool" / "1.del").write_bytes(b"junk")
    server = CniServer(tmp_path / "cni.sock", {"none": mode})
    await server.start()
    await server.stop()
    assert list((tmp_path / "cni-spool").iterdir()) == []


async def test_add_waits_for_an_agent_that_starts(mode: Recorder, tmp_path: Path) -> None:
    namespace = "/proc/self/ns/net"
    waiting = asyncio.create_task(shim(variables("ADD", tmp_path, CNI_NETNS=namespace)))
    server = CniServer(tmp_path / "cni.sock", {"none": mode})
    await server.start()
    try:
        code, answer = await waiting
    finally:
        await server.stop()
    # it got through to the agent, which refuses the node's own namespace
    assert code == 1 and "node's own" in answer["msg"]


@pytest.mark.parametrize(("command", "expected"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
async def test_without_an_agent(command: str, expected: int, tmp_path: Path) -> None:
    environment = variables(command, tmp_path, CILIATE_CNI_WAIT="0", CNI_NETNS="/proc/self/ns/net")
    code, answer = await shim(environment, {**CONFIG, "cniVersion": "1.1.0"})
    assert code == 1 and answer["code"] == expected
    assert answer["cniVersion"] == "1.1.0" and str(tmp_path) in answer["msg"]


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
@pytest.mark.parametrize(("variable", "value"), [("CONTAINERID", "../x"), ("CONTAINERID", "a/b"), ("IFNAME", "..")])
async def test_paths_in_names_are_refused_without_an_agent(
    command: str, variable: str, value: str, tmp_path: Path
) -> None:
    code, answer = await shim(variables(command, tmp_path, **{f"CNI_{variable}": value}))
    assert code == 1 and answer["code"] == 4 and f"CNI_{variable}" in answer["msg"]
    assert not (tmp_path / "cni-spool").exists()


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0", "9.9.9"])
async def test_version_needs_no_agent(version: str, tmp_path: Path) -> None:
    code, answer = await shim(variables("VERSION", tmp_path), {"cniVersion": version})
    assert code == 0
    assert answer == {"cniVersion": version, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}


async def test_version_refuses_what_is_no_json(tmp_path: Path) -> None:
    code, answer = await shim(variables("VERSION", tmp_path), b"{")
    assert code == 1 and answer["code"] == 6


async def test_an_unknown_command_is_refused_without_an_agent(tmp_path: Path) -> None:
    code, answer = await shim(variables("UPDATE", tmp_path))
    assert code == 1 and answer["code"] == 4 and "CNI_COMMAND" in answer["msg"]


async def test_a_namespace_that_is_gone(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    missing = str(tmp_path / "netns")
    assert await shim(variables("DEL", tmp_path, CNI_NETNS=missing)) == (0, None)
    code, answer = await shim(variables("ADD", tmp_path, CNI_NETNS=missing))
    assert code == 1 and answer["code"] == 4 and "CNI_NETNS" in answer["msg"]


def test_the_executable_loads_few_modules(tmp_path: Path) -> None:
    """A DEL without an agent goes nearly the whole way; what it loads is what each pod start pays."""
    code = (
        "import sys\n"
        "source = open(sys.argv[1]).read()\n"
        "space = {'__name__': 'shim'}\n"
        "exec(compile(source, 'shim', 'exec'), space)\n"
        "space['main']()\n"
        "print(len(sys.modules))\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", code, str(shim_source())],
        env=variables("DEL", tmp_path),
        input=json.dumps(CONFIG).encode(),
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) <= 30


async def test_an_agent_that_goes_away_is_told_as_such(tmp_path: Path) -> None:
    """ADD is refused, to be tried again; DEL is queued."""

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.close()

    listener = await asyncio.start_unix_server(leave, tmp_path / "cni.sock")
    async with listener:
        code, answer = await shim(variables("ADD", tmp_path))
        assert (code, answer["code"]) == (1, 11) and "does not answer" in answer["msg"]
        assert await shim(variables("DEL", tmp_path)) == (0, None)
    assert len(list((tmp_path / "cni-spool").glob("*.del"))) == 1


async def test_large_requests_and_answers_arrive_whole(server: CniServer, mode: Recorder, tmp_path: Path) -> None:
    mode.failure = CniError(ErrorCode.TRY_AGAIN, "x" * 300_000)
    code, answer = await shim(variables("DEL", tmp_path), {**CONFIG, "more": "y" * 1_500_000})
    assert (code, len(answer["msg"])) == (1, 300_000)


def test_install_writes_what_a_runtime_needs(tmp_path: Path) -> None:
    (executable,) = install_executable(tmp_path / "bin", "/run/elsewhere/cni.sock", native=False)
    configuration = install_configuration(tmp_path / "net.d")
    assert executable.name == "ciliate-cni" and executable.stat().st_mode & 0o7777 == 0o755
    assert b'DEFAULT_SOCKET = "/run/elsewhere/cni.sock"' in executable.read_bytes()
    assert executable.read_bytes().startswith(b"#!/usr/bin/python3 -IS\n")
    document = json.loads(configuration.read_bytes())
    capabilities = {"bandwidth": True, "portMappings": True}
    assert document["plugins"] == [{"type": "ciliate-cni", "capabilities": capabilities}] and document[
        "cniVersion"
    ] in ("1.0.0", "1.1.0")
    environment = {**os.environ, "CNI_COMMAND": "VERSION"}
    done = subprocess.run([sys.executable, executable], env=environment, input=b"", capture_output=True, check=True)
    assert json.loads(done.stdout)["supportedVersions"][-1] == "1.1.0"


def test_names_of_host_interfaces_are_stable_short_and_distinct() -> None:
    names = {host_interface_name(f"c{number}", ifname) for number in range(1000) for ifname in ("eth0", "eth1")}
    assert len(names) == 2000
    assert {len(name) for name in names} == {15}
    assert host_interface_name("c1", "eth0") == host_interface_name("c1", "eth0")
    assert host_interface_name("a", "bc") != host_interface_name("ab", "c")


def test_attachments_are_kept_on_disk(tmp_path: Path) -> None:
    store = AttachmentStore(tmp_path / "cni")
    assert store.load() == []
    item = Attachment("net", "c1", "eth0", "none")
    store.save(item)
    assert AttachmentStore(tmp_path / "cni").load() == [item]
    store.remove("c1", "eth0")
    store.remove("c1", "eth0")
    assert store.load() == []
