from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxPipeline
from models import prompting_pipeline
from PIL import Image

from ddit_rt.lab.train import DataConfig

PROMPTS = ("a fox", "a hen", "an owl")


@pytest.fixture
def pipeline() -> FluxPipeline:
    return prompting_pipeline()


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\n" + "\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def own_data(prompt_file: Path) -> DataConfig:
    """Six short trajectories of the model itself."""
    return DataConfig(
        kind="self", source=str(prompt_file), height=64, width=64, limit=6, sampling_steps=8
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three good images, one broken, one without a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate(("a", "b", "c")):
        Image.new("RGB", (80, 64), (40 * index, 90, 160)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}\n")
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.txt").write_text("half a picture")
    Image.new("RGB", (64, 64)).save(folder / "silent.png")
    return folder
