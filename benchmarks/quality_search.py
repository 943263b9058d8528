"""Searches over plans: for a rule or a static plan at a cost, or the cheapest plan at a fidelity.

All turn a dial by bisection, on prompts of their own. At a fixed tau two rules spend different
amounts, and a comparison says nothing: so a tau is looked for at which a rule spends a given share
of the tokens of full resolution. What a plan costs is read from a table of measured step times, so
that no search follows the noise of a clock.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from demo_models import DemoModel
from quality_rows import Judge, Row
from quality_runs import QUANTILE, Plan, Runs, StepCosts, reference

from ddit_rt.lab.plans.candidates import CacheRange, Candidate, Static, Template
from ddit_rt.lab.plans.dial import highest, on_log_scale
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.policies import PatchPolicy

DDIT = "ddit"
CACHE_LEVELS = 24
PlanAt = Callable[[int], Plan]
MakePolicy = Callable[[float], PatchPolicy]
_TAU_RANGE = (1e-5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Makes rows at one number of steps.

    Attributes:
        judge: Judges the images.
        search_prompts: Prompts that tau and static plans are chosen on, none of the judge's.
        steps: Denoising steps.
        path: Coarse step.
        iterations: Halvings of the range of tau.
        share: Share of the tokens of full resolution that rules are matched to.
        statistic: See `Plan`.
    """

    judge: Judge
    search_prompts: tuple[Prompt, ...]
    steps: int
    path: str
    iterations: int = 9
    share: float = 0.5
    statistic: str = QUANTILE

    def row(self, name: str, label: str, kind: str, policy: PatchPolicy) -> Row:
        """A plan's row, compared with full resolution of as many steps."""
        return self.judge.row(name, label, kind, self._plan(policy), self.steps)

    def matched(self, name: str, label: str, make: MakePolicy) -> Row:
        """A rule at the tau at which it spends the share; the row says what came out."""
        tau, found = self.search_tau(make)
        row = self.row(name, label, "dynamic", make(tau))
        return {**row, "tau": tau, "target_share": self.share, "searched_share": found}

    def search_tau(self, make: MakePolicy) -> tuple[float, float]:
        """The tau of those tried whose closed loop comes closest to the share, and its share.

        The share falls as tau rises, but not strictly: decisions change the latents that later
        ones see. So this takes the best of all that bisection tries.
        """
        tried: dict[float, float] = {}
        levels = 2**self.iterations - 1

        def spends_more(level: int) -> bool:
            tau = on_log_scale(_TAU_RANGE, level, levels)
            tried[tau] = self._share_of(self._plan(make(tau)))
            return tried[tau] > self.share

        highest(levels, spends_more)
        tau = min(tried, key=lambda tau: (abs(tried[tau] - self.share), tau))
        return tau, tried[tau]

    def static_of(self, row: Row) -> list[Row]:
        """The static plan that is best, on the search's prompts, of those that take no longer."""
        best: tuple[float, Candidate] | None = None
        whole = self.judge.runs.run(reference(self.steps), self.search_prompts).images
        for template in static_templates(self.steps):
            level = self._level(template, row["loop_ms"])
            if level is not None:
                candidate = template.at(level)
                images = self.judge.runs.run(self._plan(candidate.policy), self.search_prompts)
                ssim = statistics.fmean(self.judge.model.compare(images.images, whole).ssim)
                if best is None or ssim > best[0]:
                    best = ssim, candidate
        if best is None or row["tokens_share"] == 1:
            return []
        _, candidate = best
        static = self.row(f"static_{row['name']}", candidate.label, "static", candidate.policy)
        row["static"] = static["name"]
        return [static]

    def _plan(self, policy: PatchPolicy) -> Plan:
        return Plan(policy=policy, steps=self.steps, path=self.path, statistic=self.statistic)

    def _share_of(self, plan: Plan) -> float:
        costs, made = self.judge.costs, self.judge.runs.run(plan, self.search_prompts)
        tokens = statistics.fmean(costs.loop_tokens(one) for one in made.branches)
        return tokens / (costs.tokens["p"] * self.steps)

    def _level(self, template: Static, loop_ms: float) -> int | None:
        """The fewest coarse steps, at least one, with which a template takes no longer."""
        for level in range(1, template.levels + 1):
            sizes = [size for size, count in template.sizes(level).items() for _ in range(count)]
            plan = self._plan(template.at(level).policy)
            if self.judge.costs.loop_ms(plan, sizes) <= loop_ms:
                return level
        return None


def static_templates(steps: int) -> list[Static]:
    """Static plans that are tried as baselines: interleaved after three steps at p, or a block."""
    interleaved = [
        Static(steps=steps, coarse=coarse) for coarse in (("2p",), ("4p",), ("4p", "2p"))
    ]
    blocks = [
        Static(steps=steps, coarse=coarse, head=0, refresh=None)
        for coarse in (("2p",), ("4p", "2p"))
    ]
    return [*interleaved, *blocks]


def plan_of(candidate: Candidate, kind: str) -> Plan:
    """A candidate as a plan that the benchmark runs."""
    return Plan(
        policy=candidate.policy,
        steps=candidate.num_inference_steps,
        cache=candidate.step_cache,
        kind=kind,
        label=candidate.label,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What a plan came to, means over the search prompts.

    Attributes:
        plan: The plan.
        ssim: To full resolution.
        cost_ms: Of the loop, by the table.
        coarse: Share of the steps at a coarse size.
        reused: Share of the steps that reused.
    """

    plan: Plan
    ssim: float
    cost_ms: float
    coarse: float
    reused: float


@dataclass(kw_only=True)
class FidelitySearch:
    """The cheapest plan of each kind at a given SSIM, found on a few prompts.

    Two dials together: for several taus, none of which is too coarse by itself, the threshold of a
    cache is turned in the same way.

    Attributes:
        model: What draws.
        runs: Runs plans.
        prompts: The search prompts.
        steps: Steps of the reference.
        costs: Of a step.
        tried: What was run, by the plan's key.
    """

    model: DemoModel
    runs: Runs
    prompts: tuple[Prompt, ...]
    steps: int
    costs: StepCosts
    tried: dict[str, Tried] = field(default_factory=dict)

    def run(self, plan: Plan) -> Tried:
        """A plan's fidelity and cost."""
        if plan.key not in self.tried:
            whole = self.runs.run(reference(self.steps), self.prompts).images
            made = self.runs.run(plan, self.prompts)
            own = self.tried[plan.key] = Tried(
                plan=plan,
                ssim=statistics.fmean(self.model.compare(made.images, whole).ssim),
                cost_ms=statistics.fmean(self.costs.loop_ms(plan, one) for one in made.branches),
                coarse=statistics.fmean(map(coarse_share, made.branches)),
                reused=statistics.fmean(map(reused_share, made.branches)),
            )
            print(f"{own.ssim:.3f} {plan.label}", file=sys.stderr, flush=True)
        return self.tried[plan.key]

    def sweep(self, plan_at: PlanAt, levels: int, targets: Sequence[float]) -> int:
        """Turns a dial as far as each target allows; the level of the lowest target.

        Args:
            plan_at: The plan of a level.
            levels: The highest level.
            targets: SSIM of the search prompts.
        """
        reached = 0
        for target in sorted(targets, reverse=True):
            reached = highest(levels, lambda level: self.run(plan_at(level)).ssim >= target)  # noqa: B023
        return reached

    def sweep_pairs(
        self, rule: Template, kind: str, cache: CacheRange, targets: Sequence[float], count: int
    ) -> None:
        """Turns a cache's threshold for several taus.

        Args:
            rule: The rule, by tau.
            kind: Of the rule with the cache.
            cache: The cache.
            targets: SSIM of the search prompts.
            count: Taus, evenly over those that take coarse steps and meet the lowest target.
        """

        def alone(level: int) -> Plan:
            return plan_of(rule.at(level), DDIT)

        first = highest(rule.levels, lambda level: self.run(alone(level)).coarse == 0)
        last = self.sweep(alone, rule.levels, [min(targets)])
        for level in spread_levels(first + 1, last, count):
            plan = alone(level)
            within = [target for target in targets if self.run(plan).ssim >= target]
            self.sweep(partial(with_cache, plan, kind, cache), CACHE_LEVELS, within)

    def cheapest(self, kind: str, target: float, *, both: bool) -> Tried | None:
        """The cheapest plan of a kind that met a target.

        Args:
            kind: Of plans.
            target: SSIM of the search prompts.
            both: Whether it must take coarse steps and reuse.
        """
        found = [
            tried
            for tried in self.tried.values()
            if tried.plan.kind == kind
            and tried.ssim >= target
            and (not both or (tried.coarse > 0 and tried.reused > 0))
        ]
        return min(found, key=lambda tried: tried.cost_ms, default=None)


def with_cache(plan: Plan, kind: str, cache: CacheRange, level: int) -> Plan:
    """A plan with a step cache: the threshold rises with the level, and at 0 there is none."""
    if level == 0:
        return plan
    threshold = on_log_scale(cache.thresholds, level - 1, CACHE_LEVELS - 1)
    chosen = replace(cache.cache, threshold=threshold)
    name = f"{type(chosen).__name__} {threshold:g}"
    return replace(plan, kind=kind, cache=chosen, label=f"{plan.label} + {name}")


def spread_levels(first: int, last: int, count: int) -> list[int]:
    """At most `count` levels from the first to the last, evenly; none where they cross."""
    if first > last:
        return []
    gaps = max(count - 1, 1)
    return sorted({round(first + (last - first) * place / gaps) for place in range(count)})


def coarse_share(branches: Sequence[str]) -> float:
    """Share of the steps that ran or reused at a coarse size."""
    return sum(not one.startswith("p") for one in branches) / len(branches)


def reused_share(branches: Sequence[str]) -> float:
    """Share of the steps that reused."""
    return sum(one.endswith(" reused") for one in branches) / len(branches)
