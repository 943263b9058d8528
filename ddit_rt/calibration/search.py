"""The search: pure Python against an `Evaluator`, in a closed loop and within a budget.

Each family gets the same number of evaluations. In it, the first template's dial is turned until
the target is just met; then variations are raced against the best template so far, each at the
level where it should be level with the target, and dropped as soon as one measured plan beats it
in both cost and similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from ddit_rt.calibration.plans import Candidate, Family, Template
from ddit_rt.calibration.target import Target
from ddit_rt.patch_scheduler import PatchPolicy

_OPENING, _CHALLENGE, _POLISH = 4, 3, 4
"""Evaluations at most: of the first template, of a variation, and of the best one at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with the seed of its noise."""

    text: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What an evaluation gave.

    Attributes:
        cost: Mean cost of a picture's denoising loop.
        similarity: SSIM of each prompt's picture to its all-fine reference.
        psnr: The same in dB; None where the picture equals its reference.
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
        """Mean over the pictures that differ; None when none does."""
        finite = [value for value in self.psnr if value is not None]
        return fmean(finite) if finite else None


class Evaluator(Protocol):
    """Runs a plan: the one thing that the search needs of an engine."""

    def evaluate(
        self, policy: PatchPolicy, num_inference_steps: int, prompts: Sequence[Prompt]
    ) -> Measurement:
        """Generates every prompt and compares with the all-fine pictures of the same noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A candidate with what was measured on the calibration prompts."""

    candidate: Candidate
    measurement: Measurement

    @property
    def cost(self) -> float:
        """Mean cost of a picture."""
        return self.measurement.cost

    @property
    def ssim(self) -> float:
        """Mean similarity."""
        return self.measurement.ssim

    def dominates(self, other: Point) -> bool:
        """Whether it is no worse in both, and better in one."""
        no_worse = self.cost <= other.cost and self.ssim >= other.ssim
        return no_worse and (self.cost < other.cost or self.ssim > other.ssim)


class _BudgetSpent(Exception):
    """No evaluation is left."""


@dataclass
class Ledger:
    """Measured points of one family, each measured once.

    Attributes:
        measure: Measures a candidate.
        limit: Evaluations at most; may be raised.
        points: By `Candidate.key`, in order of measurement.
        levels: The same by template and level.
    """

    measure: Callable[[Candidate], Measurement]
    limit: int
    points: dict[str, Point] = field(default_factory=dict)
    levels: dict[Template, dict[int, Point]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Evaluations that are left."""
        return self.limit - len(self.points)

    def at(self, template: Template, level: int) -> Point:
        """The point of a template's level; `_BudgetSpent` if it would be one too many."""
        candidate = template.at(level)
        if candidate.key not in self.points:
            if self.left <= 0:
                raise _BudgetSpent
            self.points[candidate.key] = Point(
                candidate=candidate, measurement=self.measure(candidate)
            )
        point = self.points[candidate.key]
        self.levels.setdefault(template, {})[level] = point
        return point

    def dominated(self, point: Point) -> bool:
        """Whether a measured point beats this one in both."""
        return any(other.dominates(point) for other in self.points.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Best:
    template: Template
    level: int
    point: Point


@dataclass(kw_only=True)
class _Race:
    """One family's search for one target.

    Attributes:
        ledger: Measures.
        target: What to reach.
        costs: Cost of one step at each patch size.
        best: The best template so far; at first where a race for a target nearby ended.
    """

    ledger: Ledger
    target: Target
    costs: Mapping[str, float]
    best: _Best | None = None

    def run(self, family: Family) -> None:
        """Turns the first template's dial, races the variations, and polishes the best."""
        limit = self.ledger.limit
        self.ledger.limit = max(1, limit - _POLISH)
        with suppress(_BudgetSpent):
            self._race(family)
        self.ledger.limit = limit
        for template in list(self.ledger.levels):
            if self._promising(template):
                self._approach(template, None, 1)
        assert self.best is not None, "the opening measured something"
        self._approach(self.best.template, None, _POLISH)

    def _race(self, family: Family) -> None:
        first = self.best.template if self.best else family.start
        hint = self.best.level if self.best else first.levels // 2
        exact = self._exact(first, None)
        self._approach(first, hint if exact is None else exact, _OPENING)
        for change in family.changes:
            assert self.best is not None, "the opening measured something"
            challenger = change(self.best.template)
            if challenger is None or challenger == self.best.template or not challenger.levels:
                continue
            exact = self._exact(challenger, self.best.point.cost)
            hint = min(self.best.level, challenger.levels)
            self._approach(challenger, hint if exact is None else exact, _CHALLENGE)

    def spread(self) -> None:
        """Spends what is left of the budget evenly over the best template's levels."""
        assert self.best is not None, "spread comes after run"
        template, left = self.best.template, self.ledger.left
        for index in range(left):
            self.ledger.at(template, round((index + 0.5) * template.levels / left))

    def _exact(self, template: Template, cost: float | None) -> int | None:
        """The level to start from where costs are known without running, else None.

        With a limit on cost: the first level that keeps it. With one on similarity: the first
        that is cheaper than `cost`, the best so far, since only that would be better.
        """
        limit = self.target.max_cost or cost
        if limit is None or template.sizes(0) is None:
            return None
        for level in range(template.levels + 1):
            known = self._cost(template, level)
            if known < limit or (self.target.max_cost and known <= limit):
                return level
        return template.levels

    def _cost(self, template: Template, level: int) -> float:
        sizes = template.sizes(level)
        assert sizes is not None, "the caller asked whether sizes are known"
        return sum(self.costs[size] * count for size, count in sizes.items())

    def _approach(self, template: Template, first: int | None, limit: int) -> None:
        """Turns the dial until the target is just met, or the template is out of the race.

        Args:
            template: The template.
            first: Level to start from; None to go on from what is known of it.
            limit: Evaluations at most.
        """
        level = first if first is not None else self._next_level(template)
        tried = 0
        while level is not None and (tried < limit or self._promising(template)):
            point = self.ledger.at(template, level)
            tried += 1
            if self.best is None or self.target.better(point, self.best.point):
                self.best = _Best(template=template, level=level, point=point)
            if self._finished(template, point):
                return
            level = self._next_level(template)

    def _bracket(self, template: Template) -> tuple[int, int]:
        """The cheapest level known that is too dear, the dearest that is too cheap.

        -1 and one more than the highest where there is none.
        """
        known = self.ledger.levels.get(template, {})
        dear = [level for level, point in known.items() if self._wants_cheaper(point)]
        cheap = [level for level, point in known.items() if not self._wants_cheaper(point)]
        return max(dear, default=-1), min(cheap, default=template.levels + 1)

    def _next_level(self, template: Template) -> int | None:
        """The level to try next: inside the bracket of the target, or towards it."""
        dear, cheap = self._bracket(template)
        if cheap - dear < 2:
            return None
        known = self.ledger.levels.get(template, {})
        stride = max(1, template.levels // 12) << len(known)
        if cheap > template.levels:
            return min(dear + stride, template.levels)
        if dear < 0:
            return max(cheap - stride, 0)
        share = min(max(self._crossing(known[dear], known[cheap]), 0.2), 0.8)
        return min(max(round(dear + share * (cheap - dear)), dear + 1), cheap - 1)

    def _crossing(self, dear: Point, cheap: Point) -> float:
        """How far from one point to the other the target lies, by a straight line."""
        above, below = self.target.shortfall(dear), self.target.shortfall(cheap)
        return above / (above - below) if above != below else 0.5

    def _promising(self, template: Template) -> bool:
        """Whether a variation should beat the best, by a straight line over its bracket."""
        dear, cheap = self._bracket(template)
        if self.best is None or self.best.template == template:
            return False
        if dear < 0 or cheap > template.levels or not self.target.met(self.best.point):
            return False
        known = self.ledger.levels[template]
        one, other = known[dear], known[cheap]
        share = self._crossing(one, other)
        if self.target.max_cost is None:
            return one.cost + share * (other.cost - one.cost) < self.best.point.cost
        return one.ssim + share * (other.ssim - one.ssim) > self.best.point.ssim

    def _finished(self, template: Template, point: Point) -> bool:
        """Whether turning further cannot help: the target is met closely, or the race is lost."""
        assert self.best is not None, "a point was measured"
        if self.target.close(point):
            return True
        exact = template.sizes(0) is not None
        if exact and self.target.max_cost is not None:
            return True
        if self.best.template == template:
            return False
        missed = exact and not self.target.met(point)
        return missed or self.ledger.dominated(point)

    def _wants_cheaper(self, point: Point) -> bool:
        """Whether the target lies on the cheaper side of a point."""
        met = self.target.met(point)
        return met if self.target.max_cost is None else not met


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a family's search found.

    Attributes:
        points: Everything that was measured.
        template: The best template for the main target.
    """

    points: Sequence[Point]
    template: Template

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


def search(
    families: Sequence[Family],
    evaluator: Evaluator,
    prompts: Sequence[Prompt],
    *,
    costs: Mapping[str, float],
    targets: Sequence[Target],
    evaluations: int,
) -> dict[str, Found]:
    """Searches every family for every target, with equal budgets.

    Args:
        families: What to search.
        evaluator: Runs plans.
        prompts: Calibration prompts.
        costs: Cost of one step at each patch size.
        targets: The main one first, on which 60% of the budget goes; the rest is shared.
        evaluations: Candidates per family at most; each generates every prompt once.

    Returns:
        By kind of family.
    """

    def measure(candidate: Candidate) -> Measurement:
        return evaluator.evaluate(candidate.policy, candidate.num_inference_steps, prompts)

    found: dict[str, Found] = {}
    for family in families:
        ledger = Ledger(measure=measure, limit=0)
        main: _Best | None = None
        for index, target in enumerate(targets):
            share = 0.6 + 0.4 * index / (len(targets) - 1) if len(targets) > 1 else 1
            ledger.limit = max(1, round(evaluations * share))
            race = _Race(ledger=ledger, target=target, costs=costs, best=main)
            with suppress(_BudgetSpent):
                race.run(family)
            main = main or race.best
        with suppress(_BudgetSpent):
            race.spread()
        assert main is not None, "every budget is at least one evaluation"
        found[family.kind] = Found(points=list(ledger.points.values()), template=main.template)
    return found


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
