"""Plans that `bench_skip.py` compares, as dials: from all fine to as cheap as a kind gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ddit_rt.lab.plans.candidates import Candidate, FewerSteps, Static, Template, full_resolution
from ddit_rt.policies import (
    CacheFit,
    DDiTPolicy,
    MagCache,
    NoCache,
    PatchPolicy,
    StepCache,
    TeaCache,
)

FINE, FEWER, STATIC, DDIT = "fine", "fewer_steps", "static", "ddit"
TEACACHE, MAGCACHE = "teacache", "magcache"
CACHES = (TEACACHE, MAGCACHE)
COMBINED = tuple(f"{DDIT}_{cache}" for cache in CACHES)
KINDS = (FEWER, STATIC, DDIT, *CACHES, *COMBINED)
"""In the order of the table."""

_NAMES = {TEACACHE: "TeaCache", MAGCACHE: "MagCache"}
_MAGCACHES = (
    MagCache(),
    MagCache(max_skip_steps=6, retention_ratio=0.1),
    MagCache(max_skip_steps=6, retention_ratio=0.0),
)
_RULES = {
    "": DDiTPolicy(),
    "no refresh": DDiTPolicy(refresh=None),
    "coarse warm-up": DDiTPolicy(warmup="coarse"),
    "coarse warm-up, no refresh": DDiTPolicy(warmup="coarse", refresh=None),
}
"""By what sets them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipPlan:
    """One way to make pictures.

    Attributes:
        kind: `FINE`, or one of `KINDS`.
        label: The plan in a few words.
        policy: Patch size of each step.
        steps: Denoising steps.
        cache: Which steps reuse.
    """

    kind: str
    label: str
    policy: PatchPolicy
    steps: int
    cache: StepCache = field(default_factory=NoCache)

    @property
    def key(self) -> str:
        """Equal for plans that do the same."""
        return json.dumps([self.policy.to_dict(), self.steps, self.cache.to_dict()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """Plans of one kind by level; cost and fidelity fall as the level rises.

    Attributes:
        levels: The highest level; the lowest is 0.
        at: The plan of a level.
    """

    levels: int
    at: Callable[[int], SkipPlan]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDial:
    """A step cache by its threshold, on top of any plan.

    Attributes:
        cache: `TEACACHE` or `MAGCACHE`.
        make: The cache at a threshold.
        low: Threshold of level 1, at which hardly a step reuses; level 0 is no cache.
        high: Threshold of the highest level.
        levels: The highest level.
    """

    cache: str
    make: Callable[[float], StepCache]
    low: float
    high: float
    levels: int

    def on(self, plan: SkipPlan, level: int) -> SkipPlan:
        """A plan without a cache, with this one."""
        if level == 0:
            return plan
        threshold = _spaced(self.low, self.high, level - 1, self.levels - 1)
        name = f"{_NAMES[self.cache]} {threshold:g}"
        if plan.kind == FINE:
            kind, label = self.cache, name
        else:
            kind, label = f"{plan.kind}_{self.cache}", f"{plan.label} + {name}"
        return replace(plan, kind=kind, label=label, cache=self.make(threshold))

    def alone(self, steps: int) -> Dial:
        """The cache by itself, every step at p."""
        return Dial(levels=self.levels, at=lambda level: self.on(fine(steps), level))


def fine(steps: int) -> SkipPlan:
    """All steps at p, all computed."""
    return _planned(FINE, full_resolution(steps))


def fewer_steps(steps: int) -> Dial:
    """Level n is n steps fewer."""
    return _templated(FEWER, FewerSteps(steps=steps))


def statics(steps: int, coarse: Sequence[str]) -> list[Dial]:
    """One coarse size at the first n free steps, with a step at p after every three."""
    return [_templated(STATIC, Static(steps=steps, coarse=(size,))) for size in coarse]


def ddits(steps: int, coarse: Sequence[str], taus: tuple[float, float], levels: int) -> list[Dial]:
    """The default rule, without steps at p in between, and started at the coarsest size, by tau."""
    return [_ddit(steps, coarse, taus, levels, name) for name in _RULES]


def _ddit(
    steps: int,
    coarse: Sequence[str],
    taus: tuple[float, float],
    levels: int,
    name: str,
) -> Dial:
    def at(level: int) -> SkipPlan:
        tau = _spaced(*taus, level, levels)
        # A size of twice the side has about the half of the other's threshold at equal error.
        sizes = {size: float(f"{tau * 0.5**place:.4g}") for place, size in enumerate(coarse)}
        return SkipPlan(
            kind=DDIT,
            label=", ".join(filter(None, (f"DDiT, tau {tau:g}", name))),
            policy=replace(_RULES[name], tau=sizes),
            steps=steps,
        )

    return Dial(levels=levels, at=at)


def cache_dials(fit: CacheFit, steps: int, levels: int) -> list[CacheDial]:
    """A cache with what was fitted for the model, in each of its shapes.

    Args:
        fit: Of kind `"teacache"`, by `fit_cache`, or `"magcache"`.
        steps: Denoising steps.
        levels: Of each dial.
    """
    if fit.kind == TEACACHE:
        least, most = fit.evidence["outputs"]

        def tea(threshold: float) -> StepCache:
            return TeaCache(threshold, coefficients=fit.values)

        high = most * steps / 2
        return [CacheDial(cache=TEACACHE, make=tea, low=least, high=high, levels=levels)]
    return [_mag_dial(fit, shape, levels) for shape in _MAGCACHES]


def _mag_dial(fit: CacheFit, shape: MagCache, levels: int) -> CacheDial:
    errors = [abs(1 - ratio) for ratio in fit.values[1:]]

    def make(threshold: float) -> StepCache:
        return replace(shape, threshold=threshold, mag_ratios=fit.values)

    high = sum(errors) * shape.max_skip_steps
    low = max(min(errors), high * 1e-5)
    return CacheDial(cache=MAGCACHE, make=make, low=low, high=high, levels=levels)


def _templated(kind: str, template: Template) -> Dial:
    return Dial(levels=template.levels, at=lambda level: _planned(kind, template.at(level)))


def _planned(kind: str, candidate: Candidate) -> SkipPlan:
    return SkipPlan(
        kind=kind,
        label=candidate.label,
        policy=candidate.policy,
        steps=candidate.num_inference_steps,
    )


def _spaced(low: float, high: float, level: int, levels: int) -> float:
    """Evenly on a log scale."""
    return float(f"{low * (high / low) ** (level / max(levels, 1)):.4g}")
