from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.ops import pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference_pack(latents: Tensor, p: int) -> Tensor:
    if latents.dim() == 4:
        latents = latents.unsqueeze(2)
    b, c, f, h, w = latents.shape
    patches = latents.view(b, c, f, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
    return patches.reshape(b, f * (h // p) * (w // p), c * p * p)


def test_pack_orders_features_by_channel_row_column_worked_by_hand() -> None:
    latents = torch.arange(16.0).view(1, 2, 2, 4)  # two channels of 2 x 4
    expected = torch.tensor([[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]).float()
    assert torch.equal(pack(latents, 2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 128, 128), (2, 3, 6, 10)])
def test_pack_equals_diffusers(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    latents = torch.randn(shape).to(dtype)
    assert torch.equal(pack(latents, 2), FluxPipeline._pack_latents(latents, *shape))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [0, 1, 3])
def test_pack_equals_reference_and_unpack_inverts_it(
    p: int, dtype: torch.dtype, frames: int
) -> None:
    size = (48, 96)
    shape = (2, 5, frames, *size) if frames else (2, 5, *size)
    latents = torch.randn(shape).to(dtype)
    tokens = pack(latents, p)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, reference_pack(latents, p))
    assert torch.equal(unpack(tokens, p, *size, frames), latents)


def test_pack_takes_latents_that_are_not_contiguous() -> None:
    latents = torch.randn(1, 8, 8, 4).permute(0, 3, 1, 2)
    assert torch.equal(pack(latents, 2), reference_pack(latents, 2))


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (1, 0, 8, 8)])
def test_pack_of_nothing_is_empty(shape: tuple[int, ...]) -> None:
    assert pack(torch.empty(shape), 2).shape == (shape[0], 16, shape[1] * 4)


def test_gradients_of_pack_and_unpack_are_each_others_inverse() -> None:
    image = torch.randn(1, 2, 4, 6, requires_grad=True)
    weights = torch.randn(1, 6, 8)
    (pack(image, 2) * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert torch.equal(image.grad, unpack(weights, 2, 4, 6))
    video_tokens = torch.randn(1, 12, 8, requires_grad=True)
    targets = torch.randn(1, 2, 2, 4, 6)
    (unpack(video_tokens, 2, 4, 6, 2) * targets).sum().backward()  # type: ignore[no-untyped-call]
    assert video_tokens.grad is not None
    assert torch.equal(video_tokens.grad, pack(targets, 2))


@pytest.mark.parametrize(
    ("latents", "patch_size", "message"),
    [
        (torch.zeros(4, 8, 8), 2, r"shape \(4, 8, 8\), expected \[B, C, H, W\]"),
        (torch.zeros(1, 4, 6, 8), 4, "patch size 4 does not divide the latent size 6 x 8"),
        (torch.zeros(1, 4, 6, 8), 0, "patch size 0"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.float64), 2, "float64, expected float32 or bfloat16"),
    ],
)
def test_pack_refuses_with_what_came_and_what_was_expected(
    latents: Tensor, patch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(latents, patch_size)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((1, 15, 8), (2, 8, 8)),  # a token too few
        ((1, 16, 6), (2, 8, 8)),  # features that are not C * 4
        ((16, 8), (2, 8, 8)),  # no batch
        ((1, 16, 8), (2, 8, 8, 2)),  # half the frames
        ((1, 16, 8), (3, 8, 8)),  # a patch that does not divide
        ((1, 16, 8), (2, 8, 0)),
    ],
)
def test_unpack_refuses_sizes_that_do_not_fit(
    shape: tuple[int, ...], arguments: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError):
        unpack(torch.zeros(shape), *arguments)
