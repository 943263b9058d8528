"""The plans that a search may try: the families that it begins with, and changes of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ddit_rt.lab.plans.genome import (
    LEAST_STEPS,
    TAU_LEVELS,
    Genome,
    Reuse,
    Rule,
    Static,
    halved,
    within,
)
from ddit_rt.lab.plans.step_caches import LEVELS, CacheDial

T = TypeVar("T")

_SHIFTS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_FACTORS = (0.6, 0.75, 0.85, 0.95, 1.1, 1.25)
"""Of the number of steps."""
_HEADS, _TAILS, _REFRESHES = (0, 1, 3, 5), (1, 2, 4), (None, 1, 2, 3, 5)
_RULES: Mapping[str, Sequence[Any]] = {
    "refresh": (None, 2, 3),
    "fine_tail": (1, 2, 4),
    "warmup": ("fine", "coarse"),
    "warmup_steps": (None, 5),
    "dwell": (0, 3),
}
_CORNERS = (0.45, 0.6, 0.75)
"""Where dials stand in the plans that a search begins with, as shares of their range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What plans can be made of.

    Attributes:
        steps: Steps of the reference.
        costs: Cost of one step at each patch size, `"p"` among them.
        taus: Range of tau.
        dials: Step caches.
        places: Whether the pipeline's call takes noise levels.
    """

    steps: int
    costs: Mapping[str, float]
    taus: tuple[float, float] = (0.0, 0.0)
    dials: Sequence[CacheDial] = ()
    places: bool = False

    @property
    def coarse(self) -> tuple[str, ...]:
        """Coarse sizes, ascending; none where there are too few steps for one."""
        sizes = tuple(size for size in self.costs if size != "p")
        return sizes if self.steps >= LEAST_STEPS else ()

    def corners(self, limits: Sequence[float]) -> list[Genome]:
        """The families one by one: what a search begins with.

        Args:
            limits: Costs of a run that matter, the main one first.
        """
        found = [self._fewer(limit) for limit in limits]
        found += [replace(found[0], shift=shift) for shift in (0.7, 2.0) if self.places]
        for place, limit in enumerate(limits):
            shapes = self._shapes() if place == 0 else self._shapes()[:1]
            plans = [within([shape], self.steps, limit, self.costs) for shape in shapes]
            found += [plan for plan in plans if plan is not None]
        rules = [self._rule(share) for share in _CORNERS] if self.coarse else []
        reuses = [
            Reuse(dial=dial, level=level)
            for dial in self.dials
            for level in self._levels(dial, limits[::2])
        ]
        found += [Genome(steps=self.steps, patches=rule) for rule in rules]
        found += [Genome(steps=self.steps, reuse=reuse) for reuse in reuses]
        both: list[Static | Rule] = [
            replace(one, count=self.steps // 2) for one in self._shapes()[-1:]
        ]
        both += rules[:1]
        for reuse in reuses[:1]:
            found += [Genome(steps=self.steps, patches=one, reuse=reuse) for one in both]
        return [genome for genome in found if genome.makes_sense]

    def families(self) -> list[list[Genome]]:
        """Every plan of each family by itself, in its plain shape."""
        steps, shapes = self.steps, self._shapes()
        static = [
            Genome(steps=steps, patches=replace(shape, count=count))
            for shape in shapes
            for count in range(1, len(shape.free(steps)) + 1)
        ]
        levels = range(TAU_LEVELS + 1) if self.coarse else ()
        rules = [Rule(level=level, factors=halved(self.coarse)) for level in levels]
        families = [
            [Genome(steps=fewer) for fewer in range(1, steps)],
            static,
            [Genome(steps=steps, patches=rule) for rule in rules],
            *(
                [
                    Genome(steps=steps, reuse=Reuse(dial=dial, level=level))
                    for level in range(LEVELS + 1)
                ]
                for dial in self.dials
            ),
        ]
        return [family for family in families if family]

    def _levels(self, dial: CacheDial, limits: Sequence[float]) -> list[int]:
        """Where a dial stands first: as far as it takes for a cost, where that is known."""
        if not dial.tells:
            return [round(share * LEVELS) for share in _CORNERS[::2]]
        shares = [limit / (self.costs["p"] * self.steps) for limit in limits]
        reached = [dial.cost_share(level, (), self.steps) for level in range(LEVELS + 1)]
        return [
            next((level for level, own in enumerate(reached) if own <= share), LEVELS)
            for share in shares
        ]

    def _fewer(self, cost: float) -> Genome:
        return Genome(steps=max(1, min(self.steps - 1, int(cost / self.costs["p"] + 1e-9))))

    def _shapes(self) -> list[Static]:
        if not self.coarse:
            return []
        largest, smallest = self.coarse[-1:], self.coarse[:1]
        interleaved = Static(count=1, sizes=largest)
        block = Static(count=1, sizes=smallest, refresh=None)
        return [interleaved, block, Static(count=1, sizes=self.coarse[::-1], head=0, refresh=None)]

    def _rule(self, share: float) -> Rule:
        return Rule(level=round(share * TAU_LEVELS), factors=halved(self.coarse))

    def changed(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """A plan with one part of it changed.

        Args:
            genome: The plan.
            rng: Draws the change.
        """
        parts = [self._steps, *[self._shift] * self.places]
        parts += [self._patches] * 2 * bool(self.coarse) + [self._reuse] * 2 * bool(self.dials)
        return _pick(parts, rng)(genome, rng)

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """A plan with parts of two; its coarse steps or its reuse are the other's."""
        if rng.random() < 0.5:
            return replace(one, reuse=other.reuse)
        return self._fitted(replace(one, patches=other.patches), other.steps)

    def _steps(self, genome: Genome, rng: np.random.Generator) -> Genome:
        steps = min(self.steps, max(1, round(genome.steps * _pick(_FACTORS, rng))))
        return self._fitted(replace(genome, steps=steps), genome.steps)

    def _fitted(self, genome: Genome, before: int) -> Genome:
        """Coarse steps in proportion to another number of steps."""
        if not isinstance(genome.patches, Static):
            return genome
        count = round(genome.patches.count * genome.steps / before)
        count = min(max(count, 1), len(genome.patches.free(genome.steps)))
        return replace(genome, patches=replace(genome.patches, count=count))

    def _shift(self, genome: Genome, rng: np.random.Generator) -> Genome:
        return replace(genome, shift=_pick(_SHIFTS, rng))

    def _patches(self, genome: Genome, rng: np.random.Generator) -> Genome:
        patches, kind = genome.patches, rng.random()
        if patches is None or kind < 0.15:
            shapes = [replace(shape, count=max(1, genome.steps // 3)) for shape in self._shapes()]
            rules = [self._rule(share) for share in _CORNERS]
            return replace(genome, patches=_pick([*shapes, *rules, None], rng))
        if isinstance(patches, Static):
            return replace(genome, patches=self._static(patches, rng, turn=kind < 0.5))
        turned: Rule = replace(patches, level=_turned(patches.level, TAU_LEVELS, rng))
        if kind > 0.5:
            name = _pick([*_RULES], rng)
            policy = replace(patches.policy, **{name: _pick(_RULES[name], rng)})
            turned = replace(turned, policy=policy)
        elif kind > 0.45:
            turned = replace(turned, factors=_pick([turned.factors[:1], halved(self.coarse)], rng))
        return replace(genome, patches=turned)

    def _static(self, patches: Static, rng: np.random.Generator, *, turn: bool) -> Static:
        if turn:
            return replace(patches, count=patches.count + _pick((-3, -2, -1, 1, 2, 3), rng))
        orders = [self.coarse[:1], self.coarse[-1:], self.coarse[::-1]]
        values: dict[str, Sequence[Any]] = {
            "head": _HEADS,
            "tail": _TAILS,
            "refresh": _REFRESHES,
            "sizes": orders,
        }
        name = _pick([*values], rng)
        return replace(patches, **{name: _pick(values[name], rng)})

    def _reuse(self, genome: Genome, rng: np.random.Generator) -> Genome:
        reuse, kind = genome.reuse, rng.random()
        if reuse is None or kind < 0.15:
            level = round(_pick(_CORNERS, rng) * LEVELS)
            fresh = [Reuse(dial=dial, level=level) for dial in self.dials]
            return replace(genome, reuse=_pick([*fresh, None], rng))
        turned = replace(reuse, level=_turned(reuse.level, LEVELS, rng))
        if kind > 0.6 and reuse.dial.varied:
            name = _pick([*reuse.dial.varied], rng)
            own = dict(reuse.changed)
            own.pop(name, None)
            value = _pick([None, *reuse.dial.varied[name]], rng)
            own |= {} if value is None else {name: value}
            turned = replace(turned, changed=tuple(sorted(own.items())))
        return replace(genome, reuse=turned)


def _turned(level: int, levels: int, rng: np.random.Generator) -> int:
    return min(max(level + int(rng.integers(-10, 11)), 0), levels)


def _pick(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]
