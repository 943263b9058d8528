"""An evaluation from settings to report: images, scores, `report.json`, `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.lab.evaluate.config import EvaluationConfig
from ddit_rt.lab.evaluate.generation import generate
from ddit_rt.lab.evaluate.metrics import Metric, Skipped
from ddit_rt.lab.evaluate.page import build_page
from ddit_rt.lab.evaluate.report import build_report
from ddit_rt.lab.evaluate.scoring import score
from ddit_rt.lab.evaluate.store import Store
from ddit_rt.lab.measure.measures import SOUND, measure_of
from ddit_rt.lab.measure.report import (
    device_name,
    machine,
    model_entry,
    versions,
    write_json,
    write_whole,
)
from ddit_rt.models import family_named

if TYPE_CHECKING:
    from ddit_rt.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: Name of the model, as the caller gave it.
        artifact: Path of the artifact.
    """

    model: str
    artifact: str


def evaluate(
    engine: Engine,
    config: EvaluationConfig,
    subject: Subject,
    metrics: Sequence[Metric],
    skipped: Sequence[Skipped] = (),
    *,
    shown: int = 12,
) -> tuple[dict[str, Any], list[Path]]:
    """Makes what is missing of the images and scores, and writes the report.

    Args:
        engine: A compiled pipeline.
        config: Settings.
        subject: What is evaluated, by name.
        metrics: Metrics that can run here, among them SSIM, of recordings STFT similarity.
        skipped: Metrics that cannot.
        shown: Prompts with images on the page at most, worst first.

    Returns:
        The report, and the files that were written.

    Raises:
        ValueError: The folder holds another evaluation, or a policy does not fit.
    """
    digest = engine.artifact.manifest.digest
    measure = measure_of(family_named(engine.artifact.manifest.family))
    rate = engine.pipeline.sample_rate if measure is SOUND else None
    store = Store(config.out, rate)
    identity = {"model": subject.model, "artifact": digest}
    plans, found = generate(engine, config, store, identity)
    scores = score(store, config, plans, metrics, skipped)
    transformer = engine.pipeline.transformer
    conditions = {
        "machine": machine(),
        "versions": versions(),
        "device": device_name(transformer.device),
        "model": model_entry(subject.model, transformer),
        "artifact": {"path": subject.artifact, "digest": digest},
        "makes": measure.makes,
        "similarity": measure.key,
    }
    report = build_report(store, config, plans, found, metrics, scores, conditions)
    return report, _write(report, store, shown)


def _write(report: Mapping[str, Any], store: Store, shown: int) -> list[Path]:
    record, page = store.folder / "report.json", store.folder / "report.html"
    write_json(record, report)
    write_whole(page, build_page(report, store.shown, shown=shown).encode())
    return [page, record]


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    metrics = report["metrics"]
    titles = [metric["name"] for metric in metrics]
    header = f"{'plan':<24}{'loop s':>9}{'speed-up':>10}{'tokens':>8}"
    lines = [header + "".join(f"{title:>14}" for title in titles)]
    for plan in report["plans"]:
        line = (
            f"{plan['title']:<24}{plan['seconds']['value']:>9.3f}{plan['speedup']:>9.2f}x"
            f"{plan['tokens']['value']:>8.0f}"
        )
        lines.append(line + "".join(f"{_value(plan, title):>14}" for title in titles))
    for entry in report["wins"]:
        if entry["metric"] == report["similarity"]:
            share = entry["share"]
            lines.append(
                f"{report['main']} is more similar than {entry['against']} on "
                f"{share['value']:.0%} of the prompts ({share['low']:.0%} to {share['high']:.0%})"
            )
    return "\n".join(lines)


def _value(plan: Mapping[str, Any], metric: str) -> str:
    score = plan["scores"].get(metric)
    if score is None:
        return "-"
    return "same" if score["value"] is None else f"{score['value']:.4g}"
