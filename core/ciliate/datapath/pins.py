"""The BPF file system and the directory of one instance's pins."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath import bpf
from ciliate.datapath.errors import DatapathError

log = logging.getLogger(__name__)
BPF_FS_MAGIC = 0xCAFE4A11
ENTRY = "ciliate_entry"
"""The program array that the programs on devices lead to."""
_libc = ctypes.CDLL(None, use_errno=True)


def is_bpffs(path: Path) -> bool:
    """Whether a BPF file system is mounted at or above ``path``."""

    class _Statfs(ctypes.Structure):
        _fields_ = (("type", ctypes.c_long), ("rest", ctypes.c_byte * 248))

    buffer = _Statfs()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        return False
    return bool(buffer.type == BPF_FS_MAGIC)


def mount_bpffs(path: Path) -> bool:
    """Mount a BPF file system at ``path`` unless it is one; True where it was mounted now."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatapathError(error.errno, f"bpf-root {path}: cannot be made: {error.strerror}") from error
    if is_bpffs(path):
        return False
    if path != Path("/sys/fs/bpf") and any(path.iterdir()):
        text = f"bpf-root {path}: holds files and is no BPF file system; expected one, or an empty directory"
        raise DatapathError(errno.ENOTEMPTY, text)
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        code = ctypes.get_errno()
        text = f"bpf-root {path}: is no BPF file system and one cannot be mounted: {os.strerror(code)}"
        raise DatapathError(code, text)
    return True


def unmount(path: Path) -> None:
    """Unmount what ``mount_bpffs`` mounted; nothing happens where nothing is mounted."""
    if _libc.umount2(os.fsencode(path), 0) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):
            raise DatapathError(code, f"bpf-root {path}: cannot be unmounted: {os.strerror(code)}")


class _Held(NamedTuple):
    """A pinned object: its descriptor, and the inode of the pin, by which another pin of the name is told."""

    descriptor: int
    inode: int


class PinDirectory:
    """``bpf-root/ciliate/INSTANCE``, its home; while maps change their layout, the directory beside it (``migration``).

    Whoever calls ``hold`` keeps the pinned objects alive: a program array that loses its last pin and descriptor is
    emptied by the kernel, and every packet of every pod would be dropped. So a pin that somebody removes does no harm,
    and ``mend`` puts it back. Not for several threads at once.
    """

    def __init__(self, root: Path, instance: str) -> None:
        self.root = root
        self.home = root / "ciliate" / instance
        self.path = self.home
        """Where programs that are loaded now find their maps: beside ``home`` while a change is prepared."""
        self._held: dict[str, _Held] = {}

    @property
    def entry(self) -> Path:
        """The program array that programs on devices lead to, or are to lead to."""
        return self.home / ENTRY

    def open(self) -> None:
        """Mount the file system where needed and make the directory."""
        mount_bpffs(self.root)
        try:
            for directory in (self.home.parent, self.home):
                _own(directory)
        except OSError as error:
            text = f"bpf-root {self.root}: {self.home} cannot be made: {error.strerror}"
            raise DatapathError(error.errno, text) from error

    def of(self, name: str) -> Path:
        """The path of one pin."""
        return self.path / name

    def hold(self) -> None:
        """Keep everything open that is pinned now, and let go of what was replaced."""
        for name, inode in self._present().items():
            held = self._held.get(name)
            if held is not None and held.inode == inode:
                continue
            self._held[name] = _Held(bpf.get_pinned(self.of(name)), inode)
            if held is not None:
                os.close(held.descriptor)

    def follow(self) -> None:
        """Where pins are held, hold those too that are new."""
        if self._held:
            self.hold()

    def mend(self) -> list[str]:
        """Pin again what is held and lost its pin, on a new file system where that is gone; what was done, in words."""
        present = self._present()
        lost = [name for name in self._held if name not in present]
        if lost:
            self.open()
        for name in lost:
            bpf.pin(self._held[name].descriptor, self.of(name))
            self._held[name] = self._held[name]._replace(inode=self.of(name).stat().st_ino)
        return [f"the pins of {', '.join(sorted(lost))} in {self.path}"] if lost else []

    def unlink(self, name: str) -> None:
        """Remove a pin for good; nothing happens where there is none."""
        held = self._held.pop(name, None)
        if held is not None:
            os.close(held.descriptor)
        self.of(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of everything; the pins stay."""
        while self._held:
            os.close(self._held.popitem()[1].descriptor)

    def _present(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.inode() for entry in entries}
        except FileNotFoundError:
            return {}

    def remove(self) -> None:
        """Remove every pin and the directory. What is attached stays attached."""
        self.close()
        for path in {self.path, self.home}:
            remove_directory(path)
        with contextlib.suppress(OSError):
            self.home.parent.rmdir()  # other instances may still be there


def remove_directory(path: Path) -> None:
    """Remove a directory of pins with all that is pinned in it; nothing happens where there is none."""
    with contextlib.suppress(FileNotFoundError):
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()


def _own(directory: Path) -> None:
    """Make a directory that is ours alone, though everybody may write around it: the kernel mounts a BPF file system
    so. What strangers made there first is taken from them; pins can only be made by who has the right to use BPF."""
    if directory.is_symlink():
        log.warning("%s: was a link to %s; it is removed", directory, directory.readlink())
        directory.unlink()
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.stat()
    if found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH:
        return
    log.warning("%s: belonged to user %d; it is ours now", directory, found.st_uid)
    os.chown(directory, os.geteuid(), os.getegid())
    directory.chmod(0o700)
    with os.scandir(directory) as entries:
        foreign = [entry for entry in entries if entry.stat(follow_symlinks=False).st_uid != os.geteuid()]
    for entry in foreign:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()
