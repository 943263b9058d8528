"""Step caches in a search: which there are for a model, and how far their dials go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ddit_rt.lab.plans.dial import on_log_scale
from ddit_rt.lab.plans.reuse_plan import GROWTH, Drift
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_named
from ddit_rt.ops import CacheGrowth
from ddit_rt.planning.outline import model_fits
from ddit_rt.policies import (
    CacheFit,
    CacheModel,
    CacheTable,
    FirstBlockCache,
    MagCache,
    SeaCache,
    StaticCache,
    StepCache,
    TeaCache,
    nearest_ratios,
)

LEVELS = 48
"""Levels of a step cache's dial."""

_GROWTHS = (0.0, 2.0, 3.0)
"""Weights of early errors that are tried beside the usual one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDial:
    """A step cache that a search may turn.

    Attributes:
        cache: The cache; of the field that is turned its value does not count.
        alternating: The same kind of cache, computing and reusing in turn: to measure what both
            cost.
        fit: Kind of fit that the model must have; None if the cache needs none.
        turns: The field that is turned.
        ends: Its lowest and highest value: at the lowest hardly a step reuses, at the highest
            nearly every one. None where a run tells them, of a cache that goes by a threshold.
        varied: Values of other fields that are worth trying, by field.
        changes: What each step of full resolution adds to what the threshold bounds; empty where
            no run has told.
        reused: Cost of a step that reuses over that of one that computes.
        drift: By which the steps that compute are planned; None: they are evenly spread, or the
            cache's own rule finds them.
    """

    cache: StepCache
    alternating: StepCache
    fit: str | None = None
    turns: str = "threshold"
    ends: tuple[float, float] | None = None
    varied: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    changes: Sequence[float] = ()
    reused: float = 0.0
    drift: Drift | None = None

    @property
    def name(self) -> str:
        """Class of the cache, and what sets it apart from another dial of the class."""
        return self.fit or type(self.cache).__name__

    def at(
        self, level: int, changed: Sequence[tuple[str, Any]] = (), *, steps: int, shift: float = 1.0
    ) -> StepCache:
        """The cache of a level, 0 to `LEVELS`.

        Args:
            level: How far the dial is turned.
            changed: Values of other fields, and of `growth` where the steps are planned.
            steps: Of the run.
            shift: Where their noise levels lie; see `placed_levels`.
        """
        assert self.ends is not None, "a run has told the ends"
        value: Any = on_log_scale(self.ends, level, LEVELS)
        if isinstance(getattr(self.cache, self.turns), int):
            value = round(value)
        others = {self.turns: value, **dict(changed)}
        if self.drift is not None:
            growth = others.pop("growth", GROWTH)
            plan = self.drift.plan(steps, max(1, round(steps / value)), shift=shift, growth=growth)
            others |= {"plan": plan, "first": 1, "last": 0}
        return replace(self.cache, **others)  # type: ignore[type-var]

    def planned(self, drift: Drift) -> CacheDial:
        """The same, of a cache that is its plan, with the steps that compute where they should."""
        return replace(self, drift=drift, varied={"growth": _GROWTHS})

    def priced(self, costs: Mapping[str, float]) -> CacheDial:
        """The same with its `reused`.

        Args:
            costs: Of one step under the cache, `"p"` computed and `"p reused"`.
        """
        return replace(self, reused=costs["p reused"] / costs["p"])

    @property
    def tells(self) -> bool:
        """Whether it is known beforehand which steps will reuse."""
        return self.turns != "threshold" or bool(self.changes)

    def cost_share(self, level: int, changed: Sequence[tuple[str, Any]], steps: int) -> float:
        """Cost of a run at p over that of one in which every step computes.

        No run is made for it: steps are decided upon as `ops.decide_reuse_` does, along the changes
        of full resolution, which a run that reuses departs from.

        Args:
            level: See `at`.
            changed: See `at`.
            steps: Steps of the run.

        Returns:
            The share, in (0, 1].
        """
        table = self.at(level, changed, steps=steps).resolve(
            CacheModel(name="", steps=steps, fits=_NO_FITS, time_changes=lambda _: [0.0] * steps)
        )
        assert table is not None, "a cache that caches"
        grown: Sequence[float] = table.increments
        if table.growth == CacheGrowth.PRODUCT:
            # Of single steps, however many there are; whether they grew or shrank is not known.
            grown = [1 - change for change in nearest_ratios(self.changes, steps)]
        elif self.changes:
            ends = np.linspace(0, len(self.changes), steps + 1)
            summed = np.interp(ends, range(len(self.changes) + 1), [0, *np.cumsum(self.changes)])
            grown = np.diff(summed).tolist()
        computed = computed_steps(table, grown)
        return (computed + (steps - computed) * self.reused) / steps


_NO_FITS = tuple(
    CacheFit(kind=kind, values=(1.0,), source="")
    for kind in ("teacache", "teacache-ret", "magcache")
)
"""In their place stand the changes of a run."""
_TEA = TeaCache(1.5, coefficients=(1.0,), first=1, last=0)
_MAG = MagCache(threshold=1.0, max_skip_steps=1, retention_ratio=0.0, mag_ratios=(1.0,))

STEP_CACHES = (
    CacheDial(
        fit="teacache",
        cache=TeaCache(0.0),
        alternating=_TEA,
        varied={"first": (3, 6), "last": (2,), "residual_order": (1,)},
    ),
    CacheDial(
        fit="teacache-ret",
        cache=TeaCache(0.0, use_ret_steps=True),
        alternating=replace(_TEA, use_ret_steps=True),
        varied={"first": (3,), "last": (2,), "residual_order": (1,)},
    ),
    CacheDial(
        fit="magcache",
        cache=MagCache(threshold=0.0),
        alternating=_MAG,
        varied={"max_skip_steps": (5, 2, 8), "retention_ratio": (0.1, 0.3), "residual_order": (1,)},
    ),
    CacheDial(
        cache=SeaCache(0.0),
        alternating=SeaCache(1e30, cache_end_steps=0, max_consecutive_cached=1),
        varied={
            "max_consecutive_cached": (1, 4, 8),
            "retention_steps": (3,),
            "residual_order": (0,),
        },
    ),
    CacheDial(
        cache=StaticCache(2.0),
        alternating=StaticCache(2.0, first=1, last=0),
        turns="plan",
        ends=(1.1, 8.0),
        varied={"first": (2, 5), "residual_order": (0,)},
    ),
)
"""All that a search may take, a line each."""


_FIRST_BLOCK = CacheDial(
    cache=FirstBlockCache(0.0), alternating=FirstBlockCache(1e30, max_consecutive_cached=1)
)
"""None that a search takes: its change is not added up, so what it will cost is not known before a
run; in as many computed steps it is about as close as SeaCache (docs/quality.md)."""


def computed_steps(table: CacheTable, grown: Sequence[float]) -> int:
    """How many steps compute at one patch size, as `ops.decide_reuse_` decides of a single image.

    Args:
        table: The cache, resolved.
        grown: By what the change grows at each step, as `CacheTable.increments` says, also in
            steps that always compute. What `LATEST` measures is taken for the sum of these.
    """
    total, factor, reused, computed = 0.0, 1.0, 0, 0
    for increment, own in zip(table.increments, grown, strict=True):
        factor *= own
        total += abs(1 - factor) if table.growth == CacheGrowth.PRODUCT else own
        if not math.isnan(increment) and total < table.threshold and reused < table.limit:
            reused += 1
        else:
            total, factor, reused, computed = 0.0, 1.0, 0, computed + 1
    return computed


def searched_caches(engine: Any) -> tuple[CacheDial, ...]:
    """The step caches that may serve an engine's model: those that need no fit, or have theirs.

    A fit is for one model: where several take turns, those are left that need none. Where a
    soundtrack goes along, there are none.

    Args:
        engine: The engine, with its pipeline.
    """
    if family_named(engine.artifact.manifest.family).soundtrack:
        return ()
    fits = model_fits(engine.pipeline.transformer, engine.artifact.manifest.cache_fits)
    kinds = {None, *(fit.kind for fit in fits if not several_models(engine))}
    return tuple(dial for dial in STEP_CACHES if dial.fit in kinds)


def several_models(engine: Any) -> bool:
    """Whether the steps of a run are shared out between experts.

    Args:
        engine: The engine, with its pipeline.
    """
    return bool(family_named(engine.artifact.manifest.family).experts(engine.pipeline))


def threshold_range(trace: RunTrace) -> tuple[float, float] | None:
    """Thresholds from none that reuses to all that may.

    Args:
        trace: Trace of a run at threshold 0, in which each step's accumulated change is its own.

    Returns:
        The least change, at which no step is below the threshold, and the sum of all; None where
        no step may reuse.
    """
    changes = [record.accumulated for record in trace if record.accumulated is not None]
    usable = [change for change in changes if change > 0 and math.isfinite(change)]
    return (min(usable), sum(usable)) if len(usable) > 1 else None


def changes_of(trace: RunTrace) -> list[float]:
    """What each step of a run at threshold 0 added.

    Where it always computes, what lies between the known ones: another cache of the kind may reuse
    there.
    """
    added = [math.nan if r.accumulated is None else r.accumulated for r in trace]
    known = [step for step, change in enumerate(added) if math.isfinite(change)]
    if not known:
        return []
    return np.interp(range(len(added)), known, [added[step] for step in known]).tolist()


def alternating(cache: StepCache) -> StepCache:
    """The same kind of cache, computing and reusing in turn."""
    dials = (*STEP_CACHES, _FIRST_BLOCK)
    return next(dial.alternating for dial in dials if isinstance(cache, type(dial.cache)))
