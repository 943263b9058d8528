"""What gets profiled: the denoising loop of an engine, on a prepared request."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt.engine import Engine
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_of
from ddit_rt.policies import PatchPolicy, StepCache
from ddit_rt.steps import StepModel


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine and one request, encoded: what is left is the loop.

    Attributes:
        engine: The engine, with ranges for profilers.
        model: Its model, for counts of what a step must do.
        latents: Initial noise, `[B, C, H, W]`, of a video `[B, C, F, H, W]`.
        conditioning: The prompt, as `Engine.denoise` takes it.
        steps: Denoising steps.
        policy: Patch policy.
        step_cache: Step cache.
        prompts: The prompts.
    """

    engine: Engine
    model: StepModel
    latents: Tensor
    conditioning: Mapping[str, Tensor]
    steps: int
    policy: PatchPolicy
    step_cache: StepCache
    prompts: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.transformer.parameters()).device

    @property
    def text_tokens(self) -> int:
        """Text tokens per sample."""
        return int(self.conditioning[self.model.family.text].shape[1])

    @property
    def passes(self) -> int:
        """Passes of the model in a step: two with guidance."""
        return 1 + (self.model.family.guidance(self.conditioning) is not None)

    @property
    def last_trace(self) -> RunTrace:
        """Trace of the latest run."""
        assert self.engine.last_trace is not None, "a run that returned has a trace"
        return self.engine.last_trace

    def run(self) -> RunTrace:
        """Denoises once."""
        arguments: dict[str, Any] = {
            "patch_policy": self.policy,
            "step_cache": self.step_cache,
            **self.conditioning,
        }
        self.engine.denoise(self.latents, num_inference_steps=self.steps, **arguments)
        return self.last_trace


@torch.no_grad()
def subject_of(
    engine: Engine,
    policy: PatchPolicy,
    step_cache: StepCache,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
) -> Subject:
    """Encodes a request; the engine then marks its ranges for profilers.

    Args:
        engine: The engine.
        policy: Patch policy.
        step_cache: Step cache.
        prompts: A batch.
        arguments: Further arguments of the pipeline's call, its `generator` among them.
    """
    engine.annotate = True
    pipeline: Any = engine.pipeline
    transformer = pipeline.transformer
    family = family_of(transformer, pipeline)
    model = StepModel(family=family, transformer=transformer, base={})
    steps = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    request = {"num_inference_steps": steps, **arguments, "prompt": list(prompts)}
    latents, conditioning = engine.encode(**request)
    return Subject(
        engine=engine,
        model=model,
        latents=latents,
        conditioning=conditioning,
        steps=request["num_inference_steps"],
        policy=policy,
        step_cache=step_cache,
        prompts=tuple(prompts),
    )
