"""Where the embedded demo pipeline is: data of the package, in diffusers' own layout."""

from __future__ import annotations

from pathlib import Path

from ddit_rt.errors import UnsupportedModelError


def model_path() -> Path:
    """Folder of the embedded pipeline.

    Raises:
        UnsupportedModelError: This installation lacks it.
    """
    path = Path(__file__).parent / "model"
    if not (path / "model_index.json").is_file():
        raise UnsupportedModelError(
            f"the embedded demo model is missing at {path}; install ddit_rt from a complete "
            "source tree or wheel, or name another model"
        )
    return path
