"""A step cache for one model and run: whose fit it takes, and what it goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt import checks
from ddit_rt.artifact import public_config
from ddit_rt.policies import (
    CacheFit,
    CacheModel,
    NoCache,
    ResolvedCache,
    StepCache,
    parse_step_cache,
    published_fits,
)
from ddit_rt.steps import StepModel


def as_step_cache(step_cache: Any) -> StepCache | None:
    """The step cache that a caller passed, by value or as text.

    Raises:
        TypeError: Neither, nor None.
        ValueError: A text that stands for none.
    """
    if isinstance(step_cache, str):
        return parse_step_cache(step_cache)
    expected = 'a step cache, such as TeaCache(0.4), "teacache:0.4", or NoCache()'
    return checks.optional(checks.instance, "step_cache", step_cache, StepCache, expected)


def resolve_cache(
    step_cache: StepCache, model: StepModel, timesteps: Tensor, fits: Sequence[CacheFit]
) -> ResolvedCache | None:
    """The cache's table for a model; None: every step computes.

    Args:
        step_cache: What the caller asked for.
        model: The model.
        timesteps: t that the model is given at each step, `[N]`.
        fits: Those of the artifact, which come before published ones.

    Raises:
        ValueError: Nothing was fitted for the model, or the cache does not suit it.
    """
    if isinstance(step_cache, NoCache):
        return None
    transformer = model.transformer

    def changes(projected: bool) -> list[float]:
        # The host waits for these, once and before the run: they are its table.
        signal = model.family.time_signal(transformer, timesteps, projected=projected)
        return relative_changes(signal)

    return step_cache.resolve(
        CacheModel(
            name=type(transformer).__name__,
            steps=len(timesteps),
            fits=model_fits(transformer, fits),
            time_changes=changes if model.family.time_driven else None,
        )
    )


def model_fits(transformer: nn.Module, fits: Sequence[CacheFit]) -> tuple[CacheFit, ...]:
    """What step caches can take of a model: fits of its artifact, and then published ones.

    Args:
        transformer: The model.
        fits: Those of the artifact.
    """
    config = public_config(transformer.config)  # type: ignore[arg-type]
    return (*fits, *published_fits(type(transformer).__name__, config))


def relative_changes(rows: Tensor) -> list[float]:
    """Relative L1 change of consecutive rows `[N, m]`; 0 for the first."""
    change = rows.diff(dim=0).abs().mean(1) / rows[:-1].abs().mean(1)
    return [0.0, *change.to(torch.float64).tolist()]
