"""Plans that name the patch size of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from ddit_rt import checks
from ddit_rt.policies.patch import (
    PatchPolicy,
    PolicyTable,
    Schedule,
    bucket_of,
    checked_share,
    fixed_table,
    parse_patch,
    patch_name,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinePolicy(PatchPolicy):
    """Every step at the base patch p: the unmodified model, and the baseline of every claim."""

    @property
    def sizes(self) -> frozenset[int]:
        """See `PatchPolicy.sizes`."""
        return frozenset((1,))

    def resolve(self, schedule: Schedule) -> PolicyTable:
        """See `PatchPolicy.resolve`."""
        return fixed_table(schedule, (0,) * schedule.steps, "fine policy")


@dataclass(frozen=True, slots=True)
class StaticPolicy(PatchPolicy):
    """A plan fixed before the run.

    Attributes:
        plan: One patch size per step (`["4p", "2p", "p", ...]`, multiples of p allowed), or
            shares of the steps in order, `"4p:0.2,2p:0.4,p"`; the last entry may leave its
            share out and takes the rest.
        fine_share: Share of the regions that stay at p in a coarse step, in [0, 1): a mixed step
            (`steps/mixed.py`), 0 for none.
    """

    plan: str | Sequence[str | int]
    _: KW_ONLY
    fine_share: float = 0.0

    def __post_init__(self) -> None:
        """Parses the plan once, so that a typing error shows where it was made."""
        checks.settle(self, fine_share=checked_share(self.fine_share))
        if not isinstance(self.plan, str):
            expected = 'one patch size per step, ["2p", "p"], or shares of the steps, "2p:0.5,p"'
            entries = checks.items("plan", self.plan, expected)
            if not entries:
                raise ValueError(checks.got("plan", self.plan, expected))
            multiples = [parse_patch(entry, f"plan[{at}]") for at, entry in enumerate(entries)]
            checks.settle(self, plan=tuple(map(patch_name, multiples)))
        if self.sizes == {1} and self.fine_share:
            raise ValueError(
                f"got fine_share={self.fine_share} for the plan {self.plan!r}, in which no step is "
                'coarse; add coarse steps, "2p:0.5,p", or leave the share out'
            )

    @property
    def sizes(self) -> frozenset[int]:
        """See `PatchPolicy.sizes`."""
        if isinstance(self.plan, str):
            return frozenset(multiple for multiple, _ in _parse_shares(self.plan))
        return frozenset(map(parse_patch, self.plan))

    def resolve(self, schedule: Schedule) -> PolicyTable:
        """See `PatchPolicy.resolve`."""
        if isinstance(self.plan, str):
            multiples = _spread(_parse_shares(self.plan), schedule.steps)
        else:
            multiples = [parse_patch(patch) for patch in self.plan]
        if len(multiples) != schedule.steps:
            raise ValueError(
                f"the static plan has {len(multiples)} entries and the run {schedule.steps} "
                'steps; give one entry per step, or shares such as "4p:0.2,2p:0.4,p"'
            )
        buckets = tuple(bucket_of(multiple, schedule.offered) for multiple in multiples)
        table = fixed_table(schedule, buckets, "static plan")
        return replace(table, fine_share=self.fine_share)


def _parse_shares(text: str) -> list[tuple[int, float | None]]:
    """`"4p:0.2,2p:0.4,p"` to `[(4, 0.2), (2, 0.4), (1, None)]`."""
    entries: list[tuple[int, float | None]] = []
    for part in text.split(","):
        name, colon, share = part.strip().partition(":")
        try:
            entries.append((parse_patch(name), float(share) if colon else None))
        except ValueError as error:
            raise ValueError(
                f"cannot read {part!r} in the plan {text!r} ({error}); write shares of the steps "
                'in order, such as "4p:0.2,2p:0.4,p"'
            ) from error
    shares = [share for _, share in entries if share is not None]
    open_entries = [index for index, (_, share) in enumerate(entries) if share is None]
    total = sum(shares)
    usable = all(0 <= share < math.inf for share in shares)
    if not usable or open_entries not in ([], [len(entries) - 1]):
        raise ValueError(
            f"the plan {text!r} needs finite shares >= 0, and only its last may be left out"
        )
    if total > 1 + 1e-9 or (not open_entries and abs(total - 1) > 1e-9):
        raise ValueError(f"the shares of the plan {text!r} add up to {total:g} instead of 1")
    return entries


def _spread(entries: list[tuple[int, float | None]], steps: int) -> list[int]:
    """Whole steps for every share, by rounding the cumulative shares."""
    plan: list[int] = []
    cumulative = 0.0
    for multiple, share in entries:
        cumulative = 1.0 if share is None else cumulative + share
        until = steps if share is None else math.floor(cumulative * steps + 0.5)
        plan.extend([multiple] * (until - len(plan)))
    return plan
