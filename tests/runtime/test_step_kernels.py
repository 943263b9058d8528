"""The step loop's kernels, their own source on the CPU, against the CPU ops and plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from step_loop import (
    PAST,
    CpuRun,
    LoopPlan,
    RandomModel,
    StepLoop,
    euler,
    mixed_run,
    multistep,
    plan_of,
    run_cpu,
)
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Kernel and CPU op sum the same float32 values in different orders, which moves a deviation by a
# few units in the last place (6e-8 each).
AS_CPU = {"rtol": 2e-6, "atol": 0.0}


def run_emulated(loop: StepLoop, plan: LoopPlan, expected: CpuRun) -> list[Tensor]:
    """Runs the loop with the CPU run's velocities; returns the latents after every step."""
    start = expected.latents[0]
    latents = [start.clone()]

    def bucket(index: int) -> None:
        step = int(loop["state"][0])
        assert index == expected.buckets[step]
        if step > 0:
            latents.append(loop["latents"].clone())
        loop["velocity"].copy_(expected.velocities[step])

    loop.load(plan, start)
    loop.run_host(plan.steps, bucket)
    return [*latents, loop["latents"].clone()]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def check_history(loop: StepLoop, plan: LoopPlan, expected: CpuRun) -> None:
    """z[m] in slot m mod 3 and v[m] in slot m mod (D - 1), for the newest that they hold."""
    kept, steps = plan.velocity_slots - 1, plan.steps
    for m in range(max(0, steps - PAST), steps):
        assert_same_bits(loop["past"][m % PAST], expected.latents[m])
    for m in range(max(0, steps - kept), steps):
        assert_same_bits(loop["past_velocities"][m % kept], expected.velocities[m].float())


FLUX_LIKE = (1, 16, 1, 16, 24)
WAN_LIKE = (1, 6, 3, 12, 20)
SHAPES = [
    (FLUX_LIKE, (4, 8), 4),
    (WAN_LIKE, (4,), 4),
    ((2, 3, 2, 8, 72), (2, 4, 8), 4),  # more than two tiles of 32 columns
    ((1, 2, 1, 12, 36), (6,), 1),  # tiles of 30 columns, which 4 does not divide
    ((1, 3, 2, 6, 10), (2,), 1),
    ((2, 1, 1, 9, 33), (3,), 1),
    ((1, 1, 1, 48, 96), (48,), 4),  # base patches of 24
    ((1, 4, 1, 18, 20), (4, 8), 4),  # patches over the edges
    ((2, 3, 2, 17, 26), (4, 8), 1),
    ((1, 3, 1, 1, 44), (4, 8), 4),
    (FLUX_LIKE, (), 4),  # nothing to score: the flat kernel
    ((3, 1, 1, 5, 7), (), 1),
]


KINDS = [(1, torch.float32), (1, torch.bfloat16), (2, torch.float16), (3, torch.bfloat16)]
"""Velocities that the solver combines, and their type."""


@pytest.mark.parametrize(
    ("shape", "sizes", "width", "slots", "dtype"),
    [  # each of the few without sizes, and the others by turns
        (shape, sizes, width, *KINDS[(row + turn) % 4])
        for row, (shape, sizes, width) in enumerate(SHAPES)
        for turn in ((0, 2) if sizes else range(4))
    ],
)
def test_a_whole_run_has_the_bits_of_the_cpu_ops(
    runtime: ModuleType,
    shape: tuple[int, int, int, int, int],
    sizes: tuple[int, ...],
    width: int,
    slots: int,
    dtype: torch.dtype,
) -> None:
    steps = 6
    table = euler(steps) if slots == 1 else multistep(steps, slots)
    run = mixed_run(shape, steps, sizes=sizes, coefficients=table, dtype=dtype)
    plan, expected = run.plan, run.cpu
    loop = StepLoop(runtime, plan)
    latents = run_emulated(loop, plan, expected)
    for actual, wanted in zip(latents, expected.latents, strict=True):
        assert_same_bits(actual, wanted)
    check_history(loop, plan, expected)
    torch.testing.assert_close(loop.record(), expected.record, equal_nan=True, **AS_CPU)
    kernel = f"update{'' if sizes else '_flat'}<{str(dtype).removeprefix('torch.')}, {width}>"
    assert runtime.kernel_runs()[kernel] == steps


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_a_velocity(runtime: ModuleType, dtype: torch.dtype) -> None:
    """Signed zeros, subnormal numbers, infinities, NaN: all that 16 bits can hold."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype if dtype != torch.float32 else torch.bfloat16).to(dtype)
    shape = (1, 4, 1, 128, 128)
    plan = plan_of(shape, (), euler(1), dtype=dtype)
    start = torch.randn(shape)
    expected = run_cpu(plan, start, lambda *_: values.reshape(shape))
    loop = StepLoop(runtime, plan)
    latents = run_emulated(loop, plan, expected)
    torch.testing.assert_close(latents[1], expected.latents[1], rtol=0, atol=0, equal_nan=True)


def test_addresses_that_are_not_aligned_are_read_one_value_at_a_time(runtime: ModuleType) -> None:
    plan = plan_of(FLUX_LIKE, (4,), euler(4))
    whole = torch.empty(1 + math.prod(FLUX_LIKE))
    loop = StepLoop(runtime, plan, buffers={"velocity": whole[1:].view(FLUX_LIKE)})
    start = torch.randn(FLUX_LIKE)
    expected = run_cpu(plan, start, RandomModel(plan))
    assert_same_bits(run_emulated(loop, plan, expected)[-1], expected.latents[-1])
    assert runtime.kernel_runs()["update<float32, 1>"] == plan.steps


@pytest.mark.parametrize("sizes", [(), (4,)])
def test_terms_without_coefficient_are_not_read_and_minus_zero_survives(
    runtime: ModuleType, sizes: tuple[int, ...]
) -> None:
    """The buffers of past latents and velocities are full of NaN before the first step."""
    table = torch.tensor([[1.0, 0, 0, 1.0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1.0, 0, 0]])
    plan = plan_of((1, 2, 1, 4, 4), sizes, table, forced=[0, 0, 0])
    values = [-0.0, 1.0, -0.0]
    loop = StepLoop(runtime, plan)
    expected = run_cpu(
        plan, torch.full(plan.shape, -0.0), lambda k, *_: torch.full(plan.shape, values[k])
    )
    latents = run_emulated(loop, plan, expected)
    assert [bool(z.signbit().all()) for z in latents] == [True, True, False, True]
    assert all((z == 0).all() for z in latents)


def test_a_velocity_that_the_ring_is_too_short_for_shows(runtime: ModuleType) -> None:
    plan = plan_of((1, 2, 1, 4, 4), (), euler(2))
    loop = StepLoop(runtime, plan)
    wrong = replace(plan, coefficients=torch.tensor([[1.0, 0, 0, 1.0, 0.5, 0]] * 2))
    loop.load(wrong, torch.zeros(plan.shape))
    loop.run_host(2, lambda _: loop["velocity"].zero_())
    assert loop["latents"].isnan().all()
