"""Classifier-free guidance of one run: the passes of a step, and the scale of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.errors import ShapeError
from ddit_rt.models.base import Guidance

WHOLE_RUN = (0.0, 1.0)
"""The interval of a run that is guided from its first step to its last."""


def check_interval(interval: Any) -> tuple[float, float]:
    """Start and stop of the guided steps.

    Raises:
        TypeError: No pair of numbers.
        ValueError: No interval within 0 and 1.
    """
    expected = "(start, stop), shares of the steps with 0 <= start <= stop <= 1"
    start, stop = checks.pair("guidance_interval", interval, checks.number, expected)
    if not 0 <= start <= stop <= 1:
        raise ValueError(checks.got("guidance_interval", interval, expected))
    return start, stop


def guided_steps(guided: bool, interval: tuple[float, float], steps: int) -> tuple[bool, ...]:
    """Which steps are guided where the run is; all of a run without guidance.

    Args:
        guided: Whether the run has guidance.
        interval: Start and stop as shares of the steps, rounded down to whole steps, as diffusers'
            guiders have it: steps k with int(start N) <= k < int(stop N) are guided.
        steps: N.

    Raises:
        ValueError: The interval is none, or there is no guidance for it to bound.
        TypeError: It is no pair of numbers.
    """
    start, stop = check_interval(interval)
    if not guided and (start, stop) != WHOLE_RUN:
        raise ValueError(
            f"got guidance_interval={interval} for a run without classifier-free guidance; ask "
            "for it (`guidance_scale` > 1 for Wan; `true_cfg_scale` > 1 and a negative prompt "
            "for FLUX), or leave the interval out"
        )
    return tuple(int(start * steps) <= step < int(stop * steps) for step in range(steps))


def scales_of(guidance: Guidance | None, experts: Sequence[int], count: int) -> Tensor | None:
    """Guidance scale of every step, `[N]`, float32; None without guidance.

    Args:
        guidance: The run's.
        experts: Expert of every step, `[N]`.
        count: Experts that there are.

    Raises:
        ShapeError: Another number of scales.
    """
    if guidance is None:
        return None
    scales = guidance.scale
    if scales.ndim == 1 and len(scales) != count:
        raise ShapeError(
            f"got {len(scales)} guidance scales for {count} model(s); give one for all, without "
            "dimensions, or one for each"
        )
    scales = scales.expand(count)
    index = torch.tensor(experts, dtype=torch.int64, device="cpu").to(
        scales.device, non_blocking=True
    )
    return scales.index_select(0, index)


def passes_of(
    conditioning: Mapping[str, Tensor], guidance: Guidance | None, batched: bool
) -> tuple[Mapping[str, Tensor], ...]:
    """Conditioning of every pass of the model in a step.

    Raises:
        ShapeError: Halves of unequal text lengths cannot be one batch.
    """
    if guidance is None:
        return (conditioning,)
    if not batched:
        return guidance.prompt, guidance.negative
    for name, tensor in guidance.prompt.items():
        if guidance.negative[name].shape != tensor.shape:
            raise ShapeError(
                f"`{name}` has shape {list(tensor.shape)} for the prompt and "
                f"{list(guidance.negative[name].shape)} for the negative prompt, which cannot be "
                "one batch; pad them alike, or set engine.batched_guidance = False"
            )
    return (
        {name: torch.cat((one, guidance.negative[name])) for name, one in guidance.prompt.items()},
    )
