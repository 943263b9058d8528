"""`report.json` of an evaluation: everything that the page shows.

Schema, version 1. Strict JSON: a number that does not exist is null. An interval is
`{"value", "low", "high"}`: a mean over prompts with its 95% bootstrap interval, or a share with
Wilson's; `low` and `high` are null for one prompt.

- `schema_version`: 1.
- `machine`, `versions`: where the report was written, as in the demo's report; `device`.
- `model`, `artifact`: `name`, `transformer_class`, `parameters`, `dtype`; `path`, `digest`.
- `makes`: `"image"` or `"recording"`; `similarity`: name of the metric that cases are sorted by.
- `settings`: what was asked for.
- `sessions`: when images were made: `started` (UTC), `machine`, `versions`, `pictures`.
- `costs`: `unit`, `main_cost` and `step_costs` that the baselines were chosen by, `pilot_prompts`.
- `main`: name of the plan that the baselines belong to.
- `metrics`: `name`, `label`, `kind` (`"picture"` or `"set"`), `higher_is_better`,
  `needs_reference`, `references` (of a set: how many images, and which).
- `skipped`: metrics that could not run: `name`, `label`, `reason`.
- `absent`: baselines that this model does not have: `name`, `reason`.
- `plans`: `name`, `title`, `role`, `kind`, `label`, `policy`, `num_inference_steps`; intervals
  `seconds` (denoising loop, per image), `seconds_call` (whole call), `tokens`; `speedup` (ratio
  of the mean loop seconds of full resolution to its own); `scores`: per metric an interval, with
  `pictures` and `identical` (images whose score is infinite, left out of the mean); for a set
  only `value`.
- `wins`: the main plan against every other: `against`, `metric`, `share` (of prompts on which the
  main plan is better; a tie counts half), `prompts`.
- `prompts`: `prompt` and `pictures`: per plan a list of `repeat`, `seed`, `file`, `seconds`,
  `seconds_spread`, `seconds_call`, `tokens`, `session`, `patch_sizes`, `scores`.
- `worst`: indices of prompts by the similarity of the main plan, the lowest first.
- `notes`: what a reader must know of these figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """Builds the report.

    Args:
        store: The folder, complete.
        config: Settings.
        plans: The plans, the reference first.
        found: What led to the baselines.
        metrics: Metrics that ran.
        scores: What they gave.
        conditions: The entries `machine`, `versions`, `device`, `model`, `artifact`, `makes` and
            `similarity`.
    """
    used = tuple(m for m in metrics if m.name in scores.images or m.name in scores.sets)
    builder = _Builder(store, config, plans, used, scores)
    entries = [builder.plan(plan) for plan in plans]
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
        "metrics": [builder.metric(metric) for metric in used],
        "skipped": [asdict(skipped) for skipped in scores.skipped],
        "absent": found.get("absent", []),
        "plans": entries,
        "wins": builder.wins(main),
        "prompts": [builder.prompt(index) for index in builder.prompts],
        "worst": builder.worst(main, conditions["similarity"]),
        "notes": [*found["notes"], *_unequal(entries, main), *_notes(store, config)],
    }


def interval_entry(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON: null for a bound that does not exist."""
    return {
        name: value if math.isfinite(value) else None for name, value in asdict(interval).items()
    }


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes the entries that follow from images and scores; its fields are `build_report`'s."""

    store: Store
    config: EvaluationConfig
    plans: Sequence[NamedPlan]
    metrics: Sequence[Metric]
    scores: Scores

    @property
    def prompts(self) -> range:
        return range(len(self.config.prompts))

    def records(self, plan: str, prompt: int) -> list[ImageRecord]:
        return [self.store.records[plan, prompt, n] for n in range(self.config.seeds)]

    def own_scores(self, metric: str, plan: str, prompt: int) -> list[float | None]:
        """Scores of the images of a plan and prompt, those that there are."""
        places = [(plan, prompt, repeat) for repeat in range(self.config.seeds)]
        table = self.scores.images[metric]
        return [table[place] for place in places if place in table]

    def metric(self, metric: Metric) -> dict[str, Any]:
        entry = {
            "name": metric.name,
            "label": metric.label,
            "higher_is_better": metric.higher_is_better,
        }
        if isinstance(metric, ImageMetric):
            return {**entry, "kind": "picture", "needs_reference": metric.needs_reference}
        references = self.config.references
        if references is None:
            source = f"the {len(self.prompts) * self.config.seeds} full-resolution images"
        else:
            source = f"{len(image_files(references))} images in {references}"
        return {**entry, "kind": "set", "needs_reference": True, "references": source}

    def plan(self, plan: NamedPlan) -> dict[str, Any]:
        rows = [self.records(plan.name, prompt) for prompt in self.prompts]
        entry: dict[str, Any] = {**plan.to_dict(), "scores": {}}
        for name in ("seconds", "seconds_call", "tokens"):
            means = [fmean(getattr(record, name) for record in row) for row in rows]
            entry[name] = interval_entry(mean_interval(means))
        for metric in self.metrics:
            by_plan = self.scores.sets.get(metric.name)
            if by_plan is None:
                summary = self.summary(metric.name, plan.name)
            else:
                summary = {"value": by_plan[plan.name]} if plan.name in by_plan else None
            if summary is not None:
                entry["scores"][metric.name] = summary
        return entry

    def summary(self, metric: str, plan: str) -> dict[str, Any] | None:
        """Mean over the prompts of the mean over a prompt's images; None without any score."""
        rows = [self.own_scores(metric, plan, prompt) for prompt in self.prompts]
        count = sum(map(len, rows))
        if not count:
            return None
        finite = [[value for value in row if value is not None] for row in rows]
        means = [fmean(row) for row in finite if row]
        none = Interval(value=math.nan, low=math.nan, high=math.nan)
        return {
            **interval_entry(mean_interval(means) if means else none),
            "pictures": count,
            "identical": count - sum(map(len, finite)),
        }

    def wins(self, main: str) -> list[dict[str, Any]]:
        """The main plan against every other that has a score for every prompt."""
        entries = []
        for metric in self.metrics:
            if not isinstance(metric, ImageMetric):
                continue
            own = [self.rank(metric, main, prompt) for prompt in self.prompts]
            for plan in self.plans:
                others = [self.rank(metric, plan.name, prompt) for prompt in self.prompts]
                pairs = [
                    (a, b)
                    for a, b in zip(own, others, strict=True)
                    if a is not None and b is not None
                ]
                if plan.name == main or len(pairs) < len(own) - own.count(None) or not pairs:
                    continue
                wins = sum(1.0 if a > b else 0.5 * (a == b) for a, b in pairs)
                share = interval_entry(share_interval(wins, len(pairs)))
                names = {"against": plan.name, "metric": metric.name}
                entries.append({**names, "share": share, "prompts": len(pairs)})
        return entries

    def rank(self, metric: Metric, plan: str, prompt: int) -> float | None:
        """A prompt's mean score, the larger the better; None where the plan has none."""
        values = self.own_scores(metric.name, plan, prompt)
        if not values:
            return None
        mean = fmean(math.inf if value is None else value for value in values)
        return mean if metric.higher_is_better else -mean

    def prompt(self, prompt: int) -> dict[str, Any]:
        images = {
            plan.name: [self.image(record) for record in self.records(plan.name, prompt)]
            for plan in self.plans
        }
        return {"prompt": self.config.prompts[prompt], "pictures": images}

    def image(self, record: ImageRecord) -> dict[str, Any]:
        tables = self.scores.images.items()
        return {
            "repeat": record.repeat,
            "seed": record.seed,
            "file": str(self.store.path(*record.place).relative_to(self.store.folder)),
            "seconds": record.seconds,
            "seconds_spread": list(record.seconds_spread),
            "seconds_call": record.seconds_call,
            "tokens": record.tokens,
            "session": record.session,
            "patch_sizes": [step["patch_size"] for step in record.trace["steps"]],
            "scores": {n: table[record.place] for n, table in tables if record.place in table},
        }

    def worst(self, main: str, similarity: str) -> list[int]:
        """Prompts by the lowest similarity among the main plan's images."""

        def lowest(prompt: int) -> float:
            return min(v for v in self.own_scores(similarity, main, prompt) if v is not None)

        return sorted(self.prompts, key=lowest)


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


def _unequal(entries: Sequence[Mapping[str, Any]], main: str) -> list[str]:
    """Baselines that were chosen for equal cost and did not take equal time."""
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
