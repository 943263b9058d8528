"""Plans of every kind at a cost, for `bench_study.py`.

A cost is the time of a loop, by a table of measured step times, or the image tokens that its blocks
ran on, none for a step that reuses. Each kind has some candidates at the cost; the one that comes
closest on a few prompts of their own stands for it. The planner's plans are those of one search, as
`ddit-rt calibrate` makes it, over steps, their noise levels, patch sizes and reuse.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from quality_paths import TRAINING_FREE
from quality_runs import Plan, Runs, StepCosts, mixed_cost, reference
from quality_search import STATIC_SHAPES, TAU_RANGE, Judged, closest, dials_of, plan_of

from ddit_rt.lab.calibrate.moves import Space
from ddit_rt.lab.calibrate.search import Search
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.plans.candidates import cache_text
from ddit_rt.lab.plans.dial import TAU_PROBES, on_log_scale, tau_range
from ddit_rt.lab.plans.genome import Static, within
from ddit_rt.lab.plans.points import Prompt, best_for
from ddit_rt.lab.plans.reuse_plan import DRIFTING
from ddit_rt.lab.plans.step_caches import LEVELS, computed_steps
from ddit_rt.lab.plans.target import Target
from ddit_rt.policies import (
    CacheFit,
    CacheModel,
    DDiTPolicy,
    FinePolicy,
    FirstBlockCache,
    MagCache,
    NoCache,
    PatchPolicy,
    SeaCache,
    SpectralPolicy,
    StaticCache,
    StaticPolicy,
    StepCache,
)

FEWER, STATIC, MIXED, DDIT, SPECTRAL = "fewer_steps", "static", "mixed", "ddit", "spectral"
MAG, SEA, FIRST, FIXED = "magcache", "seacache", "first_block_cache", "static_cache"
PLANNED = "planner"
KINDS = (FEWER, MAG, SEA, FIRST, FIXED, STATIC, MIXED, SPECTRAL, DDIT, PLANNED)
"""In the order of the tables."""

CACHES: tuple[StepCache, ...] = (
    MagCache(0.0),
    SeaCache(0.0),
    FirstBlockCache(0.0),
    StaticCache(2.0),
)
"""One of each class that plans take."""

LEAST_LEVELS = 3
"""Costs that one search of the planner is for."""

_RETAINED = ((0.2, 3), (0.1, 3), (0.1, 5), (0.06, 8))
_HEADS = (3, 10)
_REFRESHED = (3, 4, 2)
"""Coarse or free steps between two at p."""
_CONSECUTIVE = (2, 4, 8)
_LATE = (
    Static(count=1, sizes=("2p",), head=10),
    Static(count=1, sizes=("4p",), head=10),
    Static(count=1, sizes=("4p", "2p"), head=10),
)
"""Beside those of the other tables: with a fifth of the steps fine first, as MagCache has them."""
_FINE_SHARES = (0.125, 0.25, 0.5)
_THRESHOLDS = (0.01, 1.0)
"""Of FirstBlockCache."""
_EQUAL_SHARE = 0.03
_SPANS = [1 + place / 100 for place in range(1501)]
_MOST_DELTA = 0.999


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Finds plans.

    Attributes:
        runs: Runs plans.
        costs: Of a step, by path and by class of step cache.
        steps: Of the reference.
        prompts: To choose on.
        fit: MagCache's.
        spectrum: Amplitude and decay of the latents' power.
        levels: How many times cheaper than full resolution plans must be, the main one first; the
            planner looks for plans at the first three.
        iterations: Halvings of the range of tau.
        pictures: What the search behind the planner's plans may generate.
    """

    runs: Runs
    costs: StepCosts
    steps: int
    prompts: tuple[Prompt, ...]
    fit: CacheFit
    spectrum: tuple[float, float]
    levels: tuple[float, ...]
    iterations: int = 6
    pictures: int = 200

    @property
    def whole(self) -> float:
        """Cost of full resolution."""
        return self._of_step["p"] * self.steps

    @property
    def _of_step(self) -> Mapping[str, float]:
        """Cost of a step at each patch size."""
        return self.costs.milliseconds[TRAINING_FREE]

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
        return statistics.fmean(self.costs.loop_ms(plan, one) for one in made.branches) / self.whole

    def _plan(
        self,
        policy: PatchPolicy,
        label: str = "",
        cache: StepCache = NoCache(),  # noqa: B008 - frozen
    ) -> Plan:
        return Plan(policy=policy, num_inference_steps=self.steps, step_cache=cache, label=label)

    def _closeness(self, plan: Plan) -> float:
        fine = self.runs.run(reference(self.steps), self.prompts).images
        found = fidelity(self.runs.run(plan, self.prompts).images, fine).psnr
        return statistics.fmean(math.inf if value is None else value for value in found)

    def _candidates(self, kind: str, level: float) -> Iterator[Plan]:
        made: Mapping[str, Callable[[float], Iterator[Plan]]] = {
            FEWER: self._fewer,
            STATIC: self._static,
            MIXED: self._mixed,
            SPECTRAL: self._spectral,
            DDIT: self._dynamic,
            MAG: self._magcache,
            SEA: self._seacache,
            FIRST: self._first_block,
            FIXED: self._fixed,
            PLANNED: lambda level: iter(self._searched.get(level, [])),
        }
        return (replace(plan, kind=kind) for plan in made[kind](level))

    def _fewer(self, level: float) -> Iterator[Plan]:
        yield reference(round(self.steps / level))

    def _static(self, level: float, fine_share: float = 0.0) -> Iterator[Plan]:
        # As far beyond the cost as rules may be, which cannot be turned more finely.
        most = self.whole * (1 / level + _EQUAL_SHARE)
        costs = {
            name: mixed_cost(self._of_step["p"], own, fine_share)
            for name, own in self._of_step.items()
        }
        shapes = [*STATIC_SHAPES, *_LATE]
        if not fine_share:  # mixed steps take three shares of each already
            shapes += [
                replace(shape, refresh=refresh)
                for shape in shapes
                for refresh in _REFRESHED[1:]
                if shape.refresh is not None
            ]
        for shape in shapes:
            genome = within([shape], self.steps, most, costs)
            if genome is None:
                continue
            candidate = genome.candidate()
            policy, label = candidate.policy, candidate.label
            if fine_share:
                assert isinstance(policy, StaticPolicy), "a plan of sizes"
                policy = replace(policy, fine_share=fine_share)
                label = f"{label}, {fine_share:.3g} of the regions at p"
            yield self._plan(policy, label)

    def _mixed(self, level: float) -> Iterator[Plan]:
        for fine_share in _FINE_SHARES:
            yield from self._static(level, fine_share)

    def _spectral(self, level: float) -> Iterator[Plan]:
        amplitude, decay = self.spectrum
        for coarsest in ("2p", "4p"):

            def at(delta: float, coarsest: str = coarsest) -> Plan:
                return self._plan(
                    SpectralPolicy(
                        min(delta, _MOST_DELTA),
                        amplitude=amplitude,
                        decay=decay,
                        coarsest=coarsest,
                    )
                )

            yield from self._matched(level, at, f"SPEED's rule, {coarsest} at the most, delta")

    def _dynamic(self, level: float) -> Iterator[Plan]:
        heads = (head for head in _HEADS if head < self.steps)
        for head, refresh in itertools.product(heads, _REFRESHED):

            def at(tau: float, head: int = head, refresh: int = refresh) -> Plan:
                return self._plan(DDiTPolicy(tau, warmup_steps=head, refresh=refresh))

            label = f"DDiT, {head} steps at p first, one after {refresh}, tau"
            yield from self._matched(level, at, label)

    def _matched(
        self,
        level: float,
        at: Callable[[float], Plan],
        label: str,
        ends: tuple[float, float] = TAU_RANGE,
        beyond: float = _EQUAL_SHARE,
    ) -> Iterator[Plan]:
        """The rule at the number between some at which it costs what it should, if it can.

        By default as far beyond it as static plans.
        """
        most = 1 / level + beyond
        value, share = closest(
            lambda value: self.share(at(value), self.prompts),
            most,
            self.iterations,
            ends,
            most if beyond else math.inf,
        )
        if abs(share - 1 / level) <= _EQUAL_SHARE:
            yield replace(at(value), label=f"{label} {value:.2g}")

    def _magcache(self, level: float) -> Iterator[Plan]:
        ratios = self.fit.values
        for first, most in _RETAINED:
            caches = (
                MagCache(one, retention_ratio=first, max_skip_steps=most, mag_ratios=ratios)
                for one in _thresholds([abs(1 - ratio) for ratio in ratios])
            )
            label = f"MagCache, {first:.0%} of the steps first, at most {most} in a row reuse"
            yield from self._cached(level, caches, label)

    def _seacache(self, level: float) -> Iterator[Plan]:
        for most in _CONSECUTIVE:
            caches = (
                SeaCache(one, max_consecutive_cached=most) for one in _thresholds(self._changes[0])
            )
            label = f"SeaCache, extrapolating, at most {most} in a row reuse"
            yield from self._cached(level, caches, label)

    def _first_block(self, level: float) -> Iterator[Plan]:
        for order, name in enumerate(("as published", "extrapolating")):

            def at(threshold: float, order: int = order) -> Plan:
                cache = FirstBlockCache(threshold, residual_order=order)
                return self._plan(FinePolicy(), cache=cache)

            yield from self._matched(level, at, f"FirstBlockCache, {name},", _THRESHOLDS, 0.0)

    def _fixed(self, level: float) -> Iterator[Plan]:
        for head in _HEADS:
            caches = (StaticCache(span, first=head) for span in _SPANS)
            yield from self._cached(level, caches)

    @cached_property
    def _changes(self) -> list[list[float]]:
        """What SeaCache's signal changes by at each step, along full resolution's trajectory."""
        plan = self._plan(FinePolicy(), cache=SeaCache(0.0))
        traces = [self.runs.trace(plan, prompt) for prompt in self.prompts[:2]]
        return [[record.accumulated or 0.0 for record in trace] for trace in traces]

    def _cached(self, level: float, caches: Iterable[StepCache], label: str = "") -> Iterator[Plan]:
        """The first of some caches that costs no more, to half a step, if there is one.

        What a cache costs follows from what its signal changes by; none is run for it.
        """
        known = CacheModel(name="model", steps=self.steps, fits=(), time_changes=None)
        limit = self.whole / level + self._of_step["p"] / 2
        for cache in caches:
            of_step, table = self.costs.milliseconds[type(cache).__name__], cache.resolve(known)
            assert table is not None, "a cache that caches"
            grown = self._changes if table.coefficients else [table.increments]
            computed = statistics.fmean(computed_steps(table, one) for one in grown)
            if computed * of_step["p"] + (self.steps - computed) * of_step["p reused"] <= limit:
                name = label or f"{cache_text(cache)}, extrapolating"
                yield self._plan(FinePolicy(), name, cache)
                return

    @cached_property
    def _searched(self) -> dict[float, list[Plan]]:
        """By level, the best plan that one search found for it, if there is one."""
        # As far beyond the cost as a cache beside it may be.
        beyond = self._of_step["p"] / 2
        levels = self.levels[:LEAST_LEVELS]
        targets = [Target(max_cost=self.whole / level + beyond) for level in levels]
        probes = [self._plan(policy) for policy in TAU_PROBES]
        space = Space(
            steps=self.steps,
            costs=self._of_step,
            taus=tau_range(self.runs.trace(plan, self.prompts[0]) for plan in probes),
            dials=[
                dial.priced(self.costs.milliseconds[type(dial.cache).__name__])
                for dial in dials_of({MAG: self.fit}, self.runs, self.steps, self.prompts[0])
            ],
            places=True,
        )
        search = Search(
            space=space,
            evaluator=Judged(runs=self.runs, steps=self.steps, costs=self.costs),
            prompts=self.prompts,
            targets=targets,
            # References and probes count, too.
            pictures=self.pictures - len(self.prompts) - len(probes) - len(CACHES) - DRIFTING,
        )
        points = search.run()
        print(f"planner: {len(search.tried)} plans, {search.spent} pictures", file=sys.stderr)
        found = {}
        for level, target in zip(levels, targets, strict=True):
            plans = [plan_of(point.candidate) for point in [best_for(target, points)] if point]
            found[level] = [replace(plan, label=f"planner: {plan.label}") for plan in plans]
        return found


def _thresholds(changes: Sequence[float]) -> Iterator[float]:
    """From none that reuses to all that may, given the change at each step."""
    usable = [change for change in changes if change > 0]
    for level in range(LEVELS + 1):
        yield on_log_scale((min(usable), sum(usable)), level, LEVELS)
