"""`report.json` of an evaluation: everything that the page shows.

Schema, version 1. Strict JSON: a number that does not exist is null. An interval is
`{"value", "low", "high"}`: a mean over prompts with its 95% bootstrap interval, or a share with
Wilson's; `low` and `high` are null for one prompt.

- `schema_version`: 1.
- `machine`, `versions`: where the report was written, as in the demo's report; `device`.
- `model`, `artifact`: `name`, `transformer_class`, `parameters`, `dtype`; `path`, `digest`.
- `settings`: what was asked for.
- `sessions`: when images were made: `started` (UTC), `machine`, `versions`, `pictures`.
- `costs`: `unit`, `main_cost` and `step_costs` that the baselines were chosen by, `pilot_prompts`.
- `main`: name of the plan that the baselines belong to.
- `metrics`: `name`, `label`, `kind` (`"picture"` or `"set"`), `higher_is_better`,
  `needs_reference`, `references` (of a set: how many images, and which).
- `skipped`: metrics that could not run: `name`, `label`, `reason`.
- `absent`: contenders that this model does not have: `name`, `reason`.
- `plans`: `name`, `title`, `role`, `kind`, `label`, `policy`, `num_inference_steps`; intervals
  `seconds` (denoising loop, per image), `seconds_call` (whole call), `tokens`; `speedup` (ratio
  of the mean loop seconds of full resolution to its own); `scores`: per metric an interval, with
  `pictures` and `identical` (images whose score is infinite, left out of the mean); for a set
  only `value`.
- `wins`: the main plan against every other: `against`, `metric`, `share` (of prompts on which the
  main plan is better; a tie counts half), `prompts`.
- `prompts`: `prompt` and `pictures`: per plan a list of `repeat`, `seed`, `file`, `seconds`,
  `seconds_spread`, `seconds_call`, `tokens`, `session`, `patch_sizes`, `scores`.
- `worst`: indices of prompts by SSIM of the main plan, the lowest first.
- `notes`: what a reader must know of these figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ddit_rt.lab.evaluate.config import EvaluationConfig, image_files
from ddit_rt.lab.evaluate.metrics import ImageMetric, Metric
from ddit_rt.lab.evaluate.plans import BASELINE, NamedPlan
from ddit_rt.lab.evaluate.scoring import Scores
from ddit_rt.lab.evaluate.store import ImageRecord, Store
from ddit_rt.lab.measure.statistics import Interval, mean_interval, share_interval

SCHEMA_VERSION = 1

_UNEQUAL = 0.15
"""Share by which a baseline's seconds may differ before the report says so."""

_FEW = 30
"""Prompts below which an interval says little."""


def build_report(
    store: Store,
    config: EvaluationConfig,
    plans: Sequence[NamedPlan],
    found: Mapping[str, Any],
    metrics: Sequence[Metric],
    scores: Scores,
    conditions: Mapping[str, Any],
) -> dict[str, Any]:
    """The report.

    Args:
        store: The folder, complete.
        config: Settings.
        plans: The plans, the reference first.
        found: What led to the baselines.
        metrics: Metrics that ran.
        scores: What they gave.
        conditions: The entries `machine`, `versions`, `device`, `model` and `artifact`.
    """
    used = [m for m in metrics if m.name in scores.images or m.name in scores.sets]
    entries = [_plan_entry(store, config, plan, used, scores) for plan in plans]
    base = entries[0]["seconds"]["value"]
    for entry in entries:
        entry["speedup"] = base / entry["seconds"]["value"]
    main = found["main"]
    return {
        "schema_version": SCHEMA_VERSION,
        **conditions,
        "settings": _settings(config),
        "sessions": _sessions(store),
        "costs": {
            "unit": config.cost_unit,
            **{name: found[name] for name in ("main_cost", "step_costs", "pilot_prompts")},
        },
        "main": main,
        "metrics": [_metric_entry(metric, config) for metric in used],
        "skipped": [asdict(skipped) for skipped in scores.skipped],
        "absent": found.get("absent", []),
        "plans": entries,
        "wins": _wins(config, plans, main, used, scores),
        "prompts": [_prompt_entry(store, config, plans, i, scores) for i in _prompts(config)],
        "worst": _worst(config, main, scores),
        "notes": [*found["notes"], *_unequal(entries, main), *_notes(store, config)],
    }


def _prompts(config: EvaluationConfig) -> range:
    return range(len(config.prompts))


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    return {
        "source": config.source,
        "prompts": len(config.prompts),
        "seeds": config.seeds,
        "seed": config.seed,
        "steps": config.steps,
        "batch": config.batch,
        "repeats": config.repeats,
        "cost": config.cost_unit,
        "arguments": dict(config.arguments),
        "references": None if config.references is None else str(config.references),
    }


def _sessions(store: Store) -> list[dict[str, Any]]:
    made = [record.session for record in store.records.values()]
    return [
        {**session, "pictures": made.count(number)}
        for number, session in enumerate(store.sessions())
    ]


def _metric_entry(metric: Metric, config: EvaluationConfig) -> dict[str, Any]:
    entry = {
        "name": metric.name,
        "label": metric.label,
        "higher_is_better": metric.higher_is_better,
    }
    if isinstance(metric, ImageMetric):
        return {**entry, "kind": "picture", "needs_reference": metric.needs_reference}
    if config.references is None:
        source = f"the {len(config.prompts) * config.seeds} full-resolution images"
    else:
        source = f"{len(image_files(config.references))} images in {config.references}"
    return {**entry, "kind": "set", "needs_reference": True, "references": source}


def _plan_entry(
    store: Store,
    config: EvaluationConfig,
    plan: NamedPlan,
    metrics: Sequence[Metric],
    scores: Scores,
) -> dict[str, Any]:
    rows = [_records(store, config, plan.name, prompt) for prompt in _prompts(config)]
    entry = plan.to_dict()
    for name in ("seconds", "seconds_call", "tokens"):
        means = [fmean(getattr(record, name) for record in row) for row in rows]
        entry[name] = interval_entry(mean_interval(means))
    entry["scores"] = {}
    for metric in metrics:
        if metric.name in scores.sets:
            if plan.name in scores.sets[metric.name]:
                entry["scores"][metric.name] = {"value": scores.sets[metric.name][plan.name]}
        elif summary := _summary(scores.images[metric.name], config, plan.name):
            entry["scores"][metric.name] = summary
    return entry


def _records(store: Store, config: EvaluationConfig, plan: str, prompt: int) -> list[ImageRecord]:
    return [store.records[plan, prompt, repeat] for repeat in range(config.seeds)]


def _summary(
    scores: Mapping[tuple[str, int, int], float | None], config: EvaluationConfig, plan: str
) -> dict[str, Any] | None:
    """Mean over the prompts of the mean over a prompt's images; None without any score."""
    rows = [_of_prompt(scores, config, plan, prompt) for prompt in _prompts(config)]
    count = sum(map(len, rows))
    if not count:
        return None
    finite = [[value for value in row if value is not None] for row in rows]
    means = [fmean(row) for row in finite if row]
    mean = mean_interval(means) if means else None
    return {
        **(interval_entry(mean) if mean else {"value": None, "low": None, "high": None}),
        "pictures": count,
        "identical": count - sum(map(len, finite)),
    }


def _of_prompt(
    scores: Mapping[tuple[str, int, int], float | None],
    config: EvaluationConfig,
    plan: str,
    prompt: int,
) -> list[float | None]:
    places = [(plan, prompt, repeat) for repeat in range(config.seeds)]
    return [scores[place] for place in places if place in scores]


def interval_entry(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON: null for a bound that does not exist."""
    return {
        name: value if math.isfinite(value) else None for name, value in asdict(interval).items()
    }


def _wins(
    config: EvaluationConfig,
    plans: Sequence[NamedPlan],
    main: str,
    metrics: Iterable[Metric],
    scores: Scores,
) -> list[dict[str, Any]]:
    entries = []
    for metric in metrics:
        if not isinstance(metric, ImageMetric):
            continue
        table = scores.images[metric.name]
        for plan in plans:
            others = [_rank(table, config, plan.name, i, metric) for i in _prompts(config)]
            own = [_rank(table, config, main, i, metric) for i in _prompts(config)]
            pairs = [(a, b) for a, b in zip(own, others, strict=True) if a is not None]
            if plan.name == main or any(b is None for _, b in pairs):
                continue
            wins = sum(1.0 if a > b else 0.5 * (a == b) for a, b in pairs if b is not None)
            share = interval_entry(share_interval(wins, len(pairs)))
            entries.append(
                {
                    "against": plan.name,
                    "metric": metric.name,
                    "share": share,
                    "prompts": len(pairs),
                }
            )
    return entries


def _rank(
    scores: Mapping[tuple[str, int, int], float | None],
    config: EvaluationConfig,
    plan: str,
    prompt: int,
    metric: Metric,
) -> float | None:
    """A prompt's mean score, the larger the better; None where the plan has none."""
    values = _of_prompt(scores, config, plan, prompt)
    if not values:
        return None
    mean = fmean(math.inf if value is None else value for value in values)
    return mean if metric.higher_is_better else -mean


def _prompt_entry(
    store: Store,
    config: EvaluationConfig,
    plans: Sequence[NamedPlan],
    prompt: int,
    scores: Scores,
) -> dict[str, Any]:
    images = {
        plan.name: [
            _image_entry(store, record, scores)
            for record in _records(store, config, plan.name, prompt)
        ]
        for plan in plans
    }
    return {"prompt": config.prompts[prompt], "pictures": images}


def _image_entry(store: Store, record: ImageRecord, scores: Scores) -> dict[str, Any]:
    own = {
        name: table[record.place] for name, table in scores.images.items() if record.place in table
    }
    return {
        "repeat": record.repeat,
        "seed": record.seed,
        "file": str(store.path(*record.place).relative_to(store.folder)),
        "seconds": record.seconds,
        "seconds_spread": list(record.seconds_spread),
        "seconds_call": record.seconds_call,
        "tokens": record.tokens,
        "session": record.session,
        "patch_sizes": [step["patch_size"] for step in record.trace["steps"]],
        "scores": own,
    }


def _worst(config: EvaluationConfig, main: str, scores: Scores) -> list[int]:
    table = scores.images["ssim"]

    def lowest(prompt: int) -> float:
        return min(value for value in _of_prompt(table, config, main, prompt) if value is not None)

    return sorted(_prompts(config), key=lowest)


def _unequal(entries: Sequence[Mapping[str, Any]], main: str) -> list[str]:
    """Rivals that were chosen for equal cost and did not take equal time."""
    (own,) = (entry["seconds"]["value"] for entry in entries if entry["name"] == main)
    baselines = [entry for entry in entries if entry["role"] == BASELINE]
    return [
        f"{entry['title']} took {entry['seconds']['value'] / own:.2f} times the seconds of {main}: "
        "not equal as measured here, so weigh its quality against that"
        for entry in baselines
        if abs(entry["seconds"]["value"] / own - 1) > _UNEQUAL
    ]


def _notes(store: Store, config: EvaluationConfig) -> list[str]:
    notes = []
    sessions = [session for session in _sessions(store) if session["pictures"]]
    if len(sessions) > 1:
        parts = [f"{s['pictures']} images from {s['started']}" for s in sessions]
        notes.append(
            f"the images were made and timed in {len(sessions)} sessions: {', '.join(parts)}. "
            "All plans of a batch were timed side by side in one session"
        )
        if len({(s["machine"]["cpu"], s["machine"]["threads"]) for s in sessions}) > 1:
            notes.append("the sessions ran on different machines: mean seconds mix them")
    if len(config.prompts) < _FEW:
        notes.append(
            f"{len(config.prompts)} prompts: a bootstrap interval over so few is too narrow"
        )
    if config.batch > 1:
        notes.append(
            f"images were made in batches of {config.batch}: a batch takes the finest size that "
            "any of its images needs, and an image's seconds are its share of the batch's"
        )
    return notes
