"""What the Wan benchmark works with, and the ways to run its loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from diffusers import WanPipeline
from flux_contenders import BASELINE, Contender, EngineCall
from flux_model import Case
from flux_setup import PATCHES, Setup, use_executor
from timing import Call
from torch import Tensor
from wan_model import (
    WanCase,
    pipeline_around,
    random_transformer,
    request,
    with_shared_weights,
)

import ddit_rt
from ddit_rt.buckets import StepModel
from ddit_rt.families import family_of
from ddit_rt.patch_scheduler import PatchPolicy, parse_patch
from ddit_rt.pipeline import Engine
from ddit_rt.pipeline.cost import StepCost, step_cost

SCHEDULES = ("fine", "paper_1.60x", "paper_2.10x", "paper_3.20x", "dynamic")
"""The paper's speed-ups of Wan 2.1 1.3B; 3.2x is with skipped steps there, and without here."""

_HALVES = 2


@dataclass(kw_only=True)
class WanSetup(Setup):
    """One run of the script; every call is guided, so each step runs two halves."""

    @cached_property
    def pipeline(self) -> WanPipeline:
        """The model, whose weights all contenders share."""
        return pipeline_around(random_transformer(self.preset, self.device, self.dtype))

    @cached_property
    def engine(self) -> Engine:
        """As `Setup.engine`, for videos of these sizes."""
        if self.backend == "eager" or not self.artifact.exists():
            engine = ddit_rt.compile(self.pipeline, backend=self.backend, progress=False)
            if self.backend != "eager":
                engine.save(self.artifact)
            return engine
        return ddit_rt.load(self.artifact, self.pipeline, progress=False)

    def request(self, case: Case) -> dict[str, Any]:
        """Arguments of a call."""
        assert isinstance(case, WanCase)
        return request(self.pipeline, self.preset, case)

    def generate(
        self, case_request: dict[str, Any], policy: PatchPolicy, executor: str = "auto"
    ) -> Tensor:
        """Final latents `[B, C, F, H, W]` from our engine."""
        use_executor(self.engine, executor)
        latents: Tensor = self.engine(**case_request, patch_policy=policy).frames
        return latents

    def _counted(self, case: Case) -> dict[str, StepCost]:
        assert isinstance(case, WanCase)
        transformer = self.pipeline.transformer
        model = StepModel(family=family_of(transformer), transformer=transformer, base={})
        height, width = case.latent
        multiples = {patch: parse_patch(patch) for patch in PATCHES}
        return {
            patch: step_cost(
                model,
                height=height,
                width=width,
                frames=case.latent_frames,
                multiple=multiple,
                batch=_HALVES * case.batch,
                text_tokens=self.preset.text_tokens,
            )
            for patch, multiple in multiples.items()
            if not any(edge % (model.patch_size * multiple) for edge in (height, width))
        }


def all_contenders(setup: WanSetup, case: WanCase) -> dict[str, Contender]:
    """The baseline first; what takes longest to get ready last.

    Skipped steps have no rows yet: they will be further schedules of our engine.
    """
    contenders = {
        BASELINE: Contender(
            label="diffusers, eager", build=lambda: _call(setup, case, setup.pipeline)
        )
    }
    for form in setup.executors:
        for schedule in SCHEDULES:
            own = EngineCall(setup, case, schedule, form)
            contenders[f"ddit_rt_{form}_{schedule}"] = Contender(
                label=f"ddit_rt, {schedule}",
                build=own.build,
                schedule=schedule,
                executor=form,
                details=own.details,
            )
    for scope in ("regional", "full"):
        contenders[f"compile_{scope}"] = Contender(
            label=f"diffusers + torch.compile ({scope})",
            build=partial(_compiled, setup, case, scope),
        )
    return contenders


def _call(setup: WanSetup, case: WanCase, pipeline: WanPipeline) -> Call:
    arguments = setup.request(case)
    return lambda: pipeline(**arguments).frames


def _compiled(setup: WanSetup, case: WanCase, scope: str) -> Call:
    pipeline = with_shared_weights(setup.pipeline)
    if scope == "regional":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    else:
        pipeline.transformer.compile()
    return _call(setup, case, pipeline)
