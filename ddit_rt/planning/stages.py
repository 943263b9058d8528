"""Stages of a run: steps that run the model in the same way, as is known before the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddit_rt.policies import DYNAMIC, PolicyTable, ResolvedCache


@dataclass(frozen=True, order=True, slots=True)
class Stage:
    """How the steps of a stage run the model.

    Attributes:
        expert: Place of the model among the engine's.
        unguided: Whether a run with guidance is not guided there.
    """

    expert: int
    unguided: bool

    @property
    def name(self) -> str:
        """What sets it apart; empty for the first expert, guided where the run is."""
        parts = [f"expert {self.expert + 1}"] * (self.expert > 0) + ["unguided"] * self.unguided
        return ", ".join(parts)


def stages_of(
    experts: Sequence[int], guided: Sequence[bool]
) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """The stages of a run, in an order that does not depend on when they come, and each step's.

    Args:
        experts: Expert of every step, `[N]`.
        guided: Whether a step is guided where the run is, `[N]`.
    """
    steps = [Stage(expert, not on) for expert, on in zip(experts, guided, strict=True)]
    stages = tuple(sorted(set(steps)))
    return stages, tuple(map(stages.index, steps))


def stage_notes(stages: Sequence[Stage], stage_of: Sequence[int]) -> tuple[str, ...]:
    """For the trace: which steps run the model in another than the usual way."""
    runs = [
        (name, [step for step, _ in steps])
        for name, steps in itertools.groupby(
            enumerate(stage_of), key=lambda entry: stages[entry[1]].name
        )
    ]
    return tuple(f"steps {steps[0]} to {steps[-1]}: {name}" for name, steps in runs if name)


def fine_at_switches(table: PolicyTable, experts: Sequence[int]) -> PolicyTable:
    """Lets no score choose a coarse size for the first step of an expert that takes over.

    What coarse steps build on, the clean estimate of a step at p, is then its own.
    """
    forced, labels = list(table.forced), list(table.labels)
    for step in _changes(experts):
        if forced[step] == DYNAMIC:
            forced[step], labels[step] = 0, "first step of an expert"
    return replace(table, forced=tuple(forced), labels=tuple(labels))


def computed_at_changes(cache: ResolvedCache, stages: Sequence[int]) -> ResolvedCache:
    """Makes the first step of every stretch of a stage compute: there is nothing to reuse."""
    increments = list(cache.table.increments)
    for step in _changes(stages):
        increments[step] = float("nan")
    return replace(cache, table=replace(cache.table, increments=tuple(increments)))


def _changes(values: Sequence[int]) -> list[int]:
    return [step for step in range(1, len(values)) if values[step] != values[step - 1]]
