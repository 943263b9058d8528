"""Rows at equal cost: rules matched to a share of the tokens, and the rivals of a row.

At a fixed tau two rules spend different amounts, and a comparison says nothing. So tau is searched
in a closed loop, on prompts of its own, until a rule spends a given share of the all-fine tokens.
A row's rivals are the most fine steps that take no longer; the most fine steps that take no more
tokens; and the static plan that is best, on the prompts of the search, of those that take no
longer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quality_loop import HostRule
from quality_metrics import Judge
from quality_paths import TRAINING_FREE
from quality_runs import Plan, fine

from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.plans.candidates import Static
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.policies import PatchPolicy

Row = dict[str, Any]
MakePolicy = Callable[[float], PatchPolicy | HostRule]
_TAU_RANGE = (1e-5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """Makes rows at one number of steps.

    Attributes:
        judge: Judges the pictures.
        search_prompts: Prompts that tau and static plans are chosen on, none of the judge's.
        steps: Denoising steps.
        path: Coarse step.
        iterations: Halvings of the range of tau.
        share: Share of the all-fine tokens that rules are matched to.
    """

    judge: Judge
    search_prompts: tuple[Prompt, ...]
    steps: int
    path: str
    iterations: int = 9
    share: float = 0.5

    def row(self, name: str, label: str, kind: str, policy: PatchPolicy | HostRule) -> Row:
        """A plan's row, compared with the all-fine pictures of as many steps."""
        plan = Plan(policy=policy, steps=self.steps, path=self.path)
        return self.judge.row(name, label, kind, plan, self.steps)

    def matched(self, name: str, label: str, make: MakePolicy) -> Row:
        """A rule at the tau at which it spends the share; the row says what came out."""
        tau, found = self.search_tau(make)
        row = self.row(name, label, "dynamic", make(tau))
        return {**row, "tau": tau, "target_share": self.share, "searched_share": found}

    def search_tau(self, make: MakePolicy) -> tuple[float, float]:
        """The tau of those tried whose closed loop comes closest to the share, and its share.

        The share falls as tau rises, but not strictly: decisions change the latents that later
        ones see. So this keeps the best of all that it tries.
        """
        low, high = map(math.log, _TAU_RANGE)
        tried: list[tuple[float, float, float]] = []
        for _ in range(self.iterations):
            tau = float(f"{math.exp((low + high) / 2):.4g}")
            found = self._share_of(Plan(policy=make(tau), steps=self.steps, path=self.path))
            tried.append((abs(found - self.share), tau, found))
            low, high = (math.log(tau), high) if found > self.share else (low, math.log(tau))
        _, tau, found = min(tried)
        return tau, found

    def _share_of(self, plan: Plan) -> float:
        costs, made = self.judge.costs, self.judge.runs.run(plan, self.search_prompts)
        tokens = statistics.fmean(costs.loop_tokens(sizes) for sizes in made.sizes)
        return tokens / (costs.tokens["p"] * self.steps)

    def static_of(self, row: Row) -> list[Row]:
        """The static rival of a row; none where even one coarse step less would take longer."""
        best: tuple[float, str, PatchPolicy] | None = None
        reference = self.judge.runs.run(fine(self.steps), self.search_prompts).pictures
        for template in static_templates(self.steps):
            level = self._level(template, row["loop_ms"])
            if level is not None:
                candidate = template.at(level)
                plan = Plan(policy=candidate.policy, steps=self.steps, path=self.path)
                pictures = self.judge.runs.run(plan, self.search_prompts).pictures
                ssim = fidelity(pictures, reference).mean_ssim
                if best is None or ssim > best[0]:
                    best = ssim, candidate.label, candidate.policy
        if best is None or row["tokens_share"] == 1:
            return []
        static = self.row(f"static_{row['name']}", best[1], "static", best[2])
        row["static"] = static["name"]
        return [static]

    def _level(self, template: Static, loop_ms: float) -> int | None:
        """The fewest coarse steps, at least one, with which a template takes no longer."""
        for level in range(1, template.levels + 1):
            sizes = [size for size, count in template.sizes(level).items() for _ in range(count)]
            if self.judge.costs.loop_ms(self.path, sizes) <= loop_ms:
                return level
        return None


def with_fewer_steps(judge: Judge, rows: Sequence[Row]) -> list[Row]:
    """The rows, each followed by its rivals of fewer fine steps that are not in the table yet.

    Writes their names into the rows, as `fewer_steps`.
    """
    table: dict[str, Row] = {}
    for row in rows:
        table[row["name"]] = row
        if row["kind"] not in ("dynamic", "static") or row["tokens_share"] == 1:
            continue  # nothing is cheaper than all fine at its cost
        reference, row["fewer_steps"] = row["reference_steps"], {}
        for kind, exact in (
            ("equal_time", row["loop_ms"] / judge.costs.milliseconds[TRAINING_FREE]["p"]),
            ("equal_tokens", row["tokens"] / judge.costs.tokens["p"]),
        ):
            count = max(1, min(reference, math.floor(exact + 1e-9)))
            name = row["fewer_steps"][kind] = f"fewer_{count}_of_{reference}"
            if name not in table:
                label = f"{count} of {reference} fine steps"
                table[name] = judge.row(name, label, "fewer_steps", fine(count), reference)
    return list(table.values())


def static_templates(steps: int) -> list[Static]:
    """Static plans that are tried as rivals: interleaved after a fine start, and in one block."""
    interleaved = [
        Static(steps=steps, coarse=coarse) for coarse in (("2p",), ("4p",), ("4p", "2p"))
    ]
    blocks = [
        Static(steps=steps, coarse=coarse, head=0, refresh=None)
        for coarse in (("2p",), ("4p", "2p"))
    ]
    return [*interleaved, *blocks]
