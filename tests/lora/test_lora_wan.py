"""LoRA files for Wan and its experts."""

from __future__ import annotations

import pytest
import torch
from lora_files import check_unchanged, eager, everything
from models import noise
from torch import Tensor
from wan_models import wan_pipeline

from ddit_rt.errors import UnsupportedModelError

State = dict[str, Tensor]

LAYER = "transformer.blocks.0.ffn.net.2"


def wan_lora(seed: int = 0) -> State:
    return {
        f"{LAYER}.lora_A.weight": noise(2, 48, seed=seed),
        f"{LAYER}.lora_B.weight": noise(32, 2, seed=seed + 5),
    }


@pytest.mark.parametrize("second", [False, True])
def test_a_lora_of_one_expert_leaves_the_other_and_no_trace(second: bool) -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    engine = eager(pipeline)
    before = everything(pipeline)
    engine.load_lora(wan_lora(), load_into_transformer_2=second)
    changed, other = ("transformer_2", "transformer")[:: 1 if second else -1]
    after = everything(pipeline)
    name = "blocks.0.ffn.net.2.weight"
    assert not torch.equal(after[f"{changed}.{name}"], before[f"{changed}.{name}"])
    assert torch.equal(after[f"{other}.{name}"], before[f"{other}.{name}"])
    engine.unload_loras()
    check_unchanged(pipeline, before)


@pytest.mark.parametrize("boundary", [None, 0.875])
def test_an_expert_that_does_not_run_takes_none(boundary: float | None) -> None:
    pipeline = wan_pipeline(boundary_ratio=boundary)
    if boundary is not None:
        pipeline.register_to_config(boundary_ratio=None)
    engine = eager(pipeline)
    with pytest.raises(UnsupportedModelError, match="runs no transformer_2"):
        engine.load_lora(wan_lora(), load_into_transformer_2=True)


@pytest.mark.parametrize(
    ("second", "extra", "message"),
    [
        (True, {"transformer.blocks.9.attn1.to_q.lora_A.weight": noise(2, 32)}, r"blocks\.9"),
        (False, {"text_encoder.x.lora_A.weight": noise(2, 32)}, r"text_encoder\.x\.lora_A"),
        (True, {f"{LAYER}.alpha": torch.tensor(2.0)}, r"net\.2\.alpha"),
    ],
    ids=["block", "prefix", "alpha"],
)
def test_wan_files_are_taken_whole_too(second: bool, extra: State, message: str) -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    engine = eager(pipeline)
    before = everything(pipeline)
    with pytest.raises(UnsupportedModelError, match=message):
        engine.load_lora(wan_lora() | extra, load_into_transformer_2=second)
    check_unchanged(pipeline, before)


def test_differences_of_norms_are_taken_only_if_they_are_none() -> None:
    """Wan's own format brings them, and diffusers drops them."""
    pipeline = wan_pipeline()
    engine = eager(pipeline)
    lora = {
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": noise(2, 48),
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": noise(32, 2),
        "diffusion_model.blocks.0.ffn.2.diff_b": noise(32),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(32),
    }
    before = everything(pipeline)
    engine.load_lora(lora)
    bias = pipeline.transformer.blocks[0].ffn.net[2].bias
    torch.testing.assert_close(bias, before["transformer.blocks.0.ffn.net.2.bias"] + noise(32))
    engine.unload_loras()
    check_unchanged(pipeline, before)
    lora["diffusion_model.blocks.0.norm3.diff"] += 0.1
    with pytest.raises(UnsupportedModelError, match=r"leaves out.*norm3\.diff"):
        engine.load_lora(lora)
    check_unchanged(pipeline, before)
