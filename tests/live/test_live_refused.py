"""What a model may carry besides its weights is refused by name, at every moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import FirstBlockCacheConfig, FluxPipeline
from live_kinds import KINDS
from live_models import eager, nothing, run
from models import noise, tiny_conditioning, tiny_transformer

import ddit_rt
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError

REFUSED = (UnsupportedModelError, ArtifactMismatchError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_load_refuse_and_compile_does_before_any_work(
    kind: str, pipeline: FluxPipeline, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    apply, message = KINDS[kind]
    engine, transformer = eager(pipeline), pipeline.transformer
    run(engine)
    apply(pipeline)
    told = message if pipeline.transformer is transformer else "transformer is another one"
    for _ in range(2):
        with pytest.raises(REFUSED, match=told):
            run(engine)
    with pytest.raises(REFUSED, match=message):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    for place in ("engine.build.compile_blocks", "engine.build._runners"):
        monkeypatch.setattr(f"ddit_rt.{place}", work)
    monkeypatch.setattr("ddit_rt.artifact.manifest.weight_fingerprint", work)
    for model, backend in ((pipeline, "aot"), (pipeline.transformer, "eager")):
        with pytest.raises(UnsupportedModelError, match=message):
            ddit_rt.compile(model, backend=backend, progress=False)


def test_a_loaded_engine_refuses_too(engine: ddit_rt.Engine) -> None:
    engine.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    with pytest.raises(UnsupportedModelError, match="FirstBlockCacheConfig"):
        run(engine)
    with pytest.raises(UnsupportedModelError, match="FirstBlockCacheConfig"):
        engine.denoise(noise(1, 4, 16, 16), **tiny_conditioning(engine.pipeline.transformer))
    engine.pipeline.transformer.disable_cache()
    run(engine)


def test_a_bare_transformer_is_looked_at_too() -> None:
    transformer = tiny_transformer()
    engine = eager(transformer)
    transformer.transformer_blocks[0].register_forward_hook(nothing)
    with pytest.raises(UnsupportedModelError, match="has a hook"):
        engine.denoise(noise(1, 4, 16, 16), **tiny_conditioning(transformer))
