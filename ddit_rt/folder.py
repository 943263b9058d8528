"""Folders that change in one step, whatever interrupts the writer."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A sibling folder to fill, which takes the place of `path` when the block ends well.

    Args:
        path: A folder, or nothing. Its parent must exist.

    Yields:
        The sibling. It is removed if the block raises, `KeyboardInterrupt` included; `path` is
        then as it was before.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        staging.chmod(0o755)
        yield staging
        for folder in (staging, *(p for p in staging.rglob("*") if p.is_dir())):
            sync(folder)
        if path.exists():
            _exchange(staging, path)
        else:
            staging.rename(path)
        sync(path.parent)
    finally:
        # After an exchange this holds what was replaced.
        shutil.rmtree(staging, ignore_errors=True)


def unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, as the end of a sentence; empty if it can.

    Args:
        folder: Where it does not exist, the nearest one above it is tried. None is made.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"which cannot be written ({error.strerror})"
    return ""


def no_place_for_code(folder: Path, room: int) -> str:
    """Why code cannot be written to a folder and run from there, as `unwritable`.

    Args:
        folder: The folder, as `unwritable` takes it.
        room: Bytes that it has to hold.
    """
    if problem := unwritable(folder):
        return problem
    status = os.statvfs(_existing(folder))
    if status.f_flag & os.ST_NOEXEC:
        return "whose file system is mounted noexec, so that no code can be loaded from it"
    free = status.f_bavail * status.f_frsize
    if free < room:
        return f"which has {free >> 20} MiB of room for the {room >> 20} MiB that it may take"
    return ""


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def sync(path: Path) -> None:
    """Waits until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders atomically, or in two steps on file systems that cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if done == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    _exchange_in_two_steps(one, other)


def _exchange_in_two_steps(one: Path, other: Path) -> None:
    aside = one.with_name(one.name + ".old")
    try:
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
    except BaseException:
        if aside.exists() and not other.exists():
            aside.rename(other)
        raise
    finally:
        if aside.exists():
            shutil.rmtree(aside)
