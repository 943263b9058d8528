"""What a step cache goes by: how much something changed since the step before.

    signal = mean |m_k - m_{k-1}| / mean |m_{k-1}|

TeaCache's m_k is the modulated input of the first block, from z_k at the base patch size p and the
time t_k. SeaCache's is z_k, filtered for what is signal in it at its noise level. Either is a
function of latents and time alone, so m_{k-1} is computed again from z_{k-1}, which the solver's
history holds, instead of being kept: it would be as large as a residual. It follows that skipped
steps, and steps at other patch sizes, count like any other.

FirstBlockCache's m_k is what the first block adds, and its change is measured against the latest
computed step, whose m is kept: the block costs more to run again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.steps.base import RunContext, StepInputs, StepModel, at_step
from ddit_rt.steps.buckets import FineBucket
from ddit_rt.steps.first_block import FirstBlock


class Signal(Protocol):
    """The relative L1 change of something since the step before.

    Attributes:
        rows: How many changes it tells apart.
        passes: Passes of a step that `refresh` is given.
        keeps: Whether it keeps what a later step is compared with, so that it must measure every
            step, whether or not that computes in any case.
    """

    rows: int
    passes: int
    keeps: bool

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """The signal of a step after the first.

        Args:
            latents: z_k, `[B, C, H, W]`, of a video `[B, C, F, H, W]`, float32.
            previous: z_{k-1}, likewise.
            step: k, `[1]`, int32 or int64; at 0 the result means nothing.

        Returns:
            `[rows]`, float32.
        """
        ...

    def computes(self) -> None:
        """Notes that the step in progress computes."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        ...

    def refresh(self, step: int, passes: Sequence[StepInputs | None]) -> None:
        """Writes a step's row of every pass anew; None for a pass that was not called yet."""
        ...


class _SinceLastStep:
    """A change since the step before, whatever that was."""

    keeps = False

    def computes(self) -> None:
        """See `Signal.computes`."""


class InputSignal(_SinceLastStep):
    """The change of the modulated input, of every sample in every pass of a step."""

    def __init__(self, model: StepModel, context: RunContext) -> None:
        """Prepares the passes of a step."""
        family, transformer = model.layers, model.transformer
        self._model = model
        self._tables = [
            family.embed_time(transformer, context.timesteps, one.conditioning)
            for one in context.passes
        ]
        self.rows = sum(table.shape[1] for table in self._tables)
        self.passes = len(self._tables)

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """See `Signal.change`."""
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
        """See `Signal.tensors`."""
        return tuple(self._tables)

    def refresh(self, step: int, passes: Sequence[StepInputs | None]) -> None:
        """See `Signal.refresh`."""
        family, transformer = self._model.layers, self._model.transformer
        for table, one in zip(self._tables, passes, strict=True):
            now = one or passes[0]
            assert now is not None, "the first pass is called first"
            row = family.embed_time(transformer, now.timestep, now.conditioning)
            table[step].copy_(row[0])


_LEAST = 1e-6
"""How near a noise level comes to 0 and 1."""
_TINY = 1e-16


class LatentSignal(_SinceLastStep):
    """The change of the filtered latents, of every sample.

    Along each axis of frames, rows and columns, of a clean picture whose power at frequency f is
    P = 1 / |f|^e, the Wiener filter of z = (1 - t) x0 + t n is g = (1 - t) P / ((1 - t)^2 P + t^2);
    the filter is their product, of mean 1 over all frequencies. It is even in f, so that the real
    and symmetric Hartley transform H diagonalises it: H diag(g) H, as matrix products.
    """

    passes = 1

    def __init__(self, shape: Sequence[int], sigmas: Tensor, power_exp: float) -> None:
        """Prepares latents of a shape.

        Args:
            shape: `[B, C, H, W]` or `[B, C, F, H, W]`.
            sigmas: Noise level of every step, `[M]`, float32.
            power_exp: The exponent e.
        """
        self.rows = shape[0]
        self._sigmas = sigmas
        self._hartley = [_hartley(size).to(sigmas.device) for size in shape[2:]]
        self._powers = [_power(size, power_exp).to(sigmas.device) for size in shape[2:]]

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """See `Signal.change`."""
        now = self._filtered(latents, at_step(self._sigmas, step))
        before = self._filtered(previous, at_step(self._sigmas, (step - 1).clamp(min=0)))
        change = (now - before).abs().flatten(1).mean(1)
        return change / (before.abs().flatten(1).mean(1) + _TINY)

    def _filtered(self, latents: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.double().clamp(_LEAST, 1 - _LEAST)
        spectrum = self._transformed(latents)
        for axis, power in enumerate(self._powers):
            gain = (1 - level) * power / ((1 - level).square() * power + level.square() + _TINY)
            shape = [-1, *[1] * (len(self._powers) - 1 - axis)]
            spectrum = spectrum * (gain / gain.mean()).float().reshape(shape)
        return self._transformed(spectrum)

    def _transformed(self, latents: Tensor) -> Tensor:
        """The Hartley transform along all axes, which is its own inverse."""
        *frames, rows, columns = self._hartley
        latents = rows @ (latents @ columns)
        if frames:
            latents = (frames[0] @ latents.flatten(3)).reshape(latents.shape)
        return latents

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Signal.tensors`; the noise levels are the context's."""
        return tuple(self._powers)

    def refresh(self, step: int, passes: Sequence[StepInputs | None]) -> None:
        """See `Signal.refresh`: it reads nothing of a pass."""


class FirstBlockSignal:
    """The change of what the first block adds, of every sample in every pass of a step.

    A step at p goes on from what the block gave, so that it runs once.
    """

    keeps = True

    def __init__(
        self, fine: Sequence[FineBucket], first_blocks: Sequence[FirstBlock], latents: Tensor
    ) -> None:
        """Prepares the passes of a step.

        Args:
            fine: The steps at p whose first blocks run.
            first_blocks: Of all their passes; they run once, for room.
            latents: Of the shape of the run's.
        """
        self._fine, self._first_blocks = fine, first_blocks
        self._begin(latents, torch.zeros(1, dtype=torch.int32, device=latents.device))
        self.rows = sum(len(one.change()) for one in first_blocks)
        self.passes = len(first_blocks)

    def _begin(self, latents: Tensor, step: Tensor) -> None:
        for bucket in self._fine:
            bucket.begin(latents, step)

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """See `Signal.change`."""
        del previous
        self._begin(latents, step)
        return torch.cat([one.change() for one in self._first_blocks])

    def computes(self) -> None:
        """See `Signal.computes`."""
        for one in self._first_blocks:
            one.keep()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Signal.tensors`; the first blocks are the context's."""
        return tuple(tensor for bucket in self._fine for tensor in bucket.tensors())

    def refresh(self, step: int, passes: Sequence[StepInputs | None]) -> None:
        """See `Signal.refresh`; of buckets that run one pass each."""
        for bucket, now in zip(self._fine, passes, strict=True):
            if now is not None:
                bucket.refresh(step, now)


def _hartley(size: int) -> Tensor:
    """The orthonormal Hartley transform, `[size, size]`, float32."""
    places = torch.arange(size, dtype=torch.float64, device="cpu")
    angles = 2 * math.pi / size * torch.outer(places, places).remainder(size)
    return ((angles.cos() + angles.sin()) / math.sqrt(size)).float()


def _power(size: int, exponent: float) -> Tensor:
    """Power of a clean picture at the frequencies of an axis, `[size]`, float64."""
    frequencies = torch.fft.fftfreq(size, dtype=torch.float64, device="cpu")
    power: Tensor = 1 / (frequencies.abs() ** exponent + _TINY)
    return power
