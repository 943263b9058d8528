"""Solver tables against the schedulers they were read from, and against closed forms."""

from typing import Any

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from ddit_rt.errors import ScheduleError, UnsupportedModelError
from ddit_rt.solver import SolverTable, falling, own_steps, probe_scheduler, replay, solver_of

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


def scheduled(kind: type, steps: int, *, dynamic: bool) -> Any:
    """A flow scheduler, shifted by a constant or by what a picture's size asks for."""
    if kind is FlowMatchHeunDiscreteScheduler:
        return make(kind, steps, shift=3.0)
    static = {"shift": 3.0} if kind is FlowMatchEulerDiscreteScheduler else FLOW
    scheduler = kind(**{**static, "use_dynamic_shifting": dynamic})
    scheduler.set_timesteps(steps, **({"mu": 0.83} if dynamic else {}))
    return scheduler


SOLVERS = [
    (FlowMatchEulerDiscreteScheduler, 5e-6),
    (UniPCMultistepScheduler, 1e-9),
    (DPMSolverMultistepScheduler, 5e-6),
    (DEISMultistepScheduler, 1e-9),
]
"""And how far each may be off after 50 steps: some round their samples to float32."""

SHIFTED = [(kind, dynamic, tolerance) for kind, tolerance in SOLVERS for dynamic in (False, True)]


def velocity_of(latents: torch.Tensor, timestep: Any) -> torch.Tensor:
    """A smooth model that is not linear."""
    return torch.sin(3 * latents) + latents.roll(1, -1) * (1 + float(timestep) / 1000)


def loop_of(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The loop of a diffusers pipeline."""
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        velocity = velocity_of(latents, timestep)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def loop_of_table(table: SolverTable, timesteps: Any, latents: torch.Tensor) -> torch.Tensor:
    """The same, step by step from the table."""
    history, velocities = [latents], []
    for row, timestep in zip(table.coefficients, timesteps, strict=True):
        velocities.insert(0, velocity_of(history[0], timestep))
        terms = [*zip(row[:3], history, strict=False), *zip(row[3:], velocities, strict=False)]
        history.insert(0, sum((a * x for a, x in terms), torch.zeros_like(latents)))
    return history[0]


@pytest.mark.parametrize("steps", [8, 28, 50])
@pytest.mark.parametrize(
    ("kind", "dynamic", "tolerance"), [*SHIFTED, (FlowMatchHeunDiscreteScheduler, False, 5e-6)]
)
def test_solver_equals_the_loop_of_diffusers(
    kind: type, dynamic: bool, tolerance: float, steps: int
) -> None:
    scheduler = scheduled(kind, steps, dynamic=dynamic)
    table = probe_scheduler(scheduler)
    latents = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1)).double()
    expected = loop_of(scheduler, latents)
    actual = loop_of_table(table, scheduler.timesteps, latents)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


def test_a_shift_of_the_latents_passes_through_every_table() -> None:
    """So differences of latents do not see it. Some schedulers round to float32."""
    for kind, _ in SOLVERS:
        coefficients = probe_scheduler(scheduled(kind, 8, dynamic=False)).coefficients
        shifted = coefficients[:, :3].sum(1)
        torch.testing.assert_close(shifted, torch.ones_like(shifted), rtol=0, atol=1e-4)


def test_heun_takes_two_steps_a_level() -> None:
    table = probe_scheduler(make(FlowMatchHeunDiscreteScheduler, 4, shift=3.0))
    assert table.steps == 7
    assert table.sigmas[1] == table.sigmas[2]
    # The corrector goes back to the latents before the predictor.
    assert table.coefficients[1, :3].tolist() == [0, 1, 0]


def test_probing_leaves_the_scheduler_untouched() -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, 4)
    probe_scheduler(scheduler)
    assert scheduler.step_index is None


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        (FlowMatchLCMScheduler, {}),
        (SASolverScheduler, FLOW),
        (DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_scheduler_that_draws_noise_is_refused_by_name(kind: type, config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} .*draws noise"):
        probe_scheduler(make(kind, 8, **config))


def test_levels_that_rise_are_read_as_ones_that_fall() -> None:
    plain, rising = (
        make(FlowMatchEulerDiscreteScheduler, 8, shift=3.0, invert_sigmas=inverted)
        for inverted in (False, True)
    )
    turned = falling(rising)
    torch.testing.assert_close(turned.sigmas, plain.sigmas)
    torch.testing.assert_close(turned.timesteps, plain.timesteps, rtol=0.0, atol=1e-3)
    assert (turned.config.invert_sigmas, rising.config.invert_sigmas) == (False, True)
    ours, theirs = probe_scheduler(turned), probe_scheduler(plain)
    torch.testing.assert_close(ours.coefficients, theirs.coefficients, rtol=0.0, atol=1e-6)
    sample, velocity = torch.full((1, 4), 0.7), torch.full((1, 4), 0.3)
    steps = [
        scheduler.step(sign * velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
        for scheduler, sign in ((rising, 1.0), (turned, -1.0))
    ]
    torch.testing.assert_close(*steps)
    assert falling(plain) is plain


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (UniPCMultistepScheduler, {}, "'epsilon', not for a velocity"),
        (UniPCMultistepScheduler, {"prediction_type": "flow_prediction"}, "not within"),
        (LCMScheduler, {}, "no noise levels"),
        (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}, "rise from noise"),
    ],
)
def test_scheduler_of_another_process_is_refused_by_name(
    kind: type, config: Any, reason: str
) -> None:
    scheduler = make(kind, 8, **config)
    for read in (probe_scheduler, solver_of, own_steps):
        with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} is no flow.*{reason}"):
            read(scheduler)


def test_a_scheduler_that_is_no_table_takes_its_own_steps() -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, 8, shift=3.0, stochastic_sampling=True)
    table, why = solver_of(scheduler)
    assert why.endswith("it draws noise in its steps")
    assert table.sigmas == tuple(scheduler.sigmas.tolist())
    values = torch.arange(9.0, dtype=torch.float64)[:, None]
    assert torch.equal(replay(table, values), values)  # z_{k+1} is what stands for v_k
    table, why = solver_of(make(FlowMatchEulerDiscreteScheduler, 8, shift=3.0))
    assert why == ""
    assert table.coefficients[:, 0].tolist() == [1] * 8


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


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"solver_type": "bh1"}, r"step 7 of 8 gives NaN .* with solver_type='bh1'.*'bh2'"),
        ({"lower_order_final": False}, "step 7 of 8 gives NaN .* with lower_order_final=False"),
        (
            {"solver_order": 3, "lower_order_final": False},
            "step 7 of 8 fails .*singular.* with low",
        ),
        ({"predict_x0": False}, "step 0 of 8 fails .* with predict_x0=False"),
        ({"solver_type": "bh1", "lower_order_final": False}, "step 7 of 8 gives NaN or infinity,"),
    ],
)
def test_steps_that_fail_or_are_not_finite_are_refused_with_the_option(
    config: dict[str, Any], reason: str
) -> None:
    error = ScheduleError if "NaN" in reason else UnsupportedModelError
    with pytest.raises(error, match=f"UniPCMultistepScheduler .*{reason}"):
        probe_scheduler(make(UniPCMultistepScheduler, 8, **FLOW, **config))


@pytest.mark.parametrize("place", [0, 4, 8])
@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_noise_levels_that_are_not_finite_are_refused_wherever_they_are(
    level: float, place: int
) -> None:
    scheduler = make(FlowMatchEulerDiscreteScheduler, 8)
    scheduler.sigmas[place] = level
    with pytest.raises(ScheduleError, match=f"its sigmas hold {level}"):
        probe_scheduler(scheduler)
