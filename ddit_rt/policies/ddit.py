"""DDiT's rule, and what makes it the default at any number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ddit_rt import checks
from ddit_rt.policies.patch import (
    DYNAMIC,
    PatchPolicy,
    PolicyTable,
    Schedule,
    bucket_of,
    checked_share,
    parse_patch,
    patch_name,
)

_REFERENCE_STEP = 1 / 50
"""Mean sigma step of the paper's 50-step runs, at which its tau = 0.001 was chosen."""
_FEWEST = 4
"""Steps below which the default policy runs all at p."""


@dataclass(frozen=True, slots=True)
class DDiTPolicy(PatchPolicy):
    """The largest patch whose latent is still smooth, judged at every step (arXiv 2602.16968).

    At step k the `order`-th finite difference of the latest latents is cut into patches of each
    offered coarse size; the score of a size is the rho-quantile, over patches, of the standard
    deviation inside a patch (all pixels and channels, ddof = 1). The largest size whose score is
    below its tau is taken, else p. In a batch the finest need of any sample decides.

    The defaults depart from the paper in two ways. Steps at p are forced: the last ones, where
    coarse steps err most, and one after every few, against which the training-free coarse step
    corrects itself. And tau grows with the step, so that it means the same at 8 steps as at the
    paper's 50; where so few steps run that none is left to be judged (4 or 5), the second one runs
    at the finest coarse size. `DDiTPolicy.paper()` is the paper's rule, exactly. With adapters,
    where nothing needs correcting, `refresh=None, dwell=3, monotone=True` avoids that every change
    of size disturbs the third difference and so causes the next.

    Attributes:
        tau: Threshold, one for all sizes or one per size (`{"2p": 1e-3, "4p": 5e-4}`; a size
            that is left out is not offered).
        rho: Quantile over patches, in [0, 1].
        order: Order of the finite difference, 1 to 3; n needs n + 1 latents.
        warmup: Patch size of the first steps, which have no difference yet: `"fine"`, p (they fix
            the layout, and give the coarse steps something to correct themselves against; the
            paper is silent on the point); `"coarse"`, the coarsest offered size (cheapest, and it
            keeps the first differences small); or a size by name, `"2p"`.
        warmup_steps: The number of warm-up steps; by default `order`, the least possible.
        dwell: Steps that a size is kept before the scores may change it; 0 or 1 for none.
        monotone: Whether the scores may only ever go to finer sizes.
        refresh: Largest number of dynamic steps between two forced steps at p, by which the
            training-free coarse step corrects itself; None for no forced steps in between.
        fine_tail: Last steps that always run at p, where coarse steps err most.
        fine_share: Share of the regions that stay at p in a coarse step, in [0, 1): a mixed step
            (`steps/mixed.py`), 0 for none.
        criterion: `"normalised"`, tau times (mean sigma step / (1/50)) ** step_exponent, so that
            one tau serves several step counts and spacings; or `"raw"`, tau as it is.
        step_exponent: How the difference shrinks with the step size. On trained models between
            12 and 48 steps 1.2 to 1.6 was measured, far from the 3 of a smooth trajectory.
    """

    tau: float | Mapping[str, float] = 1e-3
    _: KW_ONLY
    rho: float = 0.4
    order: int = 3
    warmup: str = "fine"
    warmup_steps: int | None = None
    dwell: int = 0
    monotone: bool = False
    refresh: int | None = 4
    fine_tail: int = 2
    fine_share: float = 0.0
    criterion: str = "normalised"
    step_exponent: float = 1.4

    def __post_init__(self) -> None:
        """Checks every field; a message names the value and the range."""
        checks.settle(
            self,
            tau=_checked_tau(self.tau),
            rho=checks.number("rho", self.rho, 0, 1),
            order=checks.whole("order", self.order, 1, 3),
            warmup=_checked_warmup(self.warmup),
            dwell=checks.whole("dwell", self.dwell, 0),
            monotone=checks.flag("monotone", self.monotone),
            refresh=checks.optional(checks.whole, "refresh", self.refresh, 1),
            fine_tail=checks.whole("fine_tail", self.fine_tail, 0),
            fine_share=checked_share(self.fine_share),
            criterion=checks.choice("criterion", self.criterion, ("raw", "normalised")),
            step_exponent=checks.number("step_exponent", self.step_exponent, 0),
            warmup_steps=checks.optional(checks.whole, "warmup_steps", self.warmup_steps, 1),
        )
        if self.warmup_steps is not None and self.warmup_steps < self.order:
            raise ValueError(
                f"got warmup_steps={self.warmup_steps}; order {self.order} needs at least "
                f"{self.order}, the steps before {self.order + 1} latents exist"
            )
        if self.refresh is not None and self.monotone:
            raise ValueError(
                f"got refresh={self.refresh}, monotone=True; refresh needs monotone=False, since "
                "coarse steps follow fine ones; pass refresh=None for a monotone policy"
            )

    @classmethod
    def paper(cls, tau: float = 1e-3, rho: float = 0.4) -> DDiTPolicy:
        """The rule as published: no dwell, free to go coarser again, no forced tail, raw tau.

        The paper is silent on the steps before the third difference exists; they run at p.
        """
        return cls(tau, rho=rho, refresh=None, fine_tail=0, criterion="raw")

    @property
    def sizes(self) -> frozenset[int]:
        """See `PatchPolicy.sizes`."""
        named = [*self.tau] if isinstance(self.tau, Mapping) else []
        named += [self.warmup] * (self.warmup not in ("coarse", "fine"))
        return frozenset(map(parse_patch, named))

    def resolve(self, schedule: Schedule) -> PolicyTable:
        """See `PatchPolicy.resolve`."""
        steps = schedule.steps
        warm = min(steps, self.order if self.warmup_steps is None else self.warmup_steps)
        tail = min(steps, self.fine_tail)
        warm_bucket = self._warmup_bucket(schedule)
        forced = [warm_bucket if step < warm else DYNAMIC for step in range(steps)]
        labels = ["warm-up" if step < warm else "" for step in range(steps)]
        if self.refresh is not None:
            for step in range(warm + self.refresh, steps, self.refresh + 1):
                forced[step], labels[step] = 0, "refresh"
        for step in range(steps - tail, steps):
            forced[step], labels[step] = 0, "fine tail"
        if self._plans_blind(schedule, forced):
            usable = [index for index, tau in enumerate(self._taus(schedule), 1) if tau > 0]
            if usable:
                forced[1], labels[1] = usable[0], "too few steps to judge"
        return PolicyTable(
            forced=tuple(forced),
            labels=tuple(labels),
            thresholds=self._thresholds(schedule),
            order=self.order,
            quantile=self.rho,
            dwell=self.dwell,
            monotone=self.monotone,
            fine_share=self.fine_share,
        )

    def _plans_blind(self, schedule: Schedule, forced: Sequence[int]) -> bool:
        """Whether a coarse step is planned because the run has too few for a score.

        The second: it corrects itself against the first, and all the others follow it.
        """
        as_default = self.criterion == "normalised" and self.warmup == "fine"
        few = max(_FEWEST, self.fine_tail + 2) <= schedule.steps and DYNAMIC not in forced
        return as_default and self.warmup_steps is None and few

    def _warmup_bucket(self, schedule: Schedule) -> int:
        if self.warmup == "fine":
            return 0
        if self.warmup == "coarse":
            taus = self._taus(schedule)
            usable = [index for index, tau in enumerate(taus, start=1) if not math.isnan(tau)]
            return max(usable, default=0)
        return bucket_of(parse_patch(self.warmup), schedule.offered)

    def _taus(self, schedule: Schedule) -> tuple[float, ...]:
        """The threshold of each coarse size before it is normalised; NaN for one left out."""
        coarse = schedule.offered[1:]
        if isinstance(self.tau, Mapping):
            return tuple(self.tau.get(patch_name(multiple), math.nan) for multiple in coarse)
        return (float(self.tau),) * len(coarse)

    def _thresholds(self, schedule: Schedule) -> tuple[tuple[float, ...], ...]:
        """Threshold of each coarse bucket at every step."""
        taus, sigmas = self._taus(schedule), schedule.sigmas
        rows = [taus] * schedule.steps
        for step in range(self.order, schedule.steps if self.criterion == "normalised" else 0):
            mean_step = abs(sigmas[step - self.order] - sigmas[step]) / self.order
            scale = (mean_step / _REFERENCE_STEP) ** self.step_exponent
            rows[step] = tuple(tau * scale for tau in taus)
        return tuple(rows)


def _checked_tau(tau: Any) -> float | dict[str, float]:
    if not isinstance(tau, Mapping):
        return checks.number("tau", tau, 0)
    if not tau:
        raise ValueError(checks.got("tau", tau, 'a threshold for one size at least, {"2p": 1e-3}'))
    checked = {
        patch_name(parse_patch(size, "tau's size")): checks.number(f"tau[{size!r}]", value, 0)
        for size, value in tau.items()
    }
    if "p" in checked or len(checked) < len(tau):
        expected = "each coarse size once: p is what is left when no score is below its threshold"
        raise ValueError(checks.got("tau", tau, expected))
    return checked


def _checked_warmup(warmup: Any) -> str:
    if isinstance(warmup, str) and warmup in ("coarse", "fine"):
        return warmup
    return patch_name(parse_patch(warmup, "warmup"))
