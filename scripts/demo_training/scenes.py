"""The study model: the image model's parts, trained on scenes whose captions say little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel

from ddit_rt.lab.demo import model_path
from demo_training.draw_images import ImageConfig
from demo_training.draw_scenes import PHRASINGS, SCENE_SIZES, all_scenes, draw_scenes, phrase
from demo_training.image import ImageKind
from demo_training.kind import Phase, Size, TransformerRecipe

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "study"
_COUNTS = {(32, 32): 1024, (64, 64): 4096, (128, 128): 2048}


class SceneKind(ImageKind):
    """What is trained of it is the transformer, from the image model's weights."""

    name = "scenes"
    folder = _FOLDER
    stages = ("adopt", "transformer", "classifier", "export")
    minutes = {"transformer": 45.0}
    attribute_sizes = SCENE_SIZES
    attributes = all_scenes()
    classifier, classifier_steps = _FOLDER / "classifier.safetensors", 2400
    phrasings = PHRASINGS
    half = ("transformer",)
    shown = (64, 128)
    transformer = TransformerRecipe(
        counts=_COUNTS,
        batches={(32, 32): 64, (64, 64): 32, (128, 128): 12},
        shifts={(32, 32): -0.4, (64, 64): -0.1, (128, 128): 0.2},
        phases=(
            Phase(share=0.35, rates=(1e-3, 6e-4), mixture={(64, 64): 0.85, (32, 32): 0.15}),
            Phase(
                share=0.65,
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

    def series(self, size: Size) -> tuple[Callable[..., Any], Any]:
        return draw_scenes, ImageConfig(height=size[0], width=size[1], period=(0.16, 0.28))

    def phrase(self, attributes: Any, phrasing: int) -> str:
        return phrase(attributes, phrasing)

    def build_transformer(self) -> Any:
        """At the image model's weights."""
        model = FluxTransformer2DModel.from_pretrained(model_path(), subfolder="transformer")
        return model.float().train()

    def expected(self) -> dict[str, list[Any]]:
        """Scenes for the grids of a training; `benchmarks/bench_study.py` measures."""
        scenes = all_scenes()
        return {"held out": [scenes[place * len(scenes) // 16] for place in range(16)]}
