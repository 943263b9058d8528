"""Warnings that point at the caller's own line."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_PASSED_OVER = (
    str(Path(__file__).parent),
    str(Path(torch.__file__).parent),
    contextlib.__file__,
)
"""Code between a caller and a warning: this package, and the decorators of torch and contextlib."""


def warn(message: str) -> None:
    """Raises a `UserWarning` at the innermost frame that is neither this package's nor torch's.

    A user who turns it into an error, or filters it by module, so meets a line of their own.
    """
    level, frame = 2, sys._getframe(1)  # noqa: SLF001 - what `warnings` itself goes by
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
