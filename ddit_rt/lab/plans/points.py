"""What is measured of a plan, and which of several plans are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from ddit_rt.lab.plans.candidates import Candidate, Template
from ddit_rt.lab.plans.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with the seed of its noise."""

    text: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What an evaluation gave.

    Attributes:
        cost: Mean cost of a denoising loop.
        similarity: SSIM of each prompt's picture to its all-fine reference; of a clip, the mean
            over its frames.
        psnr: The same in dB; None where the picture or clip equals its reference.
    """

    cost: float
    similarity: tuple[float, ...]
    psnr: tuple[float | None, ...]

    @property
    def ssim(self) -> float:
        """Mean similarity."""
        return fmean(self.similarity)

    @property
    def mean_psnr(self) -> float | None:
        """Mean over those that differ; None when none does."""
        finite = [value for value in self.psnr if value is not None]
        return fmean(finite) if finite else None


class Evaluator(Protocol):
    """Runs a plan: the one thing that the search needs of an engine."""

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """Generates every prompt and compares with all fine from the same noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A candidate with what was measured on the calibration prompts."""

    candidate: Candidate
    measurement: Measurement

    @property
    def cost(self) -> float:
        """Mean cost of a run."""
        return self.measurement.cost

    @property
    def ssim(self) -> float:
        """Mean similarity."""
        return self.measurement.ssim

    def dominates(self, other: Point) -> bool:
        """Whether it is no worse in both, and better in one."""
        no_worse = self.cost <= other.cost and self.ssim >= other.ssim
        return no_worse and (self.cost < other.cost or self.ssim > other.ssim)


def best_for(target: Target, points: Sequence[Point]) -> Point | None:
    """The point that serves a target best; None where none meets it."""
    best: Point | None = None
    for point in points:
        if target.met(point) and (best is None or target.better(point, best)):
            best = point
    return best


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that none dominates, by falling cost; of equal ones the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.ssim)):
        if not front or point.ssim > front[-1].ssim:
            front.append(point)
    return front[::-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a family's search found.

    Attributes:
        points: Everything that was measured.
        template: The best template for the main target.
        level: Its best level.
    """

    points: Sequence[Point]
    template: Template
    level: int = 0

    def costing(self, cost: float, costs: Mapping[str, float]) -> Candidate | None:
        """The template's plan of at most `cost`; else the closest measured one; else None."""
        for level in range(self.template.levels + 1):
            sizes = self.template.sizes(level)
            assert sizes is not None, "only plans of known cost are rivals"
            if sum(costs[size] * count for size, count in sizes.items()) <= cost:
                return self.template.at(level)
        cheaper = [point for point in self.points if point.cost <= cost]
        best = max(cheaper, key=lambda point: point.ssim, default=None)
        return best.candidate if best else None
