"""Latents on disk: the right values, used again, refused for other data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from ddit_rt.lab.train import DataConfig, TrainConfig, latent_cache
from ddit_rt.lab.train.denoise import denoise, prepare
from ddit_rt.lab.train.latent_cache import LatentCache, open_cache
from ddit_rt.lab.train.student import Student
from ddit_rt.models.flux import FluxFamily

FLUX = FluxFamily()
# Latents are kept in float16: half a unit in its last place, and as much for sums of a few.
HALF = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def student(pipeline: FluxPipeline) -> Student:
    config = TrainConfig(rank=4)
    return Student(FLUX, pipeline.transformer, config.adapters())


def opened(folder: Path, data: DataConfig, student: Student, pipeline: FluxPipeline) -> LatentCache:
    return open_cache(folder, data, student.model, pipeline, progress=False)


def test_trajectories_are_the_pipelines_own(own_cache: LatentCache, pipeline: FluxPipeline) -> None:
    found = own_cache
    expected = pipeline(
        "a hen",
        height=64,
        width=64,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    sigmas = found.sigmas
    assert sigmas is not None
    assert len(found) == 6
    assert len(sigmas) == 8
    last = found.values("latents", [1], [7]) - sigmas[7] * found.values("velocities", [1], [7])
    torch.testing.assert_close(FLUX.pack_latents(last), expected, **HALF)


def test_images_are_the_autoencoders_latents(
    tmp_path: Path, image_folder: Path, student: Student, pipeline: FluxPipeline
) -> None:
    data = DataConfig(kind="folder", source=str(image_folder), height=64, width=64)
    found = opened(tmp_path / "c", data, student, pipeline)
    assert len(found) == 3
    assert found.captions == ["picture a", "picture b", "picture c"]
    decoded = pipeline.vae.encode(torch.full((1, 3, 64, 64), 0.0)).latent_dist.mode()
    assert found.values("latents", [0]).shape == decoded.shape
    prompt = pipeline.encode_prompt(prompt=["picture b"])[0]
    assert torch.equal(found.conditioning([1])["encoder_hidden_states"], prompt)


def test_rows_are_found_across_shards(
    tmp_path: Path,
    own_data: DataConfig,
    own_cache: LatentCache,
    student: Student,
    pipeline: FluxPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dataclasses.replace(own_data, encode_batch=2)
    monkeypatch.setattr(latent_cache, "_SHARD_BYTES", 1)
    split = opened(tmp_path / "split", data, student, pipeline)
    assert split.index["rows"] == [2, 2, 2]
    rows, steps = [5, 0, 3, 2], [1, 0, 7, 4]
    for name in ("latents", "velocities"):
        found, whole = (cache.values(name, rows, steps) for cache in (split, own_cache))
        # Prompts are encoded, and blocks run, in batches of another size.
        torch.testing.assert_close(found, whole, **HALF)


def test_cache_is_used_again_and_refused_for_other_data(
    own_cache: LatentCache, own_data: DataConfig, student: Student, pipeline: FluxPipeline
) -> None:
    shard = own_cache.folder / "shard-00000.safetensors"
    made = shard.stat().st_mtime_ns
    opened(own_cache.folder, own_data, student, pipeline)
    assert shard.stat().st_mtime_ns == made
    other = dataclasses.replace(own_data, sampling_steps=9)
    with pytest.raises(ValueError, match=r"'sampling_steps': \(8, 9\)"):
        opened(own_cache.folder, other, student, pipeline)


def test_unusable_images_alone_are_refused_with_reasons(
    tmp_path: Path, student: Student, pipeline: FluxPipeline
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"no picture")
    (folder / "x.txt").write_text("x")
    data = DataConfig(kind="folder", source=str(folder), height=64, width=64)
    with pytest.raises(ValueError, match=r"not one image .*x\.png: UnidentifiedImageError"):
        opened(tmp_path / "c", data, student, pipeline)


def test_denoising_at_p_is_the_pipelines_call(student: Student, pipeline: FluxPipeline) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 4}
    latents = denoise(student.model, prepare(FLUX, pipeline, ["a fox"], [3], **call), [1, 1, 1, 1])
    student.unload()
    generator = torch.Generator().manual_seed(3)
    expected = pipeline("a fox", generator=generator, output_type="latent", **call).images
    # Time embeddings of all steps are one matrix product here.
    torch.testing.assert_close(FLUX.pack_latents(latents), expected, rtol=1e-4, atol=1e-4)
