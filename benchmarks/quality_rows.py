"""One row of a quality table: what a plan costs, and how good its images are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from demo_models import DemoModel
from quality_paths import TRAINING_FREE
from quality_runs import Plan, Runs, StepCosts, reference, seeded
from records import interval_entry

from ddit_rt.lab.demo.classifier import attribute_hits, image_features, load_classifier
from ddit_rt.lab.demo.images import parse_caption
from ddit_rt.lab.measure.fidelity import Fidelity, fidelity
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.points import Prompt

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rows for plans, all on the same prompts.

    Attributes:
        model: What draws.
        runs: Makes the images.
        costs: Cost of a step.
        captions: Prompts.
        seeds: Images of each prompt.
    """

    model: DemoModel
    runs: Runs
    costs: StepCosts
    captions: tuple[str, ...]
    seeds: int

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """All captions with the first seed, then all with the second, and so on."""
        return seeded(self.captions * self.seeds)

    def row(self, name: str, label: str, kind: str, plan: Plan, reference_steps: int) -> Row:
        """A plan's row; `bench_quality.py` says what is in it.

        Args:
            name: Identifier within its table.
            label: Name for people.
            kind: `"fine"`, `"dynamic"`, `"static"` or `"fewer_steps"`.
            plan: The plan.
            reference_steps: It is compared with full resolution of this many steps.
        """
        made = self.runs.run(plan, self.prompts)
        whole = self.runs.run(reference(reference_steps), self.prompts).images
        tokens = statistics.fmean(self.costs.loop_tokens(one) for one in made.branches)
        return {
            "name": name,
            "label": label,
            "kind": kind,
            "reference_steps": reference_steps,
            **plan.to_dict(),
            "tokens": tokens,
            "tokens_share": tokens / (self.costs.tokens["p"] * reference_steps),
            "loop_ms": statistics.fmean(self.costs.loop_ms(plan, one) for one in made.branches),
            "steps_at": steps_at(made.branches),
            **fidelity_entry(fidelity(made.images, whole), len(self.captions)),
            "frechet": frechet(made.images, whole),
            "correct": self.correct(made.images),
        }

    def correct(self, images: Sequence[Pixels]) -> Row:
        """Share of images that show all that was asked."""
        shows = self.model.shows or _shows_attributes
        shown = [float(one) for one in shows(images, [prompt.text for prompt in self.prompts])]
        return {"all": interval_entry(_present(per_prompt(shown, len(self.captions))))}

    def with_fewer_steps(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each followed by its baselines of fewer steps that are not there yet.

        Those are the most steps at full resolution that take no longer, and that take no more
        tokens. Writes their names into the rows, as `fewer_steps`.
        """
        table: dict[str, Row] = {}
        for row in rows:
            table[row["name"]] = row
            if row["kind"] not in ("dynamic", "static") or row["tokens_share"] == 1:
                continue  # nothing is cheaper than full resolution at its cost
            whole, row["fewer_steps"] = row["reference_steps"], {}
            for kind, exact in (
                ("equal_time", row["loop_ms"] / self.costs.milliseconds[TRAINING_FREE]["p"]),
                ("equal_tokens", row["tokens"] / self.costs.tokens["p"]),
            ):
                count = max(1, min(whole, math.floor(exact + 1e-9)))
                name = row["fewer_steps"][kind] = f"fewer_{count}_of_{whole}"
                if name not in table:
                    label = f"{count} of {whole} steps at full resolution"
                    table[name] = self.row(name, label, "fewer_steps", reference(count), whole)
        return list(table.values())


def fidelity_entry(compared: Fidelity, prompts: int) -> Row:
    """Means over the prompts with their intervals, and the values of each prompt."""
    ssim, psnr = per_prompt(compared.ssim, prompts), per_prompt(compared.psnr, prompts)
    return {
        "psnr": interval_entry(_present(psnr)) if _present(psnr) else None,
        "ssim": interval_entry(_present(ssim)),
        "ssim_per_prompt": ssim,
        "psnr_per_prompt": psnr,
    }


def steps_at(branches: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """Steps of a mean run by what they did."""
    counts = Counter(one for run in branches for one in run)
    return {name: count / len(branches) for name, count in sorted(counts.items())}


def per_prompt(values: Sequence[float | None], prompts: int) -> list[float | None]:
    """Means over the seeds of each prompt; None where there is no value."""
    columns = [_present(values[start::prompts]) for start in range(prompts)]
    return [statistics.fmean(column) if column else None for column in columns]


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def frechet(images: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Fréchet distance of the features of the demo's classifier."""
    found = (image_features(load_classifier(), tensor(one)).double() for one in (images, others))
    own, other = (gaussian(features.numpy()) for features in found)
    return frechet_distance(*own, *other)


def _shows_attributes(images: Sequence[Pixels], captions: Sequence[str]) -> list[bool]:
    """Whether images show all attributes that captions of the demo name."""
    expected = [parse_caption(caption) for caption in captions]
    hits = attribute_hits(load_classifier(), tensor(images), expected)
    found: list[bool] = torch.stack(list(hits.values())).all(0).tolist()
    return found


def tensor(images: Sequence[Pixels]) -> torch.Tensor:
    """`[N, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
