"""What compiled blocks cannot honour, by name: how it comes about, and what the refusal says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig, FluxPipeline
from live_models import LORA, Flipped, Holder, Packed, deepest, ip_adapter, nothing
from torch import nn


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
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    quantization.quantize_(pipe.transformer, config)


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
        r"bitsandbytes: \S+Linear4bit \(first at single_transformer_blocks\.1\.attn\.to_v\)",
    ),
    "layer of GGUF": (layer_from("diffusers.quantizers.gguf.utils", "GGUFLinear"), "with GGUF"),
    "IP-Adapter": (ip_adapter, r"IP-Adapter.*unload_ip_adapter\(\)"),
    "LoRA beside the weights": (
        lambda pipe: pipe.load_lora_weights(dict(LORA), adapter_name="style"),
        r"'style'.*loaded but not fused.*engine\.load_lora",
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
