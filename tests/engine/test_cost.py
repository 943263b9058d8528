"""Counts of one step against closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from models import CHANNELS, tiny_transformer

from ddit_rt.engine.cost import StepCost, step_cost
from ddit_rt.errors import ShapeError
from ddit_rt.models import family_of
from ddit_rt.steps import StepModel

WIDTH, MLP = 32, 4
"""Of the tiny model: two heads of 16, and diffusers' own ratio of the feed-forward."""


def cost(transformer: FluxTransformer2DModel, **sizes: int) -> StepCost:
    model = StepModel(family=family_of(transformer), transformer=transformer, base={})
    fields = {"height": 16, "width": 24, "multiple": 1, "batch": 1, "text_tokens": 7}
    return step_cost(model, **{**fields, **sizes})


def closed_form(image: int, text: int, batch: int) -> int:
    """One double and two single blocks, written out layer by layer; modulation is once per run."""
    d, joint = WIDTH, image + text
    attention = 4 * joint**2 * d
    double = 2 * joint * d * d * (4 + 2 * MLP) + attention
    single = 2 * joint * d * d * (3 + MLP + 1 + MLP) + attention
    ends = 2 * image * d * (4 * CHANNELS) * 2 + 2 * 2 * d * d
    return batch * (double + 2 * single + ends)


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_those_of_the_closed_form(multiple: int, batch: int) -> None:
    counted = cost(tiny_transformer(), multiple=multiple, batch=batch)
    image = (16 // (2 * multiple)) * (24 // (2 * multiple))
    assert (counted.image_tokens, counted.text_tokens) == (image, 7)
    assert counted.flops == closed_form(image, 7, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_a_step_reads(dtype: torch.dtype) -> None:
    transformer = tiny_transformer().to(dtype)
    once_per_run = ("time_text_embed.", "context_embedder.", ".norm1.", ".norm1_context.", ".norm.")
    expected = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in transformer.named_parameters()
        if not any(part in name for part in once_per_run)
    )
    assert cost(transformer).weight_bytes == expected
    assert cost(transformer, batch=2, multiple=2).weight_bytes == expected


def test_flux_dev_at_1024() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    flops = [
        cost(transformer, height=128, width=128, multiple=multiple, text_tokens=512).flops
        for multiple in (1, 2, 4)
    ]
    # 12.9 GFLOP a token in linears, and attention over image and text tokens in 57 layers.
    assert [round(count / 1e12, 1) for count in flops] == [74.4, 21.5, 10.3]


def test_model_is_left_as_it_was() -> None:
    transformer = tiny_transformer()
    before = {name: id(tensor) for name, tensor in transformer.named_parameters()}
    pointers = [tensor.data_ptr() for tensor in transformer.parameters()]
    cost(transformer)
    assert {name: id(tensor) for name, tensor in transformer.named_parameters()} == before
    assert [tensor.data_ptr() for tensor in transformer.parameters()] == pointers
    assert len(transformer.single_transformer_blocks) == 2


@pytest.mark.parametrize("sizes", [{"height": 17}, {"height": 0}, {"height": 17, "multiple": 2}])
def test_latent_that_the_model_does_not_take_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ShapeError, match="do not divide"):
        cost(tiny_transformer(), **sizes)


def test_patches_over_the_edges_count_as_tokens() -> None:
    # 9 x 11 patches of p: 5 x 6 of 2p, 3 x 3 of 4p.
    counts = [
        cost(tiny_transformer(), height=18, width=22, multiple=multiple).image_tokens
        for multiple in (1, 2, 4)
    ]
    assert counts == [99, 30, 9]
