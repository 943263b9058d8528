"""A small, real FLUX pipeline that ships with the package: for demonstrations, tests and studies.

See `ddit_rt/demo/model/MODEL_CARD.md` for what it draws and how it was made, and
`ddit_rt/demo/adapters/README.md` for its patch adapters.
"""

import pathlib


def model_path() -> pathlib.Path:
    """Folder of the demo pipeline, for `FluxPipeline.from_pretrained`."""
    return pathlib.Path(__file__).parent / "model"


def adapters_path() -> pathlib.Path:
    """Folder of the demo model's patch adapters, for `ddit_rt.compile(pipe, adapter=...)`.

    The demo itself does without: they are better where coarse steps come in one block, and worse
    where steps at p come in between, as in the demo's plans.
    """
    return pathlib.Path(__file__).parent / "adapters"
