from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxPipeline
from models import prompting_pipeline
from PIL import Image

from ddit_rt.lab.train import DataConfig, TrainConfig
from ddit_rt.lab.train.latent_cache import LatentCache, open_cache
from ddit_rt.lab.train.student import Student
from ddit_rt.models.flux import FluxFamily

PROMPTS = ("a fox", "a hen", "an owl")


@pytest.fixture
def pipeline() -> FluxPipeline:
    return prompting_pipeline()


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Six short trajectories of the model itself."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# animals\n" + "\n".join(PROMPTS) + "\n")
    return DataConfig(kind="self", source=str(path), height=64, width=64, limit=6, sampling_steps=8)


@pytest.fixture(scope="session")
def own_cache(own_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """The latents of `own_data`."""
    folder, pipeline = tmp_path_factory.mktemp("cache"), prompting_pipeline()
    student = Student(FluxFamily(), pipeline.transformer, TrainConfig(rank=4).adapters())
    return open_cache(folder, own_data, student.model, pipeline, progress=False)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good images, one broken, one without a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, name in enumerate(("a", "b", "c")):
        Image.new("RGB", (80, 64), (40 * index, 90, 160)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}\n")
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.txt").write_text("half a picture")
    Image.new("RGB", (64, 64)).save(folder / "silent.png")
    return folder
