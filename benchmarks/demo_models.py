"""The models that plans are compared on: pipeline, size, and captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.lab.demo.images import all_attributes, is_held_out
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, held_out_prompts
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.sources import EMBEDDED, load_pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """A model to compare plans on.

    Attributes:
        name: As on the command line.
        pipeline: Its pipeline.
        size: `height` and `width`.
        others: Further arguments of a call.
        held_out: Captions to report on.
        seen: Captions for fits and for searches, none of those.
        shows: Of images and captions, whether each shows all that is asked; None for the
            attributes of the demo's captions.
    """

    name: str
    pipeline: Any
    size: Mapping[str, Any]
    others: Mapping[str, Any]
    held_out: tuple[str, ...]
    seen: tuple[str, ...]
    shows: Callable[[Sequence[Pixels], Sequence[str]], Sequence[bool]] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of an engine's call, but for the steps."""
        return {**self.size, **self.others}

    def reported(self, count: int) -> tuple[str, ...]:
        """Some held-out captions, spread evenly over all of them.

        Raises:
            ValueError: There are fewer.
        """
        total = len(self.held_out)
        if count > total:
            raise ValueError(f"got {count} prompts; {self.name} has {total} held-out captions")
        return tuple(self.held_out[place * total // count] for place in range(count))


def image_model(side: int = 128) -> DemoModel:
    """The embedded FLUX."""
    pipeline = load_pipeline(EMBEDDED)
    pipeline.set_progress_bar_config(disable=True)
    seen = [attributes.caption for attributes in all_attributes() if not is_held_out(attributes)]
    random.Random(0).shuffle(seen)  # noqa: S311 - a fixed choice, nothing secret
    return DemoModel(
        name=EMBEDDED,
        pipeline=pipeline,
        size={"height": side, "width": side},
        others={"max_sequence_length": MAX_SEQUENCE_LENGTH},
        held_out=tuple(held_out_prompts()),
        seen=tuple(seen),
    )
