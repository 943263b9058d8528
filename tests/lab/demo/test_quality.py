"""The embedded FLUX: its plan where no patch divides, and its adapters where their card says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline
from extras import need

import ddit_rt
from ddit_rt.lab.demo import adapters_path, model_path
from ddit_rt.lab.demo.plans import DEMO_POLICY
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from ddit_rt.lab.measure.fidelity import Fidelity, fidelity
from ddit_rt.lab.measure.timing import Batch, engine_method
from ddit_rt.policies import FinePolicy, PatchPolicy, StaticPolicy


def engine_of(**options: Any) -> ddit_rt.Engine:
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    return ddit_rt.compile(pipeline, progress=False, **options)


def closeness(
    engine: ddit_rt.Engine, policy: PatchPolicy, batches: list[Batch], height: int, width: int
) -> Fidelity:
    """Fidelity of a plan's images to full resolution."""
    call = {"height": height, "width": width, "max_sequence_length": MAX_SEQUENCE_LENGTH}

    def made(policy: PatchPolicy) -> list[Any]:
        options = {**call, "num_inference_steps": 24, "patch_policy": policy}
        method = engine_method("plan", "plan", engine, **options)
        return [image for batch in batches for image in method.generate(batch).outputs]

    return fidelity(made(policy), made(FinePolicy()))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_before")
def test_the_demos_plan_is_as_close_to_full_resolution_where_no_patch_divides() -> None:
    """17 x 15 tokens beside 16 x 16, the nearest size that 2p and 4p divide."""
    need("torchmetrics")
    engine = engine_of()
    # One at a time: a batch takes the finest size that one of its samples needs.
    batches = [
        Batch(prompts=(prompt,), seeds=(1000 + index,))
        for index, prompt in enumerate(held_out_prompts(24))
    ]
    # The standard error of a mean is 0.005.
    even, odd = (closeness(engine, DEMO_POLICY, batches, *s) for s in ((128, 128), (136, 120)))
    assert odd.mean_ssim > even.mean_ssim - 0.01


@pytest.mark.slow
def test_images_of_a_coarse_start_are_closer_with_adapters() -> None:
    need("torchmetrics")
    batch = Batch(prompts=tuple(held_out_prompts(8)), seeds=tuple(range(500, 508)))

    def psnr(adapter: Path | None) -> float:
        engine = engine_of(height=128, width=128, adapter=adapter, backend="eager")
        found = closeness(engine, StaticPolicy("2p:0.6,p"), [batch], 128, 128).mean_psnr
        assert found is not None
        return found

    # 1.5 dB on these eight; prompts vary much, and over 24 others the card has less.
    assert psnr(adapters_path()) > psnr(None) + 0.5
