"""The search for good plans: one space, one budget of pictures, pure Python against an `Evaluator`.

Every family is measured first, at the costs that matter. Then a plan at a time is proposed by what
the measured ones have taught (`surrogate.py`), from the families and from changes of the best ones,
and measured on a few prompts; it goes on to all of them where it looks like the best for a target.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ddit_rt.lab.calibrate.moves import Space
from ddit_rt.lab.calibrate.surrogate import Normal, Surrogate, features
from ddit_rt.lab.plans.candidates import FINE, KINDS, Candidate
from ddit_rt.lab.plans.genome import Genome
from ddit_rt.lab.plans.points import (
    Evaluator,
    Measurement,
    Point,
    Prompt,
    best_for,
    nearest_to,
    pareto_front,
)
from ddit_rt.lab.plans.target import Target

FEW = 2
"""Prompts that a plan is first measured on."""

_TURNS = (0, 0, 1, 0, 2)
"""Whose turn it is: the main target's, mostly."""

_TUNINGS = 2
"""Plans by which the dial of a family is set for the main target, before anything else is tried."""

_CHILDREN, _PARENTS, _CROSSED = 240, 8, 0.35
"""Changed plans in a pool, how many of the front they come of, and the share of crossings."""

_LEAST_LOSS = 1e-5

_EXPECTED = 0.02
"""Share by which a plan's cost is off what the changes along full resolution say, at the least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A plan of which something was measured.

    Attributes:
        genome: The plan.
        point: The same, as it runs, and what was measured, on the first prompts or on all.
        whole: Whether it was on all.
        cost: What a run should cost, mean over all prompts.
        ssim: How similar it should be.
    """

    genome: Genome
    point: Point
    whole: bool
    cost: float
    ssim: float

    @property
    def kind(self) -> str:
        """Its kind."""
        return self.point.candidate.kind


@dataclass(kw_only=True)
class Search:
    """What was tried, and what to try next.

    Attributes:
        space: What plans can be made of.
        evaluator: Runs plans.
        prompts: Calibration prompts.
        targets: The main one first, then a gentler and a stronger one.
        pictures: How many may be generated.
        seed: Of the changes that are drawn.
        spent: How many were.
        tried: What was measured, by the plan's key.
    """

    space: Space
    evaluator: Evaluator
    prompts: Sequence[Prompt]
    targets: Sequence[Target]
    pictures: int
    seed: int = 0
    spent: int = 0
    tried: dict[str, tuple[Genome, Point]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lists what comes first, and seeds what is drawn later."""
        self._rng = np.random.default_rng(self.seed)
        self._few = min(FEW, len(self.prompts))
        self._rest = len(self.prompts) - self._few
        base = self.space.costs["p"] * self.space.steps
        speeds = zip(self.targets, (2, 1.5, 3), strict=True)
        limits = [target.max_cost or base / speed for target, speed in speeds]
        self._families = self.space.families()
        self._rows = {
            id(one): features(one, self.space.steps, self.space.dials)
            for own in self._families
            for one in own
        }
        # Of the others the plan that just meets the target is among the first.
        settled = self.targets[0].max_cost is not None
        self._dialled = [own for own in self._families if not (settled and own[0].sizes())]
        corners = self.space.corners(limits)
        self._corners = {self._candidate(one).key: one for one in corners}
        self.kinds = {self._candidate(one).kind for one in corners}
        # The best of each kind, and for the other targets, on all prompts.
        self._reserve = self._rest * (len(self.kinds) + 2)
        first = len(self._corners) + _TUNINGS * len(self._dialled)
        self.least = self._few * first + self._reserve

    def run(self) -> list[Point]:
        """Searches until the pictures are spent; every plan that was measured on all prompts."""
        for genome in self._corners.values():
            self._measure(genome, self._few)
        for family in self._dialled * _TUNINGS:
            self._try(self.targets[0], family)
        turns = itertools.cycle(_TURNS)
        while self.spent + max(self._few, self._rest) + self._reserve <= self.pictures:
            target = self.targets[next(turns)]
            best = nearest_to(target, self.estimates())
            if best is not None and not best.whole:
                self._measure(best.genome, len(self.prompts))
            elif not self._try(target):
                break
        while self.spent + self._rest <= self.pictures:
            tried = next((one for one in self._worthy() if not one.whole), None)
            if tried is None:
                break
            self._measure(tried.genome, len(self.prompts))
        return [tried.point for tried in self.estimates() if tried.whole]

    def estimates(self) -> list[Tried]:
        """Everything that was tried, with what it should come to on all prompts.

        What was measured on few prompts is scaled by how those compare with all, in the plans of
        which both are known.
        """
        count = len(self.prompts)
        whole = [
            (g, p.measurement) for g, p in self.tried.values() if len(p.measurement.costs) == count
        ]
        losses = _ratio([[1 - x for x in own.similarity] for _, own in whole], self._few)
        costs = _ratio([own.costs for genome, own in whole if genome.sizes() is None], self._few)
        found = []
        for genome, point in self.tried.values():
            done = len(point.measurement.costs) == count
            cost = point.cost * (1.0 if done or genome.sizes() is not None else costs)
            ssim = point.ssim if done else 1 - (1 - point.ssim) * losses
            found.append(Tried(genome=genome, point=point, whole=done, cost=cost, ssim=ssim))
        return found

    def _worthy(self) -> Iterator[Tried]:
        """Yields the best of each kind, then the best for each target, then all of the front."""
        found = self.estimates()
        groups = [(self.targets[0], [one for one in found if one.kind == kind]) for kind in KINDS]
        groups += [(target, found) for target in self.targets]
        # Those first of which none is known on all prompts.
        for target, group in sorted(groups, key=lambda own: any(one.whole for one in own[1])):
            best = nearest_to(target, group)
            if best is not None:
                yield best
        yield from _front(found)

    def _candidate(self, genome: Genome) -> Candidate:
        return genome.candidate(self.space.taus, self.space.steps)

    def _measure(self, genome: Genome, count: int) -> None:
        """Measures a plan on the first prompts, those that it was not yet measured on."""
        candidate = self._candidate(genome)
        before = self.tried.get(candidate.key)
        rows = before[1].measurement.rows if before else []
        prompts = self.prompts[len(rows) : count]
        if prompts:
            rows += self.evaluator.evaluate(candidate, prompts).rows
            self.spent += len(prompts)
        point = Point(candidate=candidate, measurement=Measurement.of(rows))
        self.tried[candidate.key] = (genome, point)

    def _try(self, target: Target, family: Sequence[Genome] = ()) -> bool:
        """Measures the plan that should serve a target best, of those that are not yet measured.

        Args:
            target: The target.
            family: What to choose from; by default all families, and changes of the best plans.

        Returns:
            Whether there was one.
        """
        found = self.estimates()
        pool = family or self._pool(target, found)
        kind = self._candidate(family[0]).kind if family else None
        best = best_for(target, [one for one in found if kind in (None, one.kind)])
        scores = [_promise(target, best, *own) for own in self._predicted(found, pool)]
        for place in np.argsort(scores, kind="stable")[::-1].tolist():
            candidate = self._candidate(pool[place])
            if candidate.kind != FINE and candidate.key not in self.tried:
                self._measure(pool[place], self._few)
                return True
        return False

    def _predicted(
        self, found: Sequence[Tried], pool: Sequence[Genome]
    ) -> list[tuple[Normal, Normal]]:
        """The logarithms of cost and of loss of each plan in a pool."""
        costs, whole = self.space.costs, self.space.costs["p"]
        known = np.array([self._features(tried.genome) for tried in found])
        places = np.array([self._features(genome) for genome in pool])
        shares = [math.log(tried.cost / (whole * tried.genome.steps)) for tried in found]
        losses = [math.log(max(1 - tried.ssim, _LEAST_LOSS)) for tried in found]
        both = Surrogate(known).predict(places, shares, losses)
        off, deviation = self._off(found)
        predicted = []
        for genome, share, loss in zip(pool, *both, strict=True):
            cost, expected = genome.cost(costs), genome.expected(costs)
            if cost is not None:
                of_cost = math.log(cost), 0.0
            elif expected is not None:
                of_cost = math.log(expected) + off, deviation
            else:
                of_cost = share[0] + math.log(whole * genome.steps), share[1]
            predicted.append((of_cost, loss))
        return predicted

    def _off(self, found: Sequence[Tried]) -> Normal:
        """By how much the logarithm of a cost is off what was expected of reuse."""
        pairs = [(tried.cost, tried.genome.expected(self.space.costs)) for tried in found]
        off = [math.log(cost / expected) for cost, expected in pairs if expected is not None]
        # With one more that is as expected, so that the first ones do not decide by themselves.
        return float(np.mean([0.0, *off])), math.hypot(_EXPECTED, float(np.std([0.0, *off])))

    def _features(self, genome: Genome) -> list[float]:
        # Families live as long as the search, so that no other genome gets the id of one of theirs.
        known = self._rows.get(id(genome))
        return known or features(genome, self.space.steps, self.space.dials)

    def _pool(self, target: Target, found: Sequence[Tried]) -> list[Genome]:
        """The families, and changes of the plans that serve a target best."""
        kinds = [nearest_to(target, [one for one in found if one.kind == kind]) for kind in KINDS]
        near = sorted(_front(found), key=lambda one: abs(target.shortfall(one)))[:_PARENTS]
        parents = [tried.genome for tried in [*near, *kinds] if tried is not None]
        pool = [genome for family in self._families for genome in family]
        for _ in range(_CHILDREN):
            one, other = (parents[int(self._rng.integers(len(parents)))] for _ in range(2))
            crossed = self._rng.random() < _CROSSED
            one = (
                self.space.crossed(one, other, self._rng)
                if crossed
                else self.space.changed(one, self._rng)
            )
            if self._rng.random() < 0.5:
                one = self.space.changed(one, self._rng)
            pool += [one] if one.makes_sense else []
        return pool


def _front(found: Sequence[Tried]) -> list[Tried]:
    return pareto_front(found, lambda tried: tried.cost, lambda tried: tried.ssim)


def _ratio(rows: Sequence[Sequence[float]], few: int) -> float:
    """How the mean over all compares with that over the first ones."""
    all_of_them = sum(sum(row) / len(row) for row in rows)
    first = sum(sum(row[:few]) / few for row in rows)
    return min(max(all_of_them / first, 0.25), 4.0) if first > 0 else 1.0


def _promise(target: Target, best: Tried | None, cost: Normal, loss: Normal) -> float:
    """What is expected of a plan beyond the best one, times the chance that it meets the target.

    Args:
        target: The target.
        best: The best plan that meets it.
        cost: The logarithm of the cost.
        loss: The same of the loss.
    """
    if target.max_cost is not None:
        limit, limited, free = target.max_cost, cost, loss
        stands = max(1 - best.ssim, _LEAST_LOSS) if best else None
    else:
        assert target.min_ssim is not None
        limit, limited, free = 1 - target.min_ssim, loss, cost
        stands = best.cost if best else None
    chance = _below(math.log(limit) + 1e-6, limited)
    if stands is None:
        return chance
    mean, deviation = free
    room = math.log(stands) - mean
    density = math.exp(-0.5 * (room / deviation) ** 2) / math.sqrt(2 * math.pi) if deviation else 0
    return chance * (room * _below(math.log(stands), free) + deviation * density)


def _below(limit: float, value: Normal) -> float:
    """Chance that a normal variable, given by mean and deviation, stays below a limit."""
    mean, deviation = value
    if deviation <= 0:
        return float(mean <= limit)
    return 0.5 * (1 + math.erf((limit - mean) / (deviation * math.sqrt(2))))
