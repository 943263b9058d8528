"""The solver as a table: any linear flow scheduler of diffusers, by probing it.

A deterministic multistep solver is linear in the latents and velocities it has seen, so with
z the latents, v the model's velocities and newest first, step k is

    z_{k+1} = a0 z_k + a1 z_{k-1} + a2 z_{k-2} + b0 v_k + b1 v_{k-1} + b2 v_{k-2}

with six numbers that depend on the schedule alone. They are found by stepping the scheduler
object itself on one-hot tensors, so no solver is written again here, and a scheduler that is
not of this form (it draws noise, clips, thresholds) is found out and refused by name.

A step callback may put other latents z' in the place of z_k. Most solvers just go on from those,
and their numbers are found by giving them latents of their own at every step. A solver with a
corrector (UniPC) goes on from its own corrected latents, and sees z' only in the clean estimate
z' - t v. This is the same as going on from z_k with the velocity v - (z' - z_k) / t: see
`Replacement`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.torch_state import plain_defaults

_TERMS = 3
_FIT_TOLERANCE = 1e-6
"""Largest residual of an exact fit: some schedulers compute in float32 whatever they are given."""

_EXACT = 1e-8
"""Residual below which a fit is exact, and fewer terms are preferred."""

_REPLAY_TOLERANCE = 1e-4
"""Largest relative error on random velocities: a non-linear step misses by far more."""

_SUPPORTS: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3))
"""Numbers of (latents, velocities) tried in turn: the fewest terms that reproduce a step win."""


class Replacement(Enum):
    """What the scheduler makes of latents that a callback put in the place of its own."""

    LATENTS = "latents"
    """It goes on from them: they take their place in the history."""

    VELOCITY = "velocity"
    """It goes on from its own z, and takes z' for the velocity v - (z' - z) / t."""

    UNKNOWN = "unknown"
    """Neither, so that a run cannot follow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverTable:
    """One noise schedule and its solver.

    Attributes:
        coefficients: `[N, 6]`, float64: (a0, a1, a2, b0, b1, b2) of every step.
        sigmas: `N + 1` noise levels, from the first step's to where the last step ends.
        source: Class name of the scheduler.
        replacement: How latents that a callback replaced enter.
    """

    coefficients: Tensor
    sigmas: tuple[float, ...]
    source: str
    replacement: Replacement = Replacement.LATENTS

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.sigmas) - 1

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise level of every step, `[N]`, on the CPU."""
        return torch.tensor(self.sigmas[:-1], dtype=dtype, device="cpu")

    @property
    def velocity_depth(self) -> int:
        """Velocities that a step combines, the newest among them: 1 for Euler, up to 3."""
        used = (self.coefficients[:, _TERMS:] != 0).any(dim=0).nonzero()
        return 1 + int(used.max()) if len(used) else 1


@plain_defaults()
def probe_scheduler(scheduler: Any) -> SolverTable:
    """Reads the table off a diffusers scheduler whose timesteps are set.

    Args:
        scheduler: A flow-matching scheduler after `set_timesteps`. It is copied, not stepped.

    Raises:
        UnsupportedModelError: It is no deterministic flow scheduler, or its step is not a fixed
            linear combination of at most three latents and three velocities.
    """
    name = type(scheduler).__name__
    sigmas = _flow_sigmas(scheduler, name)
    steps = len(sigmas) - 1
    _refuse_noise(scheduler, steps)
    rows = _fit_replaced(scheduler, steps)
    replacement = Replacement.LATENTS
    if rows is None:
        latents = _trajectory(scheduler, _basis(steps + 1), steps)
        rows = [_fit(latents[: step + 2], step, name) for step in range(steps)]
        replacement = Replacement.VELOCITY
    table = SolverTable(
        coefficients=torch.tensor(rows, dtype=torch.float64, device="cpu"),
        sigmas=sigmas,
        source=name,
        replacement=replacement,
    )
    _check_on_random(scheduler, table)
    if replacement is Replacement.VELOCITY and not _goes_on_from_its_own(scheduler, table):
        return replace(table, replacement=Replacement.UNKNOWN)
    return table


def _flow_sigmas(scheduler: Any, name: str) -> tuple[float, ...]:
    """Noise levels t of z = (1 - t) x0 + t n, after checks that they are such."""
    if getattr(scheduler, "sigmas", None) is None:
        raise _refusal(name, "it has no noise levels `sigmas`")
    sigmas = tuple(float(sigma) for sigma in scheduler.sigmas)
    steps = len(scheduler.timesteps)
    if len(sigmas) != steps + 1:
        raise _refusal(name, f"it has {steps} timesteps for {len(sigmas)} sigmas")
    predicted = scheduler.config.get("prediction_type", "flow_prediction")
    if predicted != "flow_prediction":
        raise _refusal(name, f"it takes the model's output for {predicted!r}, not for a velocity")
    if not 0 <= min(sigmas) <= max(sigmas) <= 1 + 1e-6:
        raise _refusal(
            name, f"its sigmas reach from {min(sigmas):.3g} to {max(sigmas):.3g}, not within [0, 1]"
        )
    return sigmas


def _refuse_noise(scheduler: Any, steps: int) -> None:
    values = _random_values(steps + 1)
    with torch.random.fork_rng(devices=[]):
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(_trajectory(scheduler, values, steps))
    if float((runs[0] - runs[1]).abs().max()) > 0:
        raise _refusal(type(scheduler).__name__, "it draws noise in its steps")


def _basis(count: int) -> Tensor:
    """`[n, 1, 1, n]` one-hot; two leading dimensions, because UniPC's einsum needs them."""
    return torch.eye(count, dtype=torch.float64, device="cpu")[:, None, None, :]


def _random_values(count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(count, 1, 1, 16, generator=generator, dtype=torch.float64, device="cpu")
    return drawn * 10


def _trajectory(
    scheduler: Any, values: Tensor, steps: int, replaced: Tensor | None = None
) -> Tensor:
    """Latents z_0 .. z_N that a copy of the scheduler gives, `[N + 1, n]`.

    Args:
        scheduler: It is copied.
        values: `[N + 1, 1, 1, n]`: z_0, then v_0 .. v_{N-1}.
        steps: N.
        replaced: `[N, 1, 1, n]`: latents to go on from in each step, instead of z_k.
    """
    probe = copy.deepcopy(scheduler)
    probe.set_begin_index(0)
    latents = [values[0]]
    for step in range(steps):
        sample = latents[-1] if replaced is None else replaced[step]
        output = probe.step(values[step + 1], probe.timesteps[step], sample, return_dict=False)[0]
        latents.append(output.to(torch.float64))
    return torch.stack([latent.flatten() for latent in latents])


def _fit_replaced(scheduler: Any, steps: int) -> list[list[float]] | None:
    """Rows of a scheduler that goes on from whatever latents it is given; None for another."""
    one_hot = _basis(2 * steps)
    samples, velocities = one_hot[:steps], one_hot[steps:]
    outputs = _trajectory(scheduler, torch.cat((samples[:1], velocities)), steps, samples)[1:]
    rows = []
    for step, output in enumerate(outputs):
        row = [0.0] * (2 * _TERMS)
        for age in range(min(_TERMS, step + 1)):
            row[age] = float(output[step - age])
            row[_TERMS + age] = float(output[steps + step - age])
            output[step - age] = output[steps + step - age] = 0
        if output.abs().max() > _FIT_TOLERANCE:
            return None
        rows.append(_snap(row))
    return rows


def _fit(latents: Tensor, step: int, name: str) -> list[float]:
    """Six coefficients of one step, with as few terms as reproduce it as well as all terms do.

    Args:
        latents: `[step + 2, N + 1]`, z_0 .. z_{step + 1} as combinations of z_0 and velocities.
        step: The step.
        name: The scheduler's.
    """
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
    values = _random_values(table.steps + 1)
    error = _relative_error(
        replay(table, values.flatten(1)), _trajectory(scheduler, values, table.steps)
    )
    if error > _REPLAY_TOLERANCE:
        raise _refusal(
            table.source,
            f"on random tensors its step differs from the linear form by {error:.1e} "
            "(it clips or thresholds)",
        )


def _goes_on_from_its_own(scheduler: Any, table: SolverTable) -> bool:
    """Whether replaced latents enter as `Replacement.VELOCITY` says, on random tensors."""
    steps = table.steps
    drawn = _random_values(2 * steps + 1)
    values, changes = drawn[: steps + 1], drawn[steps + 1 :]
    changes[0] = 0  # nothing comes before the first step
    levels = table.levels(torch.float64).view(-1, 1, 1, 1)
    moved = torch.cat((values[:1], values[1:] - changes / levels))
    expected = replay(table, moved.flatten(1))
    replaced = expected[:-1].view_as(changes) + changes
    actual = _trajectory(scheduler, values, steps, replaced)
    return _relative_error(actual, expected) <= _REPLAY_TOLERANCE


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).nan_to_num(1.0))


def replay(table: SolverTable, values: Tensor) -> Tensor:
    """Latents z_0 .. z_N that the table makes of z_0 and given velocities.

    Args:
        table: The solver.
        values: `[N + 1, n]`: z_0, then v_0 .. v_{N-1}.

    Returns:
        `[N + 1, n]`.
    """
    latents, nothing = [values[0]], torch.zeros_like(values[0])
    for step, row in enumerate(table.coefficients.tolist()):
        terms: Sequence[tuple[float, Tensor]] = [
            *((row[i], latents[step - i]) for i in range(min(_TERMS, step + 1))),
            *((row[_TERMS + j], values[step - j + 1]) for j in range(min(_TERMS, step + 1))),
        ]
        latents.append(sum((weight * tensor for weight, tensor in terms), nothing))
    return torch.stack(latents)


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the scheduler {name} cannot be run as a solver table: {reason}; use a deterministic "
        "flow scheduler such as FlowMatchEulerDiscreteScheduler"
    )
