from __future__ import annotations

import pytest
import torch

from ddit_rt.blocks import LoraSpec, block_lora
from ddit_rt.errors import ArtifactMismatchError

NAME = "ff.net.0.proj.lora_A.weight"


@pytest.mark.parametrize(
    ("prefix", "adapter"),
    [("", ""), ("transformer.", "default."), ("base_model.model.transformer.", "")],
)
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
