"""Making room for a UNIX socket where a killed process may have left one, without taking anybody else's file."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_PATH = 107
"""Bytes that the kernel allows for the path of a UNIX socket."""


class SocketPathError(Exception):
    """A socket cannot be made at a path; the text names the option, the path and what is expected."""


@contextlib.contextmanager
def making(path: Path, option: str) -> Iterator[None]:
    """Around the bind(2) of a socket that only its owner may use; SocketPathError where that is refused."""
    make_room(path, option)
    previous = os.umask(0o177)
    try:
        yield
    except OSError as error:
        text = f"{option} {path}: cannot be made: {error.strerror or error}; choose another path"
        raise SocketPathError(text) from error
    finally:
        os.umask(previous)


def inode_of(path: Path) -> int:
    """By which a socket's path is told from another one of that name; 0 where there is nothing."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return 0


def make_room(path: Path, option: str) -> None:
    """Remove a stale socket at ``path``; SocketPathError where something else is there, or no socket can be made."""
    if len(os.fsencode(path)) > MAX_PATH:
        raise SocketPathError(f"{option} {path}: has {len(os.fsencode(path))} bytes, expected at most {MAX_PATH}")
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        _check_directory(path.parent, option, path)
        return
    except OSError as error:
        raise SocketPathError(f"{option} {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(kind):
        raise SocketPathError(f"{option} {path}: is no socket, expected a path where there is nothing or a socket")
    if _listens(path):
        raise SocketPathError(f"{option} {path}: another process listens there; end it, or choose another path")
    try:
        path.unlink()
    except OSError as error:
        text = f"{option} {path}: a stale socket cannot be removed: {error.strerror}"
        raise SocketPathError(text) from error


def _check_directory(directory: Path, option: str, path: Path) -> None:
    if not directory.is_dir():
        raise SocketPathError(f"{option} {path}: {directory} is no directory; make it, or choose another path")
    if not os.access(directory, os.W_OK | os.X_OK) or os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise SocketPathError(f"{option} {path}: {directory} cannot be written; mount it writable, or choose another")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
        return True
