"""Mixed steps: which tokens run, and what the others get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import eager, noise, tiny_conditioning, tiny_transformer
from torch import Tensor
from wan_models import wan_conditioning, wan_transformer

from ddit_rt import ops
from ddit_rt.models.base import Grid
from ddit_rt.steps import Detail, FineBucket, MixedBucket, Pass, RunContext, StepModel
from ddit_rt.steps.mixed import Regions

CPU = torch.device("cpu")
SIGMAS = torch.tensor([0.9, 0.7, 0.5])
SECOND, THIRD = torch.tensor([1]), torch.tensor([2])
ALL = 0.999
"""A share that is rounded to every region."""


def steps_of(transformer: Any) -> StepModel:
    return eager(transformer)._compiled.steps


@pytest.fixture(scope="module")
def flux() -> StepModel:
    return steps_of(tiny_transformer())


@pytest.fixture(scope="module")
def wan() -> StepModel:
    return steps_of(wan_transformer())


def context_of(
    model: StepModel, shape: tuple[int, ...], conditioning: dict[str, Tensor]
) -> tuple[RunContext, Detail]:
    detail = Detail(shape, CPU, mixed=True)
    context = RunContext(
        passes=(Pass.of(model, conditioning),),
        height=shape[-2],
        width=shape[-1],
        frames=shape[2] if len(shape) == 5 else 0,
        sigmas=SIGMAS,
        timesteps=SIGMAS,
        detail=detail,
    )
    return context, detail


def flux_context(model: StepModel, batch: int = 1) -> tuple[RunContext, Detail]:
    conditioning = tiny_conditioning(model.transformer, batch)
    return context_of(model, (batch, 4, 16, 24), conditioning)


def fine_step(context: RunContext, detail: Detail, seed: int = 1) -> Tensor:
    """A step at p by some model, and the latents that it saw."""
    latents = noise(*detail.estimate.shape, seed=seed)
    detail.update(latents, noise(*latents.shape, seed=seed + 1), context.sigmas[0])
    return latents


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("multiple", [2, 4])
def test_regions_part_the_tokens_into_squares(multiple: int, frames: int) -> None:
    grid = Grid(height=8, width=12, frames=frames)
    regions = Regions(grid, multiple, CPU)
    assert sorted(regions.tokens.flatten().tolist()) == list(range(grid.tokens))
    assert regions.count == grid.tokens // multiple**2
    for tokens, anchor in zip(regions.tokens, regions.anchors, strict=True):
        rows, columns = tokens // 12, tokens % 12
        assert rows.unique().tolist() == list(range(int(rows[0]), int(rows[0]) + multiple))
        assert columns.unique().tolist() == list(range(int(columns[0]), int(columns[0]) + multiple))
        assert anchor == tokens[multiple**2 // 2 + multiple // 2]


@pytest.mark.parametrize("multiple", [2, 4])
def test_between_anchors_values_are_linear_and_beyond_them_constant(multiple: int) -> None:
    grid = Grid(height=3 * multiple, width=2 * multiple, frames=2)
    regions = Regions(grid, multiple, CPU)
    row, column = (
        axis.float().clamp(multiple // 2, multiple * (count - 1) + multiple // 2)
        for axis, count in (
            (torch.arange(grid.height)[:, None].expand(-1, grid.width), 3),
            (torch.arange(grid.width).expand(grid.height, -1), 2),
        )
    )
    plane = torch.stack((row, column, 2 * row - column + 1), dim=-1)
    video = torch.stack((plane, 5 * plane)).reshape(1, -1, 3)
    batch = torch.cat((video, -video))
    drawn = regions.drawn_out(batch[:, regions.anchors])
    torch.testing.assert_close(drawn, batch)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_with_every_region_whole_it_is_a_step_at_p(
    request: pytest.FixtureRequest, name: str, multiple: int
) -> None:
    """Each token at its own place: the order in which tokens run changes nothing but rounding."""
    model = request.getfixturevalue(name)
    if name == "flux":
        context, _ = flux_context(model, batch=2)
    else:
        context, _ = context_of(model, (2, 4, 3, 8, 16), wan_conditioning(2))
    detail = context.detail
    assert detail is not None
    latents = noise(*detail.estimate.shape)
    mixed = MixedBucket(model, context, multiple, ALL)
    # The order is not the grid's, so that places are more than counted up.
    assert mixed.tokens == model.grid(context.height, context.width, 1, context.frames).tokens
    assert mixed.state()[1].tolist() != list(range(mixed.tokens))
    velocity = mixed.velocity(latents, SECOND)
    expected = FineBucket(model, context).velocity(latents, SECOND)
    torch.testing.assert_close(velocity, expected, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_first_mixed_step_after_a_step_at_p_keeps_its_clean_estimate(
    flux: StepModel, share: float
) -> None:
    """What the mixture disagrees with it is not taken for news."""
    context, detail = flux_context(flux)
    latents = fine_step(context, detail)
    velocity = MixedBucket(flux, context, 2, share).velocity(latents, SECOND)
    expected = (latents - detail.estimate) / SIGMAS[1]
    torch.testing.assert_close(velocity, expected, rtol=0.0, atol=1e-5)


def test_what_changes_later_is_kept_where_tokens_ran_and_drawn_out_elsewhere(
    flux: StepModel,
) -> None:
    context, detail = flux_context(flux)
    bucket = MixedBucket(flux, context, 2, 0.25)
    bucket.velocity(fine_step(context, detail), SECOND)
    later = noise(*detail.estimate.shape, seed=9)
    clean = later - SIGMAS[2] * bucket.velocity(later, THIRD)
    change = ops.pack(clean - detail.estimate, 2)[0]
    regions = Regions(flux.grid(16, 24), 2, CPU)
    drawn = regions.drawn_out(change[regions.anchors][None])[0]
    places = bucket.state()[1]
    others = torch.ones(len(change), dtype=torch.bool)
    others[places] = False
    torch.testing.assert_close(change[others], drawn[others], rtol=0.0, atol=1e-4)
    whole = places[: regions.count]  # 6 of 24 regions, of 4 tokens
    assert not torch.allclose(change[whole], drawn[whole], atol=1e-2)


def test_the_regions_that_moved_most_run_whole_until_the_next_step_at_p(flux: StepModel) -> None:
    """Of any sample of the batch; the first step at p moves all by all that they are."""
    context, detail = flux_context(flux, batch=2)
    bucket = MixedBucket(flux, context, 2, 2 / 24)
    regions = Regions(flux.grid(16, 24), 2, CPU)

    def chosen(moving: tuple[int, int]) -> list[list[int]]:
        """Regions that run whole after a step at p that moved one of each sample."""
        latents = detail.estimate.clone()
        for sample, region in enumerate(moving):
            row, column = divmod(region, 6)
            latents[sample, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 3
        detail.update(latents, torch.zeros_like(latents), context.sigmas[0])
        bucket.velocity(latents, SECOND)
        first = bucket.state()[1].clone()
        bucket.velocity(latents + 1, THIRD)
        assert torch.equal(bucket.state()[1], first)
        return sorted(first[:8].reshape(2, 4).tolist())

    for moving in ((3, 17), (20, 8)):
        assert chosen(moving) == sorted(regions.tokens[list(moving)].tolist())
