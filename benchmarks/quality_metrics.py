"""One row of a quality table: what a plan costs, and how good its pictures are."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from quality_runs import PictureRuns, Pictures, Plan, StepCosts, fine
from records import interval_entry

from ddit_rt.lab.demo.classifier import (
    AttributeClassifier,
    attribute_hits,
    image_features,
    load_classifier,
)
from ddit_rt.lab.demo.images import parse_caption
from ddit_rt.lab.measure.fidelity import Fidelity, fidelity
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.points import Prompt

_RENDER_SEED = 90_000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rows for plans, all on the same prompts.

    Attributes:
        runs: Makes the pictures.
        costs: Cost of a step.
        captions: Prompts.
        seeds: Pictures of each prompt.
    """

    runs: PictureRuns
    costs: StepCosts
    captions: tuple[str, ...]
    seeds: int

    @cached_property
    def prompts(self) -> list[Prompt]:
        """All captions with the first seed, then all with the second, and so on."""
        count = len(self.captions)
        return [
            Prompt(text=text, seed=seed * count + index)
            for seed in range(self.seeds)
            for index, text in enumerate(self.captions)
        ]

    def row(
        self, name: str, label: str, kind: str, plan: Plan, reference_steps: int
    ) -> dict[str, Any]:
        """A plan's row; `bench_quality.py` says what is in it.

        Args:
            name: Identifier within its table.
            label: Name for people.
            kind: `"fine"`, `"dynamic"`, `"static"` or `"fewer_steps"`.
            plan: The plan.
            reference_steps: The all-fine pictures of this many steps are what it is compared with.
        """
        made = self.runs.run(plan, self.prompts)
        reference = self.runs.run(fine(reference_steps), self.prompts)
        return {
            "name": name,
            "label": label,
            "kind": kind,
            "reference_steps": reference_steps,
            **plan.to_dict(),
            **self.cost(made, plan, reference_steps),
            **self.quality(made, reference),
        }

    def cost(self, made: Pictures, plan: Plan, reference_steps: int) -> dict[str, Any]:
        """Means over the pictures, and the median of the loops' wall times."""
        whole = self.costs.tokens["p"] * reference_steps
        tokens = statistics.fmean(self.costs.loop_tokens(sizes) for sizes in made.sizes)
        counts = Counter(size for sizes in made.sizes for size in sizes)
        return {
            "tokens": tokens,
            "tokens_share": tokens / whole,
            "loop_ms": statistics.fmean(
                self.costs.loop_ms(plan.path, sizes) for sizes in made.sizes
            ),
            "loop_ms_measured": statistics.median(made.loop_ms) if made.loop_ms else None,
            "steps_at": {size: count / len(made.sizes) for size, count in sorted(counts.items())},
            "switches": statistics.fmean(
                sum(a != b for a, b in pairwise(sizes)) for sizes in made.sizes
            ),
        }

    def quality(self, made: Pictures, reference: Pictures) -> dict[str, Any]:
        """Closeness to the reference, distance of the features, and what the pictures show."""
        own = gaussian(features(made.pictures))
        return {
            **self.closeness(fidelity(made.pictures, reference.pictures)),
            "frechet": frechet_distance(*own, *gaussian(features(reference.pictures))),
            "frechet_renders": frechet_distance(*own, *self._of_renders),
            "correct": self.correct(made.pictures),
        }

    def closeness(self, close: Fidelity) -> dict[str, Any]:
        """PSNR and SSIM, as means over the prompts."""
        ssim = self.per_prompt(close.ssim)
        psnr = [value for value in self.per_prompt(close.psnr) if value is not None]
        return {
            "psnr": interval_entry(psnr) if psnr else None,
            "identical": sum(value is None for value in close.psnr),
            "ssim": interval_entry([value for value in ssim if value is not None]),
            "ssim_per_prompt": ssim,
        }

    def correct(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        """Share of pictures that show what was asked: all of it, and each attribute."""
        hits = self.hits(pictures)
        every = torch.stack(list(hits.values())).all(0).double()
        per_prompt = [value for value in self.per_prompt(every.tolist()) if value is not None]
        shares = {name: float(hit.double().mean()) for name, hit in hits.items()}
        return {"all": interval_entry(per_prompt), **shares}

    def hits(self, pictures: Sequence[Pixels]) -> dict[str, torch.Tensor]:
        """Per attribute `[N]`, whether a picture shows what its caption names."""
        expected = [parse_caption(prompt.text) for prompt in self.prompts]
        return attribute_hits(_classifier(), tensor(pictures), expected)

    def per_prompt(self, values: Sequence[float | None]) -> list[float | None]:
        """Means over the seeds of each prompt; None where there is no value."""
        count = len(self.captions)
        columns = [[v for v in values[start::count] if v is not None] for start in range(count)]
        return [statistics.fmean(column) if column else None for column in columns]

    @cached_property
    def renders(self) -> list[Pixels]:
        """Drawn pictures of the same captions, as many as a plan makes."""
        arguments = self.runs.arguments
        # Last, because `profile.py` there would hide the standard library's.
        sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
        from demo_training.draw_images import (  # type: ignore[import-not-found]
            ImageConfig,
            draw_image,
        )

        config = ImageConfig(height=arguments["height"], width=arguments["width"])
        drawn = (
            draw_image(parse_caption(prompt.text), config, _RENDER_SEED, prompt.seed)
            for prompt in self.prompts
        )
        return [np.rint(picture * 255).astype(np.uint8) for picture in drawn]

    @cached_property
    def _of_renders(self) -> tuple[Array, Array]:
        return gaussian(features(self.renders))


def features(pictures: Sequence[Pixels]) -> Array:
    """`[N, 64]`: see `image_features`."""
    found = image_features(_classifier(), tensor(pictures))
    return np.asarray(found.double().numpy(), dtype=np.float64)


def tensor(pictures: Sequence[Pixels]) -> torch.Tensor:
    """`[N, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@cache
def _classifier() -> AttributeClassifier:
    return load_classifier()
