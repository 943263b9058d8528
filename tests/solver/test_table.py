"""Solver tables against the schedulers they were read from, and against closed forms."""

from typing import Any

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.solver import SolverTable, probe_scheduler, replay

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def make(kind: type, steps: int, **config: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 8, 28, 50])
def test_euler_is_one_latent_and_one_velocity(steps: int) -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, steps, shift=3.0)
    table = probe_scheduler(scheduler)
    expected = torch.zeros(steps, 6, dtype=torch.float64)
    expected[:, 0] = 1
    expected[:, 3] = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).double()
    torch.testing.assert_close(table.coefficients, expected, rtol=0, atol=1e-7)
    assert table.velocity_depth == 1
    assert table.sigmas[0] == 1.0
    assert table.sigmas[-1] == 0.0


def test_euler_with_dynamic_shifting_follows_mu() -> None:
    tables = []
    for mu in (0.5, 1.15):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(8, mu=mu)
        tables.append(probe_scheduler(scheduler))
    assert tables[0].sigmas[4] < tables[1].sigmas[4]


@pytest.mark.parametrize("steps", [8, 28, 50])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (UniPCMultistepScheduler, 1e-8),
        # Its own exponentials of half-log SNR lose digits at sigma close to 1.
        (DPMSolverMultistepScheduler, 1e-5),
        (DEISMultistepScheduler, 1e-8),
    ],
)
def test_multistep_solver_equals_its_scheduler(kind: type, tolerance: float, steps: int) -> None:
    scheduler = make(kind, steps, **FLOW)
    table = probe_scheduler(scheduler)
    values = torch.randn(steps + 1, 12, generator=torch.Generator().manual_seed(1)).double()
    sample = values[0].reshape(1, 1, 12)
    for step in range(steps):
        velocity = values[step + 1].reshape(1, 1, 12)
        sample = scheduler.step(velocity, scheduler.timesteps[step], sample, return_dict=False)[0]
    torch.testing.assert_close(replay(table, values)[-1], sample.flatten(), rtol=0, atol=tolerance)


def test_probing_leaves_the_scheduler_untouched() -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, 4)
    probe_scheduler(scheduler)
    assert scheduler.step_index is None


def test_scheduler_that_draws_noise_is_refused_by_name() -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, 8, stochastic_sampling=True)
    with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler"):
        probe_scheduler(scheduler)


def test_scheduler_that_is_not_linear_is_refused_by_name() -> None:
    class ClippingScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(x.clamp(-3, 3) for x in super().step(*args, **kwargs))

    with pytest.raises(UnsupportedModelError, match="ClippingScheduler.*random tensors"):
        probe_scheduler(make(ClippingScheduler, 8))


def test_replay_of_euler_by_hand() -> None:
    coefficients = torch.tensor([[1, 0, 0, -0.5, 0, 0], [1, 0, 0, -0.5, 0, 0]]).double()
    table = SolverTable(coefficients=coefficients, sigmas=(1.0, 0.5, 0.0), source="Euler")
    values = torch.tensor([[10.0], [2.0], [4.0]]).double()
    assert replay(table, values).flatten().tolist() == [10.0, 9.0, 7.0]
