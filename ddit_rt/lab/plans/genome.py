"""What a search varies of a plan: steps, their noise levels, patch sizes, reuse.

Fewer steps, static, dynamic and cached plans are genomes of which some parts are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddit_rt.lab.plans.candidates import (
    FINE,
    STEPS,
    Candidate,
    cache_text,
    kind_of,
    placed_levels,
)
from ddit_rt.lab.plans.dial import on_log_scale
from ddit_rt.lab.plans.step_caches import CacheDial
from ddit_rt.policies import DDiTPolicy, FinePolicy, NoCache, PatchPolicy, StaticPolicy, StepCache

TAU_LEVELS = 48
"""Levels of a rule's dial: a step of tau is a few per cent of a decade."""

LEAST_STEPS = 7
"""Steps below which a plan with coarse steps has no room for its fine start and end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """Patch sizes fixed before the run.

    Attributes:
        count: How many of the free steps are coarse, from the first.
        sizes: Coarse sizes: the first part of the coarse steps takes the first, and so on.
        head: First steps, which stay fine.
        tail: Last steps, which stay fine.
        refresh: Coarse steps between two fine ones; None for a block.
    """

    count: int
    sizes: tuple[str, ...]
    head: int = 3
    tail: int = 2
    refresh: int | None = 3

    def free(self, steps: int) -> list[int]:
        """Steps that may be coarse."""
        period = steps if self.refresh is None else self.refresh
        return [
            step
            for step in range(self.head, steps - self.tail)
            if (step - self.head) % (period + 1) != period
        ]

    def plan(self, steps: int) -> list[str]:
        """Patch size of each step."""
        plan = ["p"] * steps
        for place, step in enumerate(self.free(steps)[: self.count]):
            plan[step] = self.sizes[place * len(self.sizes) // self.count]
        return plan

    def __str__(self) -> str:
        """The plan in a few words."""
        shape = "in a block" if self.refresh is None else f"one at p after {self.refresh}"
        return f"{self.count} at {'/'.join(self.sizes)} after {self.head}, {shape}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Patch sizes that a dynamic policy picks.

    Attributes:
        level: How far tau is turned up, 0 to `TAU_LEVELS`, evenly spaced on a log scale.
        factors: Per coarse size, its tau over the level's; a size that is left out is not used.
        policy: Everything else.
    """

    level: int
    factors: tuple[tuple[str, float], ...]
    policy: DDiTPolicy = DDiTPolicy(refresh=3, criterion="raw")  # noqa: RUF009 - frozen

    def at(self, taus: tuple[float, float]) -> DDiTPolicy:
        """The policy, for a range of tau."""
        tau = on_log_scale(taus, self.level, TAU_LEVELS)
        return replace(
            self.policy, tau={size: float(f"{tau * factor:.4g}") for size, factor in self.factors}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Which steps reuse.

    Attributes:
        dial: A step cache.
        level: How far it is turned.
        changed: Values of the cache's other fields.
    """

    dial: CacheDial
    level: int
    changed: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Genome:
    """A plan, as a search varies it.

    Attributes:
        steps: How many steps.
        shift: Where their noise levels lie; see `placed_levels`. 1: the pipeline's own.
        patches: Patch size of each step, or the rule that picks it; None: all at p.
        reuse: Which of them reuse; None: every step computes.
    """

    steps: int
    shift: float = 1.0
    patches: Static | Rule | None = None
    reuse: Reuse | None = None

    @property
    def makes_sense(self) -> bool:
        """Whether every part has room in the number of steps."""
        coarse = self.patches
        if coarse is None or self.steps < LEAST_STEPS:
            return coarse is None and self.steps > 0
        return not isinstance(coarse, Static) or 0 < coarse.count <= len(coarse.free(self.steps))

    def sizes(self) -> Mapping[str, int] | None:
        """How many steps run at each patch size; None where only a run can tell what they cost."""
        if self.reuse is not None or isinstance(self.patches, Rule):
            return None
        return Counter(self.patches.plan(self.steps) if self.patches else ["p"] * self.steps)

    def cost(self, costs: Mapping[str, float]) -> float | None:
        """Cost of a run from those of a step; None where only a run can tell."""
        sizes = self.sizes()
        if sizes is None:
            return None
        return sum(costs[size] * count for size, count in sizes.items())

    def expected(self, costs: Mapping[str, float]) -> float | None:
        """Cost of a run at p, of which some steps reuse, by what is known before it; else None.

        Args:
            costs: Cost of one step at each patch size.
        """
        reuse = self.reuse
        if reuse is None or self.patches is not None or not reuse.dial.tells:
            return None
        return (
            costs["p"] * self.steps * reuse.dial.cost_share(reuse.level, reuse.changed, self.steps)
        )

    def candidate(self, taus: tuple[float, float] = (0.0, 0.0), reference: int = 0) -> Candidate:
        """The plan that a run takes.

        Args:
            taus: Range of tau; only a rule needs it.
            reference: Steps of the reference.
        """
        policy: PatchPolicy = FinePolicy()
        if isinstance(self.patches, Static):
            policy = StaticPolicy(self.patches.plan(self.steps))
        elif self.patches is not None:
            policy = self.patches.at(taus)
        reuse = self.reuse
        cache: StepCache = NoCache()
        if reuse is not None:
            cache = reuse.dial.at(reuse.level, reuse.changed, steps=self.steps, shift=self.shift)
        kind = kind_of(policy, cache)
        if kind == STEPS and self.steps == reference and self.shift == 1:
            kind = FINE
        return Candidate(
            kind=kind,
            label=self._label(policy, cache_text(cache)),
            policy=policy,
            num_inference_steps=self.steps,
            step_cache=cache,
            sigmas=None if self.shift == 1 else placed_levels(self.steps, self.shift),
        )

    def _label(self, policy: PatchPolicy, cache: str) -> str:
        sized = f", {self.patches}" if isinstance(self.patches, Static) else " at p"
        if isinstance(policy, DDiTPolicy):
            sized = f", {_rule_text(policy)}"
        shifted = "" if self.shift == 1 else f", shift {self.shift:g}"
        return f"{self.steps} steps{sized}{shifted}" + (f", {cache}" if cache else "")


def _rule_text(policy: DDiTPolicy) -> str:
    assert isinstance(policy.tau, Mapping)
    parts = ["dynamic", *(f"tau {size} {value:.2g}" for size, value in policy.tau.items())]
    parts.append(f"warm-up {policy.warmup_steps or policy.order} {policy.warmup}")
    if policy.refresh is not None:
        parts.append(f"refresh {policy.refresh}")
    if policy.dwell > 1:
        parts.append(f"dwell {policy.dwell}")
    return ", ".join([*parts, f"tail {policy.fine_tail}"])


def halved(sizes: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Factors of a rule: a size of twice the side has half of the other's tau at equal error."""
    return tuple((size, 0.5**place) for place, size in enumerate(sizes))


def within(
    shapes: Sequence[Static], steps: int, cost: float, costs: Mapping[str, float]
) -> Genome | None:
    """Of the first shape that can be so cheap, the fewest coarse steps that cost at most `cost`.

    Args:
        shapes: Static plans; their counts do not count.
        steps: Steps of the run.
        cost: Cost of a run.
        costs: Cost of one step at each patch size.
    """
    for shape in shapes:
        for count in range(1, len(shape.free(steps)) + 1):
            found = Genome(steps=steps, patches=replace(shape, count=count))
            if (found.cost(costs) or 0.0) <= cost:
                return found
    return None
