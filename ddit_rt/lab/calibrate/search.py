"""The search for good plans of one kind: pure Python against an `Evaluator`, within a budget.

The dial of the first template is turned until the target is just met. Then each variation of the
best template so far is tried in the same way, from the level at which it should cost as much, and
dropped as soon as one measured plan beats it in both cost and similarity. What is left of the
budget goes to the best template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from ddit_rt.lab.calibrate.spaces import Space, varied
from ddit_rt.lab.plans.candidates import Candidate, Template
from ddit_rt.lab.plans.points import Evaluator, Found, Measurement, Point, Prompt
from ddit_rt.lab.plans.target import Target

_TRIES = 4
"""Evaluations at most: of the first template, of a variation, and of the best one at the end."""

_MAIN_SHARE = 0.6
"""Share of the budget that goes to the first target; the others share the rest."""


class _BudgetSpent(Exception):
    """No evaluation is left."""


class _Best(NamedTuple):
    """A template at a level, and what was measured of it."""

    template: Template
    level: int
    point: Point


@dataclass(kw_only=True)
class _Trials:
    """What was measured of one space: each plan once, and at most `limit` of them."""

    measure: Callable[[Candidate], Measurement]
    limit: int = 0
    points: dict[str, Point] = field(default_factory=dict)
    levels: dict[Template, dict[int, Point]] = field(default_factory=dict)

    def at(self, template: Template, level: int) -> Point:
        """The point of a template's level; `_BudgetSpent` if it would be one too many."""
        candidate = template.at(level)
        if candidate.key not in self.points:
            if len(self.points) >= self.limit:
                raise _BudgetSpent
            measurement = self.measure(candidate)
            self.points[candidate.key] = Point(candidate=candidate, measurement=measurement)
        point = self.points[candidate.key]
        self.levels.setdefault(template, {})[level] = point
        return point

    def best(self, target: Target) -> _Best | None:
        """What serves a target best so far; None before anything was measured."""
        best: _Best | None = None
        for template, levels in self.levels.items():
            for level, point in levels.items():
                if best is None or target.better(point, best.point):
                    best = _Best(template, level, point)
        return best

    def turn(self, template: Template, target: Target, level: int | None) -> None:
        """Turns a dial from a level until the target is just met, or the template is beaten."""
        for _ in range(_TRIES):
            if level is None:
                return
            point = self.at(template, level)
            if target.close(point) or self._beaten(template, point, target):
                return
            level = next_level(self.levels[template], template.levels, target)

    def _beaten(self, template: Template, point: Point, target: Target) -> bool:
        """Whether turning on cannot make the template the best."""
        if template.known_cost and target.max_cost is not None:
            return True  # the dial started at the level that costs just what it may
        best = self.best(target)
        if best is None or best.template == template:
            return False
        missed = template.known_cost and not target.met(point)  # and started below the best's cost
        return missed or any(other.dominates(point) for other in self.points.values())


def next_level(known: Mapping[int, Point], levels: int, target: Target) -> int | None:
    """The level to measure next: where the target should lie, by a line between two points.

    Args:
        known: The measured levels, one at least.
        levels: The highest level.
        target: What to reach.

    Returns:
        A level between the last that the target finds too dear and the first that it finds too
        cheap, or beyond the last one known; None where those two are neighbours.
    """
    dear, cheap = _around(known, levels, target)
    if cheap - dear < 2:
        return None
    stride = max(1, levels // 12) << len(known)
    if cheap > levels:
        return min(dear + stride, levels)
    if dear < 0:
        return max(cheap - stride, 0)
    share = _crossing(known[dear], known[cheap], target)
    level = round(dear + min(max(share, 0.2), 0.8) * (cheap - dear))
    return min(max(level, dear + 1), cheap - 1)


def expected(known: Mapping[int, Point], levels: int, target: Target) -> float:
    """What a template should reach where it just meets a target; less is better.

    Args:
        known: The measured levels, one at least.
        levels: The highest level.
        target: What to reach.

    Returns:
        Cost, or minus the similarity where cost is limited; infinite where no level meets it.
    """
    dear, cheap = _around(known, levels, target)
    if dear >= 0 and cheap <= levels:
        share = _crossing(known[dear], known[cheap], target)
        one, other = target.open_end(known[dear]), target.open_end(known[cheap])
        return one + share * (other - one)
    met = [target.open_end(point) for point in known.values() if target.met(point)]
    return min(met, default=math.inf)


def _around(known: Mapping[int, Point], levels: int, target: Target) -> tuple[int, int]:
    """The last level known that is too dear, or -1, and the next one known, or one too many."""
    dear = max((n for n, point in known.items() if target.wants_cheaper(point)), default=-1)
    return dear, min((n for n in known if n > dear), default=levels + 1)


def _crossing(dear: Point, cheap: Point, target: Target) -> float:
    """How far from one point to the other the target lies, by a straight line."""
    above, below = target.shortfall(dear), target.shortfall(cheap)
    return above / (above - below) if above != below else 0.5


def search(
    spaces: Sequence[Space],
    evaluator: Evaluator,
    prompts: Sequence[Prompt],
    *,
    costs: Mapping[str, float],
    targets: Sequence[Target],
    evaluations: int,
) -> dict[str, Found]:
    """Searches every space for every target, with equal budgets.

    Args:
        spaces: What to search.
        evaluator: Runs plans.
        prompts: Calibration prompts.
        costs: Cost of one step at each patch size.
        targets: The main one first, on which 60% of the budget goes; at least two.
        evaluations: Candidates of a space at most; each generates every prompt once.

    Returns:
        What was found, by kind of plan.
    """
    found: dict[str, Found] = {}
    for space in spaces:
        trials = _Trials(measure=lambda plan: evaluator.evaluate(plan, prompts))
        bests: list[_Best] = []
        for index, target in enumerate(targets):
            share = _MAIN_SHARE + (1 - _MAIN_SHARE) * index / (len(targets) - 1)
            bests.append(_search_for(target, space, trials, costs, round(evaluations * share)))
        with suppress(_BudgetSpent):
            _spread(trials, bests[-1].template)
        points, main = list(trials.points.values()), bests[0]
        found[space.kind] = Found(points=points, template=main.template, level=main.level)
    return found


def _search_for(
    target: Target, space: Space, trials: _Trials, costs: Mapping[str, float], limit: int
) -> _Best:
    """Turns the first template's dial, then its variations', then the best one's once more."""
    trials.limit = max(1, limit - _TRIES)
    with suppress(_BudgetSpent):
        best = trials.best(target)
        first = space.start if best is None else best.template
        middle = first.levels // 2 if space.level is None else space.level
        trials.turn(first, target, _start(first, target, best, costs, middle))
        for name, value in space.in_turn():
            best = trials.best(target)
            assert best is not None, "the first template was measured"
            other = varied(best.template, name, value)
            if other is not None and other.levels and other not in trials.levels:
                trials.turn(other, target, _start(other, target, best, costs, middle))
    trials.limit = max(1, limit)
    with suppress(_BudgetSpent):
        _polish(target, trials)
    best = trials.best(target)
    assert best is not None, "every budget is at least one evaluation"
    return best


def _polish(target: Target, trials: _Trials) -> None:
    """Turns the dial of what should be the best template where the target is just met."""
    for _ in range(_TRIES):
        template, known = min(
            trials.levels.items(), key=lambda item: expected(item[1], item[0].levels, target)
        )
        level = next_level(known, template.levels, target)
        if level is None or any(target.close(point) for point in known.values()):
            return
        trials.at(template, level)


def _start(
    template: Template, target: Target, best: _Best | None, costs: Mapping[str, float], middle: int
) -> int:
    """Where a dial starts: where a plan costs what it may, else where the best one stands."""
    limit = target.max_cost or (best and best.point.cost * (1 - 1e-9))
    if template.known_cost and limit:
        level = template.within(limit, costs)
        return template.levels if level is None else level
    return min(best.level if best else middle, template.levels)


def _spread(trials: _Trials, template: Template) -> None:
    """Spends what is left of the budget evenly over a template's levels."""
    left = trials.limit - len(trials.points)
    for index in range(left):
        trials.at(template, round((index + 0.5) * template.levels / left))
