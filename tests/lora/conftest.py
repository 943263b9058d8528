"""Engines of the shared artifact, and a pipeline that takes prompts."""

import pytest
from diffusers import FluxPipeline
from engine_fixtures import engine, own_backend, own_home, pipeline
from lora_files import speaking_pipeline

__all__ = ["engine", "own_backend", "own_home", "pipeline"]


@pytest.fixture
def pipe() -> FluxPipeline:
    """A fresh one."""
    return speaking_pipeline()
