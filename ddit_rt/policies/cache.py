"""Step caches: which steps reuse what the blocks added before, instead of running them.

A step cache is a frozen description that a user writes down once. `StepCache.resolve` turns it,
for one model and number of steps, into a `CacheTable`. As in what is published, a step is a call of
the model, or with guidance of both passes: a Heun scheduler takes 2 N - 1 of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.ops import CacheGrowth
from ddit_rt.policies.cache_fit import CacheFit

_MAX_TERMS = 7

NO_LIMIT = 2**31 - 1
"""Steps in a row that may reuse, where nothing but the threshold ends them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTable:
    """A step cache, resolved for one model and schedule. `ops.decide_reuse_` gives its meaning.

    Attributes:
        increments: Per step what the accumulated change grows by; of `PRODUCT`, what its factor
            is multiplied by; NaN for a step that always computes.
        threshold: Below it a step reuses.
        limit: Steps in a row that may reuse.
        growth: How the accumulated change grows.
        coefficients: Coefficients of the polynomial of a signal's change, highest power first;
            empty: the increments do without a signal.
        power_exp: What the signal is: for an exponent, the latents, filtered for such a spectrum
            (`SeaCache`); None: the model's modulated input (`TeaCache`), or with `first_block` what
            its first block adds (`FirstBlockCache`).
        first_block: See `power_exp`.
        residual_order: Whether a step that reuses adds the latest residual (0), or extrapolates
            the latest two linearly in the noise level (1).
        note: For the trace: which cache, with whose fit.
    """

    increments: tuple[float, ...]
    threshold: float
    limit: int = NO_LIMIT
    growth: CacheGrowth = CacheGrowth.SUM
    coefficients: tuple[float, ...] = ()
    power_exp: float | None = None
    first_block: bool = False
    residual_order: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        """The first step has nothing to reuse."""
        assert not self.increments or math.isnan(self.increments[0]), "the first step computes"

    def signalled(self, step: int) -> bool:
        """Whether this step's decision needs the signal."""
        return bool(self.coefficients) and not math.isnan(self.increments[step])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Increments `[N]` and coefficients `[T]`, float32."""
        return (
            torch.tensor(self.increments, dtype=torch.float32, device="cpu"),
            torch.tensor(self.coefficients, dtype=torch.float32, device="cpu"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheModel:
    """What a step cache may know of a model and a run.

    Attributes:
        name: Name of the model, for messages.
        steps: Denoising steps, each a call of the model.
        fits: What was fitted for the model; of one kind, the first counts.
        time_changes: Relative change of the model's time signal at every step, `[N]`, of which the
            first is not used; takes whether the projected embedding is meant. None for a model
            whose signal depends on the latents.
    """

    name: str
    steps: int
    fits: tuple[CacheFit, ...]
    time_changes: Callable[[bool], Sequence[float]] | None

    def fit(self, kind: str) -> CacheFit:
        """The model's fit of a kind.

        Raises:
            ValueError: There is none.
        """
        for fit in self.fits:
            if fit.kind == kind:
                return fit
        cache = "magcache" if kind == "magcache" else "teacache"
        what = "ratios" if kind == "magcache" else "coefficients"
        field = "mag_ratios" if kind == "magcache" else "coefficients"
        have = f", only {[fit.kind for fit in self.fits]}" if self.fits else ""
        raise ValueError(
            f"there are no {kind} {what} for this {self.name}{have}, and those of another model "
            f"would skip the wrong steps; fit them with `ddit-rt calibrate ARTIFACT --model MODEL "
            f"--cache {cache}`, or pass {field}=(...)"
        )


class StepCache(ABC):
    """Interface of every step cache.

    Attributes:
        of_one_model: Whether it goes by what is one model's, as by what was fitted for it.
    """

    of_one_model: ClassVar[bool] = False

    @abstractmethod
    def resolve(self, model: CacheModel) -> CacheTable | None:
        """The cache as plain data for one model and schedule; None: every step computes.

        Raises:
            ValueError: Nothing was fitted for this model, or the cache does not suit it.
        """

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `step_cache_from_dict` is the inverse."""
        return {"step_cache": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoCache(StepCache):
    """Every step computes, whatever the artifact's default is."""

    def resolve(self, model: CacheModel) -> None:
        """See `StepCache.resolve`."""
        del model


@dataclass(frozen=True, slots=True)
class TeaCache(StepCache):
    """Reuses while the model's modulated input has changed little (arXiv 2411.19108).

    At each step the relative L1 change of the input of the first block since the step before (for
    Wan: of its time embedding, so that the steps are known beforehand), rescaled by a polynomial
    that was fitted for the model, is added up. While the sum is below the threshold, the step
    reuses what the blocks added at the latest computed step. Published thresholds: FLUX.1-dev
    0.25, 0.4, 0.6, 0.8; Wan 2.1 1.3B 0.05, 0.07, 0.08, with `use_ret_steps` 0.05, 0.1.

    Attributes:
        threshold: Larger is faster and less faithful; 0 reuses nothing.
        coefficients: Polynomial coefficients, highest power first; by default those fitted
            for the model.
        first: First steps that always compute; by default 1, with `use_ret_steps` 5.
        last: Last steps that always compute; by default 1, with `use_ret_steps` none.
        use_ret_steps: Whether the signal is Wan's projected time embedding.
        residual_order: 0, as published: a step adds the latest residual. 1: it extrapolates the
            latest two linearly in the noise level; while only one was computed at its patch size
            since that changed, it adds that one.
    """

    of_one_model = True

    threshold: float
    _: KW_ONLY
    coefficients: Sequence[float] | None = None
    first: int | None = None
    last: int | None = None
    use_ret_steps: bool = False
    residual_order: int = 0

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        values = checks.optional(checks.numbers, "coefficients", self.coefficients)
        if values is not None and len(values) > _MAX_TERMS:
            raise ValueError(f"got {len(values)} coefficients; at most {_MAX_TERMS} are taken")
        checks.settle(
            self,
            threshold=checks.number("threshold", self.threshold, 0),
            coefficients=values,
            first=checks.optional(checks.whole, "first", self.first, 1),
            last=checks.optional(checks.whole, "last", self.last, 0),
            use_ret_steps=checks.flag("use_ret_steps", self.use_ret_steps),
            residual_order=checked_order(self.residual_order),
        )

    def resolve(self, model: CacheModel) -> CacheTable:
        """See `StepCache.resolve`."""
        if self.use_ret_steps and model.time_changes is None:
            raise ValueError(
                f"got use_ret_steps=True for a {model.name}; it belongs to models whose signal is "
                "their time embedding (Wan): leave it out"
            )
        coefficients, source = self.coefficients, "coefficients passed"
        if coefficients is None:
            fit = model.fit("teacache-ret" if self.use_ret_steps else "teacache")
            coefficients, source = fit.values, f"coefficients {fit.source}"
        coefficients = tuple(coefficients)
        forced = self._forced(model.steps)
        if model.time_changes is None:
            increments = tuple(math.nan if at else 0.0 for at in forced)
        else:
            changes = np.asarray(model.time_changes(self.use_ret_steps), dtype=np.float64)
            values = np.polyval(coefficients, changes)
            increments = tuple(
                math.nan if at else float(value) for at, value in zip(forced, values, strict=True)
            )
            coefficients = ()
        return CacheTable(
            increments=increments,
            threshold=self.threshold,
            coefficients=coefficients,
            residual_order=self.residual_order,
            note=f"TeaCache {self.threshold:g}, {source}{order_note(self.residual_order)}",
        )

    def _forced(self, steps: int) -> list[bool]:
        first = (5 if self.use_ret_steps else 1) if self.first is None else self.first
        last = (0 if self.use_ret_steps else 1) if self.last is None else self.last
        return [step < first or step >= steps - last for step in range(steps)]


@dataclass(frozen=True, slots=True)
class MagCache(StepCache):
    """Reuses while the size of what the blocks add has changed little (arXiv 2506.09045).

    The error of a reuse is |1 - p|, with p the product, since the latest computed step, of the
    ratios by which the residual's magnitude changes from step to step, measured beforehand. A step
    reuses while the errors add up to at most the threshold. Fields as in diffusers'
    `MagCacheConfig`.

    Attributes:
        threshold: Larger is faster and less faithful.
        max_skip_steps: Steps in a row that may reuse.
        retention_ratio: Share of the steps, from the first, that always compute.
        mag_ratios: One ratio per step, the first being 1; for another number of steps the nearest
            are taken. By default those that were fitted for the model.
        residual_order: As in `TeaCache`.
    """

    of_one_model = True

    threshold: float = 0.06
    _: KW_ONLY
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    mag_ratios: Sequence[float] | None = None
    residual_order: int = 0

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        checks.settle(
            self,
            threshold=checks.number("threshold", self.threshold, 0),
            max_skip_steps=checks.whole("max_skip_steps", self.max_skip_steps, 1, NO_LIMIT),
            retention_ratio=checks.number("retention_ratio", self.retention_ratio, 0, 1),
            mag_ratios=checks.optional(checks.numbers, "mag_ratios", self.mag_ratios),
            residual_order=checked_order(self.residual_order),
        )

    def resolve(self, model: CacheModel) -> CacheTable:
        """See `StepCache.resolve`."""
        ratios, source = self.mag_ratios, "ratios passed"
        if ratios is None:
            fit = model.fit("magcache")
            ratios, source = fit.values, f"ratios {fit.source}"
        retained = max(1, int(self.retention_ratio * model.steps + 0.5))
        increments = tuple(
            math.nan if step < retained else ratio
            for step, ratio in enumerate(nearest_ratios(ratios, model.steps))
        )
        return CacheTable(
            increments=increments,
            threshold=reached(self.threshold),
            limit=self.max_skip_steps,
            growth=CacheGrowth.PRODUCT,
            residual_order=self.residual_order,
            note=f"MagCache {self.threshold:g}, {source}{order_note(self.residual_order)}",
        )


def nearest_ratios(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Ratios for another number of steps, as diffusers' `nearest_interp` takes them."""
    if len(ratios) == steps:
        return tuple(ratios)
    if steps == 1:
        return (ratios[-1],)
    scale = np.float32((len(ratios) - 1) / (steps - 1))
    places = np.rint(np.arange(steps, dtype=np.float32) * scale).astype(int)
    return tuple(ratios[place] for place in places)


def reached(threshold: float) -> float:
    """A table's threshold for a cache that reuses at its own too: the least float32 above it."""
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))


def checked_order(order: Any) -> int:
    """A `residual_order`."""
    return checks.whole("residual_order", order, 0, 1)


def order_note(order: int) -> str:
    """What a trace adds of a `residual_order`."""
    return ", residuals extrapolated" * order
