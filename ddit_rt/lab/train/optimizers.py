"""The optimizer, its schedule, and the average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.lab.train.config import OptimizerConfig

CLIP = 1.0
"""Largest norm of the gradient of one patch size's adapter."""

_FLOOR = 0.01


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> Any:
    """AdamW or Prodigy (arXiv 2306.06101).

    Raises:
        ModuleNotFoundError: Prodigy is not installed; the message names the extra.
    """
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.99),
        )
    try:
        from prodigyopt import Prodigy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'optimizer "prodigy" needs prodigyopt: pip install "ddit_rt[train]"'
        ) from error
    return Prodigy(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        # Without them the warm-up's small steps would be read as "go faster".
        safeguard_warmup=True,
        use_bias_correction=True,
    )


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.learning_rate * (_FLOOR + (1 - _FLOOR) * factor)


class WeightAverage:
    """Exponential moving average of weights; young, it follows them faster.

    Attributes:
        values: The averages, in the order of the parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self._updates = 0
        self.values: list[Tensor] = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        """Takes in the current weights."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 9))
        current = [parameter.detach() for parameter in self._parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages in place of the weights for a while."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Gives the state for a checkpoint."""
        return {"updates": self._updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the state of a checkpoint."""
        self._updates = state["updates"]
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)
