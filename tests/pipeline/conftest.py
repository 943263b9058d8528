"""Engines of the shared artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxPipeline
from models import tiny_pipeline

import ddit_rt


@pytest.fixture(autouse=True)
def own_home(artifact_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trust list that knows the shared artifact."""
    monkeypatch.setenv("DDIT_RT_HOME", str(artifact_home))
    return artifact_home


@pytest.fixture
def pipeline() -> FluxPipeline:
    """A fresh `tiny_pipeline()`: the same weights every time."""
    return tiny_pipeline()


@pytest.fixture
def engine(artifact_path: Path, pipeline: FluxPipeline) -> ddit_rt.Engine:
    """The compiled engine, loaded for a fresh pipeline."""
    return ddit_rt.load(artifact_path, pipeline, progress=False)
