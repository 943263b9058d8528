from __future__ import annotations

import pytest
import torch
from block_models import random_lora
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict

from ddit_rt.blocks import LoraSpec, block_lora
from ddit_rt.errors import ArtifactMismatchError
from ddit_rt.models import family_of

NAME = "ff.net.0.proj.lora_A.weight"


@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.", "transformer.", "base_model.model.transformer."]
)
@pytest.mark.parametrize("adapter", ["", "default."])
def test_block_lora_names(prefix: str, adapter: str) -> None:
    tensor, other = torch.zeros(1), torch.ones(1)
    state = {
        f"{prefix}transformer_blocks.1.ff.net.0.proj.lora_A.{adapter}weight": tensor,
        f"{prefix}transformer_blocks.10.ff.net.0.proj.lora_A.{adapter}weight": other,
        f"{prefix}single_transformer_blocks.1.proj_out.lora_A.{adapter}weight": other,
    }
    found = block_lora(state, "transformer_blocks.1")
    assert list(found) == [NAME]
    assert found[NAME] is tensor


def test_block_lora_of_real_peft_state(transformer: FluxTransformer2DModel) -> None:
    block_type = family_of(transformer).block_types(transformer)[1]
    block = block_type.blocks(transformer)[1]
    expected = random_lora(block_type, block, LoraSpec(rank=3))
    targets = [f"single_transformer_blocks.1.{name}" for name in block_type.feed_forward]
    transformer.add_adapter(LoraConfig(r=3, target_modules=targets))
    state = get_peft_model_state_dict(transformer)
    found = block_lora(state, "single_transformer_blocks.1")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_block_lora_nothing_for_the_block() -> None:
    with pytest.raises(ArtifactMismatchError, match="nothing for transformer_blocks.0"):
        block_lora({f"transformer_blocks.1.{NAME}": torch.zeros(1)}, "transformer_blocks.0")


@pytest.mark.parametrize("name", ["ff.net.2.alpha", "ff.net.2.lora_magnitude_vector.weight"])
def test_block_lora_other_entries(name: str) -> None:
    state = {f"transformer_blocks.0.{n}": torch.zeros(1) for n in (NAME, name)}
    with pytest.raises(ArtifactMismatchError, match="plain LoRA only"):
        block_lora(state, "transformer_blocks.0")


def test_spec_variant_names() -> None:
    assert LoraSpec(rank=32).variant == "lora32"
    assert LoraSpec(rank=8, scaling=0.5).variant == "lora8x0.5"
    with pytest.raises(ValueError, match="got 0"):
        LoraSpec(rank=0)
