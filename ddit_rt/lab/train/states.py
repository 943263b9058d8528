"""Which states of which samples a step trains on.

Every draw is a function of (seed, step, part, process) alone. So a resumed run continues as the
unbroken one would have, and nothing but the step's number needs to be kept of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.lab.train.config import TrainConfig
from ddit_rt.lab.train.latent_cache import LatentCache
from ddit_rt.lab.train.velocities import Earlier, States

_MAX_RUN = 8
"""Longest run of coarse steps after one at p that is trained."""
_HELD = 16
"""Most rows that are kept for the probe; never more than an eighth."""
_STEP = (0.02, 0.06)
"""Distance of two noise levels in runs that are made up from images: 50 to 16 steps."""

MEAN, STD = 0.5, 1.0
"""Noise levels t in (0, 1] are sigmoid(MEAN + STD n): more of the noisy, early steps."""
UNIFORM_SHARE = 0.25
"""Share of them that is uniform instead."""
MINIMUM = 0.1
"""Least t that is trained: the last steps always run at p."""


class StateSource:
    """Draws batches from a cache."""

    def __init__(
        self, cache: LatentCache, config: TrainConfig, *, process: int = 0, processes: int = 1
    ) -> None:
        self._cache = cache
        self._config = config
        self._process = process
        self._processes = processes
        # Kept from training, so that the probe shows what is learnt and not what is remembered.
        held = _HELD if len(cache) >= 8 * _HELD else len(cache) // 8
        self._trained = len(cache) - held
        self._held = list(range(self._trained, len(cache))) or list(range(len(cache)))
        self._epoch: tuple[int, list[int]] | None = None
        self._sigmas = cache.sigmas
        if self._sigmas is not None and not bool((self._sigmas >= MINIMUM).any()):
            raise ValueError(
                f"the trajectories' noise levels {cache.index['sigmas']} are all below {MINIMUM}, "
                "the least that is trained; sample them with more steps"
            )

    def batch(self, step: int, part: int) -> States:
        """The states of one forward pass.

        Args:
            step: Optimizer step, from 0.
            part: Which forward pass of that step.
        """
        count = self._config.batch_size
        first = (step * self._config.accumulate + part) * self._processes + self._process
        rows = [self._row(first * count + offset) for offset in range(count)]
        return self._drawn(rows, step, part)

    def probe(self, size: int) -> States:
        """A batch for comparisons, the same at every time, of rows that are not trained on.

        A cache of fewer than eight rows has none to spare: there they are training rows.
        """
        rows = [self._held[index % len(self._held)] for index in range(size)]
        return self._drawn(rows, 2**31 - 1, 0)

    def _drawn(self, rows: list[int], *numbers: int) -> States:
        """States of some rows, drawn by numbers that tell this draw from every other."""
        words = np.random.SeedSequence([self._config.seed, self._process, *numbers])
        rng = torch.Generator().manual_seed(int(words.generate_state(1)[0]))
        draw = self._of_images if self._sigmas is None else self._of_trajectories
        return draw(rows, draw_levels(len(rows), rng), rng)

    def _row(self, position: int) -> int:
        """The cache's row at a place of the endless, freshly shuffled series."""
        epoch, place = divmod(position, self._trained)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = torch.Generator().manual_seed(self._config.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(self._trained, generator=rng).tolist()
        return self._epoch[1][place]

    def _follows(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which samples follow a step at p, and how many steps ago it was, from 1."""
        share = self._config.detail_share if self._config.variant == "snr" else 0.0
        follows = torch.rand(count, generator=rng) < share
        return follows, torch.randint(1, _MAX_RUN + 1, (count,), generator=rng)

    def _of_images(self, rows: list[int], levels: Tensor, rng: torch.Generator) -> States:
        clean = self._cache.values("latents", rows)
        noise = torch.randn(clean.shape, generator=rng)
        used, ago = self._follows(len(rows), rng)
        distance = _STEP[0] + (_STEP[1] - _STEP[0]) * torch.rand(len(rows), generator=rng)
        fine = levels + ago * distance
        used &= fine <= 1
        fine, first = (torch.where(used, t, levels) for t in (fine, levels + (ago - 1) * distance))

        def noisy(t: Tensor) -> Tensor:
            t = t[:, None, None, None]
            return (1 - t) * clean + t * noise

        earlier = Earlier(
            used=used,
            latents=noisy(fine),
            sigmas=fine,
            velocity=None,
            first_latents=None,
            first_sigmas=first,
        )
        return States(
            latents=noisy(levels),
            sigmas=levels,
            velocity=None,
            conditioning=self._cache.conditioning(rows),
            earlier=earlier if bool(used.any()) else None,
        )

    def _of_trajectories(self, rows: list[int], levels: Tensor, rng: torch.Generator) -> States:
        """The recorded step nearest to each level."""
        assert self._sigmas is not None
        allowed = self._sigmas[self._sigmas >= MINIMUM]
        step = (levels[:, None] - allowed).abs().argmin(1)
        used, ago = self._follows(len(rows), rng)
        used &= step >= ago
        fine = torch.where(used, step - ago, step)
        first = torch.where(used, fine + 1, step)
        values = self._cache.values
        earlier = Earlier(
            used=used,
            latents=values("latents", rows, fine.tolist()),
            sigmas=self._sigmas[fine],
            velocity=values("velocities", rows, fine.tolist()),
            first_latents=values("latents", rows, first.tolist()),
            first_sigmas=self._sigmas[first],
        )
        return States(
            latents=values("latents", rows, step.tolist()),
            sigmas=self._sigmas[step],
            velocity=values("velocities", rows, step.tolist()),
            conditioning=self._cache.conditioning(rows),
            earlier=earlier if bool(used.any()) else None,
        )


def draw_levels(count: int, rng: torch.Generator) -> Tensor:
    """Noise levels of a batch, `[count]`, in [MINIMUM, 1)."""
    normal = torch.sigmoid(MEAN + STD * torch.randn(count, generator=rng))
    uniform = torch.rand(count, generator=rng)
    chosen = torch.rand(count, generator=rng) < UNIFORM_SHARE
    return MINIMUM + (1 - MINIMUM) * torch.where(chosen, uniform, normal)


def to_device(states: States, device: torch.device) -> States:
    """The same states on a device."""

    def moved(value: Any) -> Any:
        tensors = {n: v.to(device) for n, v in vars(value).items() if isinstance(v, Tensor)}
        return replace(value, **tensors)

    conditioning = {name: value.to(device) for name, value in states.conditioning.items()}
    earlier = None if states.earlier is None else moved(states.earlier)
    on_device: States = replace(moved(states), conditioning=conditioning, earlier=earlier)
    return on_device
