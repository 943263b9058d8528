"""One family's search for one target, within a budget of evaluations.

The first template's dial is turned until the target is nearly met; then variations are raced
against the best template so far, each from the level where it should be level with it, and dropped
as soon as one measured plan beats it in both cost and similarity. The best one is polished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ddit_rt.lab.calibrate.families import Family
from ddit_rt.lab.plans.candidates import Candidate, Template
from ddit_rt.lab.plans.points import Measurement, Point
from ddit_rt.lab.plans.target import Target

_OPENING, _CHALLENGE, _POLISH = 4, 3, 4
"""Evaluations at most: of the first template, of a variation, and of the best one at the end."""


class BudgetSpent(Exception):
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
        """The point of a template's level; `BudgetSpent` if it would be one too many."""
        candidate = template.at(level)
        if candidate.key not in self.points:
            if self.left <= 0:
                raise BudgetSpent
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
class Best:
    """The best level of a template, and its point."""

    template: Template
    level: int
    point: Point


@dataclass(kw_only=True)
class Race:
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
    best: Best | None = None

    def run(self, family: Family) -> None:
        """Turns the first template's dial, races the variations, and polishes the best."""
        limit = self.ledger.limit
        self.ledger.limit = max(1, limit - _POLISH)
        with suppress(BudgetSpent):
            self._race(family)
        self.ledger.limit = limit
        for template in list(self.ledger.levels):
            if self._promising(template):
                self._approach(template, None, 1)
        assert self.best is not None, "the opening measured something"
        self._approach(self.best.template, None, _POLISH)

    def _race(self, family: Family) -> None:
        first = self.best.template if self.best else family.start
        middle = first.levels // 2 if family.level is None else family.level
        hint = self.best.level if self.best else middle
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
                self.best = Best(template=template, level=level, point=point)
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
