"""Engines of the shared artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
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


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    """`set_attention_backend` sets it for the whole process."""
    backend = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(backend)
