"""One step of a linear multistep flow solver, fused."""

from __future__ import annotations

import torch
from torch import Tensor


def solver_step_(
    history: Tensor, velocities: Tensor, velocity: Tensor, coefficients: Tensor, step: int
) -> None:
    """Takes one solver step in place: writes the next latent, stores the velocity.

    `z[k+1] = a0 z[k] + a1 z[k-1] + a2 z[k-2] + b0 v[k] + b1 v[k-1] + b2 v[k-2]`, summed from left
    to right in float32. Coefficients are rounded to float32 first and no multiply-add is fused, so
    an Euler step (`a = (1, 0, 0)`, `b = (dt, 0, 0)`) has the bits of `z + dt * v` in torch. A term
    whose coefficient is 0 is not read, so a ring need not be initialised.

    Args:
        history: Ring of latents `[4, B, ...]`, float32; `z[k]` is in slot `-k mod 4`. The slot of
            `z[k+1]`, which held `z[k-3]`, is written.
        velocities: Ring of the D velocities before `v[k]`, `[D, B, ...]`, D = 0 to 2, float32;
            `v[m]` is in slot `m mod D`. `v[k]` is written over `v[k-D]`, after that is read.
        velocity: `v[k]`, `[B, ...]`, float32, bfloat16 or float16.
        coefficients: `[N, 6]`, float64 or float32: a row (a0, a1, a2, b0, b1, b2) per step. A
            `b` beyond D must be 0.
        step: k, the row of the table.

    Raises:
        RuntimeError: Rings and velocity whose shapes do not agree, another dtype, a buffer that is
            not contiguous, a step outside the table.
    """
    torch.ops.ddit_rt.solver_step_(
        history, velocities, velocity.contiguous(), coefficients.contiguous(), step
    )
