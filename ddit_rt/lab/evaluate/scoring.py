"""Scores of the images of an evaluation; known ones are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddit_rt.lab.evaluate.config import EvaluationConfig, Item, image_files
from ddit_rt.lab.evaluate.metrics import Case, ImageMetric, Metric, SetMetric, Skipped
from ddit_rt.lab.evaluate.plans import NamedPlan
from ddit_rt.lab.evaluate.store import Store
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.candidates import FINE

_SAVED_EVERY = 16
"""Scores that a stop loses at most."""

Place = tuple[str, int, int]
"""Plan, prompt and repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the metrics say.

    Attributes:
        images: Per metric's name, the score of each image; None where it is infinite, as the
            PSNR of an image that equals its reference.
        sets: Per metric's name, the distance of each plan's images from the references.
        skipped: Metrics that could not run, with the reason.
    """

    images: dict[str, dict[Place, float | None]]
    sets: dict[str, dict[str, float]]
    skipped: tuple[Skipped, ...]


def score(
    store: Store,
    config: EvaluationConfig,
    plans: Sequence[NamedPlan],
    metrics: Sequence[Metric],
    skipped: Sequence[Skipped],
    *,
    progress: bool = True,
) -> Scores:
    """Scores every image of every plan.

    Args:
        store: The folder, with all images.
        config: Settings.
        plans: The plans.
        metrics: Metrics that can run.
        skipped: Metrics that cannot.
        progress: Whether to show a bar.
    """
    from tqdm.auto import tqdm

    items = [item for job in config.jobs() for item in job]
    single = [metric for metric in metrics if isinstance(metric, ImageMetric)]
    total = len(single) * len(plans) * len(items)
    with tqdm(total=total, desc="score", leave=False, disable=not progress) as bar:
        images = {
            metric.name: _score_images(store, config, plans, metric, advance=bar.update)
            for metric in single
        }
    sets, few = {}, []
    for metric in metrics:
        if isinstance(metric, SetMetric):
            if len(items) < 2:
                reason = "a distance of sets needs two images at least"
                few.append(Skipped(name=metric.name, label=metric.label, reason=reason))
            else:
                sets[metric.name] = _distances(store, metric, plans, items, config.references)
    return Scores(images=images, sets=sets, skipped=(*skipped, *few))


def _score_images(
    store: Store,
    config: EvaluationConfig,
    plans: Sequence[NamedPlan],
    metric: ImageMetric,
    *,
    advance: Callable[[], object],
) -> dict[Place, float | None]:
    known = store.scores()
    fresh: list[tuple[str, str, str, float | None]] = []
    found: dict[Place, float | None] = {}
    for place in _places(config, plans):
        advance()
        if metric.needs_reference and place[0] == FINE:
            continue
        key = _key(store, metric, config.prompts[place[1]], place)
        if key not in known:
            known[key] = metric.score(_case(store, config.prompts[place[1]], place))
            fresh.append((*key, known[key]))
        found[place] = known[key]
        if len(fresh) == _SAVED_EVERY:
            store.add_scores(fresh)
            fresh = []
    store.add_scores(fresh)
    return found


def _places(config: EvaluationConfig, plans: Sequence[NamedPlan]) -> Iterator[Place]:
    for plan in plans:
        for job in config.jobs():
            for item in job:
                yield plan.name, item.prompt, item.repeat


def _key(store: Store, metric: ImageMetric, prompt: str, place: Place) -> tuple[str, str, str]:
    """What a score depends on; its reference is the full-resolution image or the prompt."""
    fine = (FINE, place[1], place[2])
    reference = store.records[fine].sha256 if metric.needs_reference else prompt
    return metric.key, store.records[place].sha256, reference


def _case(store: Store, prompt: str, place: Place) -> Case:
    return Case(
        prompt=prompt,
        image=store.image(*place),
        reference=store.image(FINE, *place[1:]),
    )


def _distances(
    store: Store,
    metric: SetMetric,
    plans: Sequence[NamedPlan],
    items: Sequence[Item],
    references: Path | None,
) -> dict[str, float]:
    sets = {
        plan.name: _images(store, plan.name, items)
        for plan in plans
        if references is not None or plan.name != FINE
    }
    if references is None:
        return metric.distances(sets, _images(store, FINE, items))
    return metric.distances(sets, _read(image_files(references)))


def _images(store: Store, plan: str, items: Sequence[Item]) -> Iterator[Pixels]:
    return (store.image(plan, item.prompt, item.repeat) for item in items)


def _read(files: Sequence[Path]) -> Iterator[Pixels]:
    for file in files:
        with Image.open(file) as image:
            yield np.asarray(image.convert("RGB"), dtype=np.uint8)
