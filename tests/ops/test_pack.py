from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxPipeline, WanTransformer3DModel
from torch import Tensor

from ddit_rt.ops import pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_pack_worked_by_hand() -> None:
    latents = torch.arange(16.0).view(1, 2, 2, 4)  # two channels of 2 x 4
    tokens = pack(latents, 2)  # features by channel, row and column
    assert tokens.tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
    tokens = pack(latents, 2, channels_last=True)
    assert tokens.tolist() == [[[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]]


def test_pack_of_frames_worked_by_hand() -> None:
    latents = torch.arange(16.0).view(1, 2, 2, 2, 2)  # two channels of two frames of 2 x 2
    tokens = pack(latents, 2)
    assert tokens.tolist() == [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]]
    tokens = pack(latents, 2, channels_last=True)
    assert tokens.tolist() == [[[0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 128, 128), (2, 3, 6, 10)])
def test_pack_equals_diffusers(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    latents = torch.randn(shape).to(dtype)
    assert torch.equal(pack(latents, 2), FluxPipeline._pack_latents(latents, *shape))


def tiny_wan(patch_size: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, patch_size, patch_size),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=6,
        out_channels=5,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("p", [2, 4])
def test_pack_and_unpack_are_what_the_wan_transformer_does(p: int) -> None:
    model = tiny_wan(p)
    outputs: dict[str, Tensor] = {}
    for name in ("patch_embedding", "proj_out"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    latents = torch.randn(2, 6, 4, 8, 12)
    sample = model(latents, torch.tensor([1.0, 2.0]), torch.randn(2, 3, 16)).sample

    embedding = model.patch_embedding
    tokens = pack(latents, p) @ embedding.weight.flatten(1).T
    # Sums of at most 6 * 16 products in another order.
    torch.testing.assert_close(
        tokens + embedding.bias,
        outputs["patch_embedding"].flatten(2).transpose(1, 2),
        rtol=1e-5,
        atol=1e-5,
    )
    assert torch.equal(unpack(outputs["proj_out"], p, 8, 12, 4, channels_last=True), sample)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (1, 0, 8, 8)])
def test_pack_of_nothing_is_empty(shape: tuple[int, ...]) -> None:
    assert pack(torch.empty(shape), 2).shape == (shape[0], 16, shape[1] * 4)


@pytest.mark.parametrize("frames", [(), (6,)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_in_every_layout(channels_last: bool, frames: tuple[int, ...]) -> None:
    # The ops are linear, so a gradient is the op's transpose, which for a permutation is its
    # inverse: <pack(z), w> = <z, unpack(w)> for all z and w, exactly.
    layout = {"channels_last": channels_last}
    latents = torch.randn(2, 5, *frames, 4, 8, requires_grad=True)
    tokens = torch.randn(2, 8 * math.prod(frames), 20, requires_grad=True)
    (pack(latents, 2, **layout) * tokens.detach()).sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, unpack(tokens.detach(), 2, 4, 8, *frames, **layout))
    (unpack(tokens, 2, 4, 8, *frames, **layout) * latents.detach()).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, pack(latents.detach(), 2, **layout))


@pytest.mark.parametrize(
    ("latents", "patch_size", "message"),
    [
        (torch.zeros(4, 8, 8), 2, r"latents has shape \[4, 8, 8\]"),
        (torch.zeros(1, 4, 6, 8), 4, "patch size 4 does not divide the latent size 6 x 8"),
        (torch.zeros(1, 4, 6, 8), 0, "patch size 0"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.float64), 2, "Double, expected float32, bfloat16"),
    ],
)
def test_pack_refuses_with_what_came_and_what_was_expected(
    latents: Tensor, patch_size: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
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
    with pytest.raises(RuntimeError, match="unpack: "):
        unpack(torch.zeros(shape), *arguments)
