"""Loading the diffusers pipeline that a command names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

EMBEDDED = "demo"
"""The model name that stands for the pipeline inside the package."""

DTYPES = ("float32", "bfloat16", "float16")

MODEL_HELP = "a diffusers folder, a Hub name, or 'demo' for the model inside the package"


def load_pipeline(model: str, dtype: str | None = None) -> Any:
    """A diffusers pipeline, of the class that its own index names.

    Args:
        model: A folder written by `save_pretrained`, a Hub name, or `"demo"`.
        dtype: One of `DTYPES`; by default diffusers' own, float32.

    Raises:
        ValueError: A folder that holds no pipeline.
        OSError: Neither a folder nor a name that the Hub knows.
    """
    import torch
    from diffusers import DiffusionPipeline

    source = _embedded_path() if model == EMBEDDED else model
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(
            f"{source} is a folder without model_index.json; give the folder of a whole pipeline, "
            "as pipeline.save_pretrained writes it"
        )
    show_progress = sys.stderr.isatty()
    _set_loading_bars(show=show_progress)
    torch_dtype = torch.float32 if dtype is None else getattr(torch, dtype)
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch_dtype)
    pipeline.set_progress_bar_config(disable=not show_progress)
    return pipeline


def _embedded_path() -> str:
    from ddit_rt.demo.embedded import model_path

    return str(model_path())


def _set_loading_bars(*, show: bool) -> None:
    """Loading bars are for terminals; in a log they are noise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        if show:
            library.enable_progress_bar()
        else:
            library.disable_progress_bar()
