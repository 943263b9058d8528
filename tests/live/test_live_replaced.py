"""Functions, modules and models that others have taken the place of."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformerBlock
from live_models import LORA, check_equal, eager, nothing, run
from models import tiny_pipeline, tiny_transformer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import ddit_rt
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError

REFUSED = (UnsupportedModelError, ArtifactMismatchError)


def check_refused(engine: ddit_rt.Engine, message: str) -> None:
    """By a run of an engine that was made before the change, and by compile."""
    for call in (lambda: run(engine), lambda: eager(engine.pipeline)):
        with pytest.raises(REFUSED, match=message):
            call()


def test_a_hook_for_all_modules_is_refused(pipeline: FluxPipeline) -> None:
    engine = eager(pipeline)
    handle = register_module_forward_hook(nothing)
    try:
        check_refused(engine, r"hook for all modules \(.*nothing")
    finally:
        handle.remove()
    check_equal(engine, pipeline)


def test_a_replaced_attention_function_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = eager(pipeline)
    own = torch.nn.functional.scaled_dot_product_attention

    def quantised_attention(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", quantised_attention)
    check_refused(engine, r"replaced \(\S*quantised_attention\)")


@pytest.mark.parametrize("decorated", [True, False])
def test_a_replaced_forward_of_the_transformer_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, decorated: bool
) -> None:
    """As the published TeaCache puts itself in."""
    engine = eager(pipeline)
    own = FluxTransformer2DModel.forward

    def teacache_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    forward = functools.wraps(own)(teacache_forward) if decorated else teacache_forward
    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    check_refused(engine, r"forward.*teacache_forward")


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Linear, "forward"), (nn.Module, "__call__"), (nn.Linear, "__call__")]
)
def test_a_replaced_method_of_torchs_own_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    engine = eager(pipeline)
    own = getattr(owner, name)

    def other_product(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, other_product, raising=False)
    check_refused(engine, "other_product")


def test_a_subclass_with_a_forward_of_its_own_is_refused(pipeline: FluxPipeline) -> None:
    class Cached(FluxTransformer2DModel):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    pipeline.transformer.__class__ = Cached
    with pytest.raises(UnsupportedModelError, match=r"Cached with a forward of its own"):
        eager(pipeline)


def test_a_wrapped_transformer_is_refused(pipeline: FluxPipeline) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule.*_orig_mod"):
        eager(pipeline)


def test_another_transformer_is_refused_until_the_old_one_is_back(pipeline: FluxPipeline) -> None:
    engine, own = eager(pipeline), pipeline.transformer
    pipeline.transformer = tiny_transformer(seed=7)
    for call in (lambda: run(engine), lambda: engine.load_lora(dict(LORA))):
        with pytest.raises(ArtifactMismatchError, match="transformer is another one.*load again"):
            call()
    pipeline.transformer = own
    check_equal(engine, pipeline)


@pytest.mark.parametrize("place", ["transformer_blocks.0", "transformer_blocks.0.ff"])
def test_an_exchanged_module_of_the_same_class_is_refused_at_a_run(
    pipeline: FluxPipeline, place: str
) -> None:
    engine, model = eager(pipeline), pipeline.transformer
    block = FluxTransformerBlock(dim=32, num_attention_heads=2, attention_head_dim=16).eval()
    if place.endswith("ff"):
        model.transformer_blocks[0].ff = block.ff
    else:
        model.transformer_blocks[0] = block
    with pytest.raises(ArtifactMismatchError, match=rf"transformer\.{place} has changed.*another"):
        run(engine)


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_method_replaced_after_compiling_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Even one that calls itself like the old."""
    engine = eager(pipeline)
    owner = FluxTransformerBlock if name == "forward" else FluxAttnProcessor
    own = vars(owner)[name]

    @functools.wraps(own)
    def method(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    with pytest.raises(ArtifactMismatchError, match=r"transformer_blocks\.0"):
        run(engine)


def test_the_attention_backend_is_part_of_what_was_compiled(
    pipeline: FluxPipeline, artifact_path: Path
) -> None:
    engine = eager(pipeline)
    with attention_backend("_native_math"):
        with pytest.raises(ArtifactMismatchError, match="attention backend.*native.*_native_math"):
            run(engine)
        with pytest.raises(ArtifactMismatchError, match="attention backend was as the config"):
            ddit_rt.load(artifact_path, pipeline, progress=False)
        other = eager(tiny_pipeline())
        assert other.artifact.manifest.block_changes == {"attention backend": "_native_math"}
        check_equal(other, other.pipeline)
