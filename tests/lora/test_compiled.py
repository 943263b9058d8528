"""LoRAs on layers that packages compute as one product, whose weights share a piece of memory."""

from __future__ import annotations

from typing import Any

import torch
from lora_files import check_unchanged, everything, factors
from models import latents_of, seeded, tiny_embeds
from torch import Tensor

import ddit_rt
from ddit_rt import FinePolicy

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "output_type": "latent",
    **tiny_embeds(),
}


def run(engine: ddit_rt.Engine) -> Tensor:
    return latents_of(engine(**CALL, generator=seeded(), patch_policy=FinePolicy()))


def test_they_act_and_leave_no_trace(engine: ddit_rt.Engine) -> None:
    pipeline = engine.pipeline
    plain, before = run(engine), everything(pipeline)
    engine.load_lora(factors("transformer", pipeline.transformer, "attn.to_q", "attn.to_v"))
    fused = run(engine)
    expected = latents_of(pipeline(**CALL, generator=seeded()))
    # fp32, as for packages without a LoRA: sums in another order, over three steps.
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(fused, plain, atol=1e-3)
    engine.unload_loras()
    check_unchanged(pipeline, before)
    assert torch.equal(run(engine), plain)
