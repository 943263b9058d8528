"""The cheapest plan of each kind at a given closeness, found by running plans on a few prompts.

A dial is turned by bisection to the highest level that is still close enough. Two dials together:
for several taus, none of which is too coarse by itself, the threshold is turned in the same way.
What a plan costs is read from a table of measured step times, so that the search does not follow
the noise of a clock; the plans that it finds are timed afterwards.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from skip_models import SkipModel
from skip_plans import COMBINED, CacheDial, Dial, SkipPlan, fine

from ddit_rt.lab.measure.timing import Batch, Generation, Method, Pixels, engine_method
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.loop import RunTrace
from ddit_rt.policies import DDiTPolicy, NoCache, StaticPolicy, StepCache

Costs = dict[str, dict[str, dict[str, float]]]
"""Milliseconds of a step by class of its step cache, then `"computed"` or `"reused"`, then size."""

COMPUTED, REUSED = "computed", "reused"
_NO_SCORES = (1e-5, 1e-1)


def contender(name: str, engine: Any, model: SkipModel, plan: SkipPlan) -> Method:
    """A plan on an engine."""
    return engine_method(
        name,
        plan.label,
        engine,
        patch_policy=plan.policy,
        num_inference_steps=plan.steps,
        step_cache=plan.cache,
        **model.arguments,
    )


def batch(prompt: Prompt) -> Batch:
    """One prompt as a call of its own: a batch would share its decisions."""
    return Batch(prompts=(prompt.text,), seeds=(prompt.seed,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What a plan came to, means over the search prompts.

    Attributes:
        plan: The plan.
        ssim: To the all-fine pictures.
        cost_ms: Of the loop, by the table.
        coarse: Share of the steps at a coarse size.
        reused: Share of the steps that reused.
    """

    plan: SkipPlan
    ssim: float
    cost_ms: float
    coarse: float
    reused: float


@dataclass(kw_only=True)
class Search:
    """Runs plans on the search prompts, each once.

    Attributes:
        engine: A compiled pipeline.
        model: What it draws.
        prompts: The search prompts.
        steps: Steps of the all-fine reference.
        costs: Of `step_costs`.
    """

    engine: Any
    model: SkipModel
    prompts: tuple[Prompt, ...]
    steps: int
    costs: Costs
    tried: dict[str, Tried] = field(default_factory=dict)
    _references: list[Pixels] = field(default_factory=list)

    def run(self, plan: SkipPlan) -> Tried:
        """A plan's closeness and cost."""
        if not self._references:
            self._references = [made.outputs[0] for made in self._generate(fine(self.steps))]
        if plan.key not in self.tried:
            made = self._generate(plan)
            close = self.model.closeness([one.outputs[0] for one in made], self._references)
            traces = [trace_of(one) for one in made]
            self.tried[plan.key] = Tried(
                plan=plan,
                ssim=statistics.fmean(close.ssim),
                cost_ms=statistics.fmean(self._cost(plan, trace) for trace in traces),
                coarse=statistics.fmean(coarse_share(trace) for trace in traces),
                reused=statistics.fmean(trace.reused / len(trace) for trace in traces),
            )
            print(f"{self.tried[plan.key].ssim:.3f} {plan.label}", file=sys.stderr, flush=True)
        return self.tried[plan.key]

    def sweep(self, dial: Dial, targets: Sequence[float]) -> None:
        """Turns a dial as far as each target allows."""
        for target in targets:
            self._turn(dial, target)

    def sweep_pairs(
        self, ddit: Dial, cache: CacheDial, targets: Sequence[float], count: int
    ) -> None:
        """Turns a cache's dial for several taus.

        Args:
            ddit: The rule, by tau.
            cache: The cache, by threshold.
            targets: SSIM of the search prompts.
            count: Taus, evenly over those that take coarse steps and meet the lowest target.
        """
        first = highest(ddit.levels, lambda level: self.run(ddit.at(level)).coarse == 0)
        last = self._turn(ddit, min(targets))
        for level in spread_levels(first + 1, last, count):
            plan = ddit.at(level)
            on = Dial(levels=cache.levels, at=partial(cache.on, plan))
            self.sweep(on, [target for target in targets if self.run(plan).ssim >= target])

    def cheapest(self, kind: str, target: float) -> Tried | None:
        """The cheapest plan of a kind that met a target; a combined one must do both."""
        found = [
            tried
            for tried in self.tried.values()
            if tried.plan.kind == kind
            and tried.ssim >= target
            and (kind not in COMBINED or (tried.coarse > 0 and tried.reused > 0))
        ]
        return min(found, key=lambda tried: tried.cost_ms, default=None)

    def _turn(self, dial: Dial, target: float) -> int:
        return highest(dial.levels, lambda level: self.run(dial.at(level)).ssim >= target)

    def _generate(self, plan: SkipPlan) -> list[Generation]:
        generate = contender("", self.engine, self.model, plan).generate
        return [generate(batch(prompt)) for prompt in self.prompts]

    def _cost(self, plan: SkipPlan, trace: RunTrace) -> float:
        table = self.costs[type(plan.cache).__name__]
        return sum(table[REUSED if step.reused else COMPUTED][step.patch_size] for step in trace)


def highest(levels: int, holds: Callable[[int], bool]) -> int:
    """By bisection the highest level at which holds what holds up to some level; 0 is not asked."""
    low, high = 0, levels + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def spread_levels(first: int, last: int, count: int) -> list[int]:
    """At most `count` levels from the first to the last, evenly; none where they cross."""
    if first > last:
        return []
    steps = max(count - 1, 1)
    return sorted({round(first + (last - first) * place / steps) for place in range(count)})


def trace_of(made: Generation) -> RunTrace:
    """The trace of an engine's run."""
    assert made.trace is not None, "an engine's run has a trace"
    return made.trace


def coarse_share(trace: RunTrace) -> float:
    """Share of the steps that ran or reused at a coarse size."""
    return sum(size != "p" for size in trace.patch_sizes()) / len(trace)


def step_costs(
    engine: Any,
    model: SkipModel,
    steps: int,
    prompt: Prompt,
    caches: Sequence[StepCache],
    repeats: int,
) -> Costs:
    """Milliseconds of a step, computed and reused, at each size and with each kind of cache.

    Medians over the steps of static runs in interleaved rounds, of which the first is left out.

    Args:
        engine: A compiled pipeline.
        model: What it draws.
        steps: Denoising steps.
        prompt: What the runs draw.
        caches: Of each kind one that reuses at no step, and one at every step that it may.
        repeats: Rounds.
    """
    times: dict[tuple[str, bool, str], list[float]] = {}
    for index in range(repeats + 1):
        for size in sizes_of(engine):
            for cache in (NoCache(), *caches):
                policy = StaticPolicy([size] * steps)
                plan = SkipPlan(kind="", label="", policy=policy, steps=steps, cache=cache)
                made = contender("", engine, model, plan).generate(batch(prompt))
                for step in trace_of(made) if index else ():
                    key = type(cache).__name__, step.reused, size
                    times.setdefault(key, []).append(step.latency_ms)
    costs: Costs = {}
    for (name, reused, size), values in times.items():
        table = costs.setdefault(name, {}).setdefault(REUSED if reused else COMPUTED, {})
        table[size] = statistics.median(values)
    return costs


def sizes_of(engine: Any) -> list[str]:
    """Patch sizes of an engine by name, p first."""
    return [entry.patch for entry in engine.artifact.manifest.buckets]


def tau_range(
    engine: Any, model: SkipModel, steps: int, prompts: Sequence[Prompt]
) -> tuple[float, float]:
    """Bounds of tau from the scores of runs that are all fine, and all coarse after the start."""
    scores: list[float] = []
    for tau in (0.0, 1e30):
        policy = DDiTPolicy(tau=tau, refresh=None, fine_tail=0)
        plan = SkipPlan(kind="", label="", policy=policy, steps=steps)
        generate = contender("", engine, model, plan).generate
        for prompt in prompts:
            trace = trace_of(generate(batch(prompt)))
            scores += [score for record in trace for score in record.scores.values()]
    usable = [score for score in scores if score > 0 and math.isfinite(score)]
    return (min(usable) / 2, max(usable) * 4) if usable else _NO_SCORES
