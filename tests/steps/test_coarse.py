"""The training-free coarse step: exact where it must be exact, white where noise must be white."""

from __future__ import annotations

import math

import pytest
import torch
from models import noise
from torch import Tensor

from ddit_rt.steps import Resampling, matched_level

CPU = torch.device("cpu")
SIZES = [  # latents, and their small image at 2p or 4p of p = 2
    ((128, 128), (64, 64)),
    ((128, 128), (32, 32)),
    ((60, 104), (30, 52)),
    ((60, 104), (16, 26)),
    ((90, 160), (46, 80)),
    ((90, 160), (24, 40)),
    ((134, 240), (34, 60)),
    ((96, 170), (24, 44)),
    ((6, 10), (2, 4)),
    ((1, 250), (1, 125)),
    ((1, 250), (1, 63)),
    ((12, 250), (12, 63)),  # an axis that stays as it is
]


def images(*shape: int) -> Tensor:
    """One for each combination of frequencies 0 and 1 of a cosine along each axis."""
    waves = [torch.cos(math.pi * (torch.arange(size) + 0.5) / size) for size in shape]
    rows, columns = (torch.stack((torch.ones(len(wave)), wave)) for wave in waves)
    return torch.einsum("ih,jw->ijhw", rows, columns).flatten(0, 1).unsqueeze(1)


def test_matched_level_by_hand() -> None:
    # t = 0.5, r = 1/2: a = 0.5, b = 0.25, so z' = z_low / 0.75 at t' = 1/3.
    scale, level = matched_level(torch.tensor([1.0, 0.5]), 0.5)
    torch.testing.assert_close(scale, torch.tensor([2.0, 4 / 3]))
    torch.testing.assert_close(level, torch.tensor([1.0, 1 / 3]))


def test_a_small_image_of_the_same_size_changes_nothing() -> None:
    sigmas = torch.tensor([0.9, 0.3])
    maps, latents = Resampling((12, 20), (12, 20), CPU), noise(1, 4, 12, 20)
    scale, level = matched_level(sigmas, maps.deviation)
    torch.testing.assert_close(scale, torch.ones(2))
    torch.testing.assert_close(level, sigmas)
    torch.testing.assert_close(maps.down(latents), latents, rtol=0.0, atol=1e-5)
    assert torch.equal(maps.up(latents), latents)


@pytest.mark.parametrize(("size", "small"), SIZES)
def test_down_has_orthogonal_rows_of_one_length(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    """So white noise of variance 1 has covariance r^2 I, whatever the ratio, up to the edges."""
    maps = Resampling(size, small, CPU)
    for axis in (0, 1):
        n = size[axis]
        units = torch.eye(n).reshape(n, 1, n, 1) if axis == 0 else torch.eye(n).reshape(n, 1, 1, n)
        one = [1, 1]
        one[axis] = n
        shrunk = [1, 1]
        shrunk[axis] = small[axis]
        matrix = Resampling((one[0], one[1]), (shrunk[0], shrunk[1]), CPU).down(units)
        matrix = matrix.reshape(n, small[axis]).T.double()
        expected = torch.eye(small[axis], dtype=torch.float64) * small[axis] / n
        torch.testing.assert_close(matrix @ matrix.T, expected, rtol=0.0, atol=1e-6)
    assert maps.deviation == pytest.approx(math.sqrt(math.prod(small) / math.prod(size)))


@pytest.mark.parametrize(("size", "small"), SIZES[8:])
def test_reduced_noise_is_white_with_the_deviation_of_its_level(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    """Inside, at the edges and corners, and between neighbours."""
    count = 2048
    maps = Resampling(size, small, CPU)
    scale, level = matched_level(torch.tensor([0.8]), maps.deviation)
    low = maps.down(0.8 * noise(1, count, *size))[0] * scale / level
    # The mean of n squares has a standard error of sqrt(2 / n), that of products of neighbours
    # sqrt(1 / n). Bounds are six of these, as the largest of a few thousand pixels is looked at.
    variance = low.square().mean(0)
    assert float((variance - 1).abs().max()) < 6 * math.sqrt(2 / count)
    assert float(variance.mean()) == pytest.approx(1, abs=6 * math.sqrt(2 / low.numel()))
    edges = (low[:, 0], low[:, -1], low[..., 0], low[..., -1])
    for edge in edges:
        assert float(edge.square().mean()) == pytest.approx(1, abs=6 * math.sqrt(2 / edge.numel()))
    for dy, dx in [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]:
        if dy >= small[0]:
            continue
        pairs = low[:, dy:, dx:] * low[:, : small[0] - dy, : small[1] - dx]
        assert float(pairs.mean(0).abs().max()) < 6 / math.sqrt(count)
        assert float(pairs.mean()) == pytest.approx(0, abs=6 / math.sqrt(pairs.numel()))


@pytest.mark.parametrize(("size", "small"), SIZES)
def test_a_reduced_image_is_a_smaller_one_of_the_same(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    """Constants are kept, and waves keep their height and phase, where the small image has them."""
    maps = Resampling(size, small, CPU)
    pairs = zip(images(*size), images(*small), strict=True)
    for index, (large, expected) in enumerate(pairs):
        if index % 2 >= small[1] or index // 2 >= small[0]:
            continue
        torch.testing.assert_close(maps.down(large), expected, rtol=0.0, atol=1e-4)


def test_each_frame_is_reduced_and_enlarged_by_itself() -> None:
    maps, video = Resampling((6, 10), (4, 6), CPU), noise(2, 3, 5, 6, 10)
    small = maps.down(video)
    assert small.shape == (2, 3, 5, 4, 6)
    frames = torch.stack([maps.down(video[:, :, index]) for index in range(5)], dim=2)
    torch.testing.assert_close(small, frames)
    large = maps.up(small)
    assert large.shape == video.shape
    assert torch.equal(large[:, :, 3], maps.up(small[:, :, 3].contiguous()))


@pytest.mark.parametrize(("size", "small"), SIZES)
def test_up_is_the_bicubic_enlargement(size: tuple[int, int], small: tuple[int, int]) -> None:
    pixels = noise(2, 3, *small)
    expected = torch.nn.functional.interpolate(pixels.double(), size=size, mode="bicubic")
    torch.testing.assert_close(
        Resampling(size, small, CPU).up(pixels), expected.float(), rtol=0.0, atol=1e-5
    )
