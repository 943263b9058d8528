"""The counted memory of a run against the tensors that a run really holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from models import eager, tiny_conditioning, tiny_pipeline
from torch import Tensor
from wan_models import euler, unipc, wan_conditioning, wan_pipeline

import ddit_rt
from ddit_rt import DDiTPolicy, TokenRanges
from ddit_rt.engine.memory import memory_of
from ddit_rt.loop.cpu import _RunState
from ddit_rt.planning.outline import outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.solver import probe_scheduler

STEPS = 12
SMALL = 64
"""Bytes of single numbers (serials, scales) that `memory_of` leaves out, per bucket and pass."""


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of distinct storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def held(engine: ddit_rt.Engine, conditioning: dict[str, Tensor], shape: tuple[int, ...]) -> Any:
    """The plan of a run and the state of its loop."""
    model, pipeline = engine._compiled.steps, engine.pipeline
    grid = model.grid(*shape[-2:], frames=shape[2] if len(shape) == 5 else 0)
    model.family.set_timesteps(pipeline.scheduler, STEPS, None, grid)
    outline = outline_run(
        engine._compiled,
        Request(policy=DDiTPolicy(), batched_guidance=engine.batched_guidance),
        shape=shape,
        timesteps=model.family.linear_timesteps(pipeline.scheduler),
        solver=probe_scheduler(pipeline.scheduler),
        guided=model.family.guidance(conditioning) is not None,
    )
    plan = plan_run(engine._compiled, outline, conditioning)
    return plan, _RunState(plan, torch.zeros(shape))


def run_of(kind: str) -> tuple[DiffusionPipeline, dict[str, Tensor], dict[str, int]]:
    """Pipeline, conditioning of as many text tokens as are counted, and picture size."""
    if kind.startswith("flux"):
        pipeline = tiny_pipeline()
        size = {"height": 64, "width": 96} if kind == "flux" else {"height": 72, "width": 88}
        return pipeline, tiny_conditioning(pipeline.transformer), size
    pipeline = wan_pipeline(euler() if kind == "wan-euler" else unipc())
    size = {"height": 128, "width": 64, "num_frames": 9}
    if kind == "wan-odd":
        size |= {"height": 144, "width": 112}
    return pipeline, wan_conditioning(guidance_scale=5.0), size


@pytest.mark.parametrize(
    ("kind", "batched"),
    [  # FLUX's are not guided
        *[("flux", True), ("flux-odd", True), ("wan", True), ("wan", False)],
        *[("wan-odd", False), ("wan-euler", True)],
    ],
)
def test_counted_memory_is_what_a_run_holds(kind: str, batched: bool) -> None:
    pipeline, conditioning, size = run_of(kind)
    text_tokens = conditioning["encoder_hidden_states"].shape[1]
    ranges = TokenRanges(batch=(1, 2), text=(1, text_tokens))
    engine = eager(pipeline, ranges=ranges, **size)
    engine.batched_guidance = batched
    counted = memory_of(engine.artifact, pipeline, STEPS)
    family = engine._compiled.steps.family
    shape = family.latent_shape(pipeline, size["height"], size["width"], 1, size.get("num_frames"))
    plan, state = held(engine, conditioning, shape)
    assert counted.history_bytes == bytes_of(state.history)
    assert counted.velocities_bytes == bytes_of(state._velocities)
    (estimate, _) = plan.shared[-2:]
    assert counted.detail_bytes == estimate.nbytes == counted.latent_bytes
    texts = [tensor for tensor in plan.shared if tensor.ndim == 3]  # [B, T, d] of every pass
    assert counted.text_bytes == sum(text.nbytes for text in texts)
    for entry, bucket in zip(counted.buckets, plan.buckets[0], strict=True):
        # Two passes hold positions of their own; as one batch they share them.
        positions = entry.positions_bytes * len(texts)
        parts = positions + entry.modulation_bytes + entry.correction_bytes
        difference = sum(tensor.nbytes for tensor in bucket.tensors()) - parts
        assert 0 <= difference <= SMALL, entry.patch
