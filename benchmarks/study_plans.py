"""Plans of every kind at a cost, for `bench_study.py`.

Cost is counted, not timed: image tokens that the blocks ran on, of all steps and passes, none for a
step that reuses. Each kind has some candidates at the cost; the one that comes closest on a few
prompts of their own stands for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from demo_models import DemoModel
from quality_paths import TRAINING_FREE
from quality_rows import Judge
from quality_runs import Plan, Runs, StepCosts, reference
from quality_search import STATIC_SHAPES, Matcher

from ddit_rt.lab.plans.dial import on_log_scale
from ddit_rt.lab.plans.genome import Static, within
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.lab.plans.step_caches import LEVELS
from ddit_rt.policies import (
    CacheFit,
    CacheModel,
    CacheTable,
    DDiTPolicy,
    FinePolicy,
    MagCache,
    SeaCache,
    StaticCache,
    StepCache,
)

FEWER, STATIC, DDIT = "fewer_steps", "static", "ddit"
MAG, SEA, FIXED = "magcache", "seacache", "static_cache"
KINDS = (FEWER, MAG, SEA, FIXED, STATIC, DDIT)
"""In the order of the tables."""

_CACHES = ("MagCache", "SeaCache", "StaticCache")
_RETAINED = ((0.2, 3), (0.1, 3), (0.1, 5))
_HEADS = (3, 10)
_CONSECUTIVE = (2, 4)
_LATE = (
    Static(count=1, sizes=("2p",), head=10),
    Static(count=1, sizes=("4p",), head=10),
    Static(count=1, sizes=("4p", "2p"), head=10),
)
"""Beside those of the other tables: with a fifth of the steps fine first, as MagCache has them."""
_EQUAL_SHARE = 0.03
_SPANS = [1 + place / 100 for place in range(701)]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Finds plans.

    Attributes:
        model: What draws.
        runs: Runs plans.
        costs: `token_costs` of it.
        steps: Of the reference.
        prompts: To choose on.
        fit: MagCache's.
        iterations: Halvings of the range of tau.
    """

    model: DemoModel
    runs: Runs
    costs: StepCosts
    steps: int
    prompts: tuple[Prompt, ...]
    fit: CacheFit
    iterations: int = 6

    def best(self, kind: str, level: float) -> Plan | None:
        """The candidate of a kind that comes closest to full resolution on the prompts.

        Args:
            kind: One of `KINDS`.
            level: How many times cheaper than full resolution it must be.
        """
        candidates = list(self._candidates(kind, level))
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        return max(candidates, key=self._closeness)

    def share(self, plan: Plan, prompts: Sequence[Prompt]) -> float:
        """Cost of a plan over that of full resolution."""
        made = self.runs.run(plan, prompts)
        tokens = statistics.fmean(self.costs.loop_tokens(one) for one in made.branches)
        return tokens / (self.costs.tokens["p"] * self.steps)

    def _closeness(self, plan: Plan) -> float:
        whole = self.runs.run(reference(self.steps), self.prompts).images
        found = self.model.compare(self.runs.run(plan, self.prompts).images, whole).psnr
        return statistics.fmean(math.inf if value is None else value for value in found)

    def _candidates(self, kind: str, level: float) -> Iterator[Plan]:
        made: Mapping[str, Callable[[float], Iterator[Plan]]] = {
            FEWER: self._fewer,
            STATIC: self._static,
            DDIT: self._dynamic,
            MAG: self._magcache,
            SEA: self._seacache,
            FIXED: self._fixed,
        }
        return (replace(plan, kind=kind) for plan in made[kind](level))

    def _fewer(self, level: float) -> Iterator[Plan]:
        yield reference(round(self.steps / level))

    def _static(self, level: float) -> Iterator[Plan]:
        tokens = self.costs.tokens
        for shape in (*STATIC_SHAPES, *_LATE):
            genome = within([shape], self.steps, tokens["p"] * self.steps / level, tokens)
            if genome is not None:
                candidate = genome.candidate()
                yield Plan(policy=candidate.policy, steps=self.steps, label=candidate.label)

    def _dynamic(self, level: float) -> Iterator[Plan]:
        judge = Judge(model=self.model, runs=self.runs, costs=self.costs, captions=(), seeds=1)
        matcher = Matcher(
            judge=judge,
            search_prompts=self.prompts[:2],
            steps=self.steps,
            path=TRAINING_FREE,
            iterations=self.iterations,
            share=1 / level,
        )
        for head in (head for head in _HEADS if head < self.steps):

            def rule(tau: float, head: int = head) -> DDiTPolicy:
                return DDiTPolicy(tau, warmup_steps=head)

            tau, share = matcher.search_tau(rule)
            if abs(share - 1 / level) <= _EQUAL_SHARE:
                label = f"DDiT, tau {tau:.2g}, {head} steps at p first"
                yield Plan(policy=rule(tau), steps=self.steps, label=label)

    def _magcache(self, level: float) -> Iterator[Plan]:
        for retained, skipped in _RETAINED:

            def cache(
                threshold: float, retained: float = retained, skipped: int = skipped
            ) -> MagCache:
                return MagCache(
                    threshold,
                    retention_ratio=retained,
                    max_skip_steps=skipped,
                    mag_ratios=self.fit.values,
                )

            label = f"{retained:.0%} of the steps first, at most {skipped} in a row reuse"
            changes = [[abs(1 - ratio) for ratio in self.fit.values]]
            yield from self._turned(level, cache, label, changes)

    def _seacache(self, level: float) -> Iterator[Plan]:
        for consecutive in _CONSECUTIVE:

            def cache(threshold: float, consecutive: int = consecutive) -> SeaCache:
                return SeaCache(threshold, max_consecutive_cached=consecutive)

            label = f"extrapolating, at most {consecutive} in a row reuse"
            yield from self._turned(level, cache, label, self._changes)

    def _fixed(self, level: float) -> Iterator[Plan]:
        known = CacheModel(name="model", steps=self.steps, fits=(), time_changes=None)
        for head in _HEADS:
            caches = (StaticCache(span, first=head) for span in _SPANS)
            for cache in caches:
                computed = sum(map(math.isnan, cache.resolve(known).increments))
                if computed <= round(self.steps / level):
                    label = f"every {cache.plan:.3g}th step after {head}, extrapolating"
                    yield self._cached(cache, f"StaticCache, {label}")
                    break

    @cached_property
    def _changes(self) -> list[list[float]]:
        """What SeaCache's signal changes by at each step, along full resolution's trajectory."""
        plan = self._cached(SeaCache(0.0), "")
        traces = [self.runs.trace(plan, prompt) for prompt in self.prompts[:2]]
        return [[record.accumulated or 0.0 for record in trace] for trace in traces]

    def _turned(
        self,
        level: float,
        make: Callable[[float], StepCache],
        label: str,
        changes: Sequence[Sequence[float]],
    ) -> Iterator[Plan]:
        """The cache at the least threshold at which it costs no more, if there is one.

        Args:
            level: As in `best`.
            make: The cache of a threshold.
            label: What it is called.
            changes: What it adds up at each step, for each of some prompts: what a plan costs
                follows from them, and none is run for it.
        """
        usable = [change for change in changes[0] if change > 0]
        ends = min(usable), sum(usable)
        known = CacheModel(name="model", steps=self.steps, fits=(), time_changes=None)
        for turned in range(LEVELS + 1):
            cache = make(on_log_scale(ends, turned, LEVELS))
            table = cache.resolve(known)
            assert table is not None, "a cache that caches"
            counts = [computed_steps(table, one) for one in changes]
            if statistics.fmean(counts) <= round(self.steps / level) + 0.5:
                yield self._cached(cache, f"{type(cache).__name__}, {label}")
                return

    def _cached(self, cache: StepCache, label: str) -> Plan:
        return Plan(policy=FinePolicy(), steps=self.steps, cache=cache, label=label)


def computed_steps(table: CacheTable, changes: Sequence[float]) -> int:
    """How many steps compute at one patch size, as `ops.decide_reuse_` decides of a single image.

    Args:
        table: The cache, resolved.
        changes: Of the signal, per step; those of a table without one are not read.
    """
    total, factor, reused, computed = 0.0, 1.0, 0, 0
    for increment, change in zip(table.increments, changes, strict=True):
        factor *= increment
        grown = abs(1 - factor) if table.product else change if table.coefficients else increment
        total += grown
        if not math.isnan(increment) and total < table.threshold and reused < table.limit:
            reused += 1
        else:
            total, factor, reused, computed = 0.0, 1.0, 0, computed + 1
    return computed


def token_costs(runs: Runs, prompt: Prompt) -> StepCosts:
    """What a step costs in image tokens, whatever runs it."""
    trace = runs.trace(Plan(policy=FinePolicy(), steps=2), prompt)
    whole = float(trace.steps[0].tokens)
    multiples = {name: int(name[:-1] or 1) for name in runs.sizes()}
    tokens = {name: whole / multiple**2 for name, multiple in multiples.items()}
    table = {**tokens, **{f"{name} reused": 0.0 for name in tokens}}
    return StepCosts(milliseconds=dict.fromkeys((TRAINING_FREE, *_CACHES), table), tokens=tokens)
