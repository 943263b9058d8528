"""What the Wan benchmark works with, and the ways to run its loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

from diffusers import MagCacheConfig, WanPipeline
from flux_contenders import BASELINE, CachedCall, Contender, engine_contenders
from flux_model import Case
from flux_setup import Setup, use_executor
from timing import Call
from torch import Tensor
from wan_model import (
    WanCase,
    pipeline_around,
    random_transformer,
    request,
    with_shared_weights,
)

from ddit_rt.policies import PatchPolicy, StepCache

SCHEDULES = (
    *("fine", "paper_1.60x", "paper_2.10x", "paper_3.20x", "dynamic"),
    *("fine+teacache", "paper_2.10x+teacache"),
)
"""The paper's speed-ups of Wan 2.1 1.3B: 1.6x, 2.1x and, of its schedule with TeaCache, 3.2x. So
2.1x has a row with skipped steps too, and 3.2x is without them, to show the larger share."""


@dataclass(kw_only=True)
class WanSetup(Setup):
    """One run of the script; every call is guided, so each step runs two halves."""

    passes: ClassVar[int] = 2

    @cached_property
    def pipeline(self) -> WanPipeline:
        """The model, whose weights all contenders share."""
        return pipeline_around(random_transformer(self.preset, self.device, self.dtype))

    def request(self, case: Case) -> dict[str, Any]:
        """Arguments of a call."""
        assert isinstance(case, WanCase)
        return request(self.pipeline, self.preset, case)

    def generate(
        self,
        case_request: dict[str, Any],
        policy: PatchPolicy,
        executor: str = "auto",
        cache: StepCache | None = None,
    ) -> Tensor:
        """Final latents `[B, C, F, H, W]` from our engine."""
        use_executor(self.engine, executor)
        latents: Tensor = self.engine(**case_request, patch_policy=policy, step_cache=cache).frames
        return latents


def all_contenders(setup: WanSetup, case: WanCase) -> dict[str, Contender]:
    """The baseline first; what takes longest to get ready last."""
    contenders = {
        BASELINE: Contender(
            label="diffusers, eager", build=lambda: _call(setup, case, setup.pipeline)
        ),
        **engine_contenders(setup, case, SCHEDULES),
        "mag_cache": cached_contender(setup, case),
    }
    for scope in ("regional", "full"):
        contenders[f"compile_{scope}"] = Contender(
            label=f"diffusers + torch.compile ({scope})",
            build=partial(_compiled, setup, case, scope),
        )
    return contenders


def cached_contender(setup: WanSetup, case: WanCase) -> Contender:
    """The MagCache of diffusers, so set that the steps reuse that do in `fine+teacache`.

    diffusers has no TeaCache. With ratios of 1 and at most one reuse in a row, every other step
    reuses, whatever the weights are; the hits of its FirstBlockCache would be arbitrary.
    """
    config = MagCacheConfig(
        max_skip_steps=1,
        retention_ratio=1 / case.steps,
        num_inference_steps=case.steps,
        mag_ratios=[1.0] * case.steps,
    )
    cached = CachedCall(
        copy=lambda: with_shared_weights(setup.pipeline),
        call=partial(_call, setup, case),
        config=config,
        layer="blocks.0.attn1.to_q",
        steps=case.steps,
        passes=setup.passes,
    )
    return Contender(
        label="diffusers + MagCache (every other step)",
        build=cached.build,
        details=cached.details,
    )


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
