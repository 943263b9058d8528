"""The models and settings of `bench_study.py`: what may bend a trajectory, one by one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from demo_models import DemoModel
from quality_rows import tensor

from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.classifier import load_classifier
from ddit_rt.lab.demo.images import Attributes, all_attributes, is_held_out
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.sources import EMBEDDED, load_pipeline

FOLDER = Path(__file__).resolve().parent
MODEL, CLASSIFIER = FOLDER / "study" / "model", FOLDER / "study" / "classifier.safetensors"
DEMO, STUDY = "demo", "study"
OPEN, EMPTY = "open", "empty"
STUDIED = "study: guidance 6, shift 0.4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model, what it is asked for, and how.

    Attributes:
        name: In the record.
        model: `"demo"`, the embedded model, or `"study"`.
        captions: `"open"`, which leave most open, or `"empty"`, which say nothing.
        guidance: Scale of classifier-free guidance; 1 is none.
        shift: Of the noise schedule, exp(mu): a level t becomes shift t / (1 + (shift - 1) t).
            None: the demo's, 1.65.
        side: Of the images, in pixels.
    """

    name: str
    model: str = DEMO
    captions: str = OPEN
    guidance: float = 3.5
    shift: float | None = None
    side: int = 128

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a call beside size and steps."""
        arguments: dict[str, Any] = {"max_sequence_length": MAX_SEQUENCE_LENGTH}
        if self.guidance > 1:
            arguments |= {"true_cfg_scale": self.guidance, "negative_prompt": ""}
        return arguments


def pipeline_of(model: str) -> Any:
    """The embedded pipeline or the study model's.

    Raises:
        FileNotFoundError: There is no study model.
    """
    if model == STUDY and not MODEL.is_dir():
        raise FileNotFoundError(
            f"{MODEL} is not there; `python scripts/train_demo.py scenes all` makes it"
        )
    pipeline = load_pipeline(str(MODEL) if model == STUDY else EMBEDDED)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def model_of(setting: Setting, pipeline: Any) -> DemoModel:
    """The model of a setting.

    Args:
        setting: The setting.
        pipeline: By `pipeline_of`; it gets the setting's noise schedule.
    """
    own = type(pipeline.scheduler).from_pretrained(model_path(), subfolder="scheduler")
    if setting.shift is not None:
        mu = math.log(setting.shift)  # whatever the number of tokens
        own = type(own).from_config(own.config, base_shift=mu, max_shift=mu)
    pipeline.scheduler = own
    held_out, seen = captions_of(setting)
    return DemoModel(
        name=setting.name,
        pipeline=pipeline,
        size={"height": setting.side, "width": setting.side},
        others=setting.arguments,
        held_out=held_out,
        seen=seen,
        shows=shown_as_asked if setting.model == STUDY else None,
    )


def studied(side: int = 128) -> DemoModel:
    """The study model in the setting in which half the steps lose as much as on large models."""
    setting = next(setting for setting in SETTINGS if setting.name == STUDIED)
    return model_of(replace(setting, side=side), pipeline_of(STUDY))


def captions_of(setting: Setting) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions to report on, none of which training has shown, and others to search with."""
    if setting.captions == EMPTY:
        return ("",) * 64, ("",) * 64
    if setting.model == STUDY:
        scenes = _scenes()
        return scenes.captions_of(held_out=True), scenes.captions_of(held_out=False)
    held_out, seen = (
        [attributes for attributes in all_attributes() if is_held_out(attributes) == chosen]
        for chosen in (True, False)
    )
    return (
        tuple(_open(attributes, place) for place, attributes in enumerate(held_out)),
        tuple(_open(attributes, place) for place, attributes in enumerate(seen[::13])),
    )


def shown_as_asked(images: Sequence[Pixels], captions: Sequence[str]) -> list[bool]:
    """Whether images of the study model show all that their captions say.

    By a classifier that was trained on scenes (`scripts/train_demo.py scenes classifier`).
    """
    scenes = _scenes()
    classifier = load_classifier(CLASSIFIER, scenes.SCENE_SIZES)
    with torch.no_grad():
        parts = classifier(tensor(images)).split(list(classifier.sizes.values()), dim=1)
    seen = dict(zip(classifier.sizes, (part.argmax(1).tolist() for part in parts), strict=True))
    return [
        all(seen[name][place] == label for name, label in scenes.said(caption).items())
        for place, caption in enumerate(captions)
    ]


def _open(attributes: Attributes, place: int) -> str:
    """Two of the four things that an image shows, in words that the demo's encoders know."""
    a = "an" if attributes.colour == "orange" else "a"
    return (
        f"{a} {attributes.colour} {attributes.shape}",
        f"a {attributes.shape} on {attributes.background}",
        f"{attributes.background_colour} {attributes.background}",
        f"{attributes.colour} on {attributes.background}",
    )[place % 4]


def _scenes() -> Any:
    # Last, because `profile.py` there would hide the standard library's.
    scripts = str(FOLDER.parent / "scripts")
    if scripts not in sys.path:
        sys.path.append(scripts)
    return import_module("demo_training.draw_scenes")


SETTINGS = (
    Setting(name="demo: empty prompt", captions=EMPTY, guidance=1),
    Setting(name="demo: guidance 3.5"),
    Setting(name="demo: guidance 3.5, shift 0.5", shift=0.5),
    Setting(name="study: guidance 3.5", model=STUDY),
    Setting(name="study: guidance 3.5, shift 0.5", model=STUDY, shift=0.5),
    Setting(name=STUDIED, model=STUDY, guidance=6, shift=0.4),
)
"""By which the curve is drawn."""
