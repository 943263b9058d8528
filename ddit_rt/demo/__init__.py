"""A small, real FLUX pipeline that ships with the package: for demonstrations, tests and studies.

See `ddit_rt/demo/model/MODEL_CARD.md` for what it draws and how it was made.
"""

import pathlib


def model_path() -> pathlib.Path:
    """Folder of the demo pipeline, for `FluxPipeline.from_pretrained`."""
    return pathlib.Path(__file__).parent / "model"
