"""Directories that nobody but their owner may change: what is in them is believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class DirectoryError(Exception):
    """A directory cannot be used; the text names the option, the directory and what is expected."""


def make_directory(path: Path, option: str, mode: int) -> None:
    """Make a directory that strangers cannot have made before, nor change; DirectoryError where that cannot be."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        text = f"{option} {path}: cannot be made: {error.strerror}; expected a directory that the agent can write"
        raise DirectoryError(text) from error
    problem = strangers(path)
    if problem:
        raise DirectoryError(f"{option} {path}: {problem}; expected a directory that only its owner can change")


def strangers(path: Path) -> str:
    """Who else may change a directory or put another in its place; empty where nobody may. OSError where it is gone."""
    place = Path(os.path.realpath(path))
    for directory in (place, *place.parents):
        found = directory.stat()
        if directory == place and found.st_uid not in (0, os.geteuid()):
            return f"{directory} belongs to user {found.st_uid}"
        # where the sticky bit is, nobody removes what is another's
        if found.st_mode & stat.S_IWOTH and (directory == place or not found.st_mode & stat.S_ISVTX):
            return f"everybody may write into {directory}"
    return ""
