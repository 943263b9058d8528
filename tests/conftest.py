"""Fixtures that several areas share."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import CompiledBlocks
from diffusers import FluxTransformer2DModel
from models import tiny_transformer

from ddit_rt.artifact import LoraSpec, TokenRanges
from ddit_rt.compilation import compile_blocks
from ddit_rt.families import family_of

RANK = 4


@pytest.fixture(scope="session")
def compiled_blocks(tmp_path_factory: pytest.TempPathFactory) -> CompiledBlocks:
    directory = tmp_path_factory.mktemp("packages")
    lora = LoraSpec(rank=RANK, scaling=2.0)
    transformer = tiny_transformer()
    progress: list[tuple[int, int, str]] = []
    compile_blocks(
        transformer,
        family_of(transformer).block_types(transformer),
        directory,
        ranges=TokenRanges(),
        variants={None: None, lora.variant: lora},
        progress=lambda done, total, label: progress.append((done, total, label)),
    )
    return CompiledBlocks(directory, lora, tuple(progress))


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    """A fresh tiny model with the weights of seed 0."""
    return tiny_transformer()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps every test away from the user's list of trusted artifacts."""
    home = tmp_path / "ddit-home"
    monkeypatch.setenv("DDIT_RT_HOME", str(home))
    return home
