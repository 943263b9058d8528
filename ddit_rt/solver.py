"""The solver as a table: any linear flow scheduler of diffusers, by probing it.

A deterministic multistep solver is linear in the latents and velocities it has seen, so with
z the latents, v the model's velocities and newest first, step k is

    z_{k+1} = a0 z_k + a1 z_{k-1} + a2 z_{k-2} + b0 v_k + b1 v_{k-1} + b2 v_{k-2}

with six numbers that depend on the schedule alone. They are found by stepping the scheduler
object itself on one-hot tensors, so no solver is written again here, and a scheduler that is
not of this form (it draws noise, clips, thresholds) is found out and refused by name. Such a one
takes its steps itself; `own_steps` names its noise levels then.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.errors import ScheduleError, UnsupportedModelError
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


_REQUIRED = ("prediction_type", "use_flow_sigmas")
"""Options by which a scheduler is one of flow matching; others than the defaults of some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverTable:
    """One noise schedule and its solver.

    Attributes:
        coefficients: `[N, 6]`, float64: (a0, a1, a2, b0, b1, b2) of every step.
        sigmas: `N + 1` noise levels, from the first step's to where the last step ends.
        source: Class name of the scheduler.
    """

    coefficients: Tensor
    sigmas: tuple[float, ...]
    source: str

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
            linear combination of at most three latents and three velocities, or fails.
        ScheduleError: Its levels or its steps are NaN or infinite.
    """
    try:
        return _probe(scheduler, type(scheduler).__name__)
    except _UnusableStep as error:
        reason = f"{error}{_option_to_blame(scheduler)}"
        make = _nonfinite if error.nonfinite else _refusal
        raise make(type(scheduler).__name__, reason) from error


class _UnusableStep(Exception):
    """A scheduler's own step raises, or gives NaN or infinity."""

    def __init__(self, reason: str, *, nonfinite: bool) -> None:
        super().__init__(reason)
        self.nonfinite = nonfinite


def _probe(scheduler: Any, name: str) -> SolverTable:
    sigmas = _flow_sigmas(scheduler, name)
    steps = len(sigmas) - 1
    _refuse_noise(scheduler, steps)
    rows = _fit_replaced(scheduler, steps)
    if rows is None:
        latents = _trajectory(scheduler, _basis(steps + 1), steps)
        rows = [_fit(latents[: step + 2], step, name) for step in range(steps)]
    table = SolverTable(
        coefficients=torch.tensor(rows, dtype=torch.float64, device="cpu"),
        sigmas=sigmas,
        source=name,
    )
    _check_on_random(scheduler, table)
    return table


def own_steps(scheduler: Any) -> SolverTable:
    """The table of a run in which a diffusers scheduler takes its steps itself.

    Its coefficients say that z_{k+1} is what stands in the place of v_k.

    Args:
        scheduler: A flow-matching scheduler after `set_timesteps`.

    Raises:
        UnsupportedModelError: It is no flow scheduler.
    """
    name = type(scheduler).__name__
    sigmas = _flow_sigmas(scheduler, name)
    coefficients = torch.zeros(len(sigmas) - 1, 2 * _TERMS, dtype=torch.float64, device="cpu")
    coefficients[:, _TERMS] = 1
    return SolverTable(coefficients=coefficients, sigmas=sigmas, source=name)


def falling(scheduler: Any) -> Any:
    """A scheduler whose timesteps are set, as one whose noise levels fall to 0.

    Of one with `invert_sigmas`, whose levels rise from 0 at noise to 1, a copy. Its steps are the
    same for velocities of the other sign, those of z = (1 - t) x0 + t n.
    """
    if not scheduler.config.get("invert_sigmas", False):
        return scheduler
    turned = copy.copy(scheduler)
    turned.register_to_config(invert_sigmas=False)
    turned.sigmas = 1 - scheduler.sigmas
    turned.timesteps = scheduler.config.num_train_timesteps - scheduler.timesteps
    return turned


def solver_of(scheduler: Any) -> tuple[SolverTable, str]:
    """What `probe_scheduler` reads; where it can read nothing `own_steps`, and why.

    Args:
        scheduler: A flow-matching scheduler after `set_timesteps`.

    Raises:
        UnsupportedModelError: It is no flow scheduler.
    """
    own = own_steps(scheduler)
    try:
        return probe_scheduler(scheduler), ""
    except UnsupportedModelError as error:
        return own, str(error).partition(";")[0]


class ProbedSchedules:
    """`solver_of` schedulers, each schedule probed once: a server repeats few."""

    def __init__(self, kept: int = 64) -> None:
        self._kept = kept
        self._found: dict[tuple[Any, ...], tuple[SolverTable, str]] = {}

    def __call__(self, scheduler: Any) -> tuple[SolverTable, str]:
        """See `solver_of`."""
        key = (
            type(scheduler).__name__,
            repr(sorted(scheduler.config.items())),
            tuple(scheduler.sigmas.tolist()) if hasattr(scheduler, "sigmas") else (),
        )
        if key not in self._found:
            if len(self._found) >= self._kept:
                self._found.clear()
            self._found[key] = solver_of(scheduler)
        return self._found[key]


def _flow_sigmas(scheduler: Any, name: str) -> tuple[float, ...]:
    """Noise levels t of z = (1 - t) x0 + t n, after checks that they are such."""
    if getattr(scheduler, "sigmas", None) is None:
        raise _no_flow(name, "it has no noise levels `sigmas`")
    sigmas = tuple(float(sigma) for sigma in scheduler.sigmas)
    steps = len(scheduler.timesteps)
    if len(sigmas) != steps + 1:
        raise _no_flow(name, f"it has {steps} timesteps for {len(sigmas)} sigmas")
    predicted = scheduler.config.get("prediction_type", "flow_prediction")
    if predicted != "flow_prediction":
        raise _no_flow(name, f"it takes the model's output for {predicted!r}, not for a velocity")
    unusable = [level for level in sigmas if not math.isfinite(level)]
    if unusable:
        raise _nonfinite(name, f"its sigmas hold {unusable[0]}")
    if scheduler.config.get("invert_sigmas", False):
        raise _no_flow(name, "its sigmas rise from noise to image (invert_sigmas=True)")
    if not 0 <= min(sigmas) <= max(sigmas) <= 1 + 1e-6:
        raise _no_flow(
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


def _option_to_blame(scheduler: Any) -> str:
    """The one option without which the scheduler's steps are of use, for its refusal."""
    steps = len(scheduler.timesteps)
    parameters = inspect.signature(type(scheduler).__init__).parameters
    for name, value in scheduler.config.items():
        default = parameters[name].default if name in parameters else value
        if default == value or name in _REQUIRED:
            continue
        trial = copy.deepcopy(scheduler)
        trial.register_to_config(**{name: default})
        if name in vars(trial):  # some schedulers keep an option beside their configuration
            setattr(trial, name, default)
        try:
            _trajectory(trial, _random_values(steps + 1), steps)
        except _UnusableStep:
            continue
        return f" with {name}={value!r}, and not with its default, {default!r}"
    return ""


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

    Raises:
        _UnusableStep: A step fails, or is not finite.
    """
    probe = copy.deepcopy(scheduler)
    probe.set_begin_index(0)
    latents = [values[0]]
    for step in range(steps):
        sample = latents[-1] if replaced is None else replaced[step]
        try:
            output = probe.step(values[step + 1], probe.timesteps[step], sample, return_dict=False)
        except Exception as error:
            came = f"{type(error).__name__}: {error}"
            reason = f"its step {step} of {steps} fails ({came})"
            raise _UnusableStep(reason, nonfinite=False) from error
        if not output[0].isfinite().all():
            reason = f"its step {step} of {steps} gives NaN or infinity"
            raise _UnusableStep(reason, nonfinite=True)
        latents.append(output[0].to(torch.float64))
    return torch.stack([latent.flatten() for latent in latents])


def _fit_replaced(scheduler: Any, steps: int) -> list[list[float]] | None:
    """Exact rows, of a scheduler that goes on from whatever latents it is given; None for another.

    A corrector goes on from its own latents.
    """
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


def _no_flow(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the scheduler {name} is no flow scheduler: {reason}; use one such as "
        "FlowMatchEulerDiscreteScheduler"
    )


def _nonfinite(name: str, reason: str) -> ScheduleError:
    return ScheduleError(
        f"the scheduler {name} cannot be run: {reason}, so that every result would be of no use; "
        "set its options otherwise, or use another one, such as FlowMatchEulerDiscreteScheduler"
    )
