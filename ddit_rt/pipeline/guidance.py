"""Classifier-free guidance of one run: the passes of a step, and the scale of every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.families.base import Guidance

WHOLE_RUN = (0.0, 1.0)
"""The interval of a run that is guided from its first step to its last."""


def scales_of(
    guidance: Guidance | None, interval: tuple[float, float], steps: int
) -> Tensor | None:
    """Guidance scale of every step, `[N]`, float32; 1, which is no guidance, outside the interval.

    Args:
        guidance: The run's; None for a run without.
        interval: Start and stop as shares of the steps, rounded down to whole steps, as diffusers'
            guiders have it: steps k with int(start N) <= k < int(stop N) are guided.
        steps: N.

    Raises:
        ValueError: The interval is none, or there is no guidance for it to bound.
    """
    start, stop = interval
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"got guidance_interval={interval}; expected (start, stop), shares of the steps with "
            "0 <= start <= stop <= 1"
        )
    if guidance is None:
        if (start, stop) != WHOLE_RUN:
            raise ValueError(
                f"got guidance_interval={interval} for a run without classifier-free guidance; ask "
                "for it (`guidance_scale` > 1 for Wan; `true_cfg_scale` > 1 and a negative prompt "
                "for FLUX), or leave the interval out"
            )
        return None
    index = torch.arange(steps, device=guidance.scale.device)
    guided = (index >= int(start * steps)) & (index < int(stop * steps))
    return torch.where(guided, guidance.scale, 1.0)


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
