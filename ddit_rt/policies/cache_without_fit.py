"""Step caches that need nothing fitted for a model, so that every model has one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ddit_rt import checks
from ddit_rt.ops import CacheGrowth
from ddit_rt.policies.cache import (
    NO_LIMIT,
    CacheModel,
    CacheTable,
    StepCache,
    checked_order,
    order_note,
    reached,
)

_ROUNDING = 1e-9
_PLAN = "steps from one that computes to the next, 2, or for every step whether it computes"


@dataclass(frozen=True, slots=True)
class StaticCache(StepCache):
    """Steps that compute and steps that reuse, fixed before the run.

    Attributes:
        plan: Steps from one that computes to the next, at least 1, on average where it is no whole
            number: of 2, every second step reuses; of 1.5, every third. Or one truth value per
            step, whether it computes, which `first` and `last` add to.
        first: First steps that always compute, at least 1.
        last: Last steps that always compute.
        residual_order: Whether a step that reuses adds the latest residual (0), or extrapolates
            the latest two linearly in the noise level (1); while only one was computed at its patch
            size since that changed, it adds that one.
    """

    plan: float | Sequence[bool]
    _: KW_ONLY
    first: int = 3
    last: int = 1
    residual_order: int = 1

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        checks.settle(
            self,
            plan=_checked_plan(self.plan),
            first=checks.whole("first", self.first, 1),
            last=checks.whole("last", self.last, 0),
            residual_order=checked_order(self.residual_order),
        )

    def resolve(self, model: CacheModel) -> CacheTable:
        """See `StepCache.resolve`."""
        computed = self._computed(model.steps)
        edges = (self.first, model.steps - self.last)
        increments = tuple(
            math.nan if at or not edges[0] <= step < edges[1] else 0.0
            for step, at in enumerate(computed)
        )
        kept = f"{model.steps - sum(map(math.isnan, increments))} of {model.steps} steps reuse"
        return CacheTable(
            increments=increments,
            threshold=1.0,
            residual_order=self.residual_order,
            note=f"StaticCache, {kept}{order_note(self.residual_order)}",
        )

    def _computed(self, steps: int) -> Sequence[bool]:
        plan = self.plan
        if isinstance(plan, Sequence):
            if len(plan) != steps:
                raise ValueError(
                    f"the step cache has a plan of {len(plan)} steps and the run has {steps}; give "
                    "one truth value per step, or the steps from one that computes to the next"
                )
            return plan
        spans = [
            math.floor((step - self.first + 1) / plan + _ROUNDING) for step in range(-1, steps)
        ]
        return [before < now for before, now in itertools.pairwise(spans)]


@dataclass(frozen=True, slots=True)
class SeaCache(StepCache):
    """Reuses while the latents, filtered for what is signal in them, have changed little.

    At each step the latents are filtered for a clean picture whose power falls with the frequency f
    as 1 / f ** power_exp, at the step's noise level; their relative L1 change since the step before
    is added up, and while the sum is below the threshold the step reuses (arXiv 2602.18993, as
    diffusers' `SeaCacheConfig` has it, whose fields these are). The signal is the latents' alone,
    so that every model has it, and nothing is fitted. Where diffusers extrapolates by the number
    of the step, this does by its noise level.

    Attributes:
        threshold: Larger is faster and less faithful; 0 reuses nothing.
        residual_order: As in `StaticCache`.
        retention_steps: First steps that always compute, at least 1.
        cache_end_steps: Last steps that always compute.
        max_consecutive_cached: Steps in a row that may reuse; 0 for no limit.
        power_exp: Exponent of a clean picture's spectrum; 3 was published for videos.
    """

    threshold: float = 0.25
    _: KW_ONLY
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        longest = checks.whole("max_consecutive_cached", self.max_consecutive_cached, 0, NO_LIMIT)
        checks.settle(
            self,
            threshold=checks.number("threshold", self.threshold, 0),
            residual_order=checked_order(self.residual_order),
            retention_steps=checks.whole("retention_steps", self.retention_steps, 1),
            cache_end_steps=checks.whole("cache_end_steps", self.cache_end_steps, 0),
            max_consecutive_cached=longest,
            power_exp=checks.number("power_exp", self.power_exp, 0, open_low=True),
        )

    def resolve(self, model: CacheModel) -> CacheTable:
        """See `StepCache.resolve`."""
        return CacheTable(
            increments=_looked_at(model.steps, self.retention_steps, self.cache_end_steps),
            threshold=self.threshold,
            limit=self.max_consecutive_cached or NO_LIMIT,
            coefficients=(1.0, 0.0),  # the change itself
            power_exp=self.power_exp,
            residual_order=self.residual_order,
            note=f"SeaCache {self.threshold:g}{order_note(self.residual_order)}",
        )


@dataclass(frozen=True, slots=True)
class FirstBlockCache(StepCache):
    """Reuses while what the first block adds has changed little (ParaAttention's cache).

    At every step the model's first block runs. By how much it adds other than it did in the latest
    computed step, in relative L1, decides: at the threshold or below it, what all other blocks
    added then stands for them (as diffusers' `FirstBlockCacheConfig` has it; there cond and uncond
    decide each for itself, here the larger change for both). Nothing is fitted. Where a step is
    coarse, the block runs at p all the same, since the patch size is not known to it, and the
    coarse step takes or reuses all of its own.

    Attributes:
        threshold: Larger is faster and less faithful.
        residual_order: As in `StaticCache`; 0 was published.
        first: First steps that always compute, at least 1.
        last: Last steps that always compute.
        max_consecutive_cached: Steps in a row that may reuse; 0 for no limit.
    """

    of_one_model = True

    threshold: float = 0.05
    _: KW_ONLY
    residual_order: int = 0
    first: int = 1
    last: int = 0
    max_consecutive_cached: int = 0

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        longest = checks.whole("max_consecutive_cached", self.max_consecutive_cached, 0, NO_LIMIT)
        checks.settle(
            self,
            threshold=checks.number("threshold", self.threshold, 0),
            residual_order=checked_order(self.residual_order),
            first=checks.whole("first", self.first, 1),
            last=checks.whole("last", self.last, 0),
            max_consecutive_cached=longest,
        )

    def resolve(self, model: CacheModel) -> CacheTable:
        """See `StepCache.resolve`."""
        return CacheTable(
            increments=_looked_at(model.steps, self.first, self.last),
            threshold=reached(self.threshold),
            limit=self.max_consecutive_cached or NO_LIMIT,
            growth=CacheGrowth.LATEST,
            coefficients=(1.0, 0.0),  # the change itself
            first_block=True,
            residual_order=self.residual_order,
            note=f"FirstBlockCache {self.threshold:g}{order_note(self.residual_order)}",
        )


def _looked_at(steps: int, first: int, last: int) -> tuple[float, ...]:
    """Increments of a cache that a signal decides, between the steps that always compute."""
    return tuple(0.0 if first <= step < steps - last else math.nan for step in range(steps))


def _checked_plan(plan: Any) -> float | tuple[bool, ...]:
    if not isinstance(plan, Sequence) or isinstance(plan, str):
        try:
            return checks.number("plan", plan, 1)
        except TypeError:
            raise TypeError(checks.got("plan", plan, _PLAN)) from None
    if not plan:
        raise ValueError(checks.got("plan", plan, _PLAN))
    return tuple(checks.flag(f"plan[{step}]", value) for step, value in enumerate(plan))
