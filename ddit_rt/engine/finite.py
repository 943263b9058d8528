"""Latents that are NaN or infinite: refused before a run, announced and recorded after it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddit_rt import notices
from ddit_rt.loop import RunTrace


class Finite:
    """Whether a tensor is finite throughout; on a device the answer is on its way meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._answer = torch.isfinite(tensor).all()
        self._arrived: torch.cuda.Event | None = None
        if self._answer.is_cuda:
            pinned = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._answer = pinned.copy_(self._answer, non_blocking=True)
            stream = torch.cuda.current_stream(tensor.device)
            self._arrived = stream.record_event()

    def __bool__(self) -> bool:
        """On a device, waits until what was queued before this object was made is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._answer)


class FiniteCheck:
    """Refuses initial latents that are not finite: before the run, or after it on a device.

    There the run goes on meanwhile, so that the host need not wait for the answer.
    """

    def __init__(self, latents: Tensor) -> None:
        self._finite = Finite(latents)
        if not latents.is_cuda:
            self.require()

    def require(self) -> None:
        """Raises if they were not finite. On a device: only once the run is over."""
        if not self._finite:
            raise ValueError("the initial latents hold NaN or infinity; give finite noise")


def announce_nonfinite(final: Tensor, trace: RunTrace) -> RunTrace:
    """Warns where a run's latents are not finite, whatever decided its patch sizes.

    NaN and infinity stay in the latents of a flow once they are there, so that the final ones tell
    of every step; where scores or signals were taken, the trace knows the step too.

    Args:
        final: The run's final latents. On a device the host waits for the answer here, behind the
            loop, whose end it has seen already.
        trace: The run's.

    Returns:
        The trace, with `nonfinite` set where they are not.
    """
    if Finite(final) and not trace.nonfinite:
        return trace
    first = trace.first_nonfinite
    when = "in the final latents" if first is None else f"before step {first} of {len(trace)}"
    notices.warn(
        f"the latents became NaN or infinite during the run, noticed {when}; the result is not "
        "usable: check the model's weights and dtype, the prompt embeddings and the guidance"
    )
    return replace(trace, nonfinite=True)
