"""The memory of a captured step loop, at addresses that its graphs can rely on."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ddit_rt.loop.graphs import STALL_SECONDS
from ddit_rt.loop.protocol import RunPlan

_PAST = 3
_TERMS = 6


class LoopBuffers:
    """Device memory of one captured loop, outside the graphs' pool.

    Attributes:
        latents: z_k, `[B, C, H, W]` float32: the buckets' input.
        velocity: v_k, likewise: the buckets' output.
        step: k, `[1]` int32: the index by which buckets read their tables.
        signal: What the step cache goes by, `[R]` float32; `[0]` without one.
    """

    def __init__(
        self, plan: RunPlan, shape: torch.Size, device: torch.device, runtime: Any
    ) -> None:
        coarse = len(plan.offered) - 1
        self._sizes = [plan.patch_size * multiple for multiple in plan.offered[1:]]
        self._shape = [shape[0], shape[1], shape[2] if len(shape) == 5 else 1, *shape[-2:]]
        self._depth = plan.solver.velocity_depth
        self._capacity = plan.capacity
        moments, keys = runtime.scratch_sizes(self._shape, self._sizes)

        def floats(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float32, device=device)

        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=device)

        self.latents = floats(*shape)
        self.velocity = floats(*shape)
        self._past = floats(_PAST, *shape)
        self._past_velocities = floats(self._depth - 1, *shape)
        self._coefficients = floats(plan.capacity, _TERMS)
        self._forced = integers(plan.capacity)
        # Sizes of 0, which have no address, stand for a loop of one stage, or without a step cache.
        self._stage_count = len(plan.buckets)
        self._stages = integers(plan.capacity if self._stage_count > 1 else 0)
        self._thresholds = floats(plan.capacity, coarse)
        self._moments = floats(moments)
        self._keys = integers(keys)
        self._scores = floats(shape[0], coarse)
        self._state = integers(runtime.STATE_WORDS)
        self._cache_rows = 0 if plan.cache is None else plan.cache.rows
        self._increments = floats(0 if plan.cache is None else plan.capacity)
        self._cache = floats(self._cache_rows and runtime.CACHE_HEADER + self._cache_rows)
        self.signal = floats(self._cache_rows)
        self._settings = integers(runtime.SETTINGS_WORDS)
        self.step = self._state[:1]

    def control(self, runtime: Any, device: torch.device, patience: float = STALL_SECONDS) -> Any:
        """A `StepControl` over these buffers, which it keeps alive.

        Its destructor waits for a device that is busy, at most `patience` seconds.
        """
        tensors = {
            "latents": self.latents,
            "past": self._past,
            "velocity": self.velocity,
            "past_velocities": self._past_velocities,
            "coefficients": self._coefficients,
            "forced": self._forced,
            "thresholds": self._thresholds,
            "moments": self._moments,
            "keys": self._keys,
            "scores": self._scores,
            "state": self._state,
            "settings": self._settings,
            "increments": self._increments,
            "signal": self.signal,
            "cache": self._cache,
            "stages": self._stages,
        }
        return runtime.StepControl(
            {name: tensor.data_ptr() for name, tensor in tensors.items()},
            shape=self._shape,
            sizes=self._sizes,
            velocity_type="float32",
            velocity_slots=self._depth,
            capacity=self._capacity,
            device=device.index or 0,
            owner=self,
            cache_rows=self._cache_rows,
            stages=self._stage_count,
            patience=patience,
        )

    def load(self, plan: RunPlan, latents: Tensor) -> None:
        """Copies a run's tables and initial latents in, without waiting for the device."""
        policy, steps = plan.policy, plan.policy.steps
        forced, thresholds = policy.tensors()
        settings = [steps, policy.order, _word(policy.quantile), policy.dwell, int(policy.monotone)]
        tables = [
            (self._coefficients, plan.solver.coefficients.to(torch.float32)),
            (self._forced, forced),
            (self._thresholds, thresholds),
        ]
        if self._stage_count > 1:
            stages = torch.tensor(plan.stages, dtype=torch.int32, device="cpu")
            tables.append((self._stages, stages))
        if plan.cache is not None:
            table = plan.cache.table
            terms = [_word(value) for value in table.coefficients]
            settings += [int(table.growth), _word(table.threshold), table.limit, len(terms)]
            settings += terms
            tables.append((self._increments, table.tensors()[0]))
        words = torch.tensor(settings, dtype=torch.int32, device="cpu")
        tables.append((self._settings, words))
        for target, source in tables:
            target[: len(source)].copy_(source, non_blocking=True)
        self.latents.copy_(latents, non_blocking=True)

    def previous(self, step: Tensor) -> Tensor:
        """z_{k-1} for k, `[1]`; anything at 0."""
        slot = (step + _PAST - 1) % _PAST
        return self._past.index_select(0, slot).squeeze(0)

    def next_step(self) -> Tensor:
        """The step that is decided next, `[1]`; beyond the tables, their last row."""
        return (self.step + 1).clamp(max=self._capacity - 1)


def _word(value: float) -> int:
    """The bits of a float32, as an int32."""
    (word,) = struct.unpack("<i", struct.pack("<f", value))
    assert isinstance(word, int)
    return word
