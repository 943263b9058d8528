"""The plans that `bench_mixed.py` compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mixed_regions import Subject, deviations
from mixed_steps import FINE, SIGNALS, VALUES, Run, Step

from ddit_rt.lab.plans.genome import Static
from ddit_rt.policies import DDiTPolicy, PolicyTable
from ddit_rt.policies.patch import Schedule

FEWER, STATIC, DYNAMIC, MIXED, CONTROL, ORACLE = (
    "fewer_steps",
    "static",
    "dynamic",
    "mixed",
    "control",
    "oracle",
)
FINE_PLAN = "fine"
SHARES = (0.5, 0.25)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to make pictures.

    Attributes:
        name: Identifier within a section.
        label: Name for people.
        kind: `FEWER`, `STATIC`, `DYNAMIC`, `MIXED`; `CONTROL` and `ORACLE` are mixed plans whose
            regions nothing picks, and what no plan can know.
        steps: Denoising steps.
        how: How each is taken; empty for a dynamic plan.
        policy: Of a dynamic plan.
    """

    name: str
    label: str
    kind: str
    steps: int
    how: tuple[Step, ...] = ()
    policy: DDiTPolicy | None = None

    def to_dict(self) -> dict[str, Any]:
        """What it does, JSON-ready; steps of one kind are counted."""
        mixed = next((step for step in self.how if step.share), None)
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            "steps": self.steps,
            "policy": None if self.policy is None else self.policy.to_dict(),
            "signal": None if mixed is None else mixed.signal,
            "value": None if mixed is None else mixed.value,
            "corrected": None if mixed is None else mixed.corrected,
        }


class Choice:
    """Which step a dynamic plan takes next, by the rule of its policy.

    The coarsest size is taken of which the rho-quantile of its patches' deviations is below tau.
    """

    def __init__(self, plan: Plan, subject: Subject, sigmas: torch.Tensor) -> None:
        """Of a plan at one size."""
        assert plan.policy is not None, "of a dynamic plan"
        schedule = Schedule(sigmas=tuple(sigmas.tolist()), offered=(1, 2, 4), size=subject.size)
        self._table: PolicyTable = plan.policy.resolve(schedule)
        self._plan, self._subject = plan, subject

    def __call__(self, run: Run, index: int) -> Step:
        """How step `index` is taken."""
        if not self._table.scored(index):
            return FINE if not self._table.forced[index] else Step(multiple=2)
        for multiple, tau in reversed(
            list(zip((2, 4), self._table.thresholds[index], strict=True))
        ):
            spread = deviations(self._subject.regions(multiple), run.latents)
            if float(spread.quantile(self._table.quantile)) < tau:
                return Step(multiple=multiple)
        return FINE


def pattern(steps: int, static: Static, coarse: Step, *, between: Step = FINE) -> tuple[Step, ...]:
    """A static plan of one kind of coarse step; `between` stands where it comes back to p."""
    names = static.plan(steps)
    middle = range(static.head, steps - static.tail)
    return tuple(
        FINE if step not in middle else coarse if name != "p" else between
        for step, name in enumerate(names)
    )


def refreshed(steps: int, sizes: Sequence[str], refresh: int | None) -> Static:
    """As many coarse steps as fit."""
    static = Static(count=1, sizes=tuple(sizes), refresh=refresh)
    return replace(static, count=len(static.free(steps)))


def all_plans(steps: int, quick: bool = False) -> list[Plan]:
    """Everything that a section compares, full resolution first."""
    whole = Plan(
        name=FINE_PLAN, label="full resolution", kind=FINE_PLAN, steps=steps, how=(FINE,) * steps
    )
    plans = [whole, *_fewer(steps), *_static(steps), *_dynamic(steps), *_mixed(steps)]
    if not quick:
        return plans
    kept = {FINE_PLAN, f"fewer_{steps // 2}", "static_2p_1", "ddit_0.004", "every_50"}
    kept |= {f"mixed_50_{name}" for name in SIGNALS} | {f"as_is_50_{name}" for name in VALUES}
    return [plan for plan in plans if plan.name in kept]


def _fewer(steps: int) -> list[Plan]:
    counts = sorted({round(steps * share) for share in _STEP_SHARES}, reverse=True)
    return [
        Plan(
            name=f"fewer_{count}",
            label=f"{count} steps at full resolution",
            kind=FEWER,
            steps=count,
            how=(FINE,) * count,
        )
        for count in counts
    ]


_STEP_SHARES = (0.84, 0.75, 0.67, 0.59, 0.5, 0.42, 0.34, 0.25)


def _static(steps: int) -> list[Plan]:
    plans = []
    for multiple in (2, 4):
        size, step = f"{multiple}p", Step(multiple=multiple)

        def add(name: str, label: str, static: Static, step: Step = step) -> None:
            how = pattern(steps, static, step)
            plans.append(Plan(name=name, label=label, kind=STATIC, steps=steps, how=how))

        for refresh in (1, 3):
            static = refreshed(steps, [size], refresh)
            add(f"static_{size}_{refresh}", f"static, {static}", static)
        for share in (0.25, 0.5):
            count = round(share * steps)
            static = Static(count=count, sizes=(size,), head=0, tail=0, refresh=None)
            label = f"static, the first {count} at {size}"
            add(f"static_{size}_start_{share:g}", label, static)
    return plans


def _dynamic(steps: int) -> list[Plan]:
    return [
        Plan(
            name=f"ddit_{tau:g}",
            label=f"DDiT, tau {tau:g}",
            kind=DYNAMIC,
            steps=steps,
            policy=DDiTPolicy(tau={"2p": tau, "4p": tau / 2}, criterion="raw"),
        )
        for tau in _TAUS
    ]


_TAUS = (1e-3, 2e-3, 4e-3, 1e-2)


def _mixed(steps: int) -> list[Plan]:
    """One step at p after three; regions by every signal, and every value of the others."""
    plans = []
    static = refreshed(steps, ["2p"], 3)
    for share in SHARES:
        percent = f"{100 * share:.0f}"
        for signal in SIGNALS:
            step = Step(multiple=2, share=share, signal=signal)
            text = f"mixed {share:.0%}, regions by {_SIGNAL_LABELS[signal]}"
            name, kind = f"mixed_{percent}_{signal}", _KINDS.get(signal, MIXED)
            plans.append(_of(name, text, kind, steps, static, step))
        for value in VALUES:
            for corrected in (True, False):
                step = Step(multiple=2, share=share, value=value, corrected=corrected)
                if step == Step(multiple=2, share=share):
                    continue  # stands above
                name = f"{'value' if corrected else 'as_is'}_{percent}_{value}"
                text = f"mixed {share:.0%}, {value}{'' if corrected else ', not corrected'}"
                plans.append(_of(name, text, MIXED, steps, static, step))
        step, block = Step(multiple=2, share=share), refreshed(steps, ["2p"], None)
        text = f"mixed {share:.0%} at every step from the 4th"
        plans.append(_of(f"every_{percent}", text, MIXED, steps, block, step))
    step = Step(multiple=2, value="anchor")
    return [*plans, _of("anchors", "one token in four, anchor", MIXED, steps, static, step)]


def _of(name: str, label: str, kind: str, steps: int, static: Static, step: Step) -> Plan:
    how = pattern(steps, static, step)
    return Plan(name=name, label=label, kind=kind, steps=steps, how=how)


_KINDS: Mapping[str, str] = {"random": CONTROL, "rotating": CONTROL, "oracle": ORACLE}
_SIGNAL_LABELS = {
    "third_difference": "third difference",
    "energy": "detail of x0",
    "change": "change of x0",
    "rotating": "turns",
    "random": "chance",
    "oracle": "oracle",
}
