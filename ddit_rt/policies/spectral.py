"""Coarse steps until the noise lets through what they lack: SPEED's rule (arXiv 2605.18736).

The latents of a VAE have the power P(w) = A w^-b at the spatial frequency w, in cycles over the
shorter side, where the noise has 1. A coarse step at m times p knows frequencies up to W / m, W
being half the shorter side. In z = (1 - t) x0 + t n a frequency matters, to within the share d of
its power, once the noise level has fallen to

    t(w) = 1 / (1 + sqrt(d / (P (1 + P - d))))

So the steps above t(W / m) may run at m times p. All is known before the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ddit_rt import checks
from ddit_rt.policies.cache_fit import CacheFit
from ddit_rt.policies.patch import (
    PatchPolicy,
    PolicyTable,
    Schedule,
    fixed_table,
    parse_patch,
    patch_name,
)

_FLUX = (203.615097, 1.915461)
_WAN = (219.484718, 2.422687)
"""A and b as the repository of SPEED has them."""
_FLUX_VAE = ("FluxTransformer2DModel", "ChromaTransformer2DModel", "ZImageTransformer2DModel")
"""Transformers over FLUX.1's VAE."""


def published_spectrum(transformer_class: str, config: Mapping[str, Any]) -> CacheFit:
    """A and b that others have published for a model's VAE; FLUX.1's, where they have none.

    Args:
        transformer_class: Class name of the transformer.
        config: The model's configuration.
    """
    if transformer_class.startswith("Wan") and config.get("out_channels") == 16:
        return _spectrum(_WAN, "published for the VAE of Wan 2.1")
    source = "published for the VAE of FLUX.1"
    if transformer_class not in _FLUX_VAE:
        source += ", and not measured for this model's"
    return _spectrum(_FLUX, source)


def _spectrum(values: tuple[float, float], source: str) -> CacheFit:
    return CacheFit(kind="spectrum", values=values, source=source)


@dataclass(frozen=True, slots=True)
class SpectralPolicy(PatchPolicy):
    """A coarse beginning, whose length follows from the spectrum of the VAE's latents.

    The switch is the same for every prompt. Published settings of `delta`: 0.01, 0.02, 0.05, 0.1;
    of FLUX.1's 50 steps at 1024 x 1024 the first 18 are coarse with 0.01, and the first 28 with
    0.05. The levels are compared with those of the run, as the published code does. The last step
    runs at p.

    Attributes:
        delta: Share of a frequency's power that may be missed, between 0 and 1; larger is faster.
        amplitude: A; by default measured with `ddit-rt calibrate --spectrum`, else as published.
        decay: b, likewise; both or neither.
        coarsest: The coarsest size: `"2p"`, or `"4p"` to begin with that.
    """

    delta: float = 0.01
    _: KW_ONLY
    amplitude: float | None = None
    decay: float | None = None
    coarsest: str = "2p"

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        delta = checks.number("delta", self.delta, 0, open_low=True)
        if delta >= 1:
            raise ValueError(checks.got("delta", self.delta, "a number above 0 and below 1"))
        coarsest = parse_patch(self.coarsest, "coarsest")
        if coarsest == 1:
            raise ValueError(checks.got("coarsest", self.coarsest, 'a coarse size, such as "2p"'))
        amplitude, decay = (
            None if value is None else checks.number(name, value, 0, open_low=True)
            for name, value in (("amplitude", self.amplitude), ("decay", self.decay))
        )
        if (amplitude is None) != (decay is None):
            raise ValueError(
                f"got amplitude={self.amplitude}, decay={self.decay}; pass both, or neither for "
                "those that are known of the model"
            )
        checks.settle(
            self, delta=delta, amplitude=amplitude, decay=decay, coarsest=patch_name(coarsest)
        )

    @property
    def sizes(self) -> frozenset[int]:
        """See `PatchPolicy.sizes`."""
        return frozenset((parse_patch(self.coarsest),))

    def resolve(self, schedule: Schedule) -> PolicyTable:
        """See `PatchPolicy.resolve`; a size that the shape does not offer is left out."""
        (amplitude, decay), source = self._spectrum(schedule)
        coarsest = parse_patch(self.coarsest)
        levels = {
            bucket: self._level(schedule.highest / multiple, amplitude, decay)
            for bucket, multiple in enumerate(schedule.offered)
            if 1 < multiple <= coarsest
        }
        buckets = [
            max((bucket for bucket, level in levels.items() if sigma > level), default=0)
            for sigma in schedule.sigmas[:-1]
        ]
        if buckets:
            buckets[-1] = 0
        switches = ", ".join(
            f"{patch_name(schedule.offered[bucket])} above {level:.3f}"
            for bucket, level in sorted(levels.items(), reverse=True)
        )
        note = f"spectral policy, delta {self.delta:g}: {switches or 'no coarse size'}"
        label = "spectral policy"
        return fixed_table(schedule, tuple(buckets), label, note=f"{note}; spectrum {source}")

    def _spectrum(self, schedule: Schedule) -> tuple[tuple[float, float], str]:
        if self.amplitude is not None and self.decay is not None:
            return (self.amplitude, self.decay), "passed"
        fit = schedule.spectrum or _spectrum(_FLUX, "published for the VAE of FLUX.1")
        amplitude, decay = fit.values
        return (amplitude, decay), fit.source

    def _level(self, frequency: float, amplitude: float, decay: float) -> float:
        """t(w)."""
        power = amplitude * frequency**-decay
        return 1 / (1 + math.sqrt(self.delta / (power * (1 + power - self.delta))))
