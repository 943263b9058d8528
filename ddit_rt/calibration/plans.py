"""The plans that a calibration tries: three families, each a set of templates with one dial.

A template fixes everything but one whole number, its level: cost and fidelity both fall as the
level rises. The dynamic family turns tau, the static one the number of coarse steps, and the third
takes steps away and stays fine: the rival that any cheaper plan has to beat.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy

FINE, STEPS, STATIC, DYNAMIC = "fine", "steps", "static", "dynamic"
_TAU_LEVELS = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One plan to measure.

    Attributes:
        kind: Its family: `"fine"`, `"steps"`, `"static"` or `"dynamic"`.
        label: The plan in a few words.
        policy: Which patch size each step takes.
        num_inference_steps: How many steps.
    """

    kind: str
    label: str
    policy: PatchPolicy
    num_inference_steps: int

    @property
    def key(self) -> str:
        """Equal for plans that do the same."""
        return json.dumps([self.policy.to_dict(), self.num_inference_steps], sort_keys=True)


def all_fine(steps: int) -> Candidate:
    """The reference of everything."""
    return Candidate(
        kind=FINE, label=f"{steps} fine steps", policy=FinePolicy(), num_inference_steps=steps
    )


class Template(ABC):
    """Plans of one shape, by level."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The highest level; the lowest is 0."""

    @abstractmethod
    def at(self, level: int) -> Candidate:
        """The plan of a level."""

    @abstractmethod
    def sizes(self, level: int) -> Mapping[str, int] | None:
        """How many steps run at each patch size; None where only a run can tell."""


Change = Callable[[Any], "Template | None"]
"""A variation of a template; None where it makes no sense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Templates that are searched together.

    Attributes:
        kind: As `Candidate.kind`.
        start: The first template.
        changes: Variations, likely ones first; each is tried on the best template so far.
    """

    kind: str
    start: Template
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FewerSteps(Template):
    """Level n is n steps fewer than the reference, all fine."""

    steps: int

    @property
    def levels(self) -> int:
        """One step is the least."""
        return self.steps - 1

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        return replace(all_fine(self.steps - level), kind=STEPS)

    def sizes(self, level: int) -> Mapping[str, int]:
        """See `Template.sizes`."""
        return {"p": self.steps - level}


@dataclass(frozen=True, kw_only=True, slots=True)
class Static(Template):
    """Level n runs the first n of the free steps coarse.

    Attributes:
        steps: Steps of the run.
        coarse: Coarse sizes, the first half of the coarse steps taking the first, and so on.
        head: First steps, which stay fine.
        tail: Last steps, which stay fine.
        refresh: Coarse steps between two fine ones; None for a block.
    """

    steps: int
    coarse: tuple[str, ...]
    head: int = 3
    tail: int = 2
    refresh: int | None = 3

    @property
    def levels(self) -> int:
        """All free steps."""
        return len(self._free())

    def _free(self) -> list[int]:
        period = self.steps if self.refresh is None else self.refresh
        return [
            step
            for step in range(self.head, self.steps - self.tail)
            if (step - self.head) % (period + 1) != period
        ]

    def _plan(self, level: int) -> list[str]:
        plan = ["p"] * self.steps
        for index, step in enumerate(self._free()[:level]):
            plan[step] = self.coarse[index * len(self.coarse) // level]
        return plan

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        shape = "in a block" if self.refresh is None else f"a fine one after {self.refresh}"
        label = f"static, {level} of {self.steps} steps at {'/'.join(self.coarse)}, {shape}"
        policy = StaticPolicy(self._plan(level))
        return Candidate(kind=STATIC, label=label, policy=policy, num_inference_steps=self.steps)

    def sizes(self, level: int) -> Mapping[str, int]:
        """See `Template.sizes`."""
        return Counter(self._plan(level))


@dataclass(frozen=True, kw_only=True, slots=True)
class Dynamic(Template):
    """Level n sets the n-th of many taus, evenly spaced on a log scale.

    Attributes:
        steps: Steps of the run.
        factors: Per coarse size, its tau over the level's; a size that is left out is not used.
        taus: Lowest and highest tau.
        policy: Everything else.
    """

    steps: int
    factors: tuple[tuple[str, float], ...]
    taus: tuple[float, float]
    policy: DDiTPolicy

    @property
    def levels(self) -> int:
        """A constant: a step of tau is a few per cent of a decade."""
        return _TAU_LEVELS

    def at(self, level: int) -> Candidate:
        """See `Template.at`."""
        low, high = self.taus
        tau = low * math.pow(high / low, level / _TAU_LEVELS)
        sizes = {size: float(f"{tau * factor:.4g}") for size, factor in self.factors}
        policy = replace(self.policy, tau=sizes)
        named = ", ".join(f"tau {size} {value:.2g}" for size, value in sizes.items())
        return Candidate(
            kind=DYNAMIC,
            label=f"dynamic, {self.steps} steps, {named}{_structure(policy)}",
            policy=policy,
            num_inference_steps=self.steps,
        )

    def sizes(self, level: int) -> None:
        """See `Template.sizes`."""
        del level


def _structure(policy: DDiTPolicy) -> str:
    """What else than tau makes a dynamic plan."""
    parts = [f"warm-up {policy.warmup_steps or policy.order} {policy.warmup}"]
    if policy.refresh is not None:
        parts.append(f"refresh {policy.refresh}")
    if policy.monotone:
        parts.append("monotone")
    if policy.dwell > 1:
        parts.append(f"dwell {policy.dwell}")
    return ", " + ", ".join([*parts, f"tail {policy.fine_tail}"])


def families(steps: int, coarse: tuple[str, ...], taus: tuple[float, float]) -> tuple[Family, ...]:
    """What is searched, for a number of steps.

    Args:
        steps: Steps of the reference.
        coarse: Coarse sizes that the model offers, ascending.
        taus: Range of tau.

    Returns:
        Fewer steps; and with a coarse size, and steps enough for one, static and dynamic plans.
    """
    found = [Family(kind=STEPS, start=FewerSteps(steps=steps))]
    if coarse and steps > 6:
        found += [_static_family(steps, coarse), _dynamic_family(steps, coarse, taus)]
    return tuple(found)


def _static_family(steps: int, coarse: tuple[str, ...]) -> Family:
    start = Static(steps=steps, coarse=coarse[-1:])
    orders = [coarse[:1], tuple(reversed(coarse))] if len(coarse) > 1 else []
    changes: list[Change] = [_set(coarse=order) for order in orders]
    changes += [_set(refresh=None, head=0), _fewer(0.75), _set(refresh=2), _set(tail=1)]
    changes += [_set(refresh=None), _fewer(0.75), _set(refresh=1), _set(head=1)]
    changes += [_set(refresh=5), _set(tail=4), _set(head=5)]
    return Family(kind=STATIC, start=start, changes=tuple(changes))


def _dynamic_family(steps: int, coarse: tuple[str, ...], taus: tuple[float, float]) -> Family:
    # A size of twice the side has about the half of the other's threshold at equal error.
    even = tuple((size, 0.5**index) for index, size in enumerate(coarse))
    start = Dynamic(steps=steps, factors=even, taus=taus, policy=DDiTPolicy(refresh=3))
    changes: list[Change] = [
        _structured(refresh=None),
        _structured(warmup="coarse"),
        _fewer(0.75),
        _structured(refresh=2),
        _structured(fine_tail=1),
    ]
    if len(coarse) > 1:
        changes += [_set(factors=even[:1]), _set(factors=tuple((size, 1.0) for size in coarse))]
    changes += [_fewer(0.75), _structured(refresh=1), _structured(refresh=5)]
    changes += [_structured(warmup_steps=5), _structured(dwell=3), _structured(fine_tail=4)]
    changes += [_structured(refresh=None, dwell=3, monotone=True)]
    return Family(kind=DYNAMIC, start=start, changes=tuple(changes))


def _set(**fields: Any) -> Change:
    return lambda template: replace(template, **fields)


def _structured(**fields: Any) -> Change:
    def change(template: Dynamic) -> Template | None:
        if template.policy.monotone:  # its refresh is None, and stays so
            return None
        return replace(template, policy=replace(template.policy, **fields))

    return change


def _fewer(share: float) -> Change:
    def change(template: Any) -> Template | None:
        steps = round(template.steps * share)
        return replace(template, steps=steps) if steps > 6 else None

    return change
