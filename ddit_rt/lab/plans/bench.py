"""Plans on a real engine: what they make, how similar it is to full resolution, what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ddit_rt.lab.measure.measures import Measure, measure_of
from ddit_rt.lab.measure.timing import Batch, Method, Pixels, measure
from ddit_rt.lab.plans.candidates import CacheRange, Candidate, full_resolution
from ddit_rt.lab.plans.dial import TAU_PROBES, branch, step_costs, tau_range
from ddit_rt.lab.plans.points import Evaluator, Measurement, Prompt
from ddit_rt.lab.plans.step_caches import (
    alternating,
    fitted_caches,
    several_models,
    threshold_range,
)
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_named
from ddit_rt.policies import FinePolicy, NoCache, PatchPolicy, StepCache

UNITS = ("ms", "tokens")
NO_FIT = (
    "without plans that skip steps: no step cache has a fit for this model; `ddit-rt calibrate "
    "ARTIFACT --model MODEL --cache magcache` makes one"
)
"""Note about a model that has no fit."""
SEVERAL_MODELS = (
    "without plans that skip steps: a fit of a step cache is for one model, and in this pipeline "
    "several take turns"
)
"""Note about a pipeline of experts."""


class Bench(Evaluator, Protocol):
    """What a calibration needs of an engine, at one number of steps.

    Attributes:
        steps: Steps of the reference.
        costs: Cost of one step at each patch size that the engine offers, `"p"` among them.
        taus: Range of tau: below the lowest every step is fine, above the highest none.
        caches: Step caches that can be searched.
        cache_costs: Cost of one step under a cache, `"p"` computed or `"p reused"`, by the cache's
            class.
        notes: What the search has to do without, and why.
        measure: By what plans are compared.
    """

    steps: int
    costs: Mapping[str, float]
    taus: tuple[float, float]
    caches: Sequence[CacheRange]
    cache_costs: Mapping[str, Mapping[str, float]]
    notes: Sequence[str]
    measure: Measure

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """Measures plans side by side; the first one is the reference of the others."""


class EngineBench:
    """A `Bench` of a loaded engine; see there for most of its attributes.

    Costs in the search come from tables, measured once: the median time of a step at each patch
    size, or its image tokens; with a step cache, that of a computed and of a reused one. `confirm`
    measures whole loops instead, interleaved. A video is as similar as its frames on average.

    Attributes:
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
            probe: Prompt to measure the tables with.
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
        self._references: dict[Prompt, Pixels] = {}
        self.measure = measure_of(family_named(engine.artifact.manifest.family))
        self.costs: Mapping[str, float] = self._cost_table(probe, NoCache())
        self.taus = tau_range(self._probe(policy, NoCache(), probe) for policy in TAU_PROBES)
        self.caches: Sequence[CacheRange] = ()
        self.cache_costs: Mapping[str, Mapping[str, float]] = {}
        self.notes: Sequence[str] = ()
        if skipping:
            self._add_caches(probe)

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """See `Evaluator.evaluate`."""
        references = [self._reference(prompt) for prompt in prompts]
        made, traces = zip(*(self._generate(candidate, prompt) for prompt in prompts), strict=True)
        table = self.cache_costs.get(type(candidate.step_cache).__name__, self.costs)
        costs = [sum(table[branch(record)] for record in trace) for trace in traces]
        return self._measurement(costs, made, references)

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """See `Bench.confirm`. A cost in milliseconds is the loop's median over the repeats."""
        methods = [self._method(candidate) for candidate in candidates]
        batches = [Batch(prompts=(prompt.text,), seeds=(prompt.seed,)) for prompt in prompts]
        in_ms = self._unit == "ms"
        repeats = self._repeats if in_ms else 1
        samples = measure(methods, batches, repeats=repeats, advance=self._count)
        rows = [samples[method.name] for method in methods]
        references = [sample.outputs[0] for sample in rows[0]]
        return [
            self._measurement(
                [
                    sample.median_denoise * 1e3 if in_ms else float(_trace(sample.trace).tokens)
                    for sample in row
                ],
                [sample.outputs[0] for sample in row],
                references,
            )
            for row in rows
        ]

    def _measurement(
        self, costs: Sequence[float], made: Sequence[Pixels], references: Sequence[Pixels]
    ) -> Measurement:
        found = self.measure.compare(made, references)
        cost = statistics.fmean(costs)
        return Measurement(cost=cost, similarity=found.similarity, psnr=found.ratio)

    def _method(self, candidate: Candidate) -> Method:
        return candidate.on(self._engine, candidate.key, **self._arguments)

    def _probe(self, policy: PatchPolicy, cache: StepCache, prompt: Prompt) -> RunTrace:
        """A run whose outcome does not count."""
        candidate = Candidate(
            kind="", label="", policy=policy, num_inference_steps=self.steps, step_cache=cache
        )
        return self._generate(candidate, prompt)[1]

    def _generate(self, candidate: Candidate, prompt: Prompt) -> tuple[Pixels, RunTrace]:
        batch = Batch(prompts=(prompt.text,), seeds=(prompt.seed,))
        made = self._method(candidate).generate(batch)
        self._count()
        return made.outputs[0], _trace(made.trace)

    def _count(self) -> None:
        self.runs += 1
        self._advance()

    def _reference(self, prompt: Prompt) -> Pixels:
        if prompt not in self._references:
            self._references[prompt], _ = self._generate(full_resolution(self.steps), prompt)
        return self._references[prompt]

    def _cost_table(self, probe: Prompt, cache: StepCache) -> dict[str, float]:
        return step_costs(
            lambda policy, cache: self._probe(policy, cache, probe),
            [entry.patch for entry in self._engine.artifact.manifest.buckets],
            self.steps,
            cache=cache,
            unit=self._unit,
        )

    def _add_caches(self, probe: Prompt) -> None:
        """Ranges and costs of the step caches that the model has a fit for."""
        fitted = fitted_caches(self._engine)
        traces = [(cache, self._probe(FinePolicy(), cache, probe)) for cache in fitted]
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


def _trace(trace: RunTrace | None) -> RunTrace:
    assert trace is not None, "an engine's run has a trace"
    return trace
