"""Step caches in a search: which there are for a model, and how far their dials go."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ddit_rt.lab.plans.candidates import ThresholdCache
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_named
from ddit_rt.planning.outline import model_fits
from ddit_rt.policies import MagCache, TeaCache

_BY_FIT: dict[str, ThresholdCache] = {
    "teacache": TeaCache(0.0),
    "teacache-ret": TeaCache(0.0, use_ret_steps=True),
    "magcache": MagCache(threshold=0.0),
}
"""What each kind of fit serves, at the threshold at which no step reuses."""


def fitted_caches(engine: Any) -> tuple[ThresholdCache, ...]:
    """The step caches that an engine's model has a fit for, stored in the artifact or published.

    Empty where several models take turns, since a fit is for one.

    Args:
        engine: The engine, with its pipeline.
    """
    if several_models(engine):
        return ()
    fits = model_fits(engine.pipeline.transformer, engine.artifact.manifest.cache_fits)
    kinds = {fit.kind for fit in fits}
    return tuple(cache for kind, cache in _BY_FIT.items() if kind in kinds)


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


def alternating(cache: ThresholdCache) -> ThresholdCache:
    """The same kind of cache, computing and reusing in turn: to measure what both cost."""
    if isinstance(cache, TeaCache):
        return replace(cache, threshold=1.5, coefficients=(1.0,), first=1, last=0)
    return MagCache(threshold=1.0, max_skip_steps=1, retention_ratio=0.0, mag_ratios=(1.0,))
