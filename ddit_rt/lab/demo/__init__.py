"""Small, real FLUX and Wan pipelines that ship with the package: to show, test and study.

See `model/MODEL_CARD.md` and `video_model/MODEL_CARD.md` beside this file for what they draw and
how they were made, and `adapters/README.md` for FLUX's patch adapters.
"""

import pathlib


def model_path() -> pathlib.Path:
    """Folder of the demo pipeline, for `FluxPipeline.from_pretrained`."""
    return pathlib.Path(__file__).parent / "model"


def video_model_path() -> pathlib.Path:
    """Folder of the video demo's pipeline, for `WanPipeline.from_pretrained`."""
    return pathlib.Path(__file__).parent / "video_model"


def adapters_path() -> pathlib.Path:
    """Folder of the demo model's patch adapters, for `ddit_rt.compile(pipe, adapter=...)`.

    The demo itself does without: they are better where coarse steps come in one block, and worse
    where steps at p come in between, as in the demo's plans.
    """
    return pathlib.Path(__file__).parent / "adapters"
