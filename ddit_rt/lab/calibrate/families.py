"""Families of plans: what a calibration searches, and in which order it varies a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddit_rt.lab.plans.candidates import (
    CACHED,
    COMBINED,
    DYNAMIC,
    STATIC,
    STEPS,
    Cached,
    CacheRange,
    Dynamic,
    FewerSteps,
    Static,
    Template,
    ThresholdCache,
)
from ddit_rt.policies import DDiTPolicy, MagCache, TeaCache

Change = Callable[[Any], Template | None]
"""A variation of a template; None where it makes no sense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Templates that are searched together.

    Attributes:
        kind: As `Candidate.kind`.
        start: The first template.
        changes: Variations, likely ones first; each is tried on the best template so far.
        level: The first template's level to start from; None for the middle.
    """

    kind: str
    start: Template
    changes: tuple[Change, ...] = ()
    level: int | None = None


def families(
    steps: int,
    coarse: tuple[str, ...],
    taus: tuple[float, float],
    caches: Sequence[CacheRange] = (),
) -> tuple[Family, ...]:
    """What is searched, for a number of steps.

    Args:
        steps: Steps of the reference.
        coarse: Coarse sizes that the model offers, ascending.
        taus: Range of tau.
        caches: Step caches that the model has a fit for.

    Returns:
        Fewer steps; with a coarse size, and steps enough for one, static and dynamic plans; with a
        step cache, fine steps of which some reuse.
    """
    found = [Family(kind=STEPS, start=FewerSteps(steps=steps))]
    if coarse and steps > 6:
        found += [_static_family(steps, coarse), _dynamic_family(steps, coarse, taus)]
    if caches:
        found.append(_cached_family(steps, caches))
    return tuple(found)


def combined_family(best: Dynamic, level: int, cache: ThresholdCache) -> Family:
    """Dynamic plans with a step cache: from the best dynamic one, with a moderate cache.

    Long runs of one patch size come early among the variations: at a change of it no step reuses.

    Args:
        best: The template of the best dynamic plan.
        level: Its level.
        cache: The step cache, at a moderate threshold.
    """
    changes: list[Change] = [
        _structured(refresh=None),
        _rescaled(2.0),
        _rescaled(0.5),
        _structured(refresh=5),
        _structured(warmup="coarse"),
        _fewer(0.75),
        _structured(warmup_steps=5),
        _rescaled(1.5),
        _rescaled(0.7),
        _structured(dwell=3),
        _structured(fine_tail=4),
    ]
    start = replace(best, cache=cache)
    return Family(kind=COMBINED, start=start, changes=tuple(changes), level=level)


def _static_family(steps: int, coarse: tuple[str, ...]) -> Family:
    start = Static(steps=steps, coarse=coarse[-1:])
    orders = [coarse[:1], tuple(reversed(coarse))] if len(coarse) > 1 else []
    changes: list[Change] = [_set(coarse=order) for order in orders]
    changes += [_set(refresh=None, head=0), _fewer(0.75), _set(refresh=2), _set(tail=1)]
    changes += [_set(refresh=None), _fewer(0.75), _set(refresh=1), _set(head=1)]
    changes += [_set(refresh=5), _set(tail=4), _set(head=5)]
    return Family(kind=STATIC, start=start, changes=tuple(changes))


def _dynamic_family(steps: int, coarse: tuple[str, ...], taus: tuple[float, float]) -> Family:
    # A size of twice the side has about the half of the other's threshold at equal error.
    even = tuple((size, 0.5**index) for index, size in enumerate(coarse))
    start = Dynamic(
        steps=steps, factors=even, taus=taus, policy=DDiTPolicy(refresh=3, criterion="raw")
    )
    changes: list[Change] = [
        _structured(refresh=None),
        _structured(warmup="coarse"),
        _fewer(0.75),
        _structured(refresh=2),
        _structured(fine_tail=1),
    ]
    if len(coarse) > 1:
        changes += [_set(factors=even[:1]), _set(factors=tuple((size, 1.0) for size in coarse))]
    changes += [_fewer(0.75), _structured(refresh=1), _structured(refresh=5)]
    changes += [_structured(warmup_steps=5), _structured(dwell=3), _structured(fine_tail=4)]
    changes += [_structured(refresh=None, dwell=3, monotone=True)]
    return Family(kind=DYNAMIC, start=start, changes=tuple(changes))


def _cached_family(steps: int, caches: Sequence[CacheRange]) -> Family:
    changes: list[Change] = [_set(range=other) for other in caches[1:]]
    changes += [
        _held(TeaCache, first=3),
        _held(MagCache, max_skip_steps=5),
        _fewer(0.75),
        _held(TeaCache, last=2),
        _held(MagCache, retention_ratio=0.1),
        _held(TeaCache, first=6),
        _held(MagCache, max_skip_steps=2),
        _fewer(0.75),
    ]
    start = Cached(steps=steps, range=caches[0])
    return Family(kind=CACHED, start=start, changes=tuple(changes))


def _set(**fields: Any) -> Change:
    return lambda template: replace(template, **fields)


def _structured(**fields: Any) -> Change:
    def change(template: Dynamic) -> Template | None:
        if template.policy.monotone:  # its refresh is None, and stays so
            return None
        return replace(template, policy=replace(template.policy, **fields))

    return change


def _fewer(share: float) -> Change:
    def change(template: Any) -> Template | None:
        steps = round(template.steps * share)
        return replace(template, steps=steps) if steps > 6 else None

    return change


def _held(kind: type[ThresholdCache], **fields: Any) -> Change:
    """Which steps a step cache of a kind always computes."""

    def change(template: Cached) -> Template | None:
        if not isinstance(template.range.cache, kind):
            return None
        cache = replace(template.range.cache, **fields)
        return replace(template, range=replace(template.range, cache=cache))

    return change


def _rescaled(factor: float) -> Change:
    """Another threshold of the step cache."""

    def change(template: Dynamic) -> Template:
        assert template.cache is not None, "the family's templates have one"
        threshold = float(f"{template.cache.threshold * factor:.4g}")
        return replace(template, cache=replace(template.cache, threshold=threshold))

    return change
