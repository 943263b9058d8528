from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddit_rt.ops import patch_scores

# float32 sums in another order than torch's: a few units in the last place of the deviation.
CLOSE = {"rtol": 5e-6, "atol": 0.0}


def difference(z: list[Tensor], order: int) -> Tensor:
    if order == 1:
        return z[0] - z[1]
    if order == 2:
        return z[0] - 2 * z[1] + z[2]
    return z[0] - 3 * z[1] + 3 * z[2] - z[3]


def reference(
    history: Tensor, sizes: list[int], quantile: float, order: int = 3, head: int = 0
) -> Tensor:
    d = difference([history[(head + i) % 4].double() for i in range(4)], order)
    if d.dim() == 4:
        d = d.unsqueeze(2)
    h, w = d.shape[-2:]
    scores = []
    for p in sizes:
        # One patch after the other: those at the edges hold the pixels that are there.
        patches = [d[..., y : y + p, x : x + p] for y in range(0, h, p) for x in range(0, w, p)]
        stds = torch.stack([patch.transpose(1, 2).flatten(2).std(-1) for patch in patches], dim=-1)
        scores.append(torch.quantile(stds.flatten(1).float(), quantile, dim=-1))
    return torch.stack(scores, dim=-1)


def history_of(difference_to_show: Tensor) -> Tensor:
    """A history whose third difference is the given tensor: z0 is it, the rest is zero."""
    history = torch.zeros(4, *difference_to_show.shape)
    history[0] = difference_to_show
    return history


@pytest.mark.parametrize("order", [1, 2, 3])
def test_score_of_one_patch_worked_by_hand(order: int) -> None:
    # z = 2^k has differences of every order of size 1: 1-2, 1-2*2+4, 1-3*2+3*4-8. The three others
    # are zero: mean 1/4, variance (9 + 3)/16 / 3 = 1/4.
    history = torch.zeros(4, 1, 1, 2, 2)
    history[:, 0, 0, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert patch_scores(history, [2], 0.5, order=order).item() == 0.5


def test_third_difference_is_not_the_expression_that_is_always_zero() -> None:
    # d0 + d1 - 2 * (z0 - z2) / 2 = 0 for any z; a true D3 of a cubic is its constant 3! h^3.
    steps = torch.arange(4.0)
    pattern = torch.rand(1, 4, 8, 8) + 1.0
    history = -(steps.view(4, 1, 1, 1, 1) ** 3) * pattern
    d0, d1 = history[0] - history[1], history[1] - history[2]
    assert torch.allclose(d0 + d1 - 2 * (history[0] - history[2]) / 2, torch.zeros(1), atol=1e-5)
    torch.testing.assert_close(
        patch_scores(history, [4], 0.4), reference(history_of(6 * pattern), [4], 0.4), **CLOSE
    )


def test_a_quadratic_trajectory_has_no_third_difference() -> None:
    steps = torch.arange(4.0).view(4, 1, 1, 1, 1)
    pattern = torch.randint(-8, 8, (1, 4, 8, 8)).float()  # integers: float32 is exact
    history = pattern * (steps**2 - 3 * steps + 2)
    assert torch.equal(patch_scores(history, [2, 4, 8], 0.4), torch.zeros(1, 3))


def test_constant_difference_scores_zero_even_when_large() -> None:
    history = history_of(torch.full((1, 3, 8, 8), 12345.678))
    assert torch.equal(patch_scores(history, [2, 4], 0.9), torch.zeros(1, 2))


def test_small_spread_on_a_large_mean_survives() -> None:
    # sum(x^2) - sum(x)^2 / n would lose it all: 1000^2 has a spacing of 0.06 in float32. Welford's
    # mean is rounded to 6e-5 beside a spread of 1e-2, which enters the deviation squared.
    difference_ = 1000.0 + 2.0**-8 * torch.randint(-4, 5, (1, 16, 16, 16))
    history = history_of(difference_)
    torch.testing.assert_close(
        patch_scores(history, [4, 8], 0.4), reference(history, [4, 8], 0.4), rtol=1e-2, atol=0.0
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_torch_for_every_order_and_head(order: int) -> None:
    history = torch.randn(4, 2, 4, 16, 24)
    for head in range(4):
        torch.testing.assert_close(
            patch_scores(history, [4, 8], 0.4, order, head),
            reference(history, [4, 8], 0.4, order, head),
            **CLOSE,
        )


@pytest.mark.parametrize(
    "sizes",
    [[4, 8], [2, 4, 8], [8, 4], [8, 2], [4, 6], [4, 4], [3, 12, 2], [1, 2], [24], [1], [6, 12]],
)
def test_equals_torch_for_nested_and_other_sizes(sizes: list[int]) -> None:
    history = torch.randn(4, 2, 4, 3, 24, 48)
    torch.testing.assert_close(
        patch_scores(history, sizes, 0.4), reference(history, sizes, 0.4), **CLOSE
    )


@pytest.mark.parametrize(
    "shape", [(1, 4, 90, 160), (2, 3, 60, 104), (1, 2, 3, 17, 23), (2, 4, 1, 44), (1, 5, 2, 2)]
)
def test_patches_over_the_edges_count_over_their_real_pixels(shape: tuple[int, ...]) -> None:
    history = torch.randn(4, *shape)
    for sizes in ([4, 8], [8, 4], [2, 6], [3, 5], [7], [64], [32, 48]):
        torch.testing.assert_close(
            patch_scores(history, sizes, 0.4), reference(history, sizes, 0.4), **CLOSE
        )


def test_patch_over_an_edge_worked_by_hand() -> None:
    # Columns 0 to 3 are one patch of zeros, column 4 another: -1 and 1, whose variance is 2.
    difference_ = torch.zeros(1, 1, 2, 5)
    difference_[..., 4] = torch.tensor([-1.0, 1.0])
    scores = [patch_scores(history_of(difference_), [4], q).item() for q in (0.0, 0.5, 1.0)]
    assert scores == pytest.approx([0.0, math.sqrt(2) / 2, math.sqrt(2)], rel=1e-6)


def test_quantile_0_and_1_are_smallest_and_largest() -> None:
    spread = torch.tensor([3.0, 1.0, 4.0, 2.0]).repeat_interleave(2)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 4)
    history = history_of((signs * spread).view(1, 1, 2, 8))
    unit = math.sqrt(4 / 3)  # of the patch (1, -1, -1, 1)
    for quantile, value in [(0.0, 1.0), (1.0, 4.0), (0.5, 2.5)]:
        score = patch_scores(history, [2], quantile).item()
        assert score == pytest.approx(value * unit, rel=1e-6)


def test_ties_at_the_quantile() -> None:
    spread = torch.tensor([1.0, 2.0, 2.0, 2.0, 5.0]).repeat_interleave(2)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 5)
    history = history_of((signs * spread).view(1, 1, 2, 10))
    scores = {q: patch_scores(history, [2], q).item() for q in (0.25, 0.4, 0.5, 0.75)}
    assert len(set(scores.values())) == 1
    assert scores[0.5] == pytest.approx(2.0 * math.sqrt(4 / 3), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0, 0), (15, 31, 31), (7, 12, 3)])
def test_nonfinite_value_makes_that_sample_nan(bad: float, where: tuple[int, int, int]) -> None:
    history = torch.randn(4, 3, 16, 32, 32)
    clean = patch_scores(history, [4, 8], 0.4)
    history[(2, 1, *where)] = bad
    scores = patch_scores(history, [4, 8], 0.4)
    assert scores[1].isnan().all()
    assert torch.equal(scores[[0, 2]], clean[[0, 2]])


def test_overflow_of_the_squares_is_nan() -> None:
    history = history_of(torch.randn(1, 2, 4, 4) * 1e30)
    assert patch_scores(history, [4], 0.5).isnan().all()


def test_slots_beyond_the_order_are_not_read() -> None:
    history = torch.randn(4, 1, 4, 8, 8)
    history[2:] = math.nan
    assert patch_scores(history, [4], 0.4, order=1).isfinite().all()
    assert patch_scores(history, [4], 0.4, order=2).isnan().all()


def test_number_of_threads_does_not_change_the_bits() -> None:
    history = torch.randn(4, 2, 16, 128, 128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = patch_scores(history, [4, 8], 0.4)
        torch.set_num_threads(2)
        assert torch.equal(patch_scores(history, [4, 8], 0.4), one)
    finally:
        torch.set_num_threads(threads)


def test_no_sizes_and_no_samples_give_empty_scores() -> None:
    assert patch_scores(torch.zeros(4, 2, 1, 4, 4), [], 0.4).shape == (2, 0)
    assert patch_scores(torch.zeros(4, 0, 1, 4, 4), [2], 0.4).shape == (0, 1)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3, 1, 4, 8, 8), {}, "history has"),
        ((4, 4, 8, 8), {}, "history has"),
        ((4, 1, 4, 8, 8), {"patch_sizes": [0]}, "patch size 0, expected at least 1"),
        ((4, 1, 1, 8, 8), {"patch_sizes": [1]}, "no standard deviation"),
        ((4, 1, 1, 9, 9), {"patch_sizes": [4]}, "no standard deviation"),
        ((4, 1, 4, 8, 8), {"quantile": 1.5}, "quantile 1.5"),
        ((4, 1, 4, 8, 8), {"quantile": math.nan}, "quantile nan"),
        ((4, 1, 4, 8, 8), {"order": 4}, "order 4"),
        ((4, 1, 4, 8, 8), {"head": 4}, "head 4"),
    ],
)
def test_refuses_with_what_came_and_what_was_expected(
    shape: tuple[int, ...], arguments: dict[str, object], message: str
) -> None:
    complete = {"patch_sizes": [2], "quantile": 0.4, **arguments}
    with pytest.raises(RuntimeError, match=message):
        patch_scores(torch.zeros(shape), **complete)  # type: ignore[arg-type]


def test_refuses_half_precision_and_strided_history() -> None:
    with pytest.raises(RuntimeError, match="BFloat16, expected Float"):
        patch_scores(torch.zeros(4, 1, 4, 8, 8, dtype=torch.bfloat16), [2], 0.4)
    with pytest.raises(RuntimeError, match="not contiguous"):
        patch_scores(torch.zeros(4, 1, 4, 8, 16)[..., ::2], [2], 0.4)
