"""Runs whose latents became NaN or infinite: said aloud, and recorded, under every policy."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ddit_rt.executor import RunTrace


def announce_nonfinite(final: Tensor, trace: RunTrace, *, stacklevel: int) -> RunTrace:
    """Warns where a run's latents are not finite.

    NaN and infinity stay in the latents of a flow once they are there, so that the final ones tell
    of every step; where scores or signals were taken, the trace knows the step too.

    Args:
        final: The run's final latents. On a device the host waits for the answer here, behind the
            loop, whose end it has seen already.
        trace: The run's.
        stacklevel: Frames from here to the caller, as `warnings.warn` counts them.

    Returns:
        The trace, with `nonfinite` set where they are not.
    """
    if not trace.nonfinite and bool(torch.isfinite(final).all()):
        return trace
    first = trace.first_nonfinite
    when = "in the final latents" if first is None else f"before step {first} of {len(trace)}"
    warnings.warn(
        f"the latents became NaN or infinite during the run, noticed {when}; the result is not "
        "usable: check the model's weights and dtype, the prompt embeddings and the guidance",
        stacklevel=stacklevel + 1,
    )
    return replace(trace, nonfinite=True)
