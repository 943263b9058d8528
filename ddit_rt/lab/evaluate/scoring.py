"""Scores of the images of an evaluation; known ones are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ddit_rt.lab.evaluate.config import EvaluationConfig, Item, image_files
from ddit_rt.lab.evaluate.metrics import Case, ImageMetric, Metric, SetMetric, Skipped
from ddit_rt.lab.evaluate.plans import NamedPlan
from ddit_rt.lab.evaluate.store import Store, read_image
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
) -> Scores:
    """Scores every image of every plan.

    Args:
        store: The folder, with all images.
        config: Settings.
        plans: The plans.
        metrics: Metrics that can run.
        skipped: Metrics that cannot.
    """
    from tqdm.auto import tqdm

    items = [item for job in config.jobs() for item in job]
    single = [metric for metric in metrics if isinstance(metric, ImageMetric)]
    total = len(single) * len(plans) * len(items)
    with tqdm(total=total, desc="score", leave=False) as bar:
        images = {
            metric.name: _score_images(store, config, plans, items, metric, advance=bar.update)
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
    items: Sequence[Item],
    metric: ImageMetric,
    *,
    advance: Callable[[], object],
) -> dict[Place, float | None]:
    known = store.scores()
    fresh: list[tuple[str, str, str, float | None]] = []
    found: dict[Place, float | None] = {}
    for plan, item in product(plans, items):
        advance()
        if metric.needs_reference and plan.name == FINE:
            continue
        place, fine = (plan.name, item.prompt, item.repeat), (FINE, item.prompt, item.repeat)
        prompt = config.prompts[item.prompt]
        # What a score depends on: its reference is the full-resolution image, or the prompt.
        reference = store.records[fine].sha256 if metric.needs_reference else prompt
        key = metric.key, store.records[place].sha256, reference
        if key not in known:
            case = Case(prompt=prompt, image=store.image(*place), reference=store.image(*fine))
            known[key] = metric.score(case)
            fresh.append((*key, known[key]))
        found[place] = known[key]
        if len(fresh) == _SAVED_EVERY:
            store.add_scores(fresh)
            fresh = []
    store.add_scores(fresh)
    return found


def _distances(
    store: Store,
    metric: SetMetric,
    plans: Sequence[NamedPlan],
    items: Sequence[Item],
    references: Path | None,
) -> dict[str, float]:
    def made(plan: str) -> Iterator[Pixels]:
        return (store.image(plan, item.prompt, item.repeat) for item in items)

    if references is None:
        sets = {plan.name: made(plan.name) for plan in plans if plan.name != FINE}
        return metric.distances(sets, made(FINE))
    return metric.distances(
        {plan.name: made(plan.name) for plan in plans}, map(read_image, image_files(references))
    )
