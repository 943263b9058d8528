"""Plans on a real engine: pictures, their similarity to all-fine ones, and what they cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ddit_rt.calibration.plans import Candidate, all_fine
from ddit_rt.calibration.points import Evaluator, Measurement, Prompt
from ddit_rt.demo.measure import Batch, Contender, Generation, Picture, engine_contender, measure
from ddit_rt.demo.quality import fidelity
from ddit_rt.errors import ShapeError
from ddit_rt.executor import RunTrace
from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.step_cache import NoCache

if TYPE_CHECKING:
    from ddit_rt.calibration.run import CalibrationConfig

UNITS = ("ms", "tokens")
_NO_SCORES = (1e-5, 1e-1)
"""Range of tau where a run is too short for a score."""


class Bench(Evaluator, Protocol):
    """What a calibration needs of an engine, at one number of steps.

    Attributes:
        steps: Steps of the reference.
        costs: Cost of one step at each patch size that the engine offers, `"p"` among them.
        taus: Range of tau: below the lowest every step is fine, above the highest none.
    """

    steps: int
    costs: Mapping[str, float]
    taus: tuple[float, float]

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """Measures plans side by side, the first being the all-fine reference of the others."""


class EngineBench:
    """A `Bench` of a loaded engine.

    Costs in the search come from a table, measured once: the median time of a step at each patch
    size, or its image tokens. `confirm` measures whole loops instead, interleaved.

    Attributes:
        steps: As in `Bench`.
        costs: As in `Bench`.
        taus: As in `Bench`.
        runs: Generations so far.
    """

    def __init__(
        self,
        engine: Any,
        *,
        steps: int,
        probe: Prompt,
        arguments: Mapping[str, Any],
        unit: str = "ms",
        repeats: int = 3,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Measures the table of costs and the range of tau.

        Args:
            engine: The engine, with its pipeline.
            steps: Steps of the reference.
            probe: Prompt to measure the table with.
            arguments: Further arguments of the engine's call, e.g. `height`.
            unit: `"ms"` or `"tokens"`.
            repeats: Rounds of `confirm`.
            advance: Called after every generation.
        """
        if unit not in UNITS:
            raise ValueError(f"got the cost {unit!r}; it is one of {list(UNITS)}")
        self.steps = steps
        self.runs = 0
        self._engine = engine
        self._arguments = dict(arguments)
        self._unit = unit
        self._repeats = repeats
        self._advance = advance
        self._references: dict[Prompt, Picture] = {}
        self.costs: Mapping[str, float] = self._cost_table(probe)
        self.taus = self._tau_range(probe)

    def evaluate(
        self, policy: PatchPolicy, num_inference_steps: int, prompts: Sequence[Prompt]
    ) -> Measurement:
        """See `Evaluator.evaluate`."""
        pictures, costs = [], []
        references = [self._reference(prompt) for prompt in prompts]
        for prompt in prompts:
            picture, trace = self._generate(policy, num_inference_steps, prompt)
            pictures.append(picture)
            costs.append(sum(self.costs[size] for size in trace.patch_sizes()))
        return _measurement(statistics.fmean(costs), pictures, references)

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """See `Bench.confirm`. In milliseconds: of the loop, median over the repeats."""
        contenders = [self._contender(candidate) for candidate in candidates]
        batches = [Batch(prompts=(prompt.text,), seeds=(prompt.seed,)) for prompt in prompts]
        repeats = self._repeats if self._unit == "ms" else 1
        samples = measure(contenders, batches, repeats=repeats, advance=self._count)
        references = [sample.pictures[0] for sample in samples[contenders[0].name]]
        results = []
        for contender in contenders:
            row = samples[contender.name]
            costs = [
                sample.median_denoise * 1e3
                if self._unit == "ms"
                else float(_trace(sample.trace).tokens)
                for sample in row
            ]
            pictures = [sample.pictures[0] for sample in row]
            results.append(_measurement(statistics.fmean(costs), pictures, references))
        return results

    def _contender(self, candidate: Candidate) -> Contender:
        return engine_contender(
            candidate.key,
            candidate.label,
            self._engine,
            patch_policy=candidate.policy,
            num_inference_steps=candidate.num_inference_steps,
            step_cache=NoCache(),  # a plan's cost is that of its sizes
            **self._arguments,
        )

    def _generate(
        self, policy: PatchPolicy, steps: int, prompt: Prompt
    ) -> tuple[Picture, RunTrace]:
        candidate = Candidate(kind="", label="", policy=policy, num_inference_steps=steps)
        batch = Batch(prompts=(prompt.text,), seeds=(prompt.seed,))
        made: Generation = self._contender(candidate).generate(batch)
        self._count()
        return made.pictures[0], _trace(made.trace)

    def _count(self) -> None:
        self.runs += 1
        self._advance()

    def _reference(self, prompt: Prompt) -> Picture:
        if prompt not in self._references:
            fine = all_fine(self.steps)
            self._references[prompt], _ = self._generate(fine.policy, self.steps, prompt)
        return self._references[prompt]

    def _cost_table(self, probe: Prompt) -> dict[str, float]:
        """Per size that this picture offers, the median over a run's steps."""
        table: dict[str, float] = {}
        for size in (entry.patch for entry in self._engine.artifact.manifest.buckets):
            policy = FinePolicy() if size == "p" else StaticPolicy([size] * self.steps)
            try:
                self._generate(policy, self.steps, probe)  # warms up
            except ShapeError:
                if size == "p":
                    raise
                continue
            _, trace = self._generate(policy, self.steps, probe)
            table[size] = statistics.median(
                record.latency_ms if self._unit == "ms" else float(record.tokens)
                for record in trace
            )
        return table

    def _tau_range(self, probe: Prompt) -> tuple[float, float]:
        """From the scores of an all-fine and an all-coarse run: bounds, no thresholds."""
        scores: list[float] = []
        for tau in (0.0, 1e30):
            policy = DDiTPolicy(tau=tau, refresh=None, fine_tail=0)
            _, trace = self._generate(policy, self.steps, probe)
            scores += [score for record in trace for score in record.scores.values()]
        usable = [score for score in scores if score > 0 and math.isfinite(score)]
        return (min(usable) / 2, max(usable) * 2) if usable else _NO_SCORES


def most_runs(config: CalibrationConfig, *, sizes: int, repeats: int) -> int:
    """Generations that a calibration takes at most.

    Args:
        config: Its settings.
        sizes: Patch sizes of the artifact.
        repeats: Rounds of `EngineBench.confirm`.
    """
    rounds = repeats if config.cost_unit == "ms" else 1
    search = config.calibration_prompts * (1 + 3 * config.evaluations)
    # Three finalists, then two rivals at equal cost, each time beside all fine and warmed up.
    confirm = (4 + 3) * (1 + rounds * config.held_out_prompts)
    return 2 * sizes + 2 + search + confirm


def _trace(trace: RunTrace | None) -> RunTrace:
    assert trace is not None, "an engine's run has a trace"
    return trace


def _measurement(
    cost: float, pictures: Sequence[Picture], references: Sequence[Picture]
) -> Measurement:
    closeness = fidelity(pictures, references)
    return Measurement(cost=cost, similarity=closeness.ssim, psnr=closeness.psnr)
