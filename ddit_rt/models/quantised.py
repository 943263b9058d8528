"""Weights that torchao has quantised: which of them blocks may have, and what they are made of.

torchao, whose quantisation diffusers' pipelines know, keeps a quantised weight as a tensor of a
class of its own that holds plain ones: small numbers, and scales. A package is code that reads
plain tensors, so a block is traced with those (`expose_weights`), and reads the live model's at run
time (`plain_tensors`): here as elsewhere nothing is copied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError

QUANTIZATIONS = ("int8", "fp8")
"""What `compile` takes: 8 bits, for weights by rows and for their inputs by tokens."""

_TAKEN = {"torchao.quantization.Int8Tensor", "torchao.quantization.Float8Tensor"}
"""Classes of weights that hold plain tensors which stay as they are; others are packed."""

QUANTISED = "a quantised tensor"
"""What descriptions of such a weight begin with."""

_FP8_CAPABILITY = (8, 9)
"""From this compute capability on a GPU multiplies such numbers."""


def is_quantised(tensor: Tensor | None) -> bool:
    """Whether a weight is one of torchao's that blocks may have."""
    kind = type(tensor)
    return f"{kind.__module__}.{kind.__qualname__}" in _TAKEN


def plain_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a quantised weight is made of, by torchao's names for them."""
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a quantised one torch tells those of the type it stands for."""
    held = plain_tensors(tensor).values() if is_quantised(tensor) else (tensor,)
    return sum(one.numel() * one.element_size() for one in held)


def quantisation_of(tensor: Tensor) -> str:
    """In words, the same in another process: class, data type, and how activations are taken."""
    _, settings = cast(Any, tensor).__tensor_flatten__()
    stored = str(next(iter(plain_tensors(tensor).values())).dtype).removeprefix("torch.")
    named = ", ".join(f"{key}={settings[key]}" for key in sorted(settings) if key != "dtype")
    return f"{QUANTISED} {list(tensor.shape)} ({stored}; {named})"


class _PlainParts(nn.Module):
    """A quantised weight, as buffers of the plain tensors that it is made of."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._kind: Any = type(weight)
        _, self._settings = cast(Any, weight).__tensor_flatten__()
        self._size, self._stride = weight.shape, weight.stride()
        for name, tensor in plain_tensors(weight).items():
            self.register_buffer(name, tensor.detach())

    def whole(self) -> Tensor:
        """The weight, made of what the buffers hold now."""
        held = dict(self.named_buffers(recurse=False))
        made: Tensor = self._kind.__tensor_unflatten__(
            held, self._settings, self._size, self._stride
        )
        return made


class ExposedLinear(nn.Module):
    """In the place of a linear layer whose weight is quantised."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = _PlainParts(layer.weight)
        self.bias = layer.bias

    def forward(self, values: Tensor) -> Tensor:
        """The product, as torchao takes it."""
        return F.linear(values, self.weight.whole(), self.bias)


def expose_weights(block: nn.Module) -> None:
    """Makes the plain tensors of quantised weights buffers, `to_q.weight.qdata` and the like.

    Args:
        block: A copy of a model's block.
    """
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear) and is_quantised(child.weight):
            setattr(block, name, ExposedLinear(child))
        else:
            expose_weights(child)


def check_machine(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses what this machine cannot quantise or multiply.

    Args:
        kind: One of `QUANTIZATIONS`.
        device: The model's.
        dtype: The model's.

    Raises:
        UnsupportedModelError: There is no torchao, or the device has no product for it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedModelError(
            f"quantization={kind!r} needs torchao, which is not installed: "
            "pip install 'ddit_rt[quant]'"
        )
    if kind != "fp8":
        return
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    if not capable or dtype is not torch.bfloat16:
        raise UnsupportedModelError(
            f'got quantization="fp8" for a model in {dtype} on {device}; it takes bfloat16 on a '
            "GPU of compute capability 8.9 or newer (H100, L40S, RTX 4090): load it so, take "
            '"int8", or leave it out'
        )


def quantise(layers: Iterable[nn.Linear], kind: str) -> None:
    """Quantises linear layers in place, as torchao's `quantize_` does.

    Args:
        layers: Layers of a user's model, in a floating-point type.
        kind: One of `QUANTIZATIONS`, checked by `check_machine`.
    """
    from torchao.quantization import quantize_

    for layer in layers:
        quantize_(layer, _config(kind, layer.weight.device))


def _config(kind: str, device: torch.device) -> Any:
    """Weights by rows, activations by tokens. torchao's settings of Inductor stay out of it."""
    from torchao import quantization as ao

    if kind == "fp8":
        from torchao.quantization.quantize_.common import KernelPreference

        # Kernels of other libraries are no part of a package.
        return ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=ao.PerRow(),
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
        )
    from torchao.utils import should_reduce_range

    return ao.Int8DynamicActivationInt8WeightConfig(
        reduce_range=should_reduce_range(device), set_inductor_config=False
    )


def has_quantised(model: nn.Module) -> bool:
    """Whether any weight of a model is one of those."""
    return any(is_quantised(weight) for weight in model.parameters())


def quantises_rows(weight: Tensor) -> bool:
    """Whether what is multiplied by a weight is quantised too, at every run."""
    settings: Mapping[str, Any] = cast(Any, weight).__tensor_flatten__()[1]
    return settings.get("act_quant_kwargs") is not None
