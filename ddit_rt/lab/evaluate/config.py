"""What an evaluation is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddit_rt.lab.plans.bench import UNITS
from ddit_rt.planning.request import PolicyChoice


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a prompt.

    Attributes:
        prompt: Index of the prompt.
        repeat: Which image of it, from 0.
        seed: Seed of its noise.
    """

    prompt: int
    repeat: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
        out: Folder to write to, or to go on in.
        prompts: The prompts.
        source: Where the prompts come from, for the report.
        steps: Steps of the reference.
        policies: Name and policy, preset or speed of each plan; none for the artifact's own.
        arguments: Further arguments of the engine's call, e.g. `height`.
        seeds: Images of each prompt, each with noise of its own.
        seed: Seed of the first image; image i uses seed + i.
        batch: Prompts in a call.
        repeats: Timed runs of every image.
        cost_unit: What the baselines' cost is equal in: `"ms"` of the loop, or `"tokens"`.
        references: Folder of images that FID compares with; None for the full-resolution ones.
    """

    out: Path
    prompts: tuple[str, ...]
    source: str
    steps: int
    policies: tuple[tuple[str, PolicyChoice], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    seed: int = 0
    batch: int = 1
    repeats: int = 1
    cost_unit: str = "ms"
    references: Path | None = None

    def __post_init__(self) -> None:
        """Checks the counts, before minutes of work."""
        if not self.prompts:
            raise ValueError("got no prompts; give at least one")
        counts = (self.steps, self.seeds, self.batch, self.repeats)
        if min(counts) < 1:
            raise ValueError(
                "got steps={}, seeds={}, batch={}, repeats={}; all must be at least 1".format(
                    *counts
                )
            )
        if self.cost_unit not in UNITS:
            raise ValueError(f"got the cost {self.cost_unit!r}; it is one of {list(UNITS)}")
        if self.references is not None and len(image_files(self.references)) < 2:
            raise ValueError(
                f"found fewer than two images ({', '.join(PICTURE_SUFFIXES)}) in "
                f"{self.references}; --references names a folder of them"
            )

    def jobs(self) -> list[tuple[Item, ...]]:
        """The images, by call. A batch holds different prompts."""
        items = [
            Item(prompt=prompt, repeat=repeat, seed=self.seed + prompt * self.seeds + repeat)
            for repeat in range(self.seeds)
            for prompt in range(len(self.prompts))
        ]
        return [
            tuple(items[start : start + self.batch]) for start in range(0, len(items), self.batch)
        ]


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, by name.

    Raises:
        ValueError: No such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; it should hold reference images")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
