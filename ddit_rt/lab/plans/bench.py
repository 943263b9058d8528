"""Plans on a real engine: what they make, how similar it is to full resolution, what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lab.measure.measures import Measure, measure_of
from ddit_rt.lab.measure.timing import Batch, Method, Pixels, measure, on_trial
from ddit_rt.lab.plans.candidates import Candidate, full_resolution
from ddit_rt.lab.plans.dial import TAU_PROBES, branch, step_costs, tau_range
from ddit_rt.lab.plans.points import Evaluator, Measurement, Prompt
from ddit_rt.lab.plans.reuse_plan import DRIFTING, Drift, measured_drift
from ddit_rt.lab.plans.step_caches import (
    CacheDial,
    changes_of,
    searched_caches,
    several_models,
    threshold_range,
)
from ddit_rt.loop import RunTrace
from ddit_rt.models import family_named
from ddit_rt.models.arguments import call_defaults
from ddit_rt.policies import FinePolicy, NoCache, PatchPolicy, StaticCache, StepCache

UNITS = ("ms", "tokens")
NO_FIT = (
    "with no step cache but those that need no fit: for this model there is none; `ddit-rt "
    "calibrate ARTIFACT --model MODEL --cache magcache` makes one"
)
"""Note about a model that has no fit."""
SEVERAL_MODELS = (
    "with no step cache but those that need no fit: a fit is for one model, and in this pipeline "
    "several take turns"
)
"""Note about a pipeline of experts."""
EVEN = (
    "with a static step cache that is evenly spread: how residuals drift is measured of one model, "
    "in the engine's own loop"
)
"""Note about a model whose reuse cannot be planned step by step."""
OWN_LEVELS = "with the pipeline's own noise levels alone: its call takes no others"
"""Note about a pipeline without `sigmas`, or whose scheduler would ignore them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What a bench knows before it runs a plan, for one number of steps.

    Attributes:
        steps: Steps of the reference.
        measure: By what plans are compared.
        costs: Cost of one step at each patch size that the engine offers, `"p"` among them.
        taus: Range of tau: below the lowest every step is fine, above the highest none.
        dials: Step caches that can be searched, with the ends of their dials.
        cache_costs: Cost of one step under a cache, `"p"` computed or `"p reused"`, by the cache's
            class.
        places: Whether the pipeline's call takes noise levels.
        notes: What a search has to do without, and why.
        drift: How far residuals drift from step to step; None where that cannot be measured.
        runs: Generations that it took to find this out.
    """

    steps: int
    measure: Measure
    costs: Mapping[str, float]
    taus: tuple[float, float]
    dials: Sequence[CacheDial] = ()
    cache_costs: Mapping[str, Mapping[str, float]]
    places: bool = False
    notes: Sequence[str] = ()
    drift: Drift | None = None
    runs: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What was measured of it, for a file; `EngineBench` takes it as `known`."""
        return {
            "costs": dict(self.costs),
            "taus": list(self.taus),
            "ends": {dial.name: list(dial.ends or ()) for dial in self.dials},
            "changes": {dial.name: list(dial.changes) for dial in self.dials},
            "cache_costs": {name: dict(costs) for name, costs in self.cache_costs.items()},
            "drift": self.drift and asdict(self.drift),
            "runs": self.runs,
        }


class Bench(Evaluator, Protocol):
    """What a calibration needs of an engine, at one number of steps."""

    @property
    def tables(self) -> Tables:
        """What is known before a plan runs."""

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """Measures plans side by side; the first one is the reference of the others."""


class EngineBench:
    """A `Bench` of a loaded engine.

    Costs in the search come from tables, measured once: the median time of a step at each patch
    size, or its image tokens; with a step cache, that of a computed and of a reused one. `confirm`
    measures whole loops instead, interleaved. A video is as similar as its frames on average.

    Attributes:
        runs: Generations so far.
        tables: See `Tables`.
    """

    def __init__(
        self,
        engine: Any,
        *,
        steps: int,
        probe: Prompt,
        arguments: Mapping[str, Any],
        unit: str = "ms",
        skipping: bool = False,
        known: Mapping[str, Any] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Measures the tables of costs and the ranges of the dials.

        Args:
            engine: The engine, with its pipeline.
            steps: Steps of the reference.
            probe: Prompt to measure the tables with.
            arguments: Further arguments of the engine's call, e.g. `height`.
            unit: `"ms"` or `"tokens"`.
            skipping: Whether to look for step caches that the model can take.
            known: What `Tables.to_dict` gave for the same: nothing is measured then.
            advance: Called after every generation.
        """
        if unit not in UNITS:
            raise ValueError(f"got the cost {unit!r}; it is one of {list(UNITS)}")
        self.runs = 0
        self._engine, self._arguments = engine, dict(arguments)
        self._steps, self._unit, self._advance = steps, unit, advance
        self._references: dict[Prompt, Pixels] = {}
        self._ran: set[str] = set()
        fitted = searched_caches(engine) if skipping else ()
        found = known or self._measured(probe, fitted)
        dials, drift = [], found.get("drift") and Drift.of(found["drift"])
        for one in fitted:
            if ends := found["ends"].get(one.name):
                changes = found.get("changes", {}).get(one.name, ())
                dial = replace(one, ends=tuple(ends), changes=changes)
                if isinstance(one.cache, StaticCache) and drift is not None:
                    dial = dial.planned(drift)
                dials.append(dial.priced(found["cache_costs"][type(one.cache).__name__]))
        places = _takes_levels(engine.pipeline)
        self.tables = Tables(
            steps=steps,
            measure=measure_of(family_named(engine.artifact.manifest.family)),
            costs=found["costs"],
            taus=(found["taus"][0], found["taus"][1]),
            dials=dials,
            cache_costs=found["cache_costs"],
            places=places,
            notes=[*(self._no_caches(dials) if skipping else ()), *[OWN_LEVELS] * (not places)],
            drift=drift,
            runs=found["runs"],
        )

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """See `Evaluator.evaluate`."""
        references = [self._reference(prompt) for prompt in prompts]
        made, traces = zip(*(self._generate(candidate, prompt) for prompt in prompts), strict=True)
        cache = type(candidate.step_cache).__name__
        table = self.tables.cache_costs.get(cache, self.tables.costs)
        costs = [sum(table[branch(record)] for record in trace) for trace in traces]
        return self._measurement(costs, made, references)

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """See `Bench.confirm`. A cost in milliseconds is what the whole loop took."""
        methods = [self._method(candidate) for candidate in candidates]
        batches = [Batch(prompts=(prompt.text,), seeds=(prompt.seed,)) for prompt in prompts]
        in_ms = self._unit == "ms"
        cold = in_ms and not self._ran >= {candidate.key for candidate in candidates}
        samples = measure(methods, batches, repeats=1, advance=self._count, warm_up=cold)
        self._ran |= {candidate.key for candidate in candidates}
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
        similarity, ratio = self.tables.measure.compare(made, references)
        return Measurement(costs=tuple(costs), similarity=similarity, psnr=ratio)

    def _method(self, candidate: Candidate) -> Method:
        return on_trial(candidate.on(self._engine, candidate.key, **self._arguments))

    def _probe(self, policy: PatchPolicy, cache: StepCache, prompt: Prompt) -> RunTrace:
        """A run whose outcome does not count."""
        candidate = Candidate(
            kind="", label="", policy=policy, num_inference_steps=self._steps, step_cache=cache
        )
        return self._generate(candidate, prompt)[1]

    def _generate(self, candidate: Candidate, prompt: Prompt) -> tuple[Pixels, RunTrace]:
        batch = Batch(prompts=(prompt.text,), seeds=(prompt.seed,))
        made = self._method(candidate).generate(batch)
        self._ran.add(candidate.key)
        self._count()
        return made.outputs[0], _trace(made.trace)

    def _count(self) -> None:
        self.runs += 1
        self._advance()

    def _reference(self, prompt: Prompt) -> Pixels:
        if prompt not in self._references:
            self._references[prompt], _ = self._generate(full_resolution(self._steps), prompt)
        return self._references[prompt]

    def _cost_table(
        self, probe: Prompt, cache: StepCache, *, warm_up: bool = True
    ) -> dict[str, float]:
        return step_costs(
            lambda policy, cache: self._probe(policy, cache, probe),
            [entry.patch for entry in self._engine.artifact.manifest.buckets],
            self._steps,
            cache=cache,
            unit=self._unit,
            warm_up=warm_up,
        )

    def _measured(self, probe: Prompt, dials: Sequence[CacheDial]) -> dict[str, Any]:
        """What `Tables.to_dict` has of it."""
        costs = self._cost_table(probe, NoCache())
        taus = tau_range(self._probe(policy, NoCache(), probe) for policy in TAU_PROBES)
        ends, changes, cache_costs = {}, {}, {}
        for dial in dials:
            found = dial.ends
            if found is None:
                trace = self._probe(FinePolicy(), dial.cache, probe)
                found, changes[dial.name] = threshold_range(trace), changes_of(trace)
            if found is not None:
                ends[dial.name] = found
                name = type(dial.cache).__name__
                if name not in cache_costs:
                    cache_costs[name] = self._cost_table(probe, dial.alternating, warm_up=False)
        return {
            "costs": costs,
            "taus": taus,
            "ends": ends,
            "changes": changes,
            "cache_costs": cache_costs,
            "drift": self._drift(probe) if dials else None,
            "runs": self.runs,
        }

    def _drift(self, probe: Prompt) -> dict[str, Any] | None:
        """See `measured_drift`; None where the model's steps cannot be taken one by one."""
        if several_models(self._engine):
            return None
        call = {**self._arguments, "num_inference_steps": self._steps}
        try:
            drift = measured_drift(self._engine, probe, call)
        except UnsupportedModelError:
            return None
        for _ in range(DRIFTING):
            self._count()
        return asdict(drift)

    def _no_caches(self, dials: Sequence[CacheDial]) -> list[str]:
        """What is said of the step caches that cannot be searched."""
        if not dials:
            return [f"without plans that skip steps: of {self._steps} steps none may"]
        even = [EVEN] * all(dial.drift is None for dial in dials)
        if any(dial.fit is not None for dial in dials):
            return even
        return [SEVERAL_MODELS if several_models(self._engine) else NO_FIT, *even]


def _takes_levels(pipeline: Any) -> bool:
    """Whether a pipeline's call takes noise levels that its scheduler heeds."""
    own = pipeline.scheduler.config.get("use_flow_sigmas", False)
    return "sigmas" in call_defaults(pipeline) and not own


def _trace(trace: RunTrace | None) -> RunTrace:
    assert trace is not None, "an engine's run has a trace"
    return trace
