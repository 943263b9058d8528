"""The embedded FLUX at a size that coarse patches do not divide."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FluxPipeline
from extras import need

import ddit_rt
from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.plans import DEMO_POLICY
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.timing import Batch, engine_method
from ddit_rt.policies import FinePolicy

STEPS = 24
# One at a time: a batch takes the finest size that one of its samples needs.
BATCHES = [
    Batch(prompts=(prompt,), seeds=(1000 + index,))
    for index, prompt in enumerate(held_out_prompts(24))
]


def similarity(engine: ddit_rt.Engine, height: int, width: int) -> float:
    """Mean SSIM of the demo's dynamic plan to full resolution; its standard error is 0.005."""
    call = {"height": height, "width": width, "max_sequence_length": MAX_SEQUENCE_LENGTH}

    def made(policy: Any) -> list[Any]:
        options = {**call, "num_inference_steps": STEPS, "patch_policy": policy}
        method = engine_method("plan", "plan", engine, **options)
        return [method.generate(batch).outputs[0] for batch in BATCHES]

    return fidelity(made(DEMO_POLICY), made(FinePolicy())).mean_ssim


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_before")
def test_the_demos_plan_is_as_close_to_full_resolution_where_no_patch_divides() -> None:
    """17 x 15 tokens beside 16 x 16, the nearest size that 2p and 4p divide."""
    need("torchmetrics")
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    engine = ddit_rt.compile(pipeline, progress=False)
    assert similarity(engine, 136, 120) > similarity(engine, 128, 128) - 0.01
