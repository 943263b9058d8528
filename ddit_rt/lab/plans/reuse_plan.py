"""Which steps of a run should compute, by how far off what the others reuse would be.

A step that reuses extrapolates what the blocks have added, the residual, from the two latest
computed steps. All of these lie close to those of full resolution's own run, so that one such run
tells how far off they would be, whichever steps compute: from the inner products of its residuals,
without running a plan. The best steps to compute are then a shortest path, from one pair of
computed steps to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddit_rt.engine import Engine
from ddit_rt.lab.plans.candidates import placed_levels
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.loop import CpuExecutor
from ddit_rt.planning.request import Request
from ddit_rt.policies import FinePolicy, StaticCache

Array = npt.NDArray[np.float64]

GROWTH = 1.0
"""By how many powers of e an error at noise level 1 grows until the end, more than one at 0."""

DRIFTING = 2
"""Runs that the drift is measured on."""

_MOST_VALUES = 1 << 20
"""Of a residual, evenly spread; its products hardly hang on the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How the residuals of full resolution change from step to step.

    Attributes:
        levels: Noise level of each of its N steps, and where the last one ends, `[N + 1]`.
        products: Inner products of the residuals, `[N, N]`, about 1.
    """

    levels: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]

    def plan(
        self, steps: int, computed: int, *, shift: float = 1.0, growth: float = GROWTH
    ) -> tuple[bool, ...]:
        """Of each step, whether it should compute.

        The squares of the errors add up that the steps between two computed ones make together, in
        what the run's end is off by.

        Args:
            steps: Of the run.
            computed: How many of them compute, from 1 to all.
            shift: Where their noise levels lie; see `placed_levels`.
            growth: Weight of the early steps' errors; see `GROWTH`.
        """
        return _plans(self, steps, shift, growth)[computed - 1]

    @staticmethod
    def of(found: Mapping[str, Any]) -> Drift:
        """Of its fields, as JSON gives them back."""
        products = tuple(tuple(row) for row in found["products"])
        return Drift(levels=tuple(found["levels"]), products=products)

    def at(self, steps: int, shift: float) -> tuple[Array, Array]:
        """Levels and products at the steps of another run, between the known ones linearly."""
        known = len(self.products)
        places = known * (1 - np.array(placed_levels(steps, shift)))
        levels = np.interp([*places, known], range(known + 1), self.levels)
        lower = np.clip(places.astype(int), 0, max(known - 2, 0))
        weights, above = np.zeros((steps, known)), np.clip(places - lower, 0, 1)
        weights[range(steps), lower] = 1 - above
        weights[range(steps), np.minimum(lower + 1, known - 1)] += above
        return levels, weights @ np.array(self.products) @ weights.T


@functools.lru_cache(maxsize=512)
def _plans(drift: Drift, steps: int, shift: float, growth: float) -> tuple[tuple[bool, ...], ...]:
    """The best plan of each number of computed steps, from 1 on."""
    levels, products = drift.at(steps, shift)
    weights = np.diff(levels) * np.exp(growth * levels[:-1])
    errors = _errors(levels, products, weights)
    # Of the best way to the pair (previous, latest) of computed steps; before the first is none.
    best = np.full((steps + 1, steps), np.inf)
    best[0, 0] = 0.0
    plans, back = [], list[npt.NDArray[np.intp]]()
    for _ in range(steps):
        ended = best + errors[:, :, steps]
        before, latest = np.unravel_index(int(ended.argmin()), ended.shape)
        plans.append(_traced(int(before), int(latest), back, steps))
        onward = best[:, :, None] + errors[:, :, :steps]
        back.append(onward.argmin(axis=0))
        best = np.full_like(best, np.inf)
        best[1:] = onward.min(axis=0)
    return tuple(plans)


def _traced(
    before: int, latest: int, back: Sequence[npt.NDArray[np.intp]], steps: int
) -> tuple[bool, ...]:
    """The steps on the way to a pair; of the previous one 0 is none, and k + 1 stands for k."""
    plan = [False] * steps
    plan[latest] = True
    for came in reversed(back):
        plan[before - 1] = True
        before, latest = int(came[before - 1, latest]), before - 1
    return tuple(plan)


def _errors(levels: Array, products: Array, weights: Array) -> Array:
    """What the steps between two computed ones are off by, `[steps + 1, steps, steps + 1]`.

    By the previous computed step (0: none; k + 1: k), the latest one, and the next, or the end.
    """
    steps = len(products)
    found = np.full((steps + 1, steps, steps + 1), np.inf)
    for latest in range(steps):
        reused = np.arange(latest + 1, steps)
        for before in range(-1, latest):
            beyond = np.zeros(len(reused))
            if before >= 0:
                gap = levels[latest] - levels[before]
                beyond = (levels[reused] - levels[latest]) / gap if gap else beyond
            off = np.zeros((len(reused), steps))
            off[:, latest] = 1 + beyond
            off[:, before if before >= 0 else latest] -= beyond
            off[range(len(reused)), reused] -= 1
            summed = np.cumsum(off * weights[reused, None], axis=0)
            found[before + 1, latest, latest + 1] = 0.0
            found[before + 1, latest, reused + 1] = ((summed @ products) * summed).sum(axis=1)
    return found


@torch.no_grad()
def measured_drift(engine: Engine, prompt: Prompt, arguments: Mapping[str, Any]) -> Drift:
    """Makes `DRIFTING` images of a prompt, every step computed at p.

    Args:
        engine: The engine, with its pipeline.
        prompt: The prompt; each image has a seed of its own, from the prompt's on.
        arguments: Further arguments of the engine's call, e.g. `num_inference_steps`.

    Raises:
        UnsupportedModelError: Only the pipeline's own loop can take the model's steps.
    """
    request = Request(
        policy=FinePolicy(), step_cache=StaticCache(2), batched_guidance=engine.batched_guidance
    )
    found = []
    for place in range(DRIFTING):
        generator = torch.Generator().manual_seed(prompt.seed + place)
        call = {**arguments, "prompt": prompt.text, "generator": generator}
        plan, latents = engine.plan_call(request, **call)
        bucket, residuals = plan.buckets[0][0], list[Tensor]()
        assert bucket is not None, "a fine plan"

        def look(*_: Any, bucket: Any = bucket, residuals: list[Tensor] = residuals) -> None:
            residuals.append(torch.cat([_spread(one) for one in bucket.residuals()]))

        # Every step computes: the cache is there so that its bucket keeps what they add.
        CpuExecutor().run(replace(plan, cache=None), latents, on_velocity=look)
        rows = torch.stack(residuals)
        products = (rows @ rows.T).double().cpu().numpy()
        found.append(products / np.trace(products) * len(products))
    mean = np.mean(found, axis=0)
    return Drift(levels=plan.solver.sigmas, products=tuple(map(tuple, mean.tolist())))


def _spread(residual: Tensor) -> Tensor:
    flat = residual.flatten()
    return flat[:: -(-len(flat) // _MOST_VALUES)].float()
