"""The images of an evaluation and their times; what is there already is not made again."""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddit_rt.lab.evaluate.config import EvaluationConfig, Item
from ddit_rt.lab.evaluate.plans import (
    CHOSEN,
    NamedPlan,
    baselines,
    cached_plan,
    chosen_plans,
    main_plan,
    reference_plan,
)
from ddit_rt.lab.evaluate.store import ImageRecord, Store
from ddit_rt.lab.measure.report import machine, versions
from ddit_rt.lab.measure.timing import Batch, Method, Sample, measure, on_trial
from ddit_rt.lab.plans.bench import EngineBench
from ddit_rt.lab.plans.dial import highest, on_log_scale
from ddit_rt.lab.plans.points import Prompt

if TYPE_CHECKING:
    from ddit_rt.engine import Engine
    from ddit_rt.loop import RunTrace

_PILOT = 8
"""Prompts at most, spread over all, that tell what the main plan costs."""

_THRESHOLDS, _THRESHOLD_LEVELS = (0.01, 10.0), 126
"""Thresholds of TeaCache that are tried, and the levels of its dial: seven halvings."""

_CACHE_PILOT = 2
"""Prompts that TeaCache's threshold is found on."""


def generate(
    engine: Engine,
    config: EvaluationConfig,
    store: Store,
    identity: Mapping[str, Any],
) -> tuple[tuple[NamedPlan, ...], dict[str, Any]]:
    """Makes every image that is not there yet, with all plans interleaved on each batch.

    Args:
        engine: A compiled pipeline.
        config: Settings.
        store: The folder.
        identity: What else must be the same for a run to go on: model and artifact.

    Returns:
        The plans, the reference first; and the cost table, the main plan's cost and the notes that
        the choice of the baselines left.

    Raises:
        ValueError: The folder holds another evaluation, or a policy does not fit.
    """
    request = _request(config, identity)
    settled = store.settle(request)
    if settled is None:
        settled = _plans(engine, config)
        store.begin(request, *settled)
    plans, found = settled
    missing = [
        job
        for job in config.jobs()
        if any((one.name, i.prompt, i.repeat) not in store.records for one in plans for i in job)
    ]
    if missing:
        _make(engine, config, store, plans, missing)
    return plans, found


def _request(config: EvaluationConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that images and times depend on."""
    from ddit_rt.policies import PatchPolicy

    return {
        **identity,
        "prompts": list(config.prompts),
        "steps": config.steps,
        "policies": [
            [name, choice.to_dict() if isinstance(choice, PatchPolicy) else choice]
            for name, choice in config.policies
        ],
        "arguments": dict(config.arguments),
        "seeds": config.seeds,
        "seed": config.seed,
        "batch": config.batch,
        "repeats": config.repeats,
        "cost": config.cost_unit,
    }


def _plans(
    engine: Engine, config: EvaluationConfig
) -> tuple[tuple[NamedPlan, ...], dict[str, Any]]:
    """The plans; the baselines from what the main plan costs on some of the prompts."""
    manifest, steps = engine.artifact.manifest, config.steps
    chosen = chosen_plans(
        config.policies, manifest, engine.default_policy, steps, engine.default_step_cache
    )
    main = main_plan(chosen)
    first = [item for job in config.jobs() for item in job if item.repeat == 0]
    count = min(_PILOT, len(first))
    items = [first[index * len(first) // count] for index in range(count)]
    probe = Prompt(text=config.prompts[items[0].prompt], seed=items[0].seed)
    bench = EngineBench(
        engine,
        steps=steps,
        probe=probe,
        arguments=config.arguments,
        unit=config.cost_unit,
    )
    cost = _cost(engine, main, config, items, bench)
    others, notes = baselines(main, cost, bench.tables.costs, steps)
    cached, absent = _cached(engine, config, items[:_CACHE_PILOT], bench, cost)
    found = {
        "main": main.name,
        "main_cost": cost,
        "step_costs": dict(bench.tables.costs),
        "pilot_prompts": len(items),
        "notes": notes,
        "absent": absent,
    }
    return (reference_plan(steps), *chosen, *others, *cached), found


def _cost(
    engine: Engine,
    plan: NamedPlan,
    config: EvaluationConfig,
    items: Sequence[Item],
    bench: EngineBench,
) -> float:
    """Mean cost of a plan's images."""
    method, costs = _method(engine, plan, config), []
    for item in items:
        trace = method.generate(_batch(config, (item,))).trace
        assert trace is not None, "an engine's run has a trace"
        costs.append(_spent(trace, bench.tables.costs, config.cost_unit))
    return statistics.fmean(costs)


def _method(engine: Engine, plan: NamedPlan, config: EvaluationConfig) -> Method:
    method = plan.candidate.on(engine, plan.name, **config.arguments)
    return method if plan.role == CHOSEN else on_trial(method)


def _spent(trace: RunTrace, costs: Mapping[str, float], unit: str) -> float:
    """A run's cost: of a computed step as the table has it, of one that reused as it was."""
    reused = [step.latency_ms if unit == "ms" else step.tokens for step in trace if step.reused]
    return sum(reused) + sum(costs[step.patch_size] for step in trace if not step.reused)


def _cached(
    engine: Engine,
    config: EvaluationConfig,
    items: Sequence[Item],
    bench: EngineBench,
    cost: float,
) -> tuple[list[NamedPlan], list[dict[str, str]]]:
    """TeaCache at the threshold, of those tried, whose cost comes closest; or why it is absent."""
    tried: list[tuple[float, NamedPlan]] = []

    def dearer(level: int) -> bool:
        threshold = on_log_scale(_THRESHOLDS, level, _THRESHOLD_LEVELS)
        plan = cached_plan(threshold, config.steps)
        spent = _cost(engine, plan, config, items, bench)
        tried.append((abs(spent - cost), plan))
        return spent > cost

    try:
        highest(_THRESHOLD_LEVELS, dearer)
    except ValueError as error:  # nothing was fitted for this model
        return [], [{"name": "TeaCache", "reason": str(error)}]
    return [min(tried, key=lambda entry: entry[0])[1]], []


def _make(
    engine: Engine,
    config: EvaluationConfig,
    store: Store,
    plans: Sequence[NamedPlan],
    jobs: Sequence[Sequence[Item]],
) -> None:
    from tqdm.auto import tqdm

    session = store.add_session(
        {
            "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        }
    )
    methods = [_method(engine, plan, config) for plan in plans]
    total = len(plans) * (1 + config.repeats * len(jobs))
    with tqdm(total=total, desc="eval", unit="run", leave=False) as bar:
        for index, job in enumerate(jobs):
            samples = measure(
                methods,
                [_batch(config, job)],
                repeats=config.repeats,
                advance=bar.update,
                warm_up=index == 0,
            )
            rows = {name: sample for name, (sample,) in samples.items()}
            store.add(_records(store, rows, job, session))


def _records(
    store: Store, rows: Mapping[str, Sample], job: Sequence[Item], session: int
) -> list[ImageRecord]:
    """Saves the images of a batch. An image's time is its share of the batch's."""
    records = []
    for name, sample in rows.items():
        trace, share = sample.trace, 1 / len(job)
        assert trace is not None, "an engine's run has a trace"
        for item, image in zip(job, sample.outputs, strict=True):
            digest = store.save_image(image, name, item.prompt, item.repeat)
            records.append(
                ImageRecord(
                    plan=name,
                    prompt=item.prompt,
                    repeat=item.repeat,
                    seed=item.seed,
                    sha256=digest,
                    seconds=sample.median_denoise * share,
                    seconds_spread=(min(sample.denoise) * share, max(sample.denoise) * share),
                    seconds_call=sample.median_end_to_end * share,
                    tokens=trace.tokens,
                    session=session,
                    trace=trace.to_dict(),
                )
            )
    return records


def _batch(config: EvaluationConfig, job: Sequence[Item]) -> Batch:
    return Batch(
        prompts=tuple(config.prompts[item.prompt] for item in job),
        seeds=tuple(item.seed for item in job),
    )
