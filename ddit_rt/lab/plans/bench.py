"""Plans on a real engine: what they make, how similar it is to all fine, and what they cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ddit_rt.errors import ShapeError
from ddit_rt.lab.measure.fidelity import Fidelity, fidelity
from ddit_rt.lab.measure.timing import (
    Batch,
    Contender,
    Generation,
    Picture,
    engine_contender,
    measure,
)
from ddit_rt.lab.measure.video_fidelity import clip_fidelity
from ddit_rt.lab.plans.caches import alternating, fitted_caches, several_models, threshold_range
from ddit_rt.lab.plans.candidates import CacheRange, Candidate, all_fine
from ddit_rt.lab.plans.points import Evaluator, Measurement, Prompt
from ddit_rt.loop import RunTrace, StepRecord
from ddit_rt.models import family_named
from ddit_rt.policies import DDiTPolicy, FinePolicy, NoCache, PatchPolicy, StaticPolicy, StepCache

UNITS = ("ms", "tokens")
NO_FIT = (
    "without plans that skip steps: no step cache has a fit for this model; `ddit-rt calibrate "
    "ARTIFACT --model MODEL --cache teacache` makes one"
)
"""Of a model that has none."""
SEVERAL_MODELS = (
    "without plans that skip steps: a fit of a step cache is for one model, and in this pipeline "
    "several take turns"
)
"""Of a pipeline of experts."""

_NO_SCORES = (1e-5, 1e-1)
"""Range of tau where a run is too short for a score."""


class Bench(Evaluator, Protocol):
    """What a calibration needs of an engine, at one number of steps.

    Attributes:
        steps: Steps of the reference.
        costs: Cost of one step at each patch size that the engine offers, `"p"` among them.
        taus: Range of tau: below the lowest every step is fine, above the highest none.
        caches: Step caches that can be searched.
        cache_costs: By class of the cache, cost of one step under it, `"p"` computed or
            `"p reused"`.
        notes: What the search has to do without, and why.
        makes: What a run makes, `"picture"` or `"clip"`.
    """

    steps: int
    costs: Mapping[str, float]
    taus: tuple[float, float]
    caches: Sequence[CacheRange]
    cache_costs: Mapping[str, Mapping[str, float]]
    notes: Sequence[str]
    makes: str

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """Measures plans side by side, the first being the all-fine reference of the others."""


class EngineBench:
    """A `Bench` of a loaded engine.

    Costs in the search come from tables, measured once: the median time of a step at each patch
    size, or its image tokens; with a step cache, that of a computed and of a reused one. `confirm`
    measures whole loops instead, interleaved. Clips are as similar as their frames are on average.

    Attributes:
        steps: As in `Bench`.
        costs: As in `Bench`.
        taus: As in `Bench`.
        caches: As in `Bench`.
        cache_costs: As in `Bench`.
        notes: As in `Bench`.
        makes: As in `Bench`.
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
        skipping: bool = False,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Measures the tables of costs and the ranges of the dials.

        Args:
            engine: The engine, with its pipeline.
            steps: Steps of the reference.
            probe: Prompt to measure the table with.
            arguments: Further arguments of the engine's call, e.g. `height`.
            unit: `"ms"` or `"tokens"`.
            repeats: Rounds of `confirm`.
            skipping: Whether to look for step caches that the model has a fit for.
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
        video = family_named(engine.artifact.manifest.family).video
        self.makes = "clip" if video else "picture"
        self._fidelity = _frame_means if video else fidelity
        self.costs: Mapping[str, float] = self._cost_table(probe, NoCache())
        self.taus = self._tau_range(probe)
        self.caches: Sequence[CacheRange] = ()
        self.cache_costs: Mapping[str, Mapping[str, float]] = {}
        self.notes: Sequence[str] = ()
        if skipping:
            self._add_caches(probe)

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """See `Evaluator.evaluate`."""
        pictures, costs = [], []
        references = [self._reference(prompt) for prompt in prompts]
        cached = self.cache_costs.get(type(candidate.step_cache).__name__, self.costs)
        for prompt in prompts:
            picture, trace = self._generate(candidate, prompt)
            pictures.append(picture)
            costs.append(sum(cached[_branch(record)] for record in trace))
        return self._measurement(costs, pictures, references)

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
            results.append(self._measurement(costs, pictures, references))
        return results

    def _measurement(
        self, costs: Sequence[float], made: Sequence[Picture], references: Sequence[Picture]
    ) -> Measurement:
        close = self._fidelity(made, references)
        return Measurement(cost=statistics.fmean(costs), similarity=close.ssim, psnr=close.psnr)

    def _contender(self, candidate: Candidate) -> Contender:
        return engine_contender(
            candidate.key,
            candidate.label,
            self._engine,
            patch_policy=candidate.policy,
            num_inference_steps=candidate.num_inference_steps,
            step_cache=candidate.step_cache,
            **self._arguments,
        )

    def _probe(self, policy: PatchPolicy, prompt: Prompt, cache: StepCache) -> RunTrace:
        """A run whose outcome does not count."""
        candidate = Candidate(
            kind="", label="", policy=policy, num_inference_steps=self.steps, step_cache=cache
        )
        return self._generate(candidate, prompt)[1]

    def _generate(self, candidate: Candidate, prompt: Prompt) -> tuple[Picture, RunTrace]:
        batch = Batch(prompts=(prompt.text,), seeds=(prompt.seed,))
        made: Generation = self._contender(candidate).generate(batch)
        self._count()
        return made.pictures[0], _trace(made.trace)

    def _count(self) -> None:
        self.runs += 1
        self._advance()

    def _reference(self, prompt: Prompt) -> Picture:
        if prompt not in self._references:
            self._references[prompt], _ = self._generate(all_fine(self.steps), prompt)
        return self._references[prompt]

    def _cost_table(self, probe: Prompt, cache: StepCache) -> dict[str, float]:
        """Per size that the run's shape offers, and per branch, the median over a run's steps."""
        samples: dict[str, list[float]] = {}
        for size in (entry.patch for entry in self._engine.artifact.manifest.buckets):
            policy = FinePolicy() if size == "p" else StaticPolicy([size] * self.steps)
            try:
                self._probe(policy, probe, cache)  # warms up
            except ShapeError:
                if size == "p":
                    raise
                continue
            for record in self._probe(policy, probe, cache):
                cost = record.latency_ms if self._unit == "ms" else float(record.tokens)
                samples.setdefault(_branch(record), []).append(cost)
        return {branch: statistics.median(costs) for branch, costs in samples.items()}

    def _add_caches(self, probe: Prompt) -> None:
        """Ranges and costs of the step caches that the model has a fit for."""
        fitted = fitted_caches(self._engine)
        traces = [(cache, self._probe(FinePolicy(), probe, cache)) for cache in fitted]
        ranges = [(cache, threshold_range(trace)) for cache, trace in traces]
        self.caches = [CacheRange(cache=cache, thresholds=ends) for cache, ends in ranges if ends]
        of_class = {type(entry.cache).__name__: entry.cache for entry in self.caches}
        self.cache_costs = {
            name: self._cost_table(probe, alternating(cache)) for name, cache in of_class.items()
        }
        if not fitted:
            self.notes = [SEVERAL_MODELS if several_models(self._engine) else NO_FIT]
        elif not self.caches:
            self.notes = [f"without plans that skip steps: of {self.steps} steps none may"]

    def _tau_range(self, probe: Prompt) -> tuple[float, float]:
        """From the scores of an all-fine and an all-coarse run: bounds, no thresholds."""
        scores: list[float] = []
        for tau in (0.0, 1e30):
            policy = DDiTPolicy(tau, refresh=None, fine_tail=0, criterion="raw")
            trace = self._probe(policy, probe, NoCache())
            scores += [score for record in trace for score in record.scores.values()]
        usable = [score for score in scores if score > 0 and math.isfinite(score)]
        return (min(usable) / 2, max(usable) * 2) if usable else _NO_SCORES


def _branch(record: StepRecord) -> str:
    return f"{record.patch_size} reused" if record.reused else record.patch_size


def _trace(trace: RunTrace | None) -> RunTrace:
    assert trace is not None, "an engine's run has a trace"
    return trace


def _frame_means(clips: Sequence[Picture], references: Sequence[Picture]) -> Fidelity:
    """Of clips `[F, H, W, 3]`, each the mean over its frames."""
    return clip_fidelity(clips, references).clips
