"""The solver as a table: any linear flow scheduler of diffusers, by probing it.

A deterministic multistep solver is linear in the latents and velocities it has seen, so with
z the latents, v the model's velocities and newest first, step k is

    z_{k+1} = a0 z_k + a1 z_{k-1} + a2 z_{k-2} + b0 v_k + b1 v_{k-1} + b2 v_{k-2}

with six numbers that depend on the schedule alone. They are found by stepping the scheduler
object itself on one-hot tensors, so no solver is written again here, and a scheduler that is
not of this form (it draws noise, clips, thresholds) is found out and refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError

_TERMS = 3
_FIT_TOLERANCE = 1e-6
"""Largest residual of an exact fit: some schedulers compute in float32 whatever they are given."""

_EXACT = 1e-8
"""Residual below which a fit is exact, and fewer terms are preferred."""

_REPLAY_TOLERANCE = 1e-4
"""Largest relative error on random velocities: a non-linear step misses by far more."""

_SUPPORTS: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3))
"""Numbers of (latents, velocities) tried in turn: the fewest terms that reproduce a step win."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverTable:
    """One noise schedule and its solver.

    Attributes:
        coefficients: `[N, 6]`, float64: (a0, a1, a2, b0, b1, b2) of every step.
        sigmas: `N + 1` noise levels, from the first step's to 0.
        source: Class name of the scheduler.
    """

    coefficients: Tensor
    sigmas: tuple[float, ...]
    source: str

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.sigmas) - 1

    @property
    def velocity_depth(self) -> int:
        """Velocities that must be kept: 1 for Euler, up to 3."""
        used = (self.coefficients[:, _TERMS:] != 0).any(dim=0).nonzero()
        return 1 + int(used.max()) if len(used) else 1


def probe_scheduler(scheduler: Any) -> SolverTable:
    """Reads the table off a diffusers scheduler whose timesteps are set.

    Args:
        scheduler: A flow-matching scheduler after `set_timesteps`. It is copied, not stepped.

    Raises:
        UnsupportedModelError: Its step is not a fixed linear combination of at most three
            latents and three velocities.
    """
    name = type(scheduler).__name__
    sigmas = tuple(float(sigma) for sigma in scheduler.sigmas)
    steps = len(scheduler.timesteps)
    if len(sigmas) != steps + 1:
        raise _refusal(name, f"it has {steps} timesteps for {len(sigmas)} sigmas")
    latents = _trajectory(scheduler, _basis(steps), steps)
    rows = [_fit(latents, step, name) for step in range(steps)]
    table = SolverTable(
        coefficients=torch.tensor(rows, dtype=torch.float64), sigmas=sigmas, source=name
    )
    _check_on_random(scheduler, table)
    return table


def _basis(steps: int) -> Tensor:
    """`[N + 1, 1, 1, N + 1]`: element 0 carries z_0, element k + 1 carries v_k."""
    return torch.eye(steps + 1, dtype=torch.float64)[:, None, None, :]


def _trajectory(scheduler: Any, basis: Tensor, steps: int) -> Tensor:
    """Latents z_0 .. z_N of a copy of the scheduler that is fed `basis`, `[N + 1, n]`."""
    probe = copy.deepcopy(scheduler)
    probe.set_begin_index(0)
    latents = [basis[0]]
    for step in range(steps):
        output = probe.step(basis[step + 1], probe.timesteps[step], latents[-1], return_dict=False)[
            0
        ]
        latents.append(output.to(torch.float64))
    return torch.stack([latent.flatten() for latent in latents])


def _fit(latents: Tensor, step: int, name: str) -> list[float]:
    """Six coefficients of one step, with as few terms as reproduce it as well as all terms do."""
    fits = [_fit_terms(latents, step, counts) for counts in _SUPPORTS]
    best = min(residual for _, residual in fits)
    if best > _FIT_TOLERANCE:
        raise _refusal(
            name,
            f"step {step} is no combination of the latest three latents and velocities "
            f"(residual {best:.1e})",
        )
    return next(row for row, residual in fits if residual <= max(4 * best, _EXACT))


def _fit_terms(latents: Tensor, step: int, counts: tuple[int, int]) -> tuple[list[float], float]:
    """Least squares over some latents and velocities: the row of six, and its residual."""
    z_count, v_count = (min(count, step + 1) for count in counts)
    system = np.zeros((latents.shape[1], z_count + v_count))
    for i in range(z_count):
        system[:, i] = latents[step - i].numpy()
    for j in range(v_count):
        system[step - j + 1, z_count + j] = 1
    target = latents[step + 1].numpy()
    solution = np.linalg.lstsq(system, target, rcond=None)[0]
    row = [0.0] * (2 * _TERMS)
    row[:z_count] = solution[:z_count].tolist()
    row[_TERMS : _TERMS + v_count] = solution[z_count:].tolist()
    return _snap(row), float(np.abs(system @ solution - target).max())


def _snap(row: list[float]) -> list[float]:
    """Removes the fit's rounding from coefficients that are exactly 0 or 1."""
    snapped = (0.0 if abs(x) < 1e-9 else x for x in row)
    return [1.0 if abs(x - 1) < 1e-9 else x for x in snapped]


def _check_on_random(scheduler: Any, table: SolverTable) -> None:
    """Steps the real scheduler and the table side by side on random tensors."""
    generator = torch.Generator().manual_seed(0)
    shape = (table.steps + 1, 1, 1, 16)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10
    with torch.random.fork_rng(devices=[]):
        expected = _trajectory(scheduler, values, table.steps)
    actual = replay(table, values.flatten(1))
    error = float(((actual - expected).abs().max() / expected.abs().max()).nan_to_num(1.0))
    if error > _REPLAY_TOLERANCE:
        raise _refusal(
            table.source,
            f"on random tensors its step differs from the linear form by {error:.1e} "
            "(it draws noise, clips or thresholds)",
        )


def replay(table: SolverTable, values: Tensor) -> Tensor:
    """Latents z_0 .. z_N that the table makes of z_0 and given velocities.

    Args:
        table: The solver.
        values: `[N + 1, n]`: z_0, then v_0 .. v_{N-1}.

    Returns:
        `[N + 1, n]`.
    """
    latents: list[Tensor] = [values[0]]
    for step, row in enumerate(table.coefficients.tolist()):
        terms: Sequence[tuple[float, Tensor]] = [
            *((row[i], latents[step - i]) for i in range(min(_TERMS, step + 1))),
            *((row[_TERMS + j], values[step - j + 1]) for j in range(min(_TERMS, step + 1))),
        ]
        latents.append(sum((weight * tensor for weight, tensor in terms), torch.zeros(())))
    return torch.stack(latents)


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the scheduler {name} cannot be run as a solver table: {reason}; use a deterministic "
        "flow scheduler such as FlowMatchEulerDiscreteScheduler"
    )
