"""Engines of the shared artifact, and uncompiled ones for whole modules."""

from __future__ import annotations

import pytest
from engine_fixtures import engine, own_backend, own_home, pipeline
from models import eager, tiny_pipeline, tiny_transformer
from wan_models import wan_pipeline

from ddit_rt import Engine

__all__ = ["engine", "own_backend", "own_home", "pipeline"]


@pytest.fixture(scope="module")
def flux() -> Engine:
    return eager(tiny_pipeline(guidance_embeds=True), patch_policy="fine")


@pytest.fixture(scope="module")
def wan() -> Engine:
    return eager(wan_pipeline(), patch_policy="fine")


@pytest.fixture(scope="module")
def bare() -> Engine:
    """Of a transformer without its pipeline."""
    return eager(tiny_transformer())
