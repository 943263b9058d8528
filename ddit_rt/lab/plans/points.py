"""What is measured of a plan, and which of several plans are worth having."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol, TypeVar

from ddit_rt import checks
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.target import Measured, Target

T = TypeVar("T")
M = TypeVar("M", bound=Measured)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with the seed of its noise."""

    text: str
    seed: int


def prompt_lines(path: str | Path) -> list[str]:
    """Prompts of a text file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        OSError, ValueError: No such file, or none that holds prompts.
    """
    prompts = [line for line in checks.text_lines(path) if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What an evaluation of a plan gave, an entry for each prompt.

    Attributes:
        costs: Cost of the denoising loop.
        similarity: Of what the prompt gave to what it gives at full resolution, by the measure
            of what the model makes: of images SSIM.
        psnr: That measure's ratio, in dB; None where both are equal.
    """

    costs: tuple[float, ...]
    similarity: tuple[float, ...]
    psnr: tuple[float | None, ...]

    @property
    def cost(self) -> float:
        """Mean cost."""
        return fmean(self.costs)

    @property
    def ssim(self) -> float:
        """Mean similarity."""
        return fmean(self.similarity)

    @property
    def mean_psnr(self) -> float | None:
        """Mean over those that differ; None when none does."""
        finite = [value for value in self.psnr if value is not None]
        return fmean(finite) if finite else None

    @property
    def rows(self) -> list[tuple[float, float, float | None]]:
        """Cost, similarity and ratio of each prompt."""
        return list(zip(self.costs, self.similarity, self.psnr, strict=True))

    @staticmethod
    def of(rows: Sequence[tuple[float, float, float | None]]) -> Measurement:
        """What `rows` gave."""
        costs, similarity, psnr = zip(*rows, strict=True)
        return Measurement(costs=costs, similarity=similarity, psnr=psnr)


class Evaluator(Protocol):
    """Runs a plan: the one thing that the search needs of an engine."""

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """Generates every prompt and compares with full resolution from the same noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A candidate with what was measured of it, on calibration prompts or held-out ones."""

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


def best_for(target: Target, points: Sequence[M]) -> M | None:
    """The point that serves a target best; None where none meets it."""
    best = nearest_to(target, points)
    return best if best is not None and target.met(best) else None


def nearest_to(target: Target, points: Sequence[M]) -> M | None:
    """The point that serves a target best, or comes nearest; None without points."""
    best: M | None = None
    for point in points:
        if best is None or target.better(point, best):
            best = point
    return best


def pareto_front(
    items: Sequence[T], cost: Callable[[T], float], score: Callable[[T], float]
) -> list[T]:
    """The items that none beats in both, by rising cost; of equal ones the first.

    Args:
        items: What is compared.
        cost: Returns an item's cost; less is better.
        score: Returns an item's score; more is better.
    """
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -score(item))):
        if not front or score(item) > score(front[-1]):
            front.append(item)
    return front
