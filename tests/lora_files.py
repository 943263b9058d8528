"""LoRA files for tiny pipelines, and whether fusing one has left a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline
from models import latents_of, noise, seeded, tiny_pipeline
from text_encoders import add_text_encoders
from torch import Tensor, nn

import ddit_rt
from ddit_rt import FinePolicy

CALL = {
    "prompt": "a fox",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "max_sequence_length": 16,
    "output_type": "latent",
}
State = dict[str, Tensor]


def speaking_pipeline() -> Any:
    """One that takes prompts; always of the same weights."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    return add_text_encoders(pipeline)


def eager(pipeline: Any) -> ddit_rt.Engine:
    return ddit_rt.compile(pipeline, backend="eager", progress=False)


def run(engine: ddit_rt.Engine) -> Tensor:
    return latents_of(engine(**CALL, generator=seeded(), patch_policy=FinePolicy()))


def factors(prefix: str, model: nn.Module, *ends: str, rank: int = 4, scale: float = 0.3) -> State:
    """A LoRA for the layers whose names end so."""
    state: State = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(ends):
            down, up = noise(rank, module.in_features), noise(module.out_features, rank, seed=1)
            state[f"{prefix}.{name}.lora_A.weight"] = down * scale
            state[f"{prefix}.{name}.lora_B.weight"] = up * scale
    return state


def style(pipeline: FluxPipeline) -> State:
    return factors("transformer", pipeline.transformer, "attn.to_q", "proj_mlp", "x_embedder")


def words(pipeline: FluxPipeline) -> State:
    return factors("text_encoder", pipeline.text_encoder, "q_proj", "fc1")


def norms(pipeline: FluxPipeline) -> State:
    """As control LoRAs bring them: whole values."""
    own = pipeline.transformer.state_dict()
    names = ("transformer_blocks.0.attn.norm_q", "single_transformer_blocks.1.attn.norm_k")
    return {f"transformer.{name}.weight": own[f"{name}.weight"] + 0.5 for name in names}


def everything(pipeline: Any) -> dict[str, Any]:
    """Values, modules by identity, flags and configuration of all models of a pipeline."""
    found: dict[str, Any] = {}
    for name, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        found |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
        found |= {
            f"{name}.{path} itself": (id(one), one.training, sorted(vars(one)))
            for path, one in model.named_modules()
        }
        found |= {
            f"{name}.{key} at": (one.data_ptr(), one.requires_grad)
            for key, one in model.named_parameters()
        }
        found[f"{name}.config"] = repr(model.config) + repr(vars(model.config))
    return found


def check_unchanged(pipeline: Any, before: Mapping[str, Any]) -> None:
    after = everything(pipeline)
    assert after.keys() == before.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def kohya(pipeline: FluxPipeline) -> State:
    return {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": noise(4, 32) * 0.3,
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": noise(32, 4) * 0.3,
        "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": noise(4, 20) * 0.3,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": noise(32, 4) * 0.3,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0),
    }
