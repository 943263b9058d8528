"""The pictures of an evaluation and their times; what is there already is not made again."""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddit_rt.calibration.bench import EngineBench
from ddit_rt.calibration.points import Prompt
from ddit_rt.demo.measure import Batch, Contender, Sample, engine_contender, measure
from ddit_rt.demo.report import machine, versions
from ddit_rt.evaluation.config import EvaluationConfig, Item
from ddit_rt.evaluation.plans import (
    NamedPlan,
    chosen_plans,
    main_plan,
    reference_plan,
    rivals,
)
from ddit_rt.evaluation.store import PictureRecord, Store

if TYPE_CHECKING:
    from ddit_rt.pipeline import Engine

_PILOT = 8
"""Prompts at most, spread over all, that tell what the main plan costs."""


def generate(
    engine: Engine,
    config: EvaluationConfig,
    store: Store,
    identity: Mapping[str, Any],
    *,
    progress: bool = True,
) -> tuple[tuple[NamedPlan, ...], dict[str, Any]]:
    """Makes every picture that is not there yet, with all plans interleaved on each batch.

    Args:
        engine: A compiled pipeline.
        config: Settings.
        store: The folder.
        identity: What else must be the same for a run to go on: model and artifact.
        progress: Whether to show a bar.

    Returns:
        The plans, the reference first; and the cost table, the main plan's cost and the notes that
        the choice of the rivals left.

    Raises:
        ValueError: The folder holds another evaluation, or a policy does not fit.
    """
    request = _request(config, identity)
    settled = store.settle(request)
    if settled is None:
        settled = _plans(engine, config)
        store.begin(request, *settled)
    plans, found = settled
    missing = [job for job in config.jobs() if not _is_done(store, plans, job)]
    if missing:
        _make(engine, config, store, plans, missing, progress=progress)
    return plans, found


def _request(config: EvaluationConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that pictures and times depend on."""
    from ddit_rt.patch_scheduler import PatchPolicy

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


def _is_done(store: Store, plans: Sequence[NamedPlan], job: Sequence[Item]) -> bool:
    return all(
        (plan.name, item.prompt, item.repeat) in store.records for plan in plans for item in job
    )


def _plans(
    engine: Engine, config: EvaluationConfig
) -> tuple[tuple[NamedPlan, ...], dict[str, Any]]:
    """The plans; the rivals from what the main plan costs on some of the prompts."""
    manifest, steps = engine.artifact.manifest, config.steps
    chosen = chosen_plans(config.policies, manifest, engine.default_policy, steps)
    main = main_plan(chosen)
    items = _pilot(config)
    probe = Prompt(text=config.prompts[items[0].prompt], seed=items[0].seed)
    bench = EngineBench(
        engine, steps=steps, probe=probe, arguments=config.arguments, unit=config.cost_unit
    )
    contender = _contender(engine, main, config)
    costs = []
    for item in items:
        trace = contender.generate(_batch(config, (item,))).trace
        assert trace is not None, "an engine's run has a trace"
        costs.append(sum(bench.costs[size] for size in trace.patch_sizes()))
    cost = statistics.fmean(costs)
    others, notes = rivals(main, cost, bench.costs, steps)
    found = {
        "main": main.name,
        "main_cost": cost,
        "step_costs": dict(bench.costs),
        "pilot_prompts": len(items),
        "notes": notes,
    }
    return (reference_plan(steps), *chosen, *others), found


def _pilot(config: EvaluationConfig) -> list[Item]:
    items = [item for job in config.jobs() for item in job if item.repeat == 0]
    count = min(_PILOT, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _make(
    engine: Engine,
    config: EvaluationConfig,
    store: Store,
    plans: Sequence[NamedPlan],
    jobs: Sequence[Sequence[Item]],
    *,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    session = store.add_session(
        {
            "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        }
    )
    contenders = [_contender(engine, plan, config) for plan in plans]
    total = len(plans) * (1 + config.repeats * len(jobs))
    with tqdm(total=total, desc="eval", unit="run", leave=False, disable=not progress) as bar:
        for index, job in enumerate(jobs):
            samples = measure(
                contenders,
                [_batch(config, job)],
                repeats=config.repeats,
                advance=bar.update,
                warm_up=index == 0,
            )
            rows = {name: sample for name, (sample,) in samples.items()}
            store.add(_records(store, rows, job, session))


def _records(
    store: Store, rows: Mapping[str, Sample], job: Sequence[Item], session: int
) -> list[PictureRecord]:
    """Saves the pictures of a batch. A picture's time is its share of the batch's."""
    records = []
    for name, sample in rows.items():
        trace, share = sample.trace, 1 / len(job)
        assert trace is not None, "an engine's run has a trace"
        for item, picture in zip(job, sample.pictures, strict=True):
            digest = store.save_picture(picture, name, item.prompt, item.repeat)
            records.append(
                PictureRecord(
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


def _contender(engine: Engine, plan: NamedPlan, config: EvaluationConfig) -> Contender:
    return engine_contender(
        plan.name,
        plan.candidate.label,
        engine,
        patch_policy=plan.candidate.policy,
        num_inference_steps=plan.candidate.num_inference_steps,
        **config.arguments,
    )


def _batch(config: EvaluationConfig, job: Sequence[Item]) -> Batch:
    return Batch(
        prompts=tuple(config.prompts[item.prompt] for item in job),
        seeds=tuple(item.seed for item in job),
    )
