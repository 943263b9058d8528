"""Engines that a server cannot stand before."""

from __future__ import annotations

import pytest
from longcat_models import tiny_pipeline as sounding_pipeline
from models import tiny_transformer
from served import config

import ddit_rt
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.serving.app import create_app


def test_a_bare_transformer_answers_no_prompts() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    with pytest.raises(UnsupportedModelError, match="compile the whole pipeline"):
        create_app(engine, config())


def test_sound_would_be_left_out() -> None:
    engine = ddit_rt.compile(sounding_pipeline(), backend="eager", progress=False)
    with pytest.raises(UnsupportedModelError, match="makes sound"):
        create_app(engine, config())
