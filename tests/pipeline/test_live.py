"""What a model may carry besides its weights: honoured, or refused by name at every moment."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxTransformerBlock,
)
from models import (
    latents_of,
    noise,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)
from text_encoders import clip_model, clip_words
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import ddit_rt
from ddit_rt import FinePolicy
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError

CALL = {"height": 64, "width": 64, "num_inference_steps": 5, "output_type": "latent"}
LORA = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": noise(4, 32) * 0.3,
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": noise(32, 4, seed=1) * 0.3,
}


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    """`set_attention_backend` sets it for the whole process."""
    backend = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


class Flipped(FluxAttnProcessor):  # type: ignore[misc]
    """An attention processor that does something else, and may be told how much."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(attn, hidden_states.flip(-1) * self.strength, *args, **kwargs)


class Holder(FluxAttnProcessor):  # type: ignore[misc]
    """An attention processor with a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(3)


class Packed(nn.Parameter):
    """A weight in a form of its own, as quantisers have it."""


def nothing(*_: Any) -> None:
    """A hook that only watches: nobody can tell from outside."""


def deepest(pipe: FluxPipeline) -> nn.Module:
    """A layer well inside a block that is not the first."""
    return pipe.transformer.single_transformer_blocks[1].attn.to_v


def run(engine: ddit_rt.Engine) -> torch.Tensor:
    return latents_of(
        engine(**tiny_embeds(), **CALL, generator=seeded(), patch_policy=FinePolicy())
    )


def expected(pipe: FluxPipeline) -> torch.Tensor:
    return latents_of(pipe(**tiny_embeds(), **CALL, generator=seeded()))


def eager(pipe: Any) -> ddit_rt.Engine:
    return ddit_rt.compile(pipe, backend="eager", progress=False)


def check_equal(engine: ddit_rt.Engine, pipe: FluxPipeline) -> None:
    # fp32 throughout, latents of order 4; an eager block computes as diffusers does.
    torch.testing.assert_close(run(engine), expected(pipe), rtol=0, atol=2e-6)


def weight_norm(pipe: FluxPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(deepest(pipe))


def dynamic(pipe: FluxPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer = torch.ao.quantization.quantize_dynamic(
            pipe.transformer, {nn.Linear}, dtype=torch.qint8
        )


def torchao(pipe: FluxPipeline) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def quanto(pipe: FluxPipeline) -> None:
    package = pytest.importorskip("optimum.quanto")
    package.quantize(pipe.transformer, weights=package.qint8)
    package.freeze(pipe.transformer)


def packed(pipe: FluxPipeline) -> None:
    layer = deepest(pipe)
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)


def integers(pipe: FluxPipeline) -> None:
    layer = deepest(pipe)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def layer_from(module: str, name: str) -> Callable[[FluxPipeline], None]:
    """A layer of a class that a quantiser's package would bring."""

    def apply(pipe: FluxPipeline) -> None:
        kind = type(name, (nn.Linear,), {"__module__": module})
        deepest(pipe).__class__ = kind

    return apply


def quantizer_object(pipe: FluxPipeline) -> None:
    class TorchAoHfQuantizer:
        pass

    pipe.transformer.hf_quantizer = TorchAoHfQuantizer()


def ip_adapter(pipe: FluxPipeline) -> None:
    """As `FluxPipeline.load_ip_adapter` leaves the transformer."""
    model = pipe.transformer
    model.encoder_hid_proj = nn.Identity()
    processors = model.attn_processors
    for name in processors:
        if name.startswith("transformer_blocks"):
            processors[name] = FluxIPAdapterAttnProcessor(32, 24)
    model.set_attn_processor(processors)


def disabled_while_fused(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(dict(LORA), adapter_name="style")
    pipe.fuse_lora(components=["transformer"])
    pipe.disable_lora()


def dropping(pipe: FluxPipeline) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_out[1].p = 0.1
    pipe.transformer.train()


def exchanged_block(pipe: FluxPipeline) -> None:
    pipe.transformer.transformer_blocks[0] = torch.compile(pipe.transformer.transformer_blocks[0])


def layerwise(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def group_offload(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


KINDS: dict[str, tuple[Callable[[FluxPipeline], Any], str]] = {
    "forward hook on the last block": (
        lambda pipe: pipe.transformer.single_transformer_blocks[1].register_forward_hook(nothing),
        r"single_transformer_blocks\.1 has a hook.*nothing",
    ),
    "pre-hook inside a block": (
        lambda pipe: deepest(pipe).register_forward_pre_hook(nothing),
        r"single_transformer_blocks\.1\.attn\.to_v has a hook",
    ),
    "hook on the transformer": (
        lambda pipe: pipe.transformer.register_forward_hook(nothing),
        "transformer has a hook",
    ),
    "hook on an embedding": (
        lambda pipe: pipe.transformer.x_embedder.register_forward_hook(nothing),
        r"transformer\.x_embedder has a hook",
    ),
    "cache": (
        lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9)),
        r"FirstBlockCacheConfig.*disable_cache\(\)",
    ),
    "layerwise casting": (layerwise, r"LayerwiseCasting.*leave enable_layerwise_casting\(\) out"),
    "group offloading": (group_offload, "GroupOffloading.*leave group offloading out"),
    "accelerate's hook": (
        lambda pipe: add_hook_to_module(deepest(pipe), ModelHook()),
        r"ModelHook.*pipe\.remove_all_hooks\(\)",
    ),
    "forward of one module": (
        lambda pipe: setattr(deepest(pipe), "forward", functools.partial(nothing)),
        r"attn\.to_v has a hook around its forward \(functools\.partial",
    ),
    "weight norm": (weight_norm, "WeightNorm.*remove_weight_norm"),
    "parametrization": (
        lambda pipe: nn.utils.parametrizations.weight_norm(deepest(pipe)),
        "a parametrization.*remove_parametrizations",
    ),
    "compiled block": (exchanged_block, r"transformer_blocks\.0 is a OptimizedModule.*_orig_mod"),
    "torch.ao": (dynamic, r"quantised with torch\.ao"),
    "torchao": (torchao, "quantised with torchao.*without a quantization_config"),
    "quanto": (quanto, "quantised with quanto"),
    "weights of another class": (packed, r"weights of the class \S*Packed.*attn\.to_v"),
    "whole numbers": (integers, r"to_v\.weight is torch\.int8"),
    "quantiser's name": (
        lambda pipe: setattr(pipe.transformer, "quantization_method", "bitsandbytes"),
        "quantised with bitsandbytes",
    ),
    "quantiser's object": (quantizer_object, "quantised with TorchAoHfQuantizer"),
    "quantiser's configuration": (
        lambda pipe: pipe.transformer.register_to_config(quantization_config={"bits": 4}),
        "transformer is quantised",
    ),
    "layer of bitsandbytes": (
        layer_from("bitsandbytes.nn.modules", "Linear4bit"),
        r"bitsandbytes \(first at single_transformer_blocks\.1\.attn\.to_v\)",
    ),
    "layer of GGUF": (layer_from("diffusers.quantizers.gguf.utils", "GGUFLinear"), "with GGUF"),
    "IP-Adapter": (ip_adapter, r"IP-Adapter.*unload_ip_adapter\(\)"),
    "LoRA beside the weights": (
        lambda pipe: pipe.load_lora_weights(dict(LORA), adapter_name="style"),
        r"'style'.*loaded but not fused.*engine\.fuse_lora",
    ),
    "fused LoRA, disabled": (disabled_while_fused, r"'style'.*disabled.*unfuse_lora\(\)"),
    "dropout in training": (dropping, r"to_out\.1 drops values.*transformer\.eval\(\)"),
    "tensors in a processor": (
        lambda pipe: pipe.transformer.set_attn_processor(Holder()),
        r"processor holds tensors.*register them",
    ),
    "processor on one block": (
        lambda pipe: pipe.transformer.single_transformer_blocks[1].attn.set_processor(Flipped()),
        r"single_transformer_blocks\.1\.attn\.processor .*Flipped",
    ),
    "projections fused in one block": (
        lambda pipe: pipe.transformer.single_transformer_blocks[1].attn.fuse_projections(),
        r"single_transformer_blocks\.1\.attn\.(to_qkv|fused_projections)",
    ),
    "an attribute of one block": (
        lambda pipe: setattr(pipe.transformer.single_transformer_blocks[1].norm.norm, "eps", 0.1),
        r"single_transformer_blocks\.1\.norm\.norm\.eps",
    ),
    "an attribute around the blocks": (
        lambda pipe: setattr(pipe.transformer.pos_embed, "theta", 5),
        r"transformer\.pos_embed\.theta .*5",
    ),
    "a missing block": (
        lambda pipe: pipe.transformer.single_transformer_blocks.__delitem__(0),
        "single_transformer_blocks",
    ),
    "another layer around the blocks": (
        lambda pipe: setattr(pipe.transformer, "x_embedder", nn.Linear(16, 32, bias=False)),
        r"transformer\.x_embedder",
    ),
    "a layer more": (
        lambda pipe: setattr(pipe.transformer, "extra", nn.Linear(2, 2)),
        r"transformer\.extra",
    ),
    "configuration": (
        lambda pipe: pipe.transformer.register_to_config(guidance_embeds=True),
        "guidance_embeds|time_text_embed",
    ),
    "configuration, as an attribute": (
        lambda pipe: setattr(pipe.transformer.config, "in_channels", 32),
        "in_channels|out_channels",
    ),
}


@dataclass(frozen=True)
class Change:
    apply: Callable[[FluxPipeline], Any]
    message: str


@pytest.fixture(params=KINDS)
def change(request: pytest.FixtureRequest) -> Change:
    return Change(*KINDS[request.param])


REFUSED = (UnsupportedModelError, ArtifactMismatchError)


@pytest.mark.parametrize("backend", ["eager", "aot"])
def test_compile_refuses_before_any_work(
    change: Change, pipeline: FluxPipeline, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    for place in ("compile_blocks", "_runners"):
        monkeypatch.setattr(f"ddit_rt.pipeline.build.{place}", work)
    monkeypatch.setattr("ddit_rt.artifact.manifest.weight_fingerprint", work)
    change.apply(pipeline)
    for model in (pipeline, pipeline.transformer):
        with pytest.raises(UnsupportedModelError, match=change.message):
            ddit_rt.compile(model, backend=backend, progress=False)


def test_load_refuses(change: Change, pipeline: FluxPipeline, artifact_path: Path) -> None:
    change.apply(pipeline)
    with pytest.raises(REFUSED, match=change.message):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)


def test_a_run_refuses(change: Change, pipeline: FluxPipeline) -> None:
    engine = eager(pipeline)
    before = run(engine)
    transformer = pipeline.transformer
    change.apply(pipeline)
    message = (
        change.message if pipeline.transformer is transformer else "transformer is another one"
    )
    for _ in range(2):
        with pytest.raises(REFUSED, match=message):
            run(engine)
    assert before.isfinite().all()


def test_a_loaded_engine_refuses_too(engine: ddit_rt.Engine) -> None:
    engine.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    with pytest.raises(UnsupportedModelError, match="FirstBlockCacheConfig"):
        run(engine)
    with pytest.raises(UnsupportedModelError, match="FirstBlockCacheConfig"):
        engine.denoise(noise(1, 4, 16, 16), **tiny_conditioning(engine.pipeline.transformer))
    engine.pipeline.transformer.disable_cache()
    run(engine)


@pytest.fixture
def global_hook() -> Iterator[None]:
    handle = register_module_forward_hook(nothing)
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_a_hook_for_all_modules_is_refused_at_compile(pipeline: FluxPipeline) -> None:
    with pytest.raises(UnsupportedModelError, match=r"hook for all modules \(.*nothing"):
        eager(pipeline)


def test_a_hook_for_all_modules_is_refused_at_a_run(pipeline: FluxPipeline) -> None:
    engine = eager(pipeline)
    handle = register_module_forward_hook(nothing)
    try:
        with pytest.raises(UnsupportedModelError, match=r"hook for all modules"):
            run(engine)
    finally:
        handle.remove()
    check_equal(engine, pipeline)


@pytest.mark.parametrize("before", [True, False])
def test_a_replaced_attention_function_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    engine = None if before else eager(pipeline)
    own = torch.nn.functional.scaled_dot_product_attention

    def quantised_attention(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", quantised_attention)
    with pytest.raises(UnsupportedModelError, match=r"replaced \(\S*quantised_attention\)"):
        run(engine or eager(pipeline))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("decorated", [True, False])
def test_a_replaced_forward_of_the_transformer_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, before: bool, decorated: bool
) -> None:
    """As the published TeaCache puts itself in."""
    engine = None if before else eager(pipeline)
    own = FluxTransformer2DModel.forward

    def teacache_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    forward = functools.wraps(own)(teacache_forward) if decorated else teacache_forward
    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    with pytest.raises(REFUSED, match=r"forward.*teacache_forward"):
        run(engine or eager(pipeline))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Linear, "forward"), (nn.Module, "__call__"), (nn.Linear, "__call__")]
)
def test_a_replaced_method_of_torchs_own_is_refused(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, before: bool
) -> None:
    engine = None if before else eager(pipeline)
    own = getattr(owner, name)

    def other_product(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, other_product, raising=False)
    with pytest.raises(REFUSED, match="other_product"):
        run(engine or eager(pipeline))


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
    for call in (lambda: run(engine), lambda: engine.fuse_lora(dict(LORA))):
        with pytest.raises(ArtifactMismatchError, match="transformer is another one.*load again"):
            call()
    pipeline.transformer = own
    check_equal(engine, pipeline)


def other_block(model: FluxTransformer2DModel) -> nn.Module:
    return FluxTransformerBlock(dim=32, num_attention_heads=2, attention_head_dim=16).eval()


@pytest.mark.parametrize("place", ["transformer_blocks.0", "transformer_blocks.0.ff"])
def test_an_exchanged_module_of_the_same_class_is_refused_at_a_run(
    pipeline: FluxPipeline, place: str
) -> None:
    engine, model = eager(pipeline), pipeline.transformer
    block = other_block(model)
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


# What is honoured.


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
        engine.fuse_lora(dict(LORA))
    with pytest.raises(ArtifactMismatchError, match=r"blocks: .*(to_qkv|fused_projections)"):
        ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    pipeline.transformer.unfuse_qkv_projections()
    with pytest.raises(ArtifactMismatchError, match="to_qkv has changed"):
        run(engine)
    check_equal(eager(pipeline), pipeline)


def use_and_leave_cache(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    pipe.transformer.disable_cache()


def use_and_leave_accelerate(pipe: FluxPipeline) -> None:
    add_hook_to_module(pipe.transformer, ModelHook())
    remove_hook_from_module(pipe.transformer)


def fuse_in_pipeline(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(dict(LORA), adapter_name="style")
    pipe.fuse_lora(components=["transformer"])


def disable_unfused(pipe: FluxPipeline) -> None:
    pipe.load_lora_weights(dict(LORA), adapter_name="style")
    pipe.disable_lora()


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
@pytest.mark.parametrize("moment", ["compile", "run"])
def test_what_changes_nothing_is_honoured(pipeline: FluxPipeline, kind: str, moment: str) -> None:
    if moment == "compile":
        HONOURED[kind](pipeline)
    engine = eager(pipeline)
    run(engine)
    if moment == "run":
        HONOURED[kind](pipeline)
    check_equal(engine, pipeline)
    check_equal(engine, pipeline)


@pytest.mark.parametrize("kind", HONOURED)
def test_what_changes_nothing_is_honoured_at_load(
    pipeline: FluxPipeline, kind: str, artifact_path: Path
) -> None:
    HONOURED[kind](pipeline)
    engine = ddit_rt.load(artifact_path, pipeline, check_weights=False, progress=False)
    # Compiled blocks round differently.
    torch.testing.assert_close(run(engine), expected(pipeline), rtol=0, atol=1e-4)


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


def test_a_pipeline_loaded_quantised_is_refused(pipeline: FluxPipeline, tmp_path: Path) -> None:
    """Through `PipelineQuantizationConfig`, as diffusers documents it."""
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    torchao_quantization = pytest.importorskip("torchao.quantization")
    pipeline.save_pretrained(tmp_path)
    config = TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())
    quantised = FluxPipeline.from_pretrained(
        tmp_path,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    for backend in ("eager", "aot"):
        with pytest.raises(UnsupportedModelError, match="quantised with torchao"):
            ddit_rt.compile(quantised, backend=backend, progress=False)


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


def test_a_bare_transformer_is_looked_at_too() -> None:
    transformer = tiny_transformer()
    engine = eager(transformer)
    transformer.transformer_blocks[0].register_forward_hook(nothing)
    with pytest.raises(UnsupportedModelError, match="has a hook"):
        engine.denoise(noise(1, 4, 16, 16), **tiny_conditioning(transformer))


def test_runs_and_calls_of_the_pipeline_need_no_second_look(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing changes, a run compares with the snapshot and reads no further."""

    def whole_look(*_: Any) -> None:
        raise AssertionError("looked at the whole model")

    engine = eager(pipeline)
    monkeypatch.setattr("ddit_rt.pipeline.live.check_plain", whole_look)
    for _ in range(2):
        check_equal(engine, pipeline)
    pipeline.transformer.train()
    with pytest.raises(AssertionError, match="looked at the whole model"):
        run(engine)
