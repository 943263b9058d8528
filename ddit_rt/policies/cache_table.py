"""The step cache's rule as plain data: what a kernel needs to decide, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LIMIT = 2**31 - 1
"""Steps in a row that may reuse, where nothing but the threshold ends them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTable:
    """A step cache, resolved for one model and schedule. `ops.decide_reuse_` gives its meaning.

    Attributes:
        increments: Per step what the accumulated change grows by; with `product`, what its factor
            is multiplied by; NaN for a step that always computes.
        threshold: Below it a step reuses.
        limit: Steps in a row that may reuse.
        product: Whether increments are factors.
        coefficients: Coefficients of the polynomial of a signal's change, highest power first;
            empty: the increments do without a signal.
        note: For the trace: which cache, with whose fit.
    """

    increments: tuple[float, ...]
    threshold: float
    limit: int = NO_LIMIT
    product: bool = False
    coefficients: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        """The first step has nothing to reuse."""
        assert not self.increments or math.isnan(self.increments[0]), "the first step computes"

    def signalled(self, step: int) -> bool:
        """Whether this step's decision needs the signal."""
        return bool(self.coefficients) and not math.isnan(self.increments[step])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Increments `[N]` and coefficients `[T]`, float32."""
        return (
            torch.tensor(self.increments, dtype=torch.float32, device="cpu"),
            torch.tensor(self.coefficients, dtype=torch.float32, device="cpu"),
        )
