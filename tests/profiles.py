"""Profiles of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import noise, tiny_conditioning, tiny_pipeline

import ddit_rt
from ddit_rt.lab.profile.ceilings import Ceilings
from ddit_rt.lab.profile.run import profile_run
from ddit_rt.lab.profile.subject import Subject
from ddit_rt.models import family_of
from ddit_rt.steps import StepModel

PLAN = ["4p", "4p", "2p", "2p", "2p", "p"]


def tiny_subject(device: str = "cpu", policy: Any = None, step_cache: Any = None) -> Any:
    """Two samples of `tiny_pipeline()` on a latent of 16 x 24, by default on `PLAN`."""
    pipeline = tiny_pipeline().to(device)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    engine.annotate = True
    transformer = pipeline.transformer
    conditioning = tiny_conditioning(transformer, batch=2)
    return Subject(
        engine=engine,
        model=StepModel(family=family_of(transformer), transformer=transformer, base={}),
        latents=noise(2, 4, 16, 24).to(device),
        conditioning={name: value.to(device) for name, value in conditioning.items()},
        steps=len(PLAN),
        policy=policy or ddit_rt.StaticPolicy(PLAN),
        step_cache=step_cache or ddit_rt.NoCache(),
        prompts=("embedded", "elsewhere"),
    )


def ceilings() -> Any:
    """Round numbers."""
    return Ceilings(matmul="", matmul_flops_per_s=1e9, copy="", copy_bytes_per_s=1e8)


def profiled(subject: Any, form: str | None, out: Path) -> dict[str, Any]:
    """The entry of one profiled run."""
    return profile_run(subject, form, ceilings(), 1, out)
