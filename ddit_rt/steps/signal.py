"""What a step cache goes by: how much the first block's input changed since the step before.

    m_k = modulated input of the first block, from z_k at the base patch size p and the time t_k
    signal = mean |m_k - m_{k-1}| / mean |m_{k-1}|

m is a function of latents and time alone, so m_{k-1} is computed again from z_{k-1}, which the
solver's history holds, instead of being kept: it would be as large as a residual. It follows that
skipped steps, and steps at other patch sizes, count like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.steps.base import RunContext, StepInputs, StepModel, at_step


class Signal:
    """The relative L1 change of the modulated input, of every sample in every pass of a step.

    Attributes:
        rows: Number of samples times number of passes.
    """

    def __init__(self, model: StepModel, context: RunContext) -> None:
        """Prepares the passes of a step."""
        family, transformer = model.layers, model.transformer
        self._model = model
        self._tables = [
            family.embed_time(transformer, context.timesteps, one.conditioning)
            for one in context.passes
        ]
        self.rows = sum(table.shape[1] for table in self._tables)

    @property
    def passes(self) -> int:
        """Passes of a step."""
        return len(self._tables)

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """The signal of a step after the first.

        Args:
            latents: z_k, `[B, C, H, W]`, float32.
            previous: z_{k-1}, likewise.
            step: k, `[1]`, int32 or int64; at 0 the result means nothing.

        Returns:
            `[rows]`, float32.
        """
        before_step = (step - 1).clamp(min=0)
        changes = []
        for table in self._tables:
            now = self._modulated(latents, at_step(table, step))
            before = self._modulated(previous, at_step(table, before_step))
            change = (now - before).abs().flatten(1).mean(1)
            changes.append(change / before.abs().flatten(1).mean(1))
        return torch.cat(changes)

    def _modulated(self, latents: Tensor, temb: Tensor) -> Tensor:
        """The modulated input m in float32, `[rows of temb, n, d]`."""
        model, family = self._model, self._model.layers
        tokens = ops.pack(latents.to(model.dtype), model.patch_size)
        hidden = family.embed_tokens(model.transformer, tokens)
        hidden = hidden.repeat(len(temb) // len(hidden), 1, 1)
        return family.modulate_input(model.transformer, hidden, temb).float()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return tuple(self._tables)

    def refresh(self, step: int, passes: Sequence[StepInputs]) -> None:
        """Writes a step's row of every pass anew; `sigma` is not read."""
        family, transformer = self._model.layers, self._model.transformer
        for table, now in zip(self._tables, passes, strict=True):
            row = family.embed_time(transformer, now.timestep, now.conditioning)
            table[step].copy_(row[0])
