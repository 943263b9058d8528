"""The embedded FLUX at a size that coarse patches do not divide."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FluxPipeline
from extras import need

import ddit_rt
from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.plans import DEMO_POLICY, static_plan
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.timing import Batch, engine_method
from ddit_rt.policies import FinePolicy

STEPS = 24
# One at a time: a batch takes the finest size that one of its samples needs.
BATCHES = [
    Batch(prompts=(prompt,), seeds=(1000 + index,))
    for index, prompt in enumerate(held_out_prompts(16))
]


def similarities(engine: ddit_rt.Engine, height: int, width: int) -> list[float]:
    """Mean SSIM of the demo's plans to full resolution."""
    call = {"height": height, "width": width, "max_sequence_length": MAX_SEQUENCE_LENGTH}

    def made(policy: Any) -> list[Any]:
        options = {**call, "num_inference_steps": STEPS, "patch_policy": policy}
        method = engine_method("plan", "plan", engine, **options)
        return [method.generate(batch).outputs[0] for batch in BATCHES]

    reference = made(FinePolicy())
    plans = (static_plan(STEPS), DEMO_POLICY)
    return [fidelity(made(policy), reference).mean_ssim for policy in plans]


@pytest.mark.slow
def test_plans_are_as_close_to_full_resolution_where_no_patch_divides() -> None:
    """17 x 15 tokens beside 16 x 16, the nearest size that 2p and 4p divide."""
    need("torchmetrics")
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    divides, odd = similarities(engine, 128, 128), similarities(engine, 136, 120)
    assert engine.last_trace is not None
    assert {"2p", "4p"} & set(engine.last_trace.patch_sizes())
    for one, other in zip(odd, divides, strict=True):
        assert one > other - 0.01
