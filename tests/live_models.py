"""What tests of the live model share: a tiny pipeline's run, and ways to change a model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from models import latents_of, noise, seeded, tiny_embeds
from torch import nn

import ddit_rt
from ddit_rt import FinePolicy

CALL = {"height": 64, "width": 64, "num_inference_steps": 5, "output_type": "latent"}
LORA = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": noise(4, 32) * 0.3,
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": noise(32, 4, seed=1) * 0.3,
}


class Flipped(FluxAttnProcessor):  # type: ignore[misc]
    """An attention processor that does something else, and may be told how much."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(attn, hidden_states.flip(-1) * self.strength, *args, **kwargs)


class Holder(FluxAttnProcessor):  # type: ignore[misc]
    """An attention processor with a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(3)


class Packed(nn.Parameter):
    """A weight in a form of its own, as quantisers have it."""


def nothing(*_: Any) -> None:
    """A hook that only watches: nobody can tell from outside."""


def deepest(pipe: FluxPipeline) -> nn.Module:
    """A layer well inside a block that is not the first."""
    return pipe.transformer.single_transformer_blocks[1].attn.to_v


def run(engine: ddit_rt.Engine) -> torch.Tensor:
    return latents_of(
        engine(**tiny_embeds(), **CALL, generator=seeded(), patch_policy=FinePolicy())
    )


def expected(pipe: FluxPipeline) -> torch.Tensor:
    return latents_of(pipe(**tiny_embeds(), **CALL, generator=seeded()))


def eager(pipe: Any) -> ddit_rt.Engine:
    return ddit_rt.compile(pipe, backend="eager", progress=False)


def check_equal(engine: ddit_rt.Engine, pipe: FluxPipeline) -> None:
    # fp32 throughout, latents of order 4; an eager block computes as diffusers does.
    torch.testing.assert_close(run(engine), expected(pipe), rtol=0, atol=2e-6)


def ip_adapter(pipe: FluxPipeline) -> None:
    """As `FluxPipeline.load_ip_adapter` leaves the transformer."""
    model = pipe.transformer
    model.encoder_hid_proj = nn.Identity()
    processors = model.attn_processors
    for name in processors:
        if name.startswith("transformer_blocks"):
            processors[name] = FluxIPAdapterAttnProcessor(32, 24)
    model.set_attn_processor(processors)


def fuse_in_pipeline(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(dict(LORA), adapter_name="style")
    pipe.fuse_lora(components=["transformer"])


def disable_unfused(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(dict(LORA), adapter_name="style")
    pipe.disable_lora()
