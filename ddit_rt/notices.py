"""Warnings that point at the caller's own line."""

from __future__ import annotations

import contextlib
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch


def _folder_of(package: str) -> str:
    """Where a package is, which this does not import."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is required"
    assert spec.origin is not None, f"{package} has an __init__.py"
    return str(Path(spec.origin).parent)


_PASSED_OVER = (
    str(Path(__file__).parent),
    str(Path(torch.__file__).parent),
    contextlib.__file__,
    _folder_of("diffusers"),
)
"""Code between a caller and a warning: this package, the decorators of torch and contextlib, and
diffusers' pipelines, whose own calls run around the loop."""


def warn(message: str) -> None:
    """Raises a `UserWarning` at the innermost frame of none of those.

    A user who turns it into an error, or filters it by module, so meets a line of their own.
    """
    level, frame = 2, sys._getframe(1)  # noqa: SLF001 - what `warnings` itself goes by
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
