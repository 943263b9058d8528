from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddit_rt.ops import solver_step_

SHAPE = (2, 4, 6, 10)


def rings(slots: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Rings full of NaN: whatever is read before it is written shows."""
    history = torch.full((4, *shape), math.nan)
    return history, torch.full((slots, *shape), math.nan)


def run(
    start: Tensor, velocities: list[Tensor], table: Tensor, slots: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Takes every step of the table and returns both rings and all latents."""
    history, ring = rings(slots, tuple(start.shape))
    history[0] = start
    latents = [start]
    for step, velocity in enumerate(velocities):
        solver_step_(history, ring, velocity, table, step)
        latents.append(history[-(step + 1) % 4].clone())
    return history, ring, latents


def reference(start: Tensor, velocities: list[Tensor], table: Tensor) -> list[Tensor]:
    z = [start.double()]
    v = [velocity.double() for velocity in velocities]
    for k, row in enumerate(table.double()):
        terms = [row[i] * z[k - i] for i in range(3) if row[i] != 0]
        terms += [row[3 + j] * v[k - j] for j in range(3) if row[3 + j] != 0]
        z.append(torch.stack(terms).sum(0))
    return z


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *[((1,), torch.float32), ((3, 7), torch.bfloat16), (SHAPE, torch.float16)],
        *[((1, 16, 64, 64), torch.bfloat16), ((1, 2, 3, 50, 50), torch.float32)],
    ],
)
def test_euler_has_the_bits_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    dt = -1.0 / 28
    table = torch.tensor([[1, 0, 0, dt, 0, 0]] * 6, dtype=torch.float64)
    velocities = [torch.randn(shape).to(dtype) for _ in range(6)]
    _, _, latents = run(torch.randn(shape), velocities, table, slots=0)
    for k, velocity in enumerate(velocities):
        assert torch.equal(latents[k + 1], latents[k] + dt * velocity.float())


def test_rings_hold_what_the_layout_says() -> None:
    table = torch.tensor([[1, 0, 0, 1, 0, 0]] * 7, dtype=torch.float64)
    velocities = [torch.full(SHAPE, float(2**k)) for k in range(7)]
    history, ring, latents = run(torch.zeros(SHAPE), velocities, table, slots=2)
    for k in range(4, 8):
        assert torch.equal(history[-k % 4], latents[k])
        assert (latents[k] == 2**k - 1).all()
    for k in range(5, 7):
        assert torch.equal(ring[k % 2], velocities[k])


def test_all_six_terms_worked_by_hand() -> None:
    table = torch.zeros(3, 6)
    table[:2, 0] = 1.0  # hold the latent for two steps
    table[2] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    velocities = [torch.full((1,), v) for v in (3.0, 5.0, 7.0)]
    _, _, latents = run(torch.full((1,), 10.0), velocities, table, slots=2)
    # z2 = z1 = z0 = 10: 10 * (1 + 2 + 4) + 8 * 7 + 16 * 5 + 32 * 3
    assert latents[3].item() == 70 + 56 + 80 + 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [0, 1, 2])
def test_multistep_equals_reference(dtype: torch.dtype, slots: int) -> None:
    table = torch.randn(9, 6, dtype=dtype) * 0.4
    for k in range(9):
        table[k, k + 1 : 3] = 0.0  # latents and velocities that do not exist yet
        table[k, 3 + min(slots + 1, k + 1) :] = 0.0
    velocities = [torch.randn(SHAPE) for _ in range(9)]
    start = torch.randn(SHAPE)
    _, _, latents = run(start, velocities, table, slots)
    expected = torch.stack(reference(start, velocities, table))
    # Seven roundings a step, carried through nine steps.
    torch.testing.assert_close(torch.stack(latents).double(), expected, rtol=1e-5, atol=1e-5)


def test_terms_with_coefficient_zero_are_not_read() -> None:
    history, ring = rings(2)
    history[0] = 1.0
    table = torch.tensor([[0.0, 0, 0, 0.0, 0, 0], [0, 0, 0, 2.0, 0, 0]])
    solver_step_(history, ring, torch.full(SHAPE, math.nan), table, 0)
    assert (history[3] == 0).all()
    solver_step_(history, ring, torch.ones(SHAPE), table, 1)
    assert (history[2] == 2).all()


def test_half_precision_velocities_are_taken_exactly() -> None:
    # Every float16 and bfloat16 there is, subnormal numbers, infinities and NaN included.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    table = torch.tensor([[0.0, 0, 0, 1, 0, 0]])
    for dtype in (torch.float16, torch.bfloat16):
        velocity = bits.view(dtype)
        history, ring = rings(1, tuple(velocity.shape))
        solver_step_(history, ring, velocity, table, 0)
        for taken in (ring[0], history[3]):
            torch.testing.assert_close(taken, velocity.float(), rtol=0, atol=0, equal_nan=True)


def test_refuses_a_coefficient_beyond_the_velocity_ring() -> None:
    history, ring = rings(0)
    with pytest.raises(RuntimeError, match=r"b1 is 0.5 but the velocity ring has only 0"):
        solver_step_(history, ring, torch.zeros(SHAPE), torch.tensor([[1.0, 0, 0, 1, 0.5, 0]]), 0)


@pytest.mark.parametrize(
    ("history", "velocities", "velocity", "table"),
    [
        ((3, *SHAPE), (1, *SHAPE), SHAPE, (5, 6)),
        ((4, *SHAPE), (3, *SHAPE), SHAPE, (5, 6)),
        ((4, *SHAPE), SHAPE, SHAPE, (5, 6)),
        ((4, *SHAPE), (1, *SHAPE), SHAPE[1:], (5, 6)),
        ((4, *SHAPE), (1, *SHAPE), SHAPE, (5, 4)),
    ],
)
def test_refuses_shapes_that_do_not_agree(
    history: tuple[int, ...],
    velocities: tuple[int, ...],
    velocity: tuple[int, ...],
    table: tuple[int, ...],
) -> None:
    tensors = [torch.zeros(shape) for shape in (history, velocities, velocity, table)]
    with pytest.raises(RuntimeError, match="solver_step_: "):
        solver_step_(tensors[0], tensors[1], tensors[2], tensors[3], 0)


def test_refuses_dtype_step_and_strides() -> None:
    history, ring = rings(1)
    velocity, table = torch.zeros(SHAPE), torch.zeros(5, 6)
    with pytest.raises(RuntimeError, match="history is BFloat16"):
        solver_step_(history.bfloat16(), ring, velocity, table, 0)
    with pytest.raises(RuntimeError, match="step 5, expected 0 to 4"):
        solver_step_(history, ring, velocity, table, 5)
    with pytest.raises(RuntimeError, match="a buffer of shape .* not contiguous"):
        solver_step_(history, ring.transpose(1, 2).contiguous().transpose(1, 2), velocity, table, 0)
