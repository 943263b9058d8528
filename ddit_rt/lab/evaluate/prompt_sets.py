"""Prompts to evaluate on: a file, a public set by name, or the demo model's own captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.lab.plans.points import prompt_lines

DEMO = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSet:
    """A data set of the Hub that holds prompts.

    Attributes:
        label: Name of the set, for people.
        dataset: Name on the Hub.
        column: Column of the prompts, in the split `train`, which is all there is.
    """

    label: str
    dataset: str
    column: str


HUB_SETS = {
    "drawbench": HubSet(label="DrawBench", dataset="sayakpaul/drawbench", column="Prompts"),
    "parti": HubSet(label="PartiPrompts", dataset="nateraw/parti-prompts", column="Prompt"),
    "coco": HubSet(
        label="COCO captions", dataset="sentence-transformers/coco-captions", column="caption1"
    ),
}

NAMES = (DEMO, *HUB_SETS)
"""What `read_prompts` knows besides files; a file of such a name is `./NAME`."""


def read_prompts(source: str, limit: int | None = None) -> tuple[str, ...]:
    """Different prompts, in order.

    Args:
        source: A name of `NAMES`, or a text file with one prompt a line.
        limit: How many at most, spread evenly over all of them: public sets are sorted by kind.

    Raises:
        ValueError: No prompts, a limit below 1, or a set of the Hub that cannot be reached.
        OSError: No such file.
        ModuleNotFoundError: A set of the Hub, without the package `datasets`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"got a limit of {limit} prompts; it must be at least 1")
    texts = dict.fromkeys(text for line in _lines(source) if (text := line.strip()))
    if not texts:
        raise ValueError(f"{source} holds no prompts; expected one a line")
    every = tuple(texts)
    count = min(limit or len(every), len(every))
    return tuple(every[index * len(every) // count] for index in range(count))


def _lines(source: str) -> Sequence[str]:
    if source == DEMO:
        from ddit_rt.lab.demo.prompts import held_out_prompts

        return held_out_prompts()
    if source in HUB_SETS:
        return _hub_lines(HUB_SETS[source])
    return prompt_lines(source)


def _hub_lines(wanted: HubSet) -> list[str]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the prompts of {wanted.label} need the package datasets ({error}); pip install "
            "datasets, or give a file with one prompt a line"
        ) from error
    try:
        table: Any = load_dataset(wanted.dataset, split="train")
        return [str(text) for text in table[wanted.column]]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"cannot read {wanted.label} ({wanted.dataset}, column {wanted.column}) from the Hub "
            f"or its cache: {type(error).__name__}: {error}; give a file with one prompt a line"
        ) from error
