"""Profiles of a small model, for tests of scripts that have `scripts` on their path."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from models import noise, tiny_conditioning, tiny_pipeline

import ddit_rt
from ddit_rt.models import family_of
from ddit_rt.steps import StepModel

PLAN = ["4p", "4p", "2p", "2p", "2p", "p"]


def tiny_subject(device: str = "cpu", policy: Any = None) -> Any:
    """Two samples of `tiny_pipeline()` on a latent of 16 x 24, by default on `PLAN`."""
    pipeline = tiny_pipeline().to(device)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    engine.annotate = True
    transformer = pipeline.transformer
    conditioning = tiny_conditioning(transformer, batch=2)
    return import_module("run_profiling.subject").Subject(
        engine=engine,
        model=StepModel(family=family_of(transformer), transformer=transformer, base={}),
        latents=noise(2, 4, 16, 24).to(device),
        conditioning={name: value.to(device) for name, value in conditioning.items()},
        steps=len(PLAN),
        policy=policy or ddit_rt.StaticPolicy(PLAN),
        prompts=("embedded", "elsewhere"),
    )


def ceilings() -> Any:
    """Round numbers."""
    return import_module("run_profiling.ceilings").Ceilings(
        matmul="", matmul_flops_per_s=1e9, copy="", copy_bytes_per_s=1e8
    )


def profiled(subject: Any, form: str | None, out: Path) -> dict[str, Any]:
    """The entry of one profiled run."""
    tool = import_module("run_profiling.torch_tool")
    entry: dict[str, Any] = tool.profile_run(subject, form, ceilings(), 1, out)
    return entry
