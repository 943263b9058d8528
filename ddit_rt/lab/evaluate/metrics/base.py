"""What a metric is. Each says by itself whether it can run here, and if not, why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from ddit_rt.lab.measure.timing import Pixels

_LOAD_ERRORS = (ImportError, OSError, ValueError, RuntimeError)
"""What a metric's library raises where weights are missing or versions do not fit."""

_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One image, or recording, to score.

    Attributes:
        prompt: What it should show.
        image: `[H, W, 3]` bytes, or `[channels, samples]` of 16 bits.
        reference: The full-resolution one of the same noise and size.
    """

    prompt: str
    image: Pixels
    reference: Pixels


class Metric(ABC):
    """A measure of quality.

    Attributes:
        name: Identifier in reports.
        label: Name for people, with the unit.
        higher_is_better: Direction.
        packages: Modules that it needs, each with what to install for it.
        hint: What to do where it does not load.
    """

    name: str
    label: str
    higher_is_better: bool
    packages: ClassVar[Mapping[str, str]] = {}
    hint = ""

    def unavailable(self) -> str | None:
        """Why it cannot run here, None if it can. Loads its weights to know."""
        missing = [
            f"{module} ({install})"
            for module, install in self.packages.items()
            if find_spec(module) is None
        ]
        if missing:
            return f"not installed: {', '.join(missing)}"
        try:
            self.load()
        except _LOAD_ERRORS as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
            return f"{text}; {self.hint}" if self.hint else text
        return None

    def load(self) -> None:
        """Loads weights, once."""
        _ = self.network

    @cached_property
    def network(self) -> Any:
        """What it computes with, on its device; None of a formula."""
        return None

    @property
    def key(self) -> str:
        """Equal where a score may be used again: the name, and the model behind it."""
        return self.name


class ImageMetric(Metric):
    """A score of every single image, or recording.

    Attributes:
        needs_reference: Whether it compares with full resolution, so that this itself
            has no score.
    """

    needs_reference: bool

    @abstractmethod
    def score(self, case: Case) -> float | None:
        """The score; None where the image equals its reference and the score is infinite."""


class SetMetric(Metric):
    """A distance between two sets of images."""

    @abstractmethod
    def distances(
        self, sets: Mapping[str, Iterable[Pixels]], references: Iterable[Pixels]
    ) -> dict[str, float]:
        """The distance of each set from the references; both need two images at least."""


def as_tensor(image: Pixels, device: str = "cpu") -> torch.Tensor:
    """`[H, W, 3]` bytes to `[1, 3, H, W]` bytes."""
    return torch.tensor(image).permute(2, 0, 1)[None].to(device)
