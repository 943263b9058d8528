"""What Wan's experts may carry besides their weights: the second is looked at like the first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from live_models import Packed, nothing
from made_once import Packages
from models import eager, noise, seeded
from torch import nn
from wan_models import CALL, wan_pipeline, wan_transformer

import ddit_rt
from ddit_rt import FinePolicy
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError

REFUSED = (UnsupportedModelError, ArtifactMismatchError)
LORA = {
    "transformer.blocks.0.ffn.net.2.lora_A.weight": noise(2, 48),
    "transformer.blocks.0.ffn.net.2.lora_B.weight": noise(32, 2),
}


class Flipped(WanAttnProcessor):  # type: ignore[misc]
    """An attention processor that does something else."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(attn, hidden_states.flip(-1), *args, **kwargs)


def experts() -> WanPipeline:
    return wan_pipeline(boundary_ratio=0.875)


def pack(model: WanTransformer3DModel) -> None:
    layer = model.blocks[1].ffn.net[2]
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)


def last_block(model: WanTransformer3DModel) -> nn.Module:
    block = model.blocks[1]
    assert isinstance(block, nn.Module)
    return block


KINDS: dict[str, tuple[Callable[[WanTransformer3DModel], Any], str]] = {
    "hook": (
        lambda model: last_block(model).register_forward_hook(nothing),
        r"transformer_2\.blocks\.1 has a hook",
    ),
    "cache": (
        lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.9)),
        r"transformer_2\.blocks\.0 has a hook.*FirstBlockCacheConfig",
    ),
    "forward": (
        lambda model: setattr(model.rope, "forward", functools.partial(nothing)),
        r"transformer_2\.rope has a hook around its forward",
    ),
    "quantised": (pack, r"transformer_2 is quantised with .*Packed"),
    "LoRA": (
        lambda model: model.load_lora_adapter(dict(LORA), adapter_name="style"),
        r"'style'.*not fused \(first at transformer_2\.blocks\.0",
    ),
    "processor on one block": (
        lambda model: last_block(model).attn2.set_processor(Flipped()),
        r"transformer_2\.blocks\.1\.attn2\.processor .*Flipped",
    ),
    "processors on one expert": (
        lambda model: model.set_attn_processor(Flipped()),
        r"attn.\.processor .*Flipped",
    ),
    "projections of one expert": (
        lambda model: model.fuse_qkv_projections(),
        r"attn.\.(to_qkv|to_kv|fused_projections)",
    ),
    "attribute of one block": (
        lambda model: setattr(last_block(model).norm3, "eps", 0.1),
        r"transformer_2\.blocks\.1\.norm3\.eps",
    ),
    "positions": (
        lambda model: setattr(model.rope, "max_seq_len", 7),
        r"transformer_2\.rope\.max_seq_len",
    ),
    "configuration": (
        lambda model: model.register_to_config(eps=0.1),
        r"transformer_2|of another configuration \(eps\)",
    ),
}


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, artifact_home: Path, packages: Packages
) -> Path:
    """An artifact of two experts, compiled once."""
    with packages():
        engine = ddit_rt.compile(experts(), progress=False)
    return engine.save(tmp_path_factory.mktemp("wan") / "experts.ddit")


def run(engine: ddit_rt.Engine) -> torch.Tensor:
    frames = engine(**CALL, generator=seeded(), patch_policy=FinePolicy()).frames
    assert isinstance(frames, torch.Tensor)
    return frames


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_load_refuse_and_compile_does_before_any_work(
    kind: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    apply, message = KINDS[kind]
    pipeline = experts()
    engine = eager(pipeline)
    apply(pipeline.transformer_2)
    with pytest.raises(REFUSED, match=message):
        run(engine)
    with pytest.raises(REFUSED, match=message):
        ddit_rt.load(saved, pipeline, progress=False)
    monkeypatch.setattr("ddit_rt.engine.build.compile_blocks", work)
    with pytest.raises(UnsupportedModelError, match=message):
        ddit_rt.compile(pipeline, progress=False)


def test_another_second_expert_is_refused() -> None:
    pipeline = experts()
    engine, own = eager(pipeline), pipeline.transformer_2
    pipeline.transformer_2 = wan_transformer(seed=5)
    with pytest.raises(ArtifactMismatchError, match="transformer_2 is another one"):
        run(engine)
    pipeline.transformer_2 = own
    run(engine)


@pytest.mark.parametrize("boundary", [None, 0.875])
def test_a_pipeline_that_changes_its_number_of_experts_is_refused(boundary: float | None) -> None:
    pipeline = experts()
    pipeline.register_to_config(boundary_ratio=boundary)
    engine = eager(pipeline)
    pipeline.register_to_config(boundary_ratio=0.875 if boundary is None else None)
    with pytest.raises(ArtifactMismatchError, match="transformer_2 is another one"):
        run(engine)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_attn_processor(Flipped()),
        lambda model: model.fuse_qkv_projections(),
    ],
    ids=["processors", "projections"],
)
def test_what_both_experts_have_before_compiling_acts(
    change: Callable[[WanTransformer3DModel], Any],
) -> None:
    pipeline = experts()
    for model in (pipeline.transformer, pipeline.transformer_2):
        change(model)
    engine = eager(pipeline)
    assert engine.artifact.manifest.block_changes
    expected = pipeline(**CALL, generator=seeded()).frames
    # fp32 throughout, latents of order 4, guided by 5: the last bits of a few steps.
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-5)


def test_an_idle_second_model_may_carry_anything() -> None:
    pipeline = experts()
    pipeline.register_to_config(boundary_ratio=None)
    last_block(pipeline.transformer_2).register_forward_hook(nothing)
    expected = pipeline(**CALL, generator=seeded()).frames
    torch.testing.assert_close(run(eager(pipeline)), expected, rtol=0, atol=2e-5)


def test_a_cache_that_was_left_is_no_matter(saved: Path) -> None:
    pipeline = experts()
    pipeline.transformer_2.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    pipeline.transformer_2.disable_cache()
    engine = ddit_rt.load(saved, pipeline, progress=False)
    expected = pipeline(**CALL, generator=seeded()).frames
    # Compiled blocks round differently.
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=1e-4)
