"""Types of options: a value that is none is refused in one line, before any work is done.

Each makes or is a function from text, for argparse's `type`. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ddit_rt import checks

_T = TypeVar("_T")

_MOST_SEED = 2**63 - 1


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A whole number within bounds."""
    expected = f"a whole number{checks.bounds(least, most)}"
    return _numeric(lambda text: checks.whole("value", int(text), least, most), expected)


def number(
    low: float | None = None, high: float | None = None, *, open_low: bool = False
) -> Callable[[str], float]:
    """A finite number within bounds."""
    expected = f"a finite number{checks.bounds(low, high, open_low=open_low)}"
    return _numeric(
        lambda text: checks.number("value", float(text), low, high, open_low=open_low), expected
    )


def _numeric(read: Callable[[str], _T], expected: str) -> Callable[[str], _T]:
    def parse(text: str) -> _T:
        try:
            return read(text)
        except ValueError as error:
            message = f"got {checks.show(text)}; expected {expected}"
            raise argparse.ArgumentTypeError(message) from error

    return parse


def text(check: Callable[[str], _T]) -> Callable[[str], _T]:
    """What a check of the library makes of a text; its message stays."""

    def parse(value: str) -> _T:
        try:
            return check(value)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


seed = whole(0, _MOST_SEED)


def _place(check: Callable[[Path, str], Path]) -> Callable[[str], Path]:
    """A path, after a check; what the file system says of it is one line too."""

    def parse(value: str) -> Path:
        shown = checks.show(value)[1:-1]
        try:
            return check(checks.path("path", value), shown)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{shown}: {error.strerror}") from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


@_place
def existing_file(path: Path, shown: str) -> Path:
    """A file that is there and can be read."""
    return _readable(path, shown, "file", path.is_file())


@_place
def existing_folder(path: Path, shown: str) -> Path:
    """A folder that is there and can be read."""
    return _readable(path, shown, "folder", path.is_dir())


@_place
def file_to_write(path: Path, shown: str) -> Path:
    """A file that can be written: see `writable`."""
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown} is a folder; name a file")
    return _writable(path, shown)


@_place
def folder_to_write(path: Path, shown: str) -> Path:
    """A folder that can be written to: see `writable`."""
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{shown} is a file; name a folder")
    return _writable(path, shown)


@_place
def writable(path: Path, shown: str) -> Path:
    """A path that can be written; folders above it are made where they are missing."""
    return _writable(path, shown)


def _readable(path: Path, shown: str, kind: str, there: bool) -> Path:
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such {kind}: {shown}")
    if not there:
        raise argparse.ArgumentTypeError(f"{shown} is no {kind}")
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"cannot read {shown}: permission denied")
    return path


def _writable(path: Path, shown: str) -> Path:
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if above != path and not above.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {shown}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {shown}: permission denied for {above}")
    return path
