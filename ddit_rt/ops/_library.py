"""Loads the compiled op libraries."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

_REBUILD = "Run scripts/setup.sh, or `pip install --no-build-isolation .`, and start again."


def _directory() -> Path:
    """Where the compiled modules lie.

    In an editable install they are in site-packages while the Python sources are in the checkout,
    so the one that Python itself can import shows the way.
    """
    try:
        runtime = importlib.import_module("ddit_rt._runtime")
    except ModuleNotFoundError as error:
        raise ImportError(
            "ddit_rt's compiled modules are not installed: this looks like a source checkout that "
            f"was not built. {_REBUILD}"
        ) from error
    if runtime.__file__ is None:
        raise ImportError(f"ddit_rt._runtime has no file beside it to look for. {_REBUILD}")
    return Path(runtime.__file__).parent


def cuda_wanted() -> bool:
    """Whether this torch, on this machine, can run the CUDA kernels."""
    return torch.version.cuda is not None and torch.cuda.is_available()


def load() -> None:
    """Registers the CPU kernels, and the CUDA kernels where they can run.

    Raises:
        ImportError: A library is missing, or was built for another torch.
    """
    directory = _directory()
    libraries = [directory / "_ops.so"]
    if cuda_wanted():
        libraries.append(directory / "_ops_cuda.so")
    for library in libraries:
        _load_one(library)


def _load_one(library: Path) -> None:
    if not library.exists():
        cause = "was built without CUDA" if library.stem == "_ops_cuda" else "is incomplete"
        raise ImportError(f"{library} does not exist: this build of ddit_rt {cause}. {_REBUILD}")
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{library} cannot be loaded by torch {torch.__version__}: {error}. {_REBUILD}"
        ) from error
