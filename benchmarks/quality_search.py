"""Searches over plans: for a rule or a static plan at a cost, or the cheapest plan at a fidelity.

The first turn a dial by bisection, the last is the planner's; on prompts of their own. At a fixed
tau two rules spend different amounts, and a comparison says nothing: so a tau is looked for at
which a rule spends a given share of the tokens of full resolution. What a plan costs is read from a
table of measured step times, so that no search follows the noise of a clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from quality_paths import TRAINING_FREE
from quality_rows import Judge, Row
from quality_runs import QUANTILE, Plan, Runs, StepCosts, reference

from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.plans.candidates import CACHED, COMBINED, DYNAMIC, STATIC, STEPS, Candidate
from ddit_rt.lab.plans.dial import highest, on_log_scale
from ddit_rt.lab.plans.genome import Static, within
from ddit_rt.lab.plans.points import Measurement, Prompt
from ddit_rt.lab.plans.reuse_plan import measured_drift
from ddit_rt.lab.plans.step_caches import STEP_CACHES, CacheDial, changes_of, threshold_range
from ddit_rt.policies import CacheFit, DDiTPolicy, FinePolicy, PatchPolicy, StaticCache

DDIT = "ddit"
MakePolicy = Callable[[float], PatchPolicy]
TAU_RANGE = (1e-5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Makes rows at one number of steps.

    Attributes:
        judge: Judges the images.
        search_prompts: Prompts that tau and static plans are chosen on, none of the judge's.
        steps: Denoising steps.
        iterations: Halvings of the range of tau.
        share: Share of the tokens of full resolution that rules are matched to.
        statistic: See `Plan`.
    """

    judge: Judge
    search_prompts: tuple[Prompt, ...]
    steps: int
    iterations: int = 9
    share: float = 0.5
    statistic: str = QUANTILE

    def row(self, name: str, label: str, kind: str, policy: PatchPolicy) -> Row:
        """A plan's row, compared with full resolution of as many steps."""
        return self.judge.row(name, label, kind, self._plan(policy), self.steps)

    def matched(self, name: str, label: str, make: MakePolicy) -> Row:
        """A rule at the tau at which it spends the share; the row says what came out."""
        tau, found = closest(lambda tau: self._share_of(make(tau)), self.share, self.iterations)
        row = self.row(name, label, "dynamic", make(tau))
        return {**row, "tau": tau, "target_share": self.share, "searched_share": found}

    def static_of(self, row: Row) -> list[Row]:
        """The static plan that is best, on the search's prompts, of those that take no longer."""
        runs, costs = self.judge.runs, self.judge.costs.milliseconds[TRAINING_FREE]
        genomes = [within([shape], self.steps, row["loop_ms"], costs) for shape in STATIC_SHAPES]
        candidates = [genome.candidate() for genome in genomes if genome is not None]
        if not candidates or row["tokens_share"] == 1:
            return []
        whole = runs.run(reference(self.steps), self.search_prompts).images

        def ssim(candidate: Candidate) -> float:
            images = runs.run(self._plan(candidate.policy), self.search_prompts).images
            return fidelity(images, whole).mean_ssim

        best = max(candidates, key=ssim)
        static = self.row(f"static_{row['name']}", best.label, "static", best.policy)
        row["static"] = static["name"]
        return [static]

    def _plan(self, policy: PatchPolicy) -> Plan:
        return Plan(policy=policy, num_inference_steps=self.steps, statistic=self.statistic)

    def _share_of(self, policy: PatchPolicy) -> float:
        costs, made = self.judge.costs, self.judge.runs.run(self._plan(policy), self.search_prompts)
        tokens = statistics.fmean(costs.loop_tokens(one) for one in made.branches)
        return tokens / (costs.tokens["p"] * self.steps)


def closest(
    share_of: Callable[[float], float],
    share: float,
    iterations: int,
    ends: tuple[float, float] = TAU_RANGE,
    most: float = math.inf,
) -> tuple[float, float]:
    """The tau of those tried whose closed loop comes closest to a share of the cost, and its share.

    The share falls as tau rises, but not strictly: decisions change the latents that later ones
    see. So this takes the best of all that bisection tries.

    Args:
        share_of: The share at a tau.
        share: What it should be.
        iterations: Halvings.
        ends: Between which tau lies.
        most: Share that it must not exceed, if any that is tried does not.
    """
    tried: dict[float, float] = {}
    levels = 2**iterations - 1

    def spends_more(level: int) -> bool:
        tau = on_log_scale(ends, level, levels)
        tried[tau] = share_of(tau)
        return tried[tau] > share

    highest(levels, spends_more)
    tau = min(tried, key=lambda tau: (tried[tau] > most, abs(tried[tau] - share), tau))
    return tau, tried[tau]


STATIC_SHAPES = (
    *(Static(count=1, sizes=sizes) for sizes in (("2p",), ("4p",), ("4p", "2p"))),
    *(Static(count=1, sizes=one, head=0, refresh=None) for one in (("2p",), ("4p", "2p"))),
)
"""Static plans that are tried as baselines: interleaved after three steps at p, or a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The planner's view of plans: costs by a table, so that no search follows a clock's noise.

    Attributes:
        runs: Runs plans.
        steps: Steps of the reference.
        costs: Of a step.
    """

    runs: Runs
    steps: int
    costs: StepCosts

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """See `Evaluator.evaluate`."""
        plan = plan_of(candidate)
        rows = []
        for prompt in prompts:
            whole, made = (self.runs.run(one, [prompt]) for one in (reference(self.steps), plan))
            (ssim,) = fidelity(made.images, whole.images).ssim
            rows.append((self.costs.loop_ms(plan, made.branches[0]), ssim, None))
        return Measurement.of(rows)


def dials_of(
    fits: Mapping[str, CacheFit], runs: Runs, steps: int, prompt: Prompt
) -> list[CacheDial]:
    """Every step cache that has its fit or needs none, and the values that are worth trying."""
    fields = {"teacache": "coefficients", "magcache": "mag_ratios"}
    engine, found = runs.paths[TRAINING_FREE].engine, []
    call = {**runs.arguments, "num_inference_steps": steps}
    drift = measured_drift(engine, prompt, call)
    for dial in STEP_CACHES:
        if dial.fit is not None and dial.fit not in fits:
            continue
        fitted: dict[str, Any] = {fields[dial.fit]: fits[dial.fit].values} if dial.fit else {}
        cache = replace(dial.cache, **fitted)  # type: ignore[type-var]
        probe = Plan(policy=FinePolicy(), num_inference_steps=steps, step_cache=cache)
        ends, changes = dial.ends, dial.changes
        if ends is None:
            trace = runs.trace(probe, prompt)
            ends, changes = threshold_range(trace), changes_of(trace)
        if ends is not None:
            own = replace(dial, cache=cache, ends=ends, changes=changes)
            found.append(own.planned(drift) if isinstance(cache, StaticCache) else own)
    return found


def plan_of(candidate: Candidate) -> Plan:
    """What the planner found, as the tables name it."""
    own = {one.name: getattr(candidate, one.name) for one in fields(candidate)}
    return Plan(**{**own, "kind": table_kind(candidate)})


def table_kind(candidate: Candidate) -> str:
    """What the tables call plans of a candidate's kind."""
    cache = type(candidate.step_cache).__name__.lower()
    names = {STEPS: "fewer_steps", DYNAMIC: DDIT, CACHED: cache}
    if candidate.kind == COMBINED:
        rule = DDIT if isinstance(candidate.policy, DDiTPolicy) else STATIC
        return f"{rule}_{cache}"
    return names.get(candidate.kind, candidate.kind)
