"""Folders of the agent's own: what is put there is whole, and belongs to whom the folder belongs to.

Root (`idmark apply`) and the agent's own user (`idmark run`) work in the same ones, and root must not be led astray by
that user: a folder is held open, no name in it is followed, and nothing is written into what the folder's owner does
not own. Every function raises OSError.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

#: The largest file that is written or read, in bytes: two policies of a million prefixes each, as JSON has them.
LIMIT = 256 << 20


@contextmanager
def made(base: Path, base_mode: int, name: str | None = None, mode: int = 0) -> Iterator[int]:
    """The descriptor of a folder `base`, or of `name` in it, "a/b" as well; what is not there is made."""
    base.mkdir(mode=base_mode, parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = stack.enter_context(opened(base))
        for part in _parts(name):
            above = folder
            with suppress(FileExistsError):
                os.mkdir(part, mode, dir_fd=above)
            folder = stack.enter_context(_held(os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=above)))
            _hand_over(folder, above)
        yield folder


@contextmanager
def opened(base: Path, name: str | None = None) -> Iterator[int]:
    """The descriptor of a folder `base`, or of `name` in it, "a/b" as well, as it is."""
    with ExitStack() as stack:
        folder = stack.enter_context(_held(os.open(base, _FOLDER)))
        for part in _parts(name):
            folder = stack.enter_context(_held(os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)))
        yield folder


def _parts(name: str | None) -> list[str]:
    return name.split("/") if name else []


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def _held(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _hand_over(descriptor: int, folder: int) -> None:
    """Give what root has made to the owner of the folder that it is in."""
    mine, owner = os.fstat(descriptor), os.fstat(folder)
    if mine.st_uid == os.geteuid() != owner.st_uid:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def put(folder: int, name: str, data: bytes, mode: int, *, durable: bool) -> None:
    """Put a file in the place of the old one, in one step; `durable`: it is on disk when this returns.

    What could not be read again is refused (EFBIG): the way back may be in it.
    """
    if len(data) > LIMIT:
        raise _too_large()
    with _new(folder, name, mode) as (file, new):
        _write(file, data)
        if durable:
            os.fsync(file)
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    if durable:
        os.fsync(folder)


@contextmanager
def _new(folder: int, name: str, mode: int) -> Iterator[tuple[int, str]]:
    """A new file, which already is whose it is to be, and the name that it has for now."""
    # Two processes, or two threads, that put the same file have a new one each.
    new = f".{name}.{threading.get_native_id()}"
    with suppress(FileNotFoundError):  # of a process of that number that was killed
        os.unlink(new, dir_fd=folder)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _held(os.open(new, flags, mode, dir_fd=folder)) as file:
            os.fchmod(file, mode)
            _hand_over(file, folder)
            yield file, new
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder)


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def got(folder: int, name: str) -> bytes | None:
    """What a file holds; None while there is none."""
    try:
        with readable(folder, name) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(LIMIT + 1)
    except FileNotFoundError:
        return None
    if len(data) > LIMIT:
        raise _too_large()
    return data


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {LIMIT >> 20} MiB")


@contextmanager
def readable(folder: int, name: str) -> Iterator[int]:
    """The descriptor of a file to read."""
    # Opening a FIFO waits for its writer, unless told not to.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _held(os.open(name, flags, dir_fd=folder)) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        yield descriptor


@contextmanager
def lockable(folder: int, name: str) -> Iterator[int]:
    """The descriptor of a file that is there to be locked, and may be written to; it is made if need be."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        found = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        # By a link, so that it appears with its owner, and is one file whoever else is making it.
        with suppress(FileExistsError), _new(folder, name, 0o600) as (_, new):
            os.link(new, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        found = os.open(name, flags, dir_fd=folder)
    with _held(found) as descriptor:
        file, owner = os.fstat(descriptor), os.fstat(folder)
        # Root writes to it: a hard link to a file of root's must not pass.
        if not stat.S_ISREG(file.st_mode) or file.st_uid != owner.st_uid:
            raise OSError(errno.EPERM, "it is not a file of this folder's owner")
        yield descriptor
