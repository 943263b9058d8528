"""FLUX's blocks in the form that is compiled, against diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ddit_rt.models import flux_blocks, processors

WIDTH, HEADS, TEXT, IMAGE = 64, 2, 5, 12


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in model.named_parameters():
        if "norm_" in name:  # all ones otherwise, of which none would be missed
            parameter.data.uniform_(0.5, 1.5)
    # Past `ModelMixin.to`, which warns of modules to be kept in float32 that FLUX has none of.
    return nn.Module.to(model, request.param).eval().requires_grad_(False)


def inputs(model: Any, batch: int = 2) -> tuple[Tensor, ...]:
    """Image, text, time and rotary tables."""
    tokens = [torch.randn(batch, count, WIDTH, dtype=model.dtype) for count in (IMAGE, TEXT)]
    ids = torch.zeros(TEXT + IMAGE, 3)
    ids[TEXT:, 1] = torch.arange(IMAGE)
    ids[TEXT:, 2] = torch.arange(IMAGE).flip(0)
    return *tokens, torch.randn(batch, WIDTH, dtype=model.dtype), *model.pos_embed(ids)


def expected(model: Any, path: str, tensors: tuple[Tensor, ...]) -> Tensor:
    image, text, temb, cos, sin = tensors
    block = model.get_submodule(path)
    return torch.cat(block(image, text, temb, (cos, sin)), dim=1)


def found(model: Any, path: str, tensors: tuple[Tensor, ...]) -> Tensor:
    image, text, temb, *rotary = tensors
    block, rows = model.get_submodule(path), flux_blocks.modulations(model, temb)
    doubles, singles = [flux_blocks.DOUBLE_CHUNKS] * 2, [flux_blocks.SINGLE_CHUNKS] * 2
    chunks = [flux_blocks.TIME_CHUNKS, *doubles, *singles]
    row = rows.split([count * WIDTH for count in chunks], dim=-1)[3 if "single" in path else 1]
    if "single" in path:
        return flux_blocks.single(block, torch.cat((text, image), 1), row, *rotary)[0]
    return torch.cat(flux_blocks.double(block, image, text, row, *rotary), dim=1)


PATHS = ("transformer_blocks.0", "single_transformer_blocks.0")


@pytest.mark.parametrize("path", PATHS)
def test_run_as_they_are_they_have_the_bits_of_diffusers(model: Any, path: str) -> None:
    tensors = inputs(model)
    assert torch.equal(found(model, path, tensors), expected(model, path, tensors))


@pytest.mark.parametrize("path", PATHS)
def test_as_generated_for_cuda_they_differ_by_rounding(
    model: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(model)
    exact = nn.Module.to(copy.deepcopy(model), torch.float32)
    reference = expected(exact, path, tuple(tensor.float() for tensor in tensors))
    as_diffusers = expected(model, path, tensors)
    monkeypatch.setattr(flux_blocks, "_for_cuda", lambda _: True)
    monkeypatch.setattr(processors, "_is_known", processors._is_plain)
    template = copy.deepcopy(model)
    processors.set_processors(template)
    fast = found(template, path, tensors)
    # Not much further from the exact result than diffusers' own order of operations.
    assert distance(fast, reference) <= 1.25 * distance(as_diffusers, reference) + 1e-6


def test_layers_with_a_branch_beside_them_are_called(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return 2 * super().forward(values)

    tensors, (path, other) = inputs(model), PATHS
    for name in (f"{path}.ff.net.0.proj", f"{other}.proj_out"):
        model.get_submodule(name).__class__ = Doubled
    before = [expected(model, place, tensors) for place in PATHS]
    monkeypatch.setattr(flux_blocks, "_for_cuda", lambda _: True)
    for place, reference in zip(PATHS, before, strict=True):
        assert distance(found(model, place, tensors), reference) < 1e-2


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference.float()).norm() / reference.float().norm())
