"""Scores of the step loop's kernels, against the CPU op, plain torch, and torch.quantile."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from step_loop import LoopPlan, StepLoop, plan_of
from torch import Tensor

from ddit_rt import ops
from ddit_rt.ops import Reason

# Kernel and CPU op sum the same float32 values in different orders, which moves the deviation by a
# few units in the last place (6e-8 each); torch in float64 also sees the rounding of the
# differences themselves.
AS_CPU = {"rtol": 2e-6, "atol": 0.0}
AS_TORCH = {"rtol": 5e-6, "atol": 0.0}

SHAPES = [
    ((1, 16, 1, 16, 32), (4, 8)),  # FLUX
    ((1, 16, 3, 12, 20), (4,)),  # Wan: frames, and heights that 8 does not divide
    ((2, 4, 1, 24, 48), (2, 4, 12)),
    ((1, 3, 2, 24, 36), (6, 12)),
    ((1, 2, 1, 32, 64), (32,)),
    ((1, 2, 1, 48, 48), (48,)),  # base patches of 24, because a tile has 32 columns
    ((2, 5, 1, 8, 40), (1, 8)),
    ((1, 3, 1, 6, 9), (3,)),
    # Patches over the edges.
    ((1, 4, 1, 18, 20), (4, 8)),
    ((2, 3, 2, 17, 26), (4, 8)),
    ((1, 2, 1, 22, 70), (4, 8)),  # a whole tile after the last whole patch
    ((1, 2, 2, 9, 33), (4,)),
    ((1, 3, 1, 1, 44), (4, 8)),
    ((1, 4, 2, 2, 2), (4, 8)),
    ((1, 2, 1, 50, 50), (48,)),
]


def score_plan(
    shape: tuple[int, int, int, int, int],
    sizes: tuple[int, ...],
    *,
    order: int = 3,
    quantile: float = 0.4,
    threshold: float = math.nan,
) -> LoopPlan:
    """Steps that take the velocity for the next latent; the fourth one, k = 3, is scored."""
    table = torch.tensor([[0.0, 0, 0, 1, 0, 0]] * 4)
    thresholds = torch.full((4, len(sizes)), threshold)
    return plan_of(shape, sizes, table, thresholds=thresholds, order=order, quantile=quantile)


def run_scored(runtime: ModuleType, plan: LoopPlan, latents: Tensor) -> StepLoop:
    """Runs with z_0 to z_3 given, `[4, B, C, F, H, W]`, through the decision on z_3."""
    loop = StepLoop(runtime, plan)
    loop.load(plan, latents[0])

    def bucket(_: int) -> None:
        loop["velocity"].copy_(latents[(int(loop["state"][0]) + 1) % 4])

    loop.run_host(4, bucket)
    return loop


def by_cpu_op(latents: Tensor, plan: LoopPlan) -> Tensor:
    """The newest latent in slot 0, as the op takes it."""
    return ops.patch_scores(latents.flip(0), plan.sizes, plan.quantile, plan.order)


def by_torch(latents: Tensor, plan: LoopPlan) -> Tensor:
    """Differences written out, torch.std with ddof = 1 over patches, torch.quantile."""
    z3, z2, z1, z0 = latents.double()
    difference = {1: z0 - z1, 2: z0 - 2 * z1 + z2, 3: z0 - 3 * z1 + 3 * z2 - z3}[plan.order]
    h, w = plan.shape[-2:]
    scores = []
    for p in plan.sizes:
        cuts = [(y, x) for y in range(0, h, p) for x in range(0, w, p)]
        patches = [difference[..., y : y + p, x : x + p].transpose(1, 2) for y, x in cuts]
        deviations = torch.stack([patch.flatten(2).std(dim=-1) for patch in patches], dim=-1)
        scores.append(torch.quantile(deviations.flatten(1).float(), plan.quantile, dim=-1))
    return torch.stack(scores, dim=-1)


@pytest.mark.parametrize(
    ("shape", "sizes", "order"), [(*row, 1 + place % 3) for place, row in enumerate(SHAPES)]
)
def test_scores_equal_the_cpu_op_and_torch(
    runtime: ModuleType,
    shape: tuple[int, int, int, int, int],
    sizes: tuple[int, ...],
    order: int,
) -> None:
    plan = score_plan(shape, sizes, order=order)
    latents = torch.randn(4, *shape)
    scores = run_scored(runtime, plan, latents)["scores"]
    torch.testing.assert_close(scores, by_cpu_op(latents, plan), **AS_CPU)
    torch.testing.assert_close(scores, by_torch(latents, plan), **AS_TORCH)


def test_small_spread_on_a_large_mean_survives(runtime: ModuleType) -> None:
    # As in the CPU op's test: 1000^2 has a spacing of 0.06 in float32, and Welford's mean is
    # rounded to 6e-5 beside a spread of 1e-2.
    plan = score_plan((1, 16, 1, 16, 16), (4, 8), order=1)
    latents = torch.zeros(4, *plan.shape)
    latents[3] = 1000.0 + 2.0**-8 * torch.randint(-4, 5, plan.shape)
    scores = run_scored(runtime, plan, latents)["scores"]
    torch.testing.assert_close(scores, by_torch(latents, plan), rtol=1e-2, atol=0.0)


def quantile_of(runtime: ModuleType, squares: Tensor, quantile: float) -> float:
    """The kernel's quantile of sqrt(squares): patches of two values, whose variance is m2 / 1."""
    shape = (1, 2, 1, 1, len(squares))
    plan = plan_of(shape, (1,), torch.zeros(1, 6), forced=[-1], quantile=quantile)
    loop = StepLoop(runtime, plan)
    loop.load(plan, torch.zeros(plan.shape))
    loop["moments"].copy_(torch.cat([torch.zeros(len(squares)), squares]))
    loop.control.begin(0)
    loop.control.decide(0)
    loop.control.finish(0)
    return float(loop["scores"].item())


def exact_sqrt(squares: Tensor) -> Tensor:
    """Correctly rounded, as the kernel's: torch's float32 sqrt may be off by a unit on a CPU."""
    return squares.double().sqrt().float()


@pytest.mark.parametrize("count", [1, 2, 3, 500, 1024, 1500])
@pytest.mark.parametrize("levels", [1, 2, 1_000_000])
def test_quantile_has_the_bits_of_torch(runtime: ModuleType, count: int, levels: int) -> None:
    """One level: a constant; two: nothing but ties."""
    squares = torch.randint(0, levels, (count,)).float() + (levels == 1)
    for quantile in (0.0, 0.1, 0.4, 0.5, 0.999, 1.0):
        expected = torch.quantile(exact_sqrt(squares), quantile).item()
        assert quantile_of(runtime, squares, quantile) == expected


def test_quantile_of_deviations_that_share_their_leading_bits(runtime: ModuleType) -> None:
    """Neighbouring floats: only the last eight bits of the keys tell them apart."""
    squares = 1.0 + 2.0**-22 * torch.randperm(300).float()
    for quantile in (0.0, 0.3, 0.77, 1.0):
        expected = torch.quantile(exact_sqrt(squares), quantile).item()
        assert quantile_of(runtime, squares, quantile) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_nonfinite_scores_choose_the_base_patch_and_raise_the_flag(
    runtime: ModuleType, bad: float
) -> None:
    """1e30 is finite, but its square is not."""
    plan = score_plan((3, 4, 1, 16, 16), (4, 8), threshold=1e9)
    latents = torch.randn(4, *plan.shape)
    latents[2, 1, 2, 0, 3, 4] = bad
    loop = run_scored(runtime, plan, latents)
    assert loop["scores"].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    bucket, reason, run_length, *scores = loop.record()[3].tolist()
    assert (bucket, reason, run_length) == (0, Reason.NONFINITE, 4)
    assert all(math.isnan(score) for score in scores)
    assert loop.control.progress().nonfinite


def test_the_flag_is_down_without_them_and_in_the_next_run(runtime: ModuleType) -> None:
    plan = score_plan((1, 4, 1, 16, 16), (4, 8), threshold=1e9)
    latents = torch.randn(4, *plan.shape)
    loop = run_scored(runtime, plan, torch.full_like(latents, math.nan))
    assert loop.control.progress().nonfinite
    loop.load(plan, latents[0])
    loop.run_host(4, lambda _: loop["velocity"].copy_(latents[(int(loop["state"][0]) + 1) % 4]))
    assert not loop.control.progress().nonfinite
    assert loop.record()[3, :3].tolist() == [2, Reason.BELOW, 1]


def test_the_sample_that_needs_the_finest_patch_decides(runtime: ModuleType) -> None:
    plan = score_plan((3, 4, 1, 16, 16), (4, 8), threshold=1.0)
    smooth = 0.01 * torch.randn(4, *plan.shape)
    for rough, bucket in [((), 2), ((1,), 0), ((0, 2), 0)]:
        latents = smooth.clone()
        latents[:, list(rough)] *= 1000.0
        loop = run_scored(runtime, plan, latents)
        expected = by_cpu_op(latents, plan)
        assert int(loop.record()[3, 0]) == bucket
        torch.testing.assert_close(loop.record()[3, 3:], expected.amax(dim=0), **AS_CPU)


def test_scores_are_not_computed_for_a_forced_step(runtime: ModuleType) -> None:
    plan = replace(score_plan((1, 4, 1, 8, 8), (4, 8)), forced=[0, 1, 2, 1])
    loop = run_scored(runtime, plan, torch.randn(4, *plan.shape))
    assert loop["scores"].isnan().all()
    assert loop["moments"].isnan().all()
    assert loop.record()[:, 0].tolist() == [0, 1, 2, 1]
    assert (loop.record()[:, 1] == Reason.FORCED).all()
    assert loop.record()[:, 3:].isnan().all()
