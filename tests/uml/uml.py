"""Runs a command in User-mode Linux: another kernel (Debian's 6.1, without BTF and JIT), the host's files, 3 s to boot.

The host is not changed: its / is read-only below an overlay in memory. Only the job's directory is shared for writing;
in it are ``command`` and, from inside, ``output``, ``status`` and ``dmesg``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ciliate.datapath.compiler import find_clang, include_directories

INIT = Path(__file__).with_name("init.sh")
KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
HIDDEN = ("/run", "/dev", "/proc", "/sys")
"""Folders that are fresh inside."""
TIMED_OUT, DIED = 124, 126
GRACE = 15.0
"""How long the kernel may take to boot and power off, in seconds, on top of the command's limit."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status (124: too slow, 126: the kernel died), what it printed, what the kernel said."""

    status: int
    seconds: float
    output: str
    console: str
    dmesg: str

    def explain(self) -> str:
        """Everything that helps to see why it failed."""
        text = f"status {self.status} after {self.seconds:.1f} s in User-mode Linux\n{self.output}"
        return text if self.status not in (TIMED_OUT, DIED) else f"{text}\n{self.console}\n{self.dmesg[-4000:]}"


def missing() -> str:
    """What this machine lacks for User-mode Linux, or nothing."""
    if os.geteuid() != 0:
        return "root"
    if shutil.which(KERNEL) is None or not MODULES.is_dir():
        return "the Debian package user-mode-linux"
    for tool, package in (("unshare", "util-linux"), ("setpriv", "util-linux"), ("modprobe", "kmod")):
        if shutil.which(tool) is None:
            return f"{tool} (the Debian package {package})"
    return ""


def run(
    command: Sequence[str],
    job: Path,
    limit: float = 120.0,
    memory: str = "1G",
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Outcome:
    """Boot, run ``command`` in ``directory`` as root for at most ``limit`` seconds, power off.

    ``job`` is an empty directory outside of HIDDEN; whatever the command writes elsewhere is gone afterwards.
    """
    if any(job.is_relative_to(folder) for folder in HIDDEN):
        raise ValueError(f"job {job}: hidden inside; expected a folder outside of {', '.join(HIDDEN)}")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    lines += [f"cd {shlex.quote(str(directory or Path.cwd()))} || exit 125", f"exec {shlex.join(command)}"]
    (job / "command").write_text("\n".join(lines) + "\n")
    (job / "output").touch()
    begin = time.monotonic()
    in_time = _boot(_arguments(job, limit, memory), job, limit + GRACE)
    return _outcome(job, time.monotonic() - begin, in_time)


def _arguments(job: Path, limit: float, memory: str) -> list[str]:
    kernel = [
        KERNEL,
        f"mem={memory}",
        "root=/dev/root",
        "rootfstype=hostfs",
        "ro",
        f"init={INIT}",
        f"uml_job={job}",
        f"uml_limit={limit:.0f}",
        f"uml_dir={job}/",
        f"umid=u{uuid.uuid4().hex[:12]}",
        *("con=null", "con0=null,fd:1", "ssl=null", "quiet", "loglevel=2", "noreboot", "panic=-1"),
    ]
    kernel = ["env", f"LD_PRELOAD={_xstate(job)}", "LD_BIND_NOW=1", *kernel]
    # the kernel has helper processes: they end with the namespace, which ends with its first process, and that with us.
    # The shell is in between because a kernel that is process 1 would ignore the signal by which it aborts.
    alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return [*alone, "sh", "-c", '"$@"; exit $?', "sh", *kernel]


def _xstate(job: Path) -> Path:
    """The library without which the kernel does not run on CPUs with AMX (see xstate.c)."""
    source, library = Path(__file__).with_name("xstate.c"), job / "xstate.so"
    includes = [part for directory in include_directories(source.parent) for part in ("-I", directory)]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *includes]
    subprocess.run([find_clang()[0], *flags, "-o", str(library), str(source)], check=True)
    return library


def _boot(arguments: Sequence[str], job: Path, limit: float) -> bool:
    """Run the kernel to its end; False where that took too long and it was killed."""
    # its memory is a file, which must be in memory itself and executable
    environment = {**os.environ, "TMPDIR": os.environ.get("UML_MEMORY", "/dev/shm")}
    with (job / "console").open("wb") as console:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def _outcome(job: Path, seconds: float, in_time: bool) -> Outcome:
    texts = {}
    for name in ("status", "output", "console", "dmesg"):
        path = job / name
        texts[name] = path.read_text(errors="replace") if path.exists() else ""
    status = int(texts["status"]) if texts["status"].strip() else DIED if in_time else TIMED_OUT
    return Outcome(status, seconds, texts["output"], texts["console"], texts["dmesg"])
