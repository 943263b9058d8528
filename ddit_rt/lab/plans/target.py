"""What a calibration is asked for, and which of two plans serves it better."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

SPEEDUP, MIN_SSIM, MIN_STFT, BUDGET_MS = "speedup", "min_ssim", "min_stft", "budget_ms"

GENTLE, STRONG = 0.5, 1.5
"""Powers of the target's speed-up at which the presets `quality` and `fast` are searched."""

_COST_MARGIN, _SSIM_MARGIN = 0.10, 0.02
"""A plan may miss by this much on held-out prompts, which is what prompts vary by."""

_EXCHANGE = 4
"""Power of the cost by which losses fall along a front: what a plan that misses a limit by a little
pays in what is not limited."""


class Measured(Protocol):
    """What a target judges."""

    @property
    def cost(self) -> float:
        """Mean cost of a run."""

    @property
    def ssim(self) -> float:
        """Mean similarity to the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A limit on cost, under which similarity counts, or one on similarity, above which cost does.

    Attributes:
        max_cost: Mean cost of a run's loop at most; None if similarity is the limit.
        min_ssim: Mean similarity at least; None if cost is the limit.
    """

    max_cost: float | None = None
    min_ssim: float | None = None

    def __post_init__(self) -> None:
        """Checks that there is one limit, in its range."""
        if (self.max_cost is None) == (self.min_ssim is None):
            raise ValueError(f"got {self}; a target has one limit, max_cost or min_ssim")
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise ValueError(f"got max_cost={self.max_cost}; it must be positive and finite")
        if self.min_ssim is not None and not 0 < self.min_ssim < 1:
            raise ValueError(f"got min_ssim={self.min_ssim}; it lies between 0 and 1")

    def shortfall(self, point: Measured) -> float:
        """How far a plan misses, as a share of cost or in similarity; <= 0 if it meets."""
        if self.max_cost is not None:
            return point.cost / self.max_cost - 1
        assert self.min_ssim is not None
        return self.min_ssim - point.ssim

    def met(self, point: Measured) -> bool:
        """Whether a plan keeps the limit."""
        return self.shortfall(point) <= 1e-9

    def met_on_held_out(self, point: Measured) -> bool:
        """Whether a plan keeps the limit within what prompts vary: 10% of cost, 0.02 otherwise."""
        return self.shortfall(point) <= (_SSIM_MARGIN if self.max_cost is None else _COST_MARGIN)

    def better(self, one: Measured, other: Measured) -> bool:
        """Whether `one` serves better: it meets the limit, and beats `other` in what is left."""
        if self.met(one) != self.met(other):
            return self.met(one)
        if not self.met(one):
            return self.shortfall(one) < self.shortfall(other)
        return self._rank(one) < self._rank(other)

    def held_out_rank(self, point: Measured) -> tuple[float, ...]:
        """Sorts plans measured on held-out prompts, best first.

        One that keeps the limit but for what prompts vary by stands as the plan that would keep it:
        closer to the reference, or cheaper, by as much less as it is over.
        """
        if not self.met_on_held_out(point):
            return (1, self.shortfall(point))
        loss = max(1 - point.ssim, 1e-9)
        if self.max_cost is not None:
            over = max(point.cost / self.max_cost, 1.0)
            return (0, loss * over**_EXCHANGE, point.cost)
        assert self.min_ssim is not None
        over = max(loss / (1 - self.min_ssim), 1.0)
        return (0, point.cost * over ** (1 / _EXCHANGE), loss)

    def _rank(self, point: Measured) -> tuple[float, float]:
        pair = (point.cost, -point.ssim)
        return pair if self.max_cost is None else (pair[1], pair[0])

    def with_room(self) -> Target:
        """The same with a tenth of the cost, or of the loss, to spare."""
        if self.max_cost is not None:
            return replace(self, max_cost=self.max_cost * (1 - _COST_MARGIN))
        assert self.min_ssim is not None
        return replace(self, min_ssim=1 - (1 - self.min_ssim) * (1 - _COST_MARGIN))

    def shifted(self, power: float, base_cost: float) -> Target:
        """A gentler (power < 1) or stronger (> 1) target on the same scale.

        Args:
            power: Exponent of the speed-up; each 0.5 of it doubles the similarity that is lost.
            base_cost: Cost of full resolution.
        """
        if self.max_cost is not None:
            return replace(self, max_cost=base_cost * (self.max_cost / base_cost) ** power)
        assert self.min_ssim is not None
        lost = (1 - self.min_ssim) * 4 ** (power - 1)
        return replace(self, min_ssim=max(1 - lost, self.min_ssim / 2))
