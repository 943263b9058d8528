"""Plans of a tiny Wan pipeline: how videos are compared, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from extras import need
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import Engine, FinePolicy, StaticPolicy
from ddit_rt.lab.calibrate import Prompt
from ddit_rt.lab.plans.bench import EVEN, OWN_LEVELS, SEVERAL_MODELS, EngineBench
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.policies import CacheFit

STEPS = 8
SIZE = {"height": 64, "width": 64, "num_frames": 5}
CALL = {"guidance_scale": 4.0, "negative_prompt": "a dog", "max_sequence_length": 12}
PROMPT = Prompt(text="a zebra", seed=3)
MAGCACHE = CacheFit(kind="magcache", values=(1.0, *(0.95,) * (STEPS - 1)), source="a test")


def eager(*fits: CacheFit, **pipeline: Any) -> Engine:
    engine = ddit_rt.compile(
        wan_pipeline(**pipeline),
        **SIZE,
        patch_sizes=("p", "2p"),
        backend="eager",
        progress=False,
    )
    for fit in fits:
        engine.artifact = engine.artifact.with_cache_fit(fit)
    return engine


def bench(engine: Engine, **arguments: Any) -> EngineBench:
    return EngineBench(
        engine,
        steps=STEPS,
        probe=PROMPT,
        arguments={**CALL, **arguments},
        unit="tokens",
        skipping=True,
    )


def frames(engine: Engine, policy: ddit_rt.PatchPolicy) -> torch.Tensor:
    """`[F, 3, H, W]`, rounded to bytes as a video file has them, in [0, 1]."""
    generator = torch.Generator().manual_seed(PROMPT.seed)
    call = {**CALL, "num_inference_steps": STEPS, "patch_policy": policy, "generator": generator}
    (video,) = engine(PROMPT.text, **call).frames
    return torch.from_numpy(np.rint(video * 255) / 255).permute(0, 3, 1, 2).float()


def test_clip_is_as_similar_as_its_frames_are_on_average() -> None:
    need("torchmetrics")
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    engine, policy = eager(), StaticPolicy("2p:0.6,p")
    coarse, fine = frames(engine, policy), frames(engine, FinePolicy())

    def means(others: torch.Tensor) -> tuple[float, float]:
        pairs = [(a[None], b[None]) for a, b in zip(coarse, others, strict=True)]
        ssim = [structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]
        psnr = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
        return float(torch.stack(ssim).mean()), float(torch.stack(psnr).mean())

    def candidate(chosen: ddit_rt.PatchPolicy) -> Candidate:
        return Candidate(kind="", label="", policy=chosen, num_inference_steps=STEPS)

    made, plans = bench(engine), [candidate(FinePolicy()), candidate(policy)]
    ssim, psnr = means(fine)
    for measured in (made.evaluate(plans[1], [PROMPT]), made.confirm(plans, [PROMPT])[1]):
        assert measured.similarity == (pytest.approx(ssim, abs=1e-5),)
        assert measured.psnr == (pytest.approx(psnr, abs=1e-3),)
    # The frames of this video differ enough to tell another order of them.
    assert abs(means(fine.flip(0))[0] - ssim) > 1e-3


@pytest.mark.slow
def test_steps_cost_the_tokens_of_all_frames() -> None:
    engine = eager(MAGCACHE)
    # Two latent frames of 8 x 8, patches of 2 and 4.
    tokens = {"p": 32.0, "2p": 8.0}
    for scale in (1.0, 4.0):
        made = bench(engine, guidance_scale=scale)
        assert made.tables.costs == tokens
        reused = {**tokens, "p reused": 0.0, "2p reused": 0.0}
        names = ("MagCache", "SeaCache", "StaticCache")
        assert made.tables.cache_costs == dict.fromkeys(names, reused)


@pytest.mark.slow
def test_two_experts_are_searched_with_the_caches_that_need_no_fit() -> None:
    """Although there is a fit: for one model, which says nothing of two."""
    need("torchmetrics")
    engine = eager(MAGCACHE, boundary_ratio=0.875)
    made = bench(engine)
    assert {dial.fit for dial in made.tables.dials} == {None}
    assert made.tables.notes == [SEVERAL_MODELS, EVEN, OWN_LEVELS]
    first, *_, last = made.tables.dials
    for dial, policy in ((first, FinePolicy()), (last, StaticPolicy("2p:0.6,p"))):
        assert dial.ends is not None
        cached = replace(dial.cache, **{dial.turns: dial.ends[1]})
        plan = Candidate(
            kind="", label="", policy=policy, num_inference_steps=STEPS, step_cache=cached
        )
        assert made.evaluate(plan, [PROMPT]).cost < STEPS * 32
        assert engine.last_trace is not None
        assert engine.last_trace.reused > 0
