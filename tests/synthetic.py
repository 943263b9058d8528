"""An engine that is a formula, so that a calibration's optimum is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddit_rt.calibration import Candidate, Measurement, Prompt
from ddit_rt.patch_scheduler import DYNAMIC, PatchPolicy, Schedule

NAMES = ("p", "2p", "4p")


@dataclass
class SyntheticBench:
    """Every step taken coarse loses similarity of its own, and so does every step left out.

    A coarse step k of N loses `coarse_loss * difficulty * weight(size) * (2 k + 1) / N^2`, where
    difficulty is a prompt's: `1 + spread * (-1 to 1)`, by its seed. N steps instead of `steps` lose
    `step_loss * (steps / N - 1)`. Losses add up; SSIM is exp(-loss).

    The score of a step is its loss, so a threshold on it is the optimal rule; with `blind`, it
    falls when the loss rises, and no threshold is of any use.
    """

    steps: int = 24
    coarse_loss: float = 0.1
    step_loss: float = 0.1
    spread: float = 0.9
    blind: bool = False
    offered: tuple[int, ...] = (1, 2, 4)
    evaluated: list[str] = field(default_factory=list)
    taus: tuple[float, float] = (1e-3, 1.0)

    @property
    def costs(self) -> dict[str, float]:
        return (
            dict(zip(NAMES, (10.0, 4.0, 2.5), strict=True)) if len(self.offered) > 1 else {"p": 10}
        )

    def evaluate(
        self, policy: PatchPolicy, num_inference_steps: int, prompts: Sequence[Prompt]
    ) -> Measurement:
        self.evaluated += [prompt.text for prompt in prompts]
        sigmas = tuple(1 - k / num_inference_steps for k in range(num_inference_steps + 1))
        table = policy.resolve(Schedule(sigmas=sigmas, offered=self.offered))
        costs, similarity = [], []
        for prompt in prompts:
            sizes = [
                self._decide(table.thresholds[k], prompt, k, num_inference_steps)
                if forced == DYNAMIC
                else forced
                for k, forced in enumerate(table.forced)
            ]
            loss = self.step_loss * (self.steps / num_inference_steps - 1)
            loss += sum(
                self.loss(prompt, k, size, num_inference_steps) for k, size in enumerate(sizes)
            )
            costs.append(sum(self.costs[NAMES[size]] for size in sizes))
            similarity.append(math.exp(-loss))
        return Measurement(
            cost=sum(costs) / len(costs), similarity=tuple(similarity), psnr=(30.0,) * len(costs)
        )

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        return [self.evaluate(c.policy, c.num_inference_steps, prompts) for c in candidates]

    def loss(self, prompt: Prompt, step: int, bucket: int, steps: int) -> float:
        if bucket == 0:
            return 0.0
        # Spread evenly over any run of seeds: the golden ratio's multiples.
        place = (prompt.seed * 0.618034) % 1
        difficulty = 1 + self.spread * (2 * place - 1)
        return self.coarse_loss * difficulty * (1.0, 2.0)[bucket - 1] * (2 * step + 1) / steps**2

    def _decide(self, taus: Sequence[float], prompt: Prompt, step: int, steps: int) -> int:
        chosen = 0
        for bucket, tau in enumerate(taus, start=1):
            score = self.loss(prompt, step, bucket, steps) * steps
            if (0.5 - score if self.blind else score) < tau:
                chosen = bucket
        return chosen
