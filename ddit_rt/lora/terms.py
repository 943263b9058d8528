"""What a LoRA adds to a parameter, computed in float32.

PEFT makes its layers of a file, and so decides on the scale of each; that and the file's factors
are all that is kept. The layers are out of the model again before anybody else sees it, and what
the user has loaded elsewhere in the pipeline stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddit_rt.lora.file import LoraFile
from ddit_rt.models.structure import base_of

_ADAPTER_NAME = "ddit_rt_style"
_TORCH_OWN = frozenset(vars(nn.Module()))

Place = tuple[nn.Module, str]
"""A parameter, by its model and its name there."""


class Term(Protocol):
    """What one LoRA adds to one parameter."""

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:
        """Adds it.

        Args:
            total: The sum so far, of the parameter's shape, contiguous, float32 or wider.
            base: The parameter without any LoRA.
            weight: The LoRA's weight.
        """


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """`scale * up @ down`, `[out, r]` and `[r, in]`; kernels of convolutions are flattened.

    Attributes:
        up: Second factor.
        down: First factor.
        scale: The file's own scale.
        magnitude: For DoRA the length of each row, `[out]`, that the sum with the base is given.
    """

    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:
        """As `Term.add_to`."""
        rows = total.flatten(1)
        up, down = self.up.to(rows), self.down.to(rows)
        if self.magnitude is None:
            rows.addmm_(up, down, alpha=weight * self.scale)
            return
        own = base.to(rows).reshape(rows.shape)
        turned = own.addmm(up, down, alpha=weight * self.scale)
        stretch = self.magnitude.to(rows) / torch.linalg.vector_norm(turned, dim=1)
        rows.add_(turned.mul_(stretch[:, None]).sub_(own))


@dataclass(frozen=True, eq=False, slots=True)
class Kronecker:
    """`scale * kron(left, right)`: LoKr.

    Attributes:
        left: `[a, b]`.
        right: `[out / a, in / b]`.
        scale: The file's own scale.
    """

    left: Tensor
    right: Tensor
    scale: float

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:  # noqa: ARG002
        """As `Term.add_to`."""
        made = torch.kron(self.left.to(total), self.right.to(total))
        total.add_(made, alpha=weight * self.scale)


@dataclass(frozen=True, eq=False, slots=True)
class Difference:
    """`scale * value`, of the parameter's shape: a bias."""

    value: Tensor
    scale: float

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:  # noqa: ARG002
        """As `Term.add_to`."""
        total.add_(self.value.to(total), alpha=weight * self.scale)


@dataclass(frozen=True, eq=False, slots=True)
class Whole:
    """`value - base`: the weight of a norm, which control LoRAs bring whole."""

    value: Tensor

    def add_to(self, total: Tensor, base: Tensor, weight: float) -> None:
        """As `Term.add_to`."""
        total.add_(self.value.to(total) - base, alpha=weight)


def make_terms(
    pipeline: Any, file: LoraFile, touched: Mapping[str, nn.Module]
) -> dict[Place, Term]:
    """What a file adds to each parameter; the models are as they were, whatever happens.

    Args:
        pipeline: The pipeline, which knows how its text encoder takes a LoRA.
        file: The file, checked.
        touched: The models that it has entries for, by prefix.
    """
    frames = [_Frame(model) for model in touched.values()]
    try:
        _load(pipeline, file, touched)
        found = {
            place: term
            for prefix, model in touched.items()
            for place, term in _terms(prefix, model, file)
        }
    finally:
        for frame in frames:
            frame.restore()
    for name, value in file.norms.items():
        model = touched["transformer"]
        found[model, name] = Whole(_copy(value, parameter_at((model, name))))
    return found


def parameter_at(place: Place) -> Tensor:
    """A parameter's values, where they lie now."""
    model, (path, _, name) = place[0], place[1].rpartition(".")
    # While one of PEFT's layers is there, the weight lies one level deeper.
    value = getattr(base_of(model.get_submodule(path)), name)
    assert isinstance(value, Tensor)
    return value.detach()


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    )


class _Frame:
    """The modules of a model, without their values: what loading a LoRA changes around them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (module, dict(module._modules), module.training)  # noqa: SLF001
            for module in model.modules()
        ]
        self._state = {k: v for k, v in vars(model).items() if k not in _TORCH_OWN}
        self._trained = [(one, one.requires_grad) for one in model.parameters()]

    def restore(self) -> None:
        """Puts them back in their places."""
        for module, children, training in self._modules:
            module._modules.clear()  # noqa: SLF001
            module._modules.update(children)  # noqa: SLF001
            module.training = training
        own = vars(self._model)
        for name in own.keys() - self._state.keys() - _TORCH_OWN:
            del own[name]
        own.update(self._state)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)


def _load(pipeline: Any, file: LoraFile, touched: Mapping[str, Any]) -> None:
    """Loads as `load_lora_weights` does, for these models alone."""
    common = {
        "adapter_name": _ADAPTER_NAME,
        "network_alphas": file.alphas,
        "metadata": file.metadata,
        # Else PEFT draws random numbers for what is overwritten at once.
        "low_cpu_mem_usage": True,
    }
    if file.layers["transformer"]:
        # It takes the alphas of its own entries out.
        touched["transformer"].load_lora_adapter(dict(file.layers["transformer"]), **common)
    if "text_encoder" in touched:
        pipeline.load_lora_into_text_encoder(
            dict(file.layers["text_encoder"]),
            text_encoder=touched["text_encoder"],
            prefix="text_encoder",
            lora_scale=pipeline.lora_scale,
            **common,
        )


def _terms(prefix: str, model: nn.Module, file: LoraFile) -> Iterator[tuple[Place, Term]]:
    """Of the file's own tensors: PEFT has rounded its copies to the model's data type."""
    scales = {path: float(one.scaling[_ADAPTER_NAME]) for path, one in adapter_layers(model)}
    for path, factors in file.factors[prefix].items():
        scale, weight = scales[path], parameter_at((model, f"{path}.weight"))
        own = {name: _copy(value, weight) for name, value in factors.items()}
        if "lora_A.weight" not in own:
            left, right = (_whole(own, name) for name in ("lokr_w1", "lokr_w2"))
            yield (model, f"{path}.weight"), Kronecker(left, right, scale)
            continue
        up, down = (own[f"lora_{one}.weight"].flatten(1) for one in "BA")
        lengths = own.get("lora_magnitude_vector.weight", own.get("lora_magnitude_vector"))
        magnitude = None if lengths is None else lengths.flatten()
        yield (model, f"{path}.weight"), Product(up, down, scale, magnitude)
        if "lora_B.bias" in own:
            yield (model, f"{path}.bias"), Difference(own["lora_B.bias"], scale)


def _whole(factors: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor of LoKr, which the file may have as a product of two."""
    if name in factors:
        return factors[name]
    return factors[f"{name}_a"].float() @ factors[f"{name}_b"].float()


def _copy(value: Tensor, beside: Tensor) -> Tensor:
    """A contiguous copy on another's device: it may be the caller's own tensor."""
    device = beside.device
    return value.detach().to(device, memory_format=torch.contiguous_format, copy=True)
