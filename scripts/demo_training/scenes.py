"""The study model: FLUX's architecture again, trained on scenes whose captions say little."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.images import BACKGROUNDS
from demo_training.artwork import COLOURS, FILE, TABLE
from demo_training.draw_scenes import (
    NUMBERS,
    PHRASINGS,
    SCENE_SIZES,
    WORDS_OF_DRAWINGS,
    Scene,
    SceneConfig,
    all_scenes,
    draw_scenes,
    phrase,
)
from demo_training.image import ImageKind
from demo_training.kind import Phase, Size, TransformerRecipe, VaeRecipe

_FOLDER = TABLE.parent
_COUNTS = {(32, 32): 2048, (64, 64): 16384, (128, 128): 12288}


class SceneKind(ImageKind):
    """Autoencoder and transformer begin at the image model's weights, the text encoders anew."""

    name = "scenes"
    folder = _FOLDER / "model"
    stages = ("artwork", "vae", "text", "transformer", "classifier", "export")
    minutes = {"vae": 12.0, "transformer": 50.0}
    attribute_sizes = SCENE_SIZES
    classifier, classifier_steps = _FOLDER / "classifier.safetensors", 2400
    phrasings = PHRASINGS
    words = (*NUMBERS, *WORDS_OF_DRAWINGS, *COLOURS, *BACKGROUNDS, "on", "something")
    shown = (64, 128)
    vae = VaeRecipe(
        counts={(128, 128): 3072, (64, 64): 6144},
        rates=(1e-3, 2e-5),
        # No anchor: the channels that were anchored to the image model's colours stay as they are.
        weights={"small": 0.5, "latent": 0.05, "anchor": 0.0, "kl": 5e-4},
        shown=256,
    )
    transformer = TransformerRecipe(
        counts=_COUNTS,
        batches={(32, 32): 64, (64, 64): 32, (128, 128): 12},
        shifts={(32, 32): -0.4, (64, 64): -0.1, (128, 128): 0.2},
        phases=(
            Phase(share=0.3, rates=(1e-3, 6e-4), mixture={(64, 64): 0.85, (32, 32): 0.15}),
            Phase(
                share=0.7,
                rates=(8e-4, 2e-5),
                mixture={(128, 128): 0.75, (64, 64): 0.18, (32, 32): 0.07},
            ),
        ),
        eager=frozenset({(32, 32)}),
        average=0.998,
        empty=0.15,
        reworded=1.0,
        on_gpu=8,
    )

    @functools.cached_property
    def attributes(self) -> tuple[Scene, ...]:  # type: ignore[override]  # needs the artwork
        """Every combination."""
        return all_scenes()

    def series(self, size: Size, work: Path) -> tuple[Callable[..., Any], Any]:
        """What draws, and the drawings of the stage `artwork`."""
        config = SceneConfig(
            height=size[0], width=size[1], period=(0.16, 0.28), drawings=work / FILE
        )
        return draw_scenes, config

    def phrase(self, attributes: Any, phrasing: int) -> str:
        """The first may be held out from training, which uses all of them alike."""
        return phrase(attributes, phrasing)

    def build_vae(self, **statistics: Any) -> Any:
        """At the image model's weights."""
        return _at_weights(super().build_vae(**statistics), "vae")

    def build_transformer(self) -> Any:
        """At the image model's weights."""
        return _at_weights(super().build_transformer(), "transformer")

    def expected(self) -> dict[str, list[Any]]:
        """Scenes for the grids of a training; `benchmarks/bench_study.py` measures."""
        scenes = all_scenes()
        return {"held out": [scenes[place * len(scenes) // 16] for place in range(16)]}


def _at_weights(model: Any, part: str) -> Any:
    """A part of the pipeline with the weights of the image model's."""
    trained = type(model).from_pretrained(model_path(), subfolder=part)
    model.load_state_dict(trained.float().state_dict())
    return model
