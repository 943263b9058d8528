"""Latents of a pipeline's own loop, as exact as the patch scheduler compares them.

Its third difference multiplies rounding: bfloat16 latents of order 1 score 0.0035 for that alone,
where a usual threshold is 0.001. Where the pipeline keeps its latents in float32 and rounds them
for the transformer (Wan with UniPC), they are taken before they are rounded. Where it keeps them in
the model's dtype (FLUX, Euler's steps), latents are followed beside it in float32,

    exact_{k+1} = the solver's table of exact latents and velocities + what a callback changed

which may drift from the pipeline's own by its rounding; a difference does not see that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddit_rt.models import Family
from ddit_rt.solver import SolverTable

_TERMS = 3
_FULL = (torch.float32, torch.float64)


class SeenLatents:
    """What enters the history of one run.

    Attributes:
        rounded: Whether latents entered rounded that no table could follow.
        latest: What the pipeline goes on from, in its layout; at the end the final latents.
    """

    def __init__(
        self,
        family: Family,
        shape: tuple[int, ...],
        table: SolverTable | None,
        scales: Sequence[float],
    ) -> None:
        """Begins a run.

        Args:
            family: The pipeline's.
            shape: Shape of the latents.
            table: The scheduler's; None where there is none.
            scales: Scale of classifier-free guidance at every step, as the pipeline joins two
                velocities; not read without a second.
        """
        self.rounded = False
        self.latest: Tensor | None = None
        self._family = family
        self._shape = shape
        self._table: list[list[float]] = [] if table is None else table.coefficients.tolist()
        self._scales = scales
        self._full: Tensor | None = None
        self._given: Tensor | None = None
        self._exact: list[Tensor] = []
        self._velocities: list[Tensor] = []
        self._step = 0

    def returned(self, latents: Tensor) -> None:
        """Notes the latents that the pipeline goes on from, in its layout."""
        self.latest = latents
        self._full = latents if latents.dtype in _FULL else None

    def entry(self, given: Tensor) -> Tensor:
        """z_k for the history, `[B, C, H, W]` or `[B, C, F, H, W]`, float32.

        Args:
            given: z_k as the transformer is given them, of the same shape.
        """
        latents = given.float() if self._full is None else self.unpacked(self._full)
        if self._full is None and self._given is not None:
            # What the scheduler gave and the transformer got differ by what a callback changed.
            latents = self._exact[0] + (latents - self._given)
        if self._table:
            self._exact[:1] = [latents]
        return latents.contiguous()

    def stepped(self, latents: Tensor, velocities: Sequence[Tensor]) -> None:
        """Follows a step of the scheduler.

        Args:
            latents: What it gave, in the pipeline's layout.
            velocities: Velocities of the step's passes in that layout; the prompt's comes first.
        """
        self._given = None
        if not self._table:
            self.rounded |= latents.dtype not in _FULL
            return
        exact = latents
        if latents.dtype not in _FULL:
            exact, self._given = self._follow(velocities), self.unpacked(latents)
        self._exact = [exact, *self._exact][:_TERMS]
        self._step += 1

    def _follow(self, velocities: Sequence[Tensor]) -> Tensor:
        """The solver's step in float32."""
        prompt, *negative = map(self.unpacked, velocities)
        for other in negative:
            prompt = other + self._scales[self._step] * (prompt - other)
        self._velocities = [prompt, *self._velocities][:_TERMS]
        row = self._table[self._step]
        terms = [
            *zip(row[:_TERMS], self._exact, strict=False),
            *zip(row[_TERMS:], self._velocities, strict=False),
        ]
        return sum((factor * tensor for factor, tensor in terms), torch.zeros_like(prompt))

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents of the pipeline's layout as `[B, C, H, W]` or `[B, C, F, H, W]`, float32."""
        return self._family.unpack_latents(latents, self._shape).float().contiguous()
