"""The plans that a calibration tries, as templates with one dial.

A template fixes everything but one whole number, its level: cost and fidelity both fall as the
level rises. `Dynamic` turns tau, with or without a step cache, `Static` the number of coarse steps,
`Cached` the threshold of a step cache over steps at p. `FewerSteps` takes steps away and stays at
full resolution: the baseline that any cheaper plan has to beat.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ddit_rt.lab.measure.timing import Method, engine_method
from ddit_rt.lab.plans.dial import on_log_scale
from ddit_rt.policies import (
    DDiTPolicy,
    FinePolicy,
    MagCache,
    NoCache,
    PatchPolicy,
    SeaCache,
    StaticCache,
    StaticPolicy,
    StepCache,
    TeaCache,
)

FINE, STEPS, STATIC = "fine", "steps", "static"
CACHED, DYNAMIC, COMBINED = "cached", "dynamic", "combined"
ADAPTIVE = (CACHED, DYNAMIC, COMBINED)
"""Kinds of plans whose cost depends on the prompt."""

_LOG_LEVELS = 48

ThresholdCache = TeaCache | MagCache
"""A step cache with a dial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One plan to measure.

    Attributes:
        kind: `"fine"`, `"steps"`, `"static"`, `"cached"` (steps at p, with a step cache),
            `"dynamic"`, or `"combined"` (a dynamic plan with a step cache).
        label: The plan in a few words.
        policy: Which patch size each step takes.
        num_inference_steps: How many steps.
        step_cache: Which of them reuse.
    """

    kind: str
    label: str
    policy: PatchPolicy
    num_inference_steps: int
    step_cache: StepCache = NoCache()  # noqa: RUF009 - frozen

    @property
    def key(self) -> str:
        """Equal for plans that do the same."""
        does = [self.policy.to_dict(), self.num_inference_steps, self.step_cache.to_dict()]
        return json.dumps(does, sort_keys=True)

    def on(self, engine: Any, name: str, **arguments: Any) -> Method:
        """This plan on an engine.

        Args:
            engine: A compiled pipeline.
            name: Name of the method.
            arguments: Further arguments of the engine's call.
        """
        return engine_method(
            name,
            self.label,
            engine,
            patch_policy=self.policy,
            num_inference_steps=self.num_inference_steps,
            step_cache=self.step_cache,
            **arguments,
        )


def full_resolution(steps: int) -> Candidate:
    """Every step at p: the reference of everything."""
    return Candidate(
        kind=FINE, label=f"{steps} steps at p", policy=FinePolicy(), num_inference_steps=steps
    )


class Template(ABC):
    """Plans of one shape, by level."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The highest level; the lowest is 0."""

    @abstractmethod
    def at(self, level: int) -> Candidate:
        """The plan of a level."""

    def sizes(self, level: int) -> Mapping[str, int] | None:
        """How many steps run at each patch size; None where only a run can tell."""
        del level
        return None

    @property
    def known_cost(self) -> bool:
        """Whether costs follow from those of a step."""
        return self.sizes(0) is not None

    def within(self, cost: float, costs: Mapping[str, float]) -> int | None:
        """The lowest level that costs at most `cost`; None where there is none.

        Args:
            cost: Cost of a run.
            costs: Cost of one step at each patch size.
        """
        for level in range(self.levels + 1):
            sizes = self.sizes(level)
            assert sizes is not None, "the caller asked whether costs are known"
            if sum(costs[size] * count for size, count in sizes.items()) <= cost:
                return level
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class FewerSteps(Template):
    """Level n is n steps fewer than the reference, all at p."""

    steps: int

    @property
    def levels(self) -> int:
        """One step is the least."""
        return self.steps - 1

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        return replace(full_resolution(self.steps - level), kind=STEPS)

    def sizes(self, level: int) -> Mapping[str, int]:
        """See `Template.sizes`."""
        return {"p": self.steps - level}


@dataclass(frozen=True, kw_only=True, slots=True)
class Static(Template):
    """Level n runs the first n of the free steps coarse.

    Attributes:
        steps: Steps of the run.
        coarse: Coarse sizes, the first half of the coarse steps taking the first, and so on.
        head: First steps, which stay fine.
        tail: Last steps, which stay fine.
        refresh: Coarse steps between two fine ones; None for a block.
    """

    steps: int
    coarse: tuple[str, ...]
    head: int = 3
    tail: int = 2
    refresh: int | None = 3

    @property
    def levels(self) -> int:
        """All free steps."""
        return len(self._free())

    def _free(self) -> list[int]:
        period = self.steps if self.refresh is None else self.refresh
        return [
            step
            for step in range(self.head, self.steps - self.tail)
            if (step - self.head) % (period + 1) != period
        ]

    def _plan(self, level: int) -> list[str]:
        plan = ["p"] * self.steps
        for index, step in enumerate(self._free()[:level]):
            plan[step] = self.coarse[index * len(self.coarse) // level]
        return plan

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        shape = "in a block" if self.refresh is None else f"one at p after {self.refresh}"
        label = f"static, {level} of {self.steps} steps at {'/'.join(self.coarse)}, {shape}"
        policy = StaticPolicy(self._plan(level))
        return Candidate(kind=STATIC, label=label, policy=policy, num_inference_steps=self.steps)

    def sizes(self, level: int) -> Mapping[str, int]:
        """See `Template.sizes`."""
        return Counter(self._plan(level))


@dataclass(frozen=True, kw_only=True, slots=True)
class Dynamic(Template):
    """Level n sets the n-th of many taus, evenly spaced on a log scale.

    Attributes:
        steps: Steps of the run.
        factors: Per coarse size, its tau over the level's; a size that is left out is not used.
        taus: Lowest and highest tau.
        policy: Everything else.
        cache: Step cache that every level has; None for none.
    """

    steps: int
    factors: tuple[tuple[str, float], ...]
    taus: tuple[float, float]
    policy: DDiTPolicy
    cache: ThresholdCache | None = None

    @property
    def levels(self) -> int:
        """A constant: a step of tau is a few per cent of a decade."""
        return _LOG_LEVELS

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        tau = on_log_scale(self.taus, level, self.levels)
        sizes = {size: float(f"{tau * factor:.4g}") for size, factor in self.factors}
        policy = replace(self.policy, tau=sizes)
        named = ", ".join(f"tau {size} {value:.2g}" for size, value in sizes.items())
        cached = "" if self.cache is None else f", {cache_text(self.cache)}"
        return Candidate(
            kind=DYNAMIC if self.cache is None else COMBINED,
            label=f"dynamic, {self.steps} steps, {named}{_structure(policy)}{cached}",
            policy=policy,
            num_inference_steps=self.steps,
            step_cache=NoCache() if self.cache is None else self.cache,
        )


def _structure(policy: DDiTPolicy) -> str:
    """What else than tau makes a dynamic plan."""
    parts = [f"warm-up {policy.warmup_steps or policy.order} {policy.warmup}"]
    if policy.refresh is not None:
        parts.append(f"refresh {policy.refresh}")
    if policy.monotone:
        parts.append("monotone")
    if policy.dwell > 1:
        parts.append(f"dwell {policy.dwell}")
    return ", " + ", ".join([*parts, f"tail {policy.fine_tail}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRange:
    """A step cache that the model has a fit for, and which thresholds are worth trying.

    Attributes:
        cache: The cache; its own threshold does not count.
        thresholds: Lowest and highest: at the lowest no step reuses, at the highest nearly every
            step that may.
    """

    cache: ThresholdCache
    thresholds: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached(Template):
    """Level n sets the n-th of many thresholds, evenly spaced on a log scale; all steps are at p.

    Attributes:
        steps: Steps of the run.
        range: The cache and its thresholds.
    """

    steps: int
    range: CacheRange

    @property
    def levels(self) -> int:
        """A constant, as for tau."""
        return _LOG_LEVELS

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        threshold = on_log_scale(self.range.thresholds, level, self.levels)
        cache = replace(self.range.cache, threshold=threshold)
        return replace(
            full_resolution(self.steps),
            kind=CACHED,
            label=f"{self.steps} steps at p, {cache_text(cache)}",
            step_cache=cache,
        )


def cache_text(cache: StepCache) -> str:
    """A step cache in a few words: `"TeaCache 0.3, first 3"`; empty for none."""
    if isinstance(cache, NoCache):
        return ""
    assert isinstance(cache, TeaCache | MagCache | SeaCache | StaticCache)
    first, *others = fields(cache)
    value = getattr(cache, first.name)
    dial = f"{value:.3g}" if isinstance(value, float) else "of its own plan"
    changed = {f.name: value for f in others if (value := getattr(cache, f.name)) != f.default}
    named = [f"{name} {value}" for name, value in changed.items()]
    return ", ".join([f"{type(cache).__name__} {dial}", *named])
