"""Blocks with torchao's weights: quantised by `compile` and `load`, or by diffusers before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import qwen_models
import torch
from diffusers import FluxPipeline
from extras import need
from made_once import Packages
from models import eager, random_adapters, seeded, tiny_embeds, tiny_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import FinePolicy, StaticPolicy
from ddit_rt.blocks.constants import live_slots
from ddit_rt.blocks.quantise import check_rows
from ddit_rt.engine.memory import memory_of
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError
from ddit_rt.models import family_of
from ddit_rt.models.quantised import is_quantised

need("torchao")

QUANTUM = 1 / 127
"""Compiled code may round a value in the middle to the other neighbour of the two."""

BFLOAT16 = {"dtype": torch.bfloat16}
"""diffusers takes no other for whole numbers."""

MIXED = StaticPolicy(["2p", "2p", "p", "p"])

pytestmark = pytest.mark.usefixtures("own_home")


def embeds(pipeline: Any) -> dict[str, Tensor]:
    return {name: one.to(pipeline.dtype) for name, one in tiny_embeds().items()}


def run(engine: ddit_rt.Engine, policy: Any = None) -> Tensor:
    output = engine(
        **embeds(engine.pipeline),
        **CALL,
        generator=seeded(),
        patch_policy=FinePolicy() if policy is None else policy,
    )
    assert isinstance(output.images, Tensor)
    return output.images


def diffusers(pipeline: FluxPipeline) -> Tensor:
    images = pipeline(**embeds(pipeline), **CALL, generator=seeded()).images
    assert isinstance(images, Tensor)
    return images


CALL: dict[str, Any] = {
    "height": 128,
    "width": 64,
    "num_inference_steps": 4,
    "output_type": "latent",
}


def assert_near(one: Tensor, other: Tensor) -> None:
    bound = float(other.abs().max()) * QUANTUM
    torch.testing.assert_close(one, other, rtol=0, atol=bound)


def quantised_layers(model: nn.Module) -> set[str]:
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    }


def loaded_quantised(folder: Path, config: Any, **options: Any) -> FluxPipeline:
    """As diffusers documents it."""
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    tiny_pipeline().save_pretrained(folder)
    mapping = {"transformer": TorchAoConfig(config, **options)}
    pipeline = FluxPipeline.from_pretrained(
        folder,
        **BFLOAT16,
        quantization_config=PipelineQuantizationConfig(quant_mapping=mapping),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    assert isinstance(pipeline, FluxPipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_layers_of_tokens_are_quantised_and_no_others() -> None:
    pipeline = tiny_pipeline()
    eager(pipeline, quantization="int8")
    double = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj"}
    double |= {"attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
    double |= {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
    single = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    expected = {f"transformer_blocks.0.{name}" for name in double}
    expected |= {f"single_transformer_blocks.{n}.{name}" for n in (0, 1) for name in single}
    assert quantised_layers(pipeline.transformer) == expected


@pytest.mark.slow
def test_compiled_equals_diffusers_and_comes_back_from_disk(
    packages: Packages, tmp_path: Path
) -> None:
    pipeline, plain = tiny_pipeline(), diffusers(tiny_pipeline())
    with packages():
        engine = ddit_rt.compile(pipeline, quantization="int8", progress=False)
    fine, mixed = run(engine), run(engine, MIXED)
    assert_near(fine, diffusers(pipeline))
    difference = float((fine - plain).abs().max() / plain.abs().max())
    assert 0 < difference < 0.2, "quantised, and still that model"
    assert not torch.equal(fine, mixed)
    path = tmp_path / "quantised.ddit"
    engine.save(path)
    for model in (tiny_pipeline(), pipeline):  # as it was, and as `compile` left it
        loaded = ddit_rt.load(path, model, progress=False)
        assert torch.equal(run(loaded), fine)
        assert torch.equal(run(loaded, MIXED), mixed)
    other = tiny_pipeline(seed=1)
    with pytest.raises(ArtifactMismatchError, match="weights: the artifact was compiled for other"):
        ddit_rt.load(path, other, progress=False)
    assert not quantised_layers(other.transformer)
    ddit_rt.load(path, other, check_weights=False, progress=False)
    assert quantised_layers(other.transformer)


@pytest.mark.slow
def test_packages_read_the_models_own_tensors(packages: Packages) -> None:
    pipeline = tiny_pipeline()
    with packages():
        engine = ddit_rt.compile(pipeline, quantization="int8", progress=False)
    before = run(engine)
    weight: Any = pipeline.transformer.transformer_blocks[0].ff.net[2].weight
    names = live_slots(pipeline.transformer.transformer_blocks[0])
    assert {"ff.net.2.weight.qdata", "ff.net.2.weight.scale"} <= names.keys()
    weight.scale.mul_(2)
    after = run(engine)
    assert not torch.equal(before, after)
    assert_near(after, diffusers(pipeline))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("Int8WeightOnlyConfig", "eager"),
        ("Int8DynamicActivationInt8WeightConfig", "eager"),
        pytest.param("Int8WeightOnlyConfig", "aot", marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_that_diffusers_quantised(
    kind: str, backend: str, packages: Packages, tmp_path: Path
) -> None:
    """All of its linear layers, those around the blocks too."""
    config = getattr(importlib.import_module("torchao.quantization"), kind)()
    pipeline = loaded_quantised(tmp_path / "model", config)
    assert "x_embedder" in quantised_layers(pipeline.transformer)
    with packages():
        engine = ddit_rt.compile(pipeline, backend=backend, progress=False)
    fine = run(engine)
    assert_near(fine, diffusers(pipeline))
    run(engine, MIXED)
    if backend == "eager":
        return
    engine.save(tmp_path / "one.ddit")
    again = loaded_quantised(tmp_path / "model", config)
    assert torch.equal(run(ddit_rt.load(tmp_path / "one.ddit", again, progress=False)), fine)
    with pytest.raises(ArtifactMismatchError, match=r"weight was a quantised tensor .*int8"):
        ddit_rt.load(tmp_path / "one.ddit", tiny_pipeline().to(torch.bfloat16), progress=False)


def test_other_kinds_of_torchao_are_refused_by_name(tmp_path: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig

    pipeline = loaded_quantised(tmp_path, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    with pytest.raises(UnsupportedModelError, match="torchao: .*IntxUnpackedToInt8Tensor"):
        eager(pipeline)


def test_both_experts_are_quantised() -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    engine = eager(pipeline, quantization="int8")
    assert quantised_layers(pipeline.transformer) == quantised_layers(pipeline.transformer_2)
    call = {**CALL, "prompt": "a cat", "num_frames": 9, "max_sequence_length": 12}
    expected = pipeline(**call, generator=seeded()).frames
    actual = engine(**call, generator=seeded(), patch_policy=FinePolicy()).frames
    assert_near(actual, expected)


def test_memory_counts_what_is_stored() -> None:
    plain = eager(tiny_pipeline())
    quantised = eager(tiny_pipeline(), quantization="int8")
    sizes = [
        memory_of(one.artifact, one.pipeline, height=128, width=64).weights_bytes
        for one in (plain, quantised)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()

    def refused(message: str, kind: Any = "int8", **more: Any) -> None:
        with pytest.raises((UnsupportedModelError, ValueError), match=message):
            eager(pipeline, quantization=kind, **more)

    refused("quantization.*'int4'.*int8", "int4")
    refused('quantization="fp8" for a model in torch.float32 on cpu.*"int8"', "fp8")
    refused("adapters that carry LoRA", adapter=random_adapters(pipeline))
    assert not quantised_layers(pipeline.transformer)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(r"needs torchao.*ddit_rt\[quant\]")
    eager(pipeline, quantization="int8")
    refused("quantised already")


def test_a_lora_on_quantised_layers_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    engine = eager(pipeline, quantization="int8")
    before = run(engine)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    state = {f"{layer}.{name}.weight": value for name, value in factors.items()}
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(UnsupportedModelError, match="quantised with torchao"):
        engine.load_lora(tmp_path / "style.safetensors")
    assert torch.equal(run(engine), before)


def test_products_of_few_rows_are_refused_for_cuda() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    transformer = qwen_models.tiny_pipeline().transformer
    block_type, *_ = family_of(transformer).block_types(transformer)
    block: Any = block_type.blocks(transformer)[0]
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(block.img_mlp, config)
    check_rows(block_type, block)
    quantize_(block.img_mod, config)
    with pytest.raises(UnsupportedModelError, match=r"img_mod\.1.*modules_to_not_convert"):
        check_rows(block_type, block)
