#!/usr/bin/python3 -IS
"""The CNI executable: hands one request to the agent of this node and prints its answer.

One file, standard library only, few modules, so that it starts in about 10 ms: `ciliate cni install` copies it to the
directory where the container runtime looks for plugins. Where the node has a C compiler, launcher.c stands before it,
and becomes this program only where the agent does not simply answer.

The frame is ``CNI1``, the lengths of environment and standard input (4 bytes each, big endian), the CNI_* variables as
NAME=VALUE joined by NUL, the standard input. The pod's network namespace travels beside it as an open file
(SCM_RIGHTS), so the agent needs no path to it. The answer is the exit code (1 byte), a length (4 bytes) and the
standard output.
"""

import _socket
import posix
import sys
import time

DEFAULT_SOCKET = "/run/ciliate/cni.sock"
MAGIC = b"CNI1"
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
SUPPORTED = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
WAIT = 30.0
"""Seconds that ADD waits for an agent that is starting; CILIATE_CNI_WAIT overrides it."""
LONGEST_WAIT = 3600.0
ANSWER_TIME = 90.0
"""Seconds within which a connected agent has to answer."""
LARGEST = 4 << 20
"""Bytes of the largest frame."""
INVALID_ENVIRONMENT, IO_FAILURE, DECODING_FAILURE, INVALID_CONFIGURATION, TRY_AGAIN, UNAVAILABLE = 4, 5, 6, 7, 11, 50


class Failure(Exception):
    """An answer that is a CNI error: code and text."""


def main() -> int:
    """Answer the request in the environment; returns the exit code."""
    variables = {
        key[4:].decode("utf-8", "replace"): value for key, value in posix.environ.items() if key.startswith(b"CNI_")
    }
    command = text(variables, "COMMAND")
    configuration = b""
    try:
        configuration = read_all(0)
        if command not in COMMANDS:
            raise Failure(INVALID_ENVIRONMENT, f"CNI_COMMAND: {command!r} given, expected one of {', '.join(COMMANDS)}")
        if command == "VERSION":
            return print_version(configuration)
        check_names(variables)
        return forward(command, variables, configuration)
    except Failure as failure:
        return print_error(configuration, *failure.args)
    except OSError as error:
        return print_error(configuration, IO_FAILURE, f"{command}: {error}")


def text(variables: dict[str, bytes], name: str) -> str:
    """A CNI variable as text, empty where it is not set."""
    return variables.get(name, b"").decode("utf-8", "replace")


def check_names(variables: dict[str, bytes]) -> None:
    """Refuse names that could lead out of a directory when somebody uses them in a path."""
    for name in ("CONTAINERID", "IFNAME"):
        value = text(variables, name)
        if "/" in value or "\\" in value or ".." in value:
            raise Failure(INVALID_ENVIRONMENT, f"CNI_{name}: {value!r} given, expected no path separator and no '..'")


def forward(command: str, variables: dict[str, bytes], configuration: bytes) -> int:
    """Send the request to the agent and print what it answers."""
    path, wait = socket_path(), waiting_time()
    block = b"\0".join(b"CNI_" + key.encode() + b"=" + value for key, value in variables.items())
    frame = MAGIC + len(block).to_bytes(4, "big") + len(configuration).to_bytes(4, "big") + block + configuration
    if len(frame) > LARGEST:
        given = f"{len(configuration)} bytes given, expected at most {LARGEST} with the variables"
        raise Failure(INVALID_CONFIGURATION, f"network configuration: {given}")
    namespace = open_namespace(command, text(variables, "NETNS"))
    lost = posix.environ.get(b"CILIATE_CNI_LOST")
    try:
        if lost is not None:  # the launcher's word: the agent had the request and gave no answer
            raise ConnectionError(lost.decode())
        code, output = exchange(connect(path, wait if command == "ADD" else 0.0), frame, namespace)
    except OSError as error:
        if command != "DEL":
            raise Failure(
                UNAVAILABLE if command == "STATUS" else TRY_AGAIN, f"the agent does not answer on {path}: {error}"
            ) from None
        code, output = queue_delete(path, frame)
    write_all(1, output)
    return code


def socket_path() -> str:
    """The agent's socket."""
    given = posix.environ.get(b"CILIATE_CNI_SOCKET", DEFAULT_SOCKET.encode())
    path = given.decode("utf-8", "replace")
    if path[:1] != "/" or path.encode() != given:
        raise Failure(INVALID_ENVIRONMENT, f"CILIATE_CNI_SOCKET: {path!r} given, expected an absolute path in UTF-8")
    return path


def waiting_time() -> float:
    """Seconds that ADD waits for an agent."""
    given = posix.environ.get(b"CILIATE_CNI_WAIT")
    try:
        wait = WAIT if given is None else float(given)
    except ValueError:
        wait = -1.0
    if not 0 <= wait <= LONGEST_WAIT:
        expected = f"expected seconds from 0 to {LONGEST_WAIT:g}"
        raise Failure(INVALID_ENVIRONMENT, f"CILIATE_CNI_WAIT: {given!r} given, {expected}")
    return wait


def open_namespace(command: str, path: str) -> int | None:
    """The namespace's file descriptor, or None; only ADD and CHECK need it to be there."""
    if not path:
        return None
    try:
        # without waiting, as a FIFO would make us
        return posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    except OSError as error:
        if command in ("ADD", "CHECK"):
            raise Failure(INVALID_ENVIRONMENT, f"CNI_NETNS: {path!r} cannot be opened: {error.strerror}") from None
        return None


def connect(path: str, wait: float) -> _socket.socket:
    """A connection to the agent, tried again for ``wait`` seconds while nobody listens; OSError after that."""
    deadline = time.monotonic() + wait
    while True:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            connection.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def exchange(connection: _socket.socket, frame: bytes, namespace: int | None) -> tuple[int, bytes]:
    """Send one frame, with the namespace's descriptor if there is one; returns exit code and output."""
    connection.settimeout(ANSWER_TIME)
    files = []
    if namespace is not None:
        descriptor = namespace.to_bytes(4, sys.byteorder)
        files = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptor)]
    sent = connection.sendmsg([frame], files)
    if sent < len(frame):
        # never an empty send: the agent may have answered and gone by now
        connection.sendall(frame[sent:])
    head = receive(connection, 5)
    output = receive(connection, int.from_bytes(head[1:], "big"))
    connection.close()
    return head[0], output


def receive(connection: _socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes; ConnectionError where the agent goes away before."""
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise ConnectionError("it went away before it had answered")
        data += chunk
    return data


def queue_delete(path: str, frame: bytes) -> tuple[int, bytes]:
    """Leave a DEL for the agent to do later and succeed: pods must be able to go while the agent is down."""
    spool = path.rpartition("/")[0] + "/cni-spool"
    make_directory(spool)
    name = f"{spool}/{time.time_ns():020d}-{posix.getpid()}"
    file = posix.open(name + ".tmp", posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
    write_all(file, frame)
    posix.fsync(file)
    posix.close(file)
    posix.rename(name + ".tmp", name + ".del")
    try:
        # an agent that has come up meanwhile may have looked into the spool too early
        answer = exchange(connect(path, 0), frame, None)
    except OSError:
        return 0, b""
    try:  # noqa: SIM105 (contextlib would be one module more to load)
        posix.unlink(name + ".del")
    except FileNotFoundError:
        pass
    return answer


def make_directory(path: str) -> None:
    """Make a directory and those above it."""
    try:
        posix.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(path.rpartition("/")[0])
        make_directory(path)


def read_all(file: int) -> bytes:
    """Everything up to the end of a file."""
    parts = []
    while chunk := posix.read(file, 65536):
        parts.append(chunk)
    return b"".join(parts)


def write_all(file: int, data: bytes) -> None:
    """Write every byte."""
    while data:
        data = data[posix.write(file, data) :]


def asked_version(configuration: bytes) -> str:
    """The configuration's cniVersion where it can be read, else our newest."""
    import json

    try:
        version = json.loads(configuration)["cniVersion"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return SUPPORTED[-1]
    return version if isinstance(version, str) else SUPPORTED[-1]


def print_version(configuration: bytes) -> int:
    """Answer VERSION: it needs no agent."""
    import json

    try:
        if configuration.strip() and not isinstance(json.loads(configuration), dict):
            raise ValueError("an object is expected")
    except (ValueError, RecursionError) as error:
        return print_error(b"", DECODING_FAILURE, f"standard input: not a JSON object: {error}")
    answer = {"cniVersion": asked_version(configuration), "supportedVersions": SUPPORTED}
    write_all(1, json.dumps(answer).encode() + b"\n")
    return 0


def print_error(configuration: bytes, code: int, message: str) -> int:
    """Print a CNI error object; returns the exit code 1."""
    import json

    answer = {"cniVersion": asked_version(configuration), "code": code, "msg": message}
    write_all(1, json.dumps(answer).encode() + b"\n")
    return 1


if __name__ == "__main__":
    posix._exit(main())
