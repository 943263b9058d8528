"""Engines that a server cannot stand before."""

from __future__ import annotations

from importlib import import_module

import pytest
from extras import need_in_diffusers
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
    need_in_diffusers("LongCatAudioDiTPipeline")
    pipeline = import_module("longcat_models").tiny_pipeline()
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    with pytest.raises(UnsupportedModelError, match="makes sound"):
        create_app(engine, config())
