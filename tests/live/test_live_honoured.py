"""What a model may carry besides its weights and an engine honours: diffusers' own result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from live_models import (
    LORA,
    Flipped,
    Packed,
    check_equal,
    deepest,
    disable_unfused,
    eager,
    expected,
    fuse_in_pipeline,
    ip_adapter,
    nothing,
    run,
)
from models import noise, tiny_pipeline, tiny_transformer
from text_encoders import clip_model, clip_words
from torch import nn

import ddit_rt
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError


def test_a_processor_on_all_blocks_before_compiling_acts(
    pipeline: FluxPipeline, artifact_path: Path
) -> None:
    plain = expected(pipeline)
    pipeline.transformer.set_attn_processor(Flipped(0.5))
    engine = eager(pipeline)
    check_equal(engine, pipeline)
    assert not torch.allclose(run(engine), plain, atol=1e-2)
    found = engine.artifact.manifest.block_changes
    assert set(found) == {
        f"{kind}.attn.processor" for kind in ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    }
    assert all(words.endswith("Flipped(strength=0.5)") for words in found.values())
    with pytest.raises(ArtifactMismatchError, match=r"blocks: .*processor was as.*Flipped"):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.set_attn_processor(FluxAttnProcessor()),
        lambda pipe: pipe.transformer.set_attn_processor(Flipped(0.25)),
        lambda pipe: setattr(
            pipe.transformer.single_transformer_blocks[1].attn.processor, "strength", 0.25
        ),
        lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    ],
    ids=["class", "argument", "in place", "backend"],
)
def test_a_processor_changed_after_compiling_is_refused(
    pipeline: FluxPipeline, change: Callable[[FluxPipeline], Any]
) -> None:
    pipeline.transformer.set_attn_processor(Flipped(0.5))
    engine = eager(pipeline)
    change(pipeline)
    with pytest.raises(ArtifactMismatchError, match=r"attn\.processor has changed.*Flipped"):
        run(engine)
    pipeline.transformer.set_attn_processor(Flipped(0.5))
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    check_equal(engine, pipeline)


def test_another_pipelines_backend_is_no_matter_to_processors_with_their_own(
    pipeline: FluxPipeline,
) -> None:
    pipeline.transformer.set_attention_backend("native")
    engine = eager(pipeline)
    tiny_transformer().set_attention_backend("_native_math")
    check_equal(engine, pipeline)


def test_fused_projections_act_where_they_were_fused_before_compiling(
    pipeline: FluxPipeline, artifact_path: Path
) -> None:
    pipeline.transformer.fuse_qkv_projections()
    engine = eager(pipeline)
    check_equal(engine, pipeline)
    with pytest.raises(UnsupportedModelError, match=r"to_q.*unfuse_qkv_projections\(\)"):
        engine.load_lora(dict(LORA))
    with pytest.raises(ArtifactMismatchError, match=r"blocks: .*(to_qkv|fused_projections)"):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    pipeline.transformer.unfuse_qkv_projections()
    with pytest.raises(ArtifactMismatchError, match="to_qkv has changed"):
        run(engine)
    check_equal(eager(pipeline), pipeline)


def other_activation(model: FluxTransformer2DModel) -> None:
    for block in model.single_transformer_blocks:
        block.act_mlp = nn.Tanh()


def other_epsilon(model: FluxTransformer2DModel) -> None:
    for block in model.single_transformer_blocks:
        block.norm.norm.eps = 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "FluxSingleTransformerBlock.forward was repl"),
        ("norm", "norm.*.forward was replaced, and ddit_rt"),
    ],
)
def test_another_forward_of_blocks_that_have_a_form_of_their_own_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    halve_output(monkeypatch, pipeline, name)
    with pytest.raises(UnsupportedModelError, match=message):
        eager(pipeline)


def test_another_forward_of_a_layer_that_is_called_acts(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = expected(pipeline)
    halve_output(monkeypatch, pipeline, "attn")
    check_equal(eager(pipeline), pipeline)
    assert not torch.allclose(expected(pipeline), plain, atol=1e-3)


def halve_output(monkeypatch: pytest.MonkeyPatch, pipeline: FluxPipeline, name: str) -> None:
    """Another forward for the class of a single-stream block, or of a layer of it."""
    kind = type(pipeline.transformer.single_transformer_blocks[0].get_submodule(name))
    own = kind.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        return tuple(0.5 * one for one in found) if isinstance(found, tuple) else 0.5 * found

    monkeypatch.setattr(kind, "forward", other)


def test_another_activation_of_the_modulation_acts(pipeline: FluxPipeline) -> None:
    plain = expected(pipeline)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.silu = nn.Tanh()
    check_equal(eager(pipeline), pipeline)
    assert not torch.allclose(expected(pipeline), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (other_activation, "FluxSingleTransformerBlock.act_mlp"),
        (other_epsilon, "FluxSingleTransformerBlock.norm.norm.eps"),
    ],
)
def test_a_change_of_all_blocks_of_a_type_acts_if_it_was_compiled(
    pipeline: FluxPipeline,
    artifact_path: Path,
    change: Callable[[FluxTransformer2DModel], None],
    place: str,
) -> None:
    plain, late = expected(pipeline), eager(tiny_pipeline())
    change(pipeline.transformer)
    engine = eager(pipeline)
    check_equal(engine, pipeline)
    assert not torch.allclose(run(engine), plain, atol=1e-3)
    assert place in engine.artifact.manifest.block_changes
    with pytest.raises(ArtifactMismatchError, match=f"blocks: {place} was as the configuration"):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    change(late.pipeline.transformer)
    with pytest.raises(ArtifactMismatchError, match="single_transformer_blocks.0"):
        run(late)


def use_and_leave_cache(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    pipe.transformer.disable_cache()


def use_and_leave_accelerate(pipe: FluxPipeline) -> None:
    add_hook_to_module(pipe.transformer, ModelHook())
    remove_hook_from_module(pipe.transformer)


def load_and_unload_ip_adapter(pipe: FluxPipeline) -> None:
    ip_adapter(pipe)
    pipe.transformer.config.encoder_hid_dim_type = "ip_image_proj"
    pipe.unload_ip_adapter()


HONOURED: dict[str, Callable[[FluxPipeline], Any]] = {
    "a cache that was left": use_and_leave_cache,
    "accelerate's hook that was left": use_and_leave_accelerate,
    "an IP-Adapter that was left": load_and_unload_ip_adapter,
    "backward hooks": lambda pipe: deepest(pipe).register_full_backward_hook(nothing),
    "torch's compile in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "blocks compiled in place": lambda pipe: pipe.transformer.compile_repeated_blocks(
        backend="eager"
    ),
    "training mode without dropout": lambda pipe: pipe.transformer.train(),
    "dropout out of training": lambda pipe: setattr(
        pipe.transformer.transformer_blocks[0].attn.to_out[1], "p", 0.5
    ),
    "gradient checkpointing": lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
    "processors of the same kind": lambda pipe: pipe.transformer.set_attn_processor(
        FluxAttnProcessor()
    ),
    "a LoRA fused by the pipeline": fuse_in_pipeline,
    "a LoRA that is disabled": disable_unfused,
    "a note on the model": lambda pipe: setattr(pipe.transformer, "my_note", [1, 2]),
    "a note on a block": lambda pipe: setattr(deepest(pipe), "my_note", object()),
}


@pytest.mark.parametrize("kind", HONOURED)
def test_what_changes_nothing_is_honoured_at_every_moment(
    pipeline: FluxPipeline, kind: str, artifact_path: Path
) -> None:
    engine = eager(pipeline)
    run(engine)
    HONOURED[kind](pipeline)
    check_equal(engine, pipeline)
    check_equal(engine, pipeline)
    check_equal(eager(pipeline), pipeline)
    loaded = ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    # Compiled blocks round differently.
    torch.testing.assert_close(run(loaded), expected(pipeline), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_have_what_the_live_ones_have(tmp_path: Path) -> None:
    """Processors, fused projections and a LoRA of the pipeline's, traced, saved and loaded."""
    pipeline = tiny_pipeline()
    fuse_in_pipeline(pipeline)
    pipeline.transformer.set_attn_processor(Flipped(0.5))
    deepest(pipeline).register_full_backward_hook(nothing)
    engine = ddit_rt.compile(pipeline, progress=False)
    path = engine.save(tmp_path / "flipped.ddit")
    for one in (engine, ddit_rt.load(path, pipeline, progress=False)):
        torch.testing.assert_close(run(one), expected(pipeline), rtol=0, atol=1e-4)
    with pytest.raises(ArtifactMismatchError, match=r"blocks: .*Flipped.*the model has it as"):
        ddit_rt.load(path, tiny_pipeline(), check_weights=False, progress=False)


def test_quantised_text_encoders_stay(pipeline: FluxPipeline) -> None:
    words = clip_words()
    pipeline.register_modules(text_encoder=clip_model(words), tokenizer=words)
    layer_of_text = pipeline.text_encoder.encoder.layers[0].mlp.fc1
    layer_of_text.weight = Packed(layer_of_text.weight.detach(), requires_grad=False)
    check_equal(eager(pipeline), pipeline)


def test_notes_and_loras_may_come_and_go(pipeline: FluxPipeline) -> None:
    transformer = pipeline.transformer
    transformer.my_note, deepest(pipeline).my_note = torch.ones(3), [2]
    fuse_in_pipeline(pipeline)
    engine = eager(pipeline)
    run(engine)
    transformer.my_note = torch.zeros(3)
    del deepest(pipeline).my_note
    pipeline.unload_lora_weights()
    check_equal(engine, pipeline)
    fuse_in_pipeline(pipeline)
    check_equal(engine, pipeline)
    pipeline.unfuse_lora(components=["transformer"])
    with pytest.raises(UnsupportedModelError, match="loaded but not fused"):
        run(engine)
    pipeline.unload_lora_weights()
    check_equal(engine, pipeline)


def test_the_users_adapters_in_the_text_encoder_stay(pipeline: FluxPipeline) -> None:
    words = clip_words()
    pipeline.register_modules(text_encoder=clip_model(words), tokenizer=words)
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    factors = {"lora_A": noise(2, 20), "lora_B": noise(20, 2)}
    pipeline.load_lora_weights(
        {f"{name}.{key}.weight": value for key, value in factors.items()}, adapter_name="words"
    )
    engine = eager(pipeline)
    run(engine)
    assert pipeline.get_list_adapters() == {"text_encoder": ["words"]}


def test_runs_and_calls_of_the_pipeline_need_no_second_look(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing changes, a run compares with the snapshot and reads no further."""

    def whole_look(*_: Any) -> None:
        raise AssertionError("looked at the whole model")

    engine = eager(pipeline)
    monkeypatch.setattr("ddit_rt.live.check_plain", whole_look)
    for _ in range(2):
        check_equal(engine, pipeline)
    pipeline.transformer.train()
    with pytest.raises(AssertionError, match="looked at the whole model"):
        run(engine)
