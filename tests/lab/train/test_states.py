"""Which states a step trains on: functions of its number alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from ddit_rt.lab.train import DataConfig, TrainConfig
from ddit_rt.lab.train.latent_cache import LatentCache, open_cache
from ddit_rt.lab.train.states import StateSource, draw_levels
from ddit_rt.lab.train.student import Student
from ddit_rt.models.flux import FluxFamily

CONFIG = TrainConfig(rank=4, batch_size=4)


def opened(folder: Path, data: DataConfig, pipeline: FluxPipeline) -> LatentCache:
    student = Student(FluxFamily(), pipeline.transformer, CONFIG.adapters())
    return open_cache(folder, data, student.model, pipeline, progress=False)


def test_batch_depends_on_the_step_alone(own_cache: LatentCache) -> None:
    first, second = (StateSource(own_cache, CONFIG) for _ in range(2))
    for step in range(5):
        first.batch(step, 0)
    expected, found = first.batch(5, 0), second.batch(5, 0)
    assert torch.equal(expected.latents, found.latents)
    assert torch.equal(expected.sigmas, found.sigmas)
    assert not torch.equal(expected.sigmas, second.batch(6, 0).sigmas)


def test_every_sample_comes_once_per_epoch(own_cache: LatentCache) -> None:
    """Six samples in batches of three, of two processes: each batch pair is one epoch."""
    config = dataclasses.replace(CONFIG, batch_size=3)
    for step in range(3):
        conditioning = [
            StateSource(own_cache, config, process=process, processes=2)
            .batch(step, 0)
            .conditioning["pooled_projections"]
            for process in range(2)
        ]
        # Three prompts, each of two trajectories.
        rows = torch.cat(conditioning)
        assert [len(torch.unique(rows, dim=0)), len(rows)] == [3, 6]
        _, counts = torch.unique(rows, dim=0, return_counts=True)
        assert counts.tolist() == [2, 2, 2]


def test_pasts_of_trajectories_come_before_their_states(own_cache: LatentCache) -> None:
    config = dataclasses.replace(CONFIG, batch_size=64, detail_share=1.0)
    states = StateSource(own_cache, config).batch(0, 0)
    earlier = states.earlier
    assert earlier is not None
    used = earlier.used
    assert bool(used.any())
    assert bool((earlier.sigmas[used] > earlier.first_sigmas[used]).all())
    assert bool((earlier.first_sigmas[used] >= states.sigmas[used]).all())
    assert states.velocity is not None


def test_pasts_of_images_come_before_their_states(
    tmp_path: Path, image_folder: Path, pipeline: FluxPipeline
) -> None:
    data = DataConfig(kind="folder", source=str(image_folder), height=64, width=64)
    config = dataclasses.replace(CONFIG, batch_size=32, detail_share=1.0)
    states = StateSource(opened(tmp_path / "cache", data, pipeline), config).batch(0, 0)
    earlier = states.earlier
    assert earlier is not None
    used = earlier.used
    assert bool((earlier.sigmas[used] > earlier.first_sigmas[used]).all())
    assert bool((earlier.first_sigmas[used] >= states.sigmas[used]).all())
    assert float(earlier.sigmas.max()) <= 1
    assert earlier.velocity is None  # so that the states after it are taken from the teacher


def test_no_pasts_where_none_are_wanted(own_cache: LatentCache) -> None:
    for other in ({"detail_share": 0.0}, {"variant": "paper", "detail_share": 1.0}):
        config = dataclasses.replace(CONFIG, **other)
        assert StateSource(own_cache, config).batch(0, 0).earlier is None


def test_levels_follow_their_distribution() -> None:
    levels = draw_levels(20_000, torch.Generator().manual_seed(0))
    assert float(levels.min()) >= 0.1
    assert float(levels.max()) < 1
    # Before the minimum three quarters have the mean of sigmoid(0.5 + n), by its density, and the
    # rest 1/2; the error of 20,000 draws is below .002.
    n = torch.linspace(-8, 8, 10_001, dtype=torch.float64)
    density = torch.exp(-n.square() / 2)
    logit_normal = float((torch.sigmoid(0.5 + n) * density).sum() / density.sum())
    expected = 0.1 + 0.9 * (0.75 * logit_normal + 0.25 * 0.5)
    assert float(levels.mean()) == pytest.approx(expected, abs=0.008)


def test_trajectories_without_a_level_to_train_are_refused(
    own_cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(own_cache.index, "sigmas", [0.05, 0.01])
    with pytest.raises(ValueError, match=r"all below 0\.1"):
        StateSource(own_cache, CONFIG)


def test_probe_holds_rows_that_are_not_trained_on(
    tmp_path: Path, own_data: DataConfig, pipeline: FluxPipeline
) -> None:
    """Sixteen trajectories: the last two are kept."""
    cache = opened(tmp_path / "cache", dataclasses.replace(own_data, limit=16), pipeline)
    source = StateSource(cache, dataclasses.replace(CONFIG, batch_size=14))
    trained = {source._row(position) for position in range(28)}
    assert trained == set(range(14))
    assert source._held == [14, 15]
    assert torch.equal(source.probe(5).latents, source.probe(5).latents)
