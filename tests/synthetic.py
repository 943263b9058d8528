"""An engine that is a formula, so that a calibration's optimum is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ddit_rt.lab.calibrate import Candidate, Measurement, Prompt
from ddit_rt.lab.measure.measures import IMAGE, Measure
from ddit_rt.lab.plans.bench import NO_FIT, Tables
from ddit_rt.lab.plans.step_caches import STEP_CACHES
from ddit_rt.policies import (
    DYNAMIC,
    CacheFit,
    CacheModel,
    CacheTable,
    PatchPolicy,
    Schedule,
)

NAMES = ("p", "2p", "4p")
COSTS = {"p": 10.0, "2p": 4.0, "4p": 2.5}
FIT = CacheFit(kind="teacache", values=(1.0, 0.0), source="a test")


@dataclass
class SyntheticBench:
    """Every step taken coarse loses similarity of its own, and so does every step left out.

    A coarse step at level x of the noise, 1 to 0, loses `coarse_loss * difficulty * weight(size) *
    (3 - 2 x) / N`, where difficulty is a prompt's: `1 + spread * (-1 to 1)`, by its seed. N steps
    instead of `steps` lose `step_loss * (steps / N - 1)`, and that times
    `1 + placing * log(shift / best_shift)^2`. Losses add up; SSIM is exp(-loss).

    The score of a step is its loss, so a threshold on it is the optimal rule; with `blind`, it
    falls when the loss rises, and no threshold is of any use.

    With a `reuse_loss` there is TeaCache. A step changes the model's input by
    `difficulty * (1.5 - k / N) / N`, and one that reuses loses `reuse_loss` times what has changed
    since the latest computed step, which is what TeaCache compares with its threshold. With an
    `interaction`, shares of coarse and of reused steps, what both lose together falls to a tenth
    where a plan has just these shares, and by less around them.
    """

    steps: int = 24
    coarse_loss: float = 0.1
    step_loss: float = 0.1
    spread: float = 0.9
    blind: bool = False
    reuse_loss: float | None = None
    interaction: tuple[float, float] | None = None
    best_shift: float = 1.0
    placing: float = 0.0
    offered: tuple[int, ...] = (1, 2, 4)
    evaluated: list[tuple[str, str]] = field(default_factory=list)
    measure: Measure = IMAGE
    die_at: int | None = None

    @property
    def tables(self) -> Tables:
        costs = COSTS if len(self.offered) > 1 else {"p": 10.0}
        changes = [(1.5 - k / self.steps) / self.steps for k in range(self.steps)]
        dial = replace(STEP_CACHES[0], ends=(0.02, 1.0), changes=changes, reused=0.1)
        reused = {f"{name} reused": 1.0 for name in COSTS}
        caches = self.reuse_loss is not None
        return Tables(
            steps=self.steps,
            measure=self.measure,
            costs=costs,
            taus=(1e-3, 1.0),
            dials=[dial] if caches else [],
            cache_costs={"TeaCache": {**COSTS, **reused}} if caches else {},
            places=self.placing > 0,
            notes=[] if caches else [NO_FIT],
        )

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        return Measurement.of([self._one(candidate, prompt) for prompt in prompts])

    def _one(self, candidate: Candidate, prompt: Prompt) -> tuple[float, float, float]:
        if self.die_at is not None and len(self.evaluated) >= self.die_at:
            raise KeyboardInterrupt
        self.evaluated.append((candidate.key, prompt.text))
        steps = candidate.num_inference_steps
        sizes = self._sizes(candidate.policy, prompt, steps)
        reused = self._reused(candidate, prompt, sizes)
        added = sum(self.loss(prompt, k, size, steps) for k, size in enumerate(sizes))
        added += sum((self.reuse_loss or 0.0) * change for change in reused.values())
        if self.interaction is not None:
            shares = sum(size > 0 for size in sizes) / steps, len(reused) / steps
            away = sum((a - b) ** 2 for a, b in zip(shares, self.interaction, strict=True))
            added *= 1 - 0.9 * math.exp(-away / 0.12)
        loss = self.step_loss * (self.steps / steps - 1) * self._placed(candidate) + added
        computed = [size for k, size in enumerate(sizes) if k not in reused]
        cost = sum(COSTS[NAMES[size]] for size in computed) + len(reused)
        return cost, math.exp(-loss), 30.0

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        return [self.evaluate(candidate, prompts) for candidate in candidates]

    def loss(self, prompt: Prompt, step: int, bucket: int, steps: int) -> float:
        if bucket == 0:
            return 0.0
        scale = self.coarse_loss * self._difficulty(prompt) * (1.0, 2.0)[bucket - 1]
        return scale * (2 * step + 1) / steps**2

    def _placed(self, candidate: Candidate) -> float:
        shift = 1.0
        if candidate.sigmas is not None and len(candidate.sigmas) > 1:
            (even, level) = 1 - 1 / len(candidate.sigmas), candidate.sigmas[1]
            shift = level * (1 - even) / (even * (1 - level))
        return 1 + self.placing * math.log(shift / self.best_shift) ** 2

    def _difficulty(self, prompt: Prompt) -> float:
        # Spread evenly over any run of seeds: the golden ratio's multiples.
        place = (prompt.seed * 0.618034) % 1
        return 1 + self.spread * (2 * place - 1)

    def _sizes(self, policy: PatchPolicy, prompt: Prompt, steps: int) -> list[int]:
        sigmas = tuple(1 - k / steps for k in range(steps + 1))
        table = policy.resolve(Schedule(sigmas=sigmas, offered=self.offered))
        return [
            self._decide(table.thresholds[k], prompt, k, steps) if forced == DYNAMIC else forced
            for k, forced in enumerate(table.forced)
        ]

    def _reused(self, candidate: Candidate, prompt: Prompt, sizes: list[int]) -> dict[int, float]:
        """The steps that reuse, with what has changed since the latest computed one."""
        steps = len(sizes)
        changes = [self._difficulty(prompt) * (1.5 - k / steps) / steps for k in range(steps)]
        model = CacheModel(
            name="test", steps=steps, fits=(FIT,), time_changes=lambda projected: changes
        )
        resolved = candidate.step_cache.resolve(model)
        return {} if resolved is None else _walk(resolved, sizes)

    def _decide(self, taus: Sequence[float], prompt: Prompt, step: int, steps: int) -> int:
        chosen = 0
        for bucket, tau in enumerate(taus, start=1):
            score = self.loss(prompt, step, bucket, steps) * steps
            if (0.5 - score if self.blind else score) < tau:
                chosen = bucket
        return chosen


def _walk(table: CacheTable, sizes: Sequence[int]) -> dict[int, float]:
    """What `ops.decide_reuse_` does with increments that are known beforehand."""
    reused, changed = {}, 0.0
    for k, increment in enumerate(table.increments):
        changed += increment
        if math.isnan(increment) or sizes[k] != sizes[k - 1] or changed >= table.threshold:
            changed = 0.0
        else:
            reused[k] = changed
    return reused
