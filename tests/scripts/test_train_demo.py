"""The training of the embedded models: a smoke run of every stage, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

PARTS = {"image": "ImageKind", "video": "VideoKind"}
EVERY = [*PARTS, "scenes"]


def kind_of(model: str) -> Any:
    name = PARTS.get(model, "SceneKind")
    return getattr(import_module(f"demo_training.{model}"), name)()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model", PARTS)
def test_smoke_run_trains_exports_and_evaluates(
    model: str, train_demo: Callable[..., None], tmp_path: Path
) -> None:
    train_demo(model, "all")
    kind, export = kind_of(model), tmp_path / "export"
    pipeline = DiffusionPipeline.from_pretrained(export)
    shipped = DiffusionPipeline.from_pretrained(kind.folder)
    assert type(pipeline) is type(shipped)
    for name in ("transformer", "vae", "text_encoder"):
        own, other = (getattr(one, name).state_dict() for one in (pipeline, shipped))
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}
    card = (export / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"| {kind.evaluated[0]} px | 12 held out |" in card
    assert card.count("## ") == (kind.folder / "MODEL_CARD.md").read_text().count("## ")


@pytest.mark.parametrize("model", EVERY)
def test_every_size_of_a_phase_has_data_a_batch_and_a_shift(model: str) -> None:
    recipe = kind_of(model).transformer
    sizes = set(recipe.counts)
    assert set(recipe.batches) == set(recipe.shifts) == sizes >= recipe.eager
    assert set(recipe.phases[-1].mixture) == sizes
    assert sum(phase.share for phase in recipe.phases) == pytest.approx(1)
    for phase in recipe.phases:
        assert sum(phase.mixture.values()) == pytest.approx(1)
        assert set(phase.mixture) <= sizes


@pytest.mark.parametrize("model", PARTS)
def test_normalised_latents_have_mean_0_and_deviation_1(model: str) -> None:
    kind = kind_of(model)
    shape = (64, 4, 8, 8) if model == "image" else (64, 8, 3, 8, 8)
    z = 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vae = kind.build_vae(**kind.statistics(z))
    normal = kind.normalise(z, vae.config)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("model", PARTS)
def test_a_transformer_begins_at_zero_velocity_in_the_layout_of_its_target(model: str) -> None:
    kind = kind_of(model)
    noisy = torch.randn((2, 4, 8, 8) if model == "image" else (2, 8, 4, 4, 4))
    text = {"sequence": torch.randn(2, 16, 64), "pooled": torch.randn(2, 64)}
    velocity = kind.velocity(kind.build_transformer(), noisy, torch.tensor([0.2, 0.8]), text)
    assert velocity.shape == kind.layout(noisy).shape
    assert torch.count_nonzero(velocity) == 0


def test_phases_follow_each_other_and_the_rate_falls_within_each() -> None:
    training, recipe = import_module("demo_training.transformer"), kind_of("image").transformer
    first, second = recipe.phases
    assert training.phase_at(recipe, 0.0) == (first, 2e-3)
    assert training.phase_at(recipe, 0.269)[0] is first
    assert training.phase_at(recipe, 0.28)[0] is second
    assert training.phase_at(recipe, 1.0) == (second, pytest.approx(2e-5))


def test_card_takes_what_was_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    write_card = import_module("demo_training.export").write_card
    card = tmp_path / "card.md"
    before = "# Model\n\n| a |\n|---|\n\n## Measured\n\nText.\n\n| b |\n|---|\n| 1 |\n\n## Limits\n"
    card.write_text(before)
    write_card(card, ["side", "shape_colour"], ["| 64 px | 90.0% |"])
    table = "| side | shape colour |\n|---|---|\n| 64 px | 90.0% |\n"
    assert card.read_text() == before.replace("| b |\n|---|\n| 1 |\n", table)
    card.write_text("# Model\n")
    with pytest.raises(ValueError, match="no table"):
        write_card(card, [], [])
