"""What a model may carry besides its weights that compiled blocks cannot honour, refused by name.

The engine runs the blocks from packages or copies, and the layers around them in an order of its
own. So whatever hangs on a module, stands in for its forward or stores its weights in another form
would be ignored, or run at the wrong time.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.quantised import is_quantised
from ddit_rt.models.structure import class_name, describe, function_name

_QUANTISERS = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "optimum.quanto": "quanto",
    "torch.ao.nn": "torch.ao",
    "diffusers.quantizers.gguf": "GGUF",
}
"""By the module that a layer's or a weight's class comes from."""

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")

_REMEDIES = {
    "LayerwiseCasting": "load the model again and leave enable_layerwise_casting() out",
    "GroupOffloading": "load the model again and leave group offloading out",
    "WeightNorm": "call torch.nn.utils.remove_weight_norm first",
}
_REMEDY = "remove it first, e.g. with transformer.disable_cache(), or load the model again"


def check_plain(model: nn.Module, name: str) -> None:
    """Raises `UnsupportedModelError` for a model or block with anything of the kind.

    Args:
        model: The module with its submodules.
        name: What messages call it.
    """
    for check in (
        check_unwrapped,
        _refuse_quantised,
        _refuse_hooks,
        _refuse_ip_adapter,
        _refuse_other_types,
        _refuse_adapters,
        _refuse_dropout,
    ):
        check(model, name)


def check_process() -> None:
    """Raises `UnsupportedModelError` for what stands between every model and torch."""
    for registry in _GLOBAL_HOOKS:
        hooks = getattr(torch_module, registry)
        if hooks:
            raise UnsupportedModelError(
                f"torch has a hook for all modules ({describe(next(iter(hooks.values())))}), which "
                "compiled blocks would not run; remove it with its handle's remove()"
            )
    called = function_name(nn.Module.__call__)
    if called != "torch.nn.modules.module._wrapped_call_impl":
        raise UnsupportedModelError(
            f"torch's nn.Module.__call__ has been replaced ({called}), which compiled blocks would "
            "not call; put it back"
        )
    attention = F.scaled_dot_product_attention
    if not isinstance(attention, BuiltinFunctionType):
        raise UnsupportedModelError(
            f"torch's scaled_dot_product_attention has been replaced ({function_name(attention)}), "
            "which compiled blocks would not call; put it back, and give the transformer an "
            "attention processor or backend instead"
        )


def process_state() -> tuple[Any, ...]:
    """What `check_process` looks at, and the attention backend, to be compared later."""
    hooks = (len(getattr(torch_module, registry)) for registry in _GLOBAL_HOOKS)
    called = nn.Module.__call__
    return (called, F.scaled_dot_product_attention, attention_backend(), *hooks)


def attention_backend() -> str:
    """The backend that diffusers takes where an attention processor names none."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return "native"
    active = dispatch._AttentionBackendRegistry._active_backend
    return str(getattr(active, "value", active))


def check_unwrapped(model: nn.Module, name: str) -> None:
    """Raises `UnsupportedModelError` for a model inside another one, as torch.compile makes it."""
    for path, module in model.named_modules():
        if "_orig_mod" in vars(module)["_modules"]:
            raise UnsupportedModelError(
                f"{_at(name, path)} is a {type(module).__name__}; put back what torch.compile was "
                "given (its ._orig_mod), since ddit_rt compiles by itself"
            )
    if hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"the {name} is a {type(model).__name__}; pass what its merge_and_unload() returns"
        )


def quantised_by(model: nn.Module, *, honoured: bool = True) -> str | None:
    """With what, and where first, a model is quantised; None if it is not.

    Args:
        model: The model.
        honoured: Whether weights that blocks may have count as well.
    """
    whole = _quantiser_of(model)
    if whole is not None and (honoured or whole != "torchao"):
        return whole
    for path, module in model.named_modules():
        held = [one for one in vars(module)["_parameters"].values() if one is not None]
        if not honoured and isinstance(module, nn.Linear):
            held = [one for one in held if not is_quantised(one)]
        for kind in (type(module), *map(type, held)):
            how = _quantiser(kind)
            if how is not None:
                return f"{how} (first at {path})"
    return None


def _refuse_quantised(model: nn.Module, name: str) -> None:
    how = quantised_by(model, honoured=False)
    if how is not None:
        raise UnsupportedModelError(
            f"the {name} is quantised with {how}, which compiled blocks do not run; they run "
            "torchao's Int8Tensor and Float8Tensor in linear layers. Load it in bfloat16 or "
            'float32 without a quantization_config, and pass quantization="int8" to compile '
            "(text encoders may stay quantised)"
        )


def _quantiser_of(model: nn.Module) -> str | None:
    """What diffusers says of the model as a whole."""
    config = getattr(model, "config", None) or {}
    found = getattr(model, "quantization_method", None) or getattr(model, "hf_quantizer", None)
    if found is None and isinstance(config, dict):
        found = config.get("quantization_config")
    if found is None:
        return None
    return str(getattr(found, "value", found if isinstance(found, str) else type(found).__name__))


def _quantiser(kind: type) -> str | None:
    for package, label in _QUANTISERS.items():
        if f"{kind.__module__}.".startswith(f"{package}."):
            return f"{label}: {class_name(kind)}"
    if issubclass(kind, Tensor) and kind is not nn.Parameter:
        return f"weights of the class {class_name(kind)}"
    return None


def _refuse_hooks(model: nn.Module, name: str) -> None:
    cache = vars(model).get("_cache_config")
    for path, module in model.named_modules():
        found = _hook(module)
        if found is not None:
            what, remedy = found
            if cache is not None:
                what, remedy = (
                    f"{what}, of {type(cache).__name__}",
                    "call transformer.disable_cache()",
                )
            raise UnsupportedModelError(
                f"{_at(name, path)} has a hook around its forward ({what}), which compiled blocks "
                f"would not run: {remedy}"
            )


def _hook(module: nn.Module) -> tuple[str, str] | None:
    """What hangs on a module, and what to do about it."""
    state = vars(module)
    registry = state.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return _named(next(iter(registry.hooks.values())))
    if "_hf_hook" in state:
        what = describe(state["_hf_hook"], 0)
        return what, 'call pipe.remove_all_hooks() and then pipe.to("cuda"), without offloading'
    if "parametrizations" in state["_modules"]:
        what = "a parametrization"
        return what, "call torch.nn.utils.parametrize.remove_parametrizations first"
    for kind in FORWARD_HOOKS:
        if state[kind]:
            return _named(next(iter(state[kind].values())))
    if "forward" in state and not _is_own_forward(module, state["forward"]):
        return _named(state["forward"])
    return None


def _named(hook: Any) -> tuple[str, str]:
    kind = type(hook).__name__
    remedies = (remedy for part, remedy in _REMEDIES.items() if part in kind)
    return describe(hook, 0), next(remedies, _REMEDY)


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether it is the class's method: diffusers and accelerate leave it when hooks go."""
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )


def _refuse_ip_adapter(model: nn.Module, name: str) -> None:
    for path, module in model.named_modules():
        if "IPAdapter" in type(module).__name__ or path == "encoder_hid_proj":
            raise UnsupportedModelError(
                f"{_at(name, path)} belongs to an IP-Adapter, which this version does not run; "
                "call pipe.unload_ip_adapter()"
            )


def _refuse_other_types(model: nn.Module, name: str) -> None:
    for path, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATING:
            raise UnsupportedModelError(
                f"{_at(name, path)} is {parameter.dtype}; compiled blocks compute in float32, "
                "bfloat16 or float16: load the model in one of these"
            )


def _refuse_adapters(model: nn.Module, name: str) -> None:
    """Refuses adapters that would act beside the weights; fused and idle ones change nothing."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        merged, active = set(layer.merged_adapters), set(layer.active_adapters)
        if layer.disable_adapters and merged:
            raise UnsupportedModelError(
                f"LoRA {sorted(merged)} is fused and disabled (first at {_at(name, path)}), so "
                "diffusers would take it out at its next call; call pipeline.unfuse_lora(), or "
                "pipeline.enable_lora() to keep it"
            )
        held = {key for kind in layer.adapter_layer_names for key in getattr(layer, kind)}
        waiting = (active & held) - merged
        if waiting and not layer.disable_adapters:
            raise UnsupportedModelError(
                f"LoRA {sorted(waiting)} is loaded but not fused (first at {_at(name, path)}), and "
                "compiled blocks would ignore it; call engine.load_lora(...) in place of "
                "load_lora_weights, or pipeline.fuse_lora(), or unload it with "
                "pipeline.unload_lora_weights()"
            )


def _refuse_dropout(model: nn.Module, name: str) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise UnsupportedModelError(
                f"{_at(name, path)} drops values at random, because the model is in training mode; "
                "call transformer.eval()"
            )


def _at(name: str, path: str) -> str:
    return f"{name}.{path}".rstrip(".")
