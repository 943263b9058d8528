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

    def close(self, point: Measured) -> bool:
        """Whether a plan meets the limit and hardly leaves room."""
        room = 0.005 if self.max_cost is None else 0.03
        return self.met(point) and self.shortfall(point) >= -room

    def open_end(self, point: Measured) -> float:
        """What is not limited: a plan's cost, or minus its similarity; less is better."""
        return point.cost if self.max_cost is None else -point.ssim

    def wants_cheaper(self, point: Measured) -> bool:
        """Whether the target lies on the cheaper side of a plan."""
        return self.met(point) == (self.max_cost is None)

    def better(self, one: Measured, other: Measured | None) -> bool:
        """Whether `one` serves better: it meets the limit, and beats `other` in what is left."""
        if other is None or self.met(one) != self.met(other):
            return self.met(one)
        if not self.met(one):
            return self.shortfall(one) < self.shortfall(other)
        return self._rank(one) < self._rank(other)

    def held_out_rank(self, point: Measured) -> tuple[float, ...]:
        """Sorts plans measured on held-out prompts, best first."""
        if self.met_on_held_out(point):
            return (0, *self._rank(point))
        return (1, self.shortfall(point))

    def _rank(self, point: Measured) -> tuple[float, float]:
        pair = (point.cost, -point.ssim)
        return pair if self.max_cost is None else (pair[1], pair[0])

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
