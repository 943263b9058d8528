"""Style LoRAs: fused into the weights that the compiled blocks read, and taken out again.

The compiled blocks hold no weights of their own, so a LoRA that is fused in place acts at once, at
every patch size, with nothing compiled again. Its layers for the text encoder are fused likewise.
PEFT does the arithmetic; its layers stay no longer than that, and what the user has loaded
elsewhere in the pipeline stays as it is. Taking a LoRA out restores the very bits that were there
before: subtracting in floating point would not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lora.file import LoraFile, check_arguments, read_lora
from ddit_rt.models.structure import base_of

_ADAPTER_NAME = "ddit_rt_style"
_SECOND = "load_into_transformer_2"
"""Argument of `load_lora_weights` by which a LoRA is for the second expert of a Wan pipeline."""

_TORCH_OWN = frozenset(vars(nn.Module()))
_OWNERS: WeakKeyDictionary[nn.Module, ref[FusedLora]] = WeakKeyDictionary()
"""Which LoRA is fused into a model: engines may share it."""


def lora_component(load_arguments: Mapping[str, Any]) -> str:
    """The pipeline's attribute that a LoRA is for.

    Raises:
        TypeError: `load_into_transformer_2` is neither True nor False.
    """
    second = load_arguments.get(_SECOND, False)
    if not isinstance(second, bool):
        raise TypeError(f"got {_SECOND}={second!r}; expected True or False")
    return "transformer_2" if second else "transformer"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class KeptLora:
    """The weights of models that a LoRA was fused into, to put them there again at once.

    They are of use only as long as the models' own weights are what they were then.

    Attributes:
        component: See `lora_component`.
        models: The models, by their names in a pipeline.
        values: Every parameter that the LoRA has changed, of each model.
    """

    component: str
    models: Mapping[str, nn.Module]
    values: tuple[Mapping[str, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(value.nbytes for values in self.values for value in values.values())


class FusedLora:
    """A LoRA that is fused into a pipeline's models, and what was there before."""

    def __init__(
        self,
        pipeline: Any,
        lora: Any,
        scale: float,
        models: Sequence[nn.Module],
        **load_arguments: Any,
    ) -> None:
        """Reads, checks, loads and fuses; on any error everything is as it was.

        Args:
            pipeline: The diffusers pipeline.
            lora: What its `load_lora_weights` takes: a path, a Hub name or a state dict.
            scale: Strength.
            models: The transformers that the engine runs.
            load_arguments: As of `load_lora_weights`, e.g. `weight_name`, or
                `load_into_transformer_2`.

        Raises:
            TypeError: An argument of another type.
            ValueError: A scale that is not finite, an unknown argument, an unreadable LoRA, or one
                while another engine's is fused.
            UnsupportedModelError: The models have LoRA layers already, or not all of the LoRA has
                a place in them.
        """
        _check_scale(scale)
        component = lora_component(load_arguments)
        load_arguments.pop(_SECOND, None)
        check_arguments(load_arguments)
        targets: dict[str, Any] = {"transformer": _transformer(pipeline, component, models)}
        if hasattr(pipeline, "load_lora_into_text_encoder"):
            targets["text_encoder"] = pipeline.text_encoder
        file = read_lora(pipeline, lora, targets, load_arguments)
        touched = {name: model for name, model in targets.items() if file.layers[name]}
        if file.norms:
            touched["transformer"] = targets["transformer"]
        for name, model in touched.items():
            _check_free(name, model)
        self._names = tuple(touched)
        self._models = tuple(touched.values())
        self._before: list[dict[str, Tensor]] = []
        self._fuse(pipeline, file, touched, float(scale))
        for model in self._models:
            _OWNERS[model] = ref(self)

    @classmethod
    def again(cls, kept: KeptLora) -> FusedLora:
        """Fuses what was kept of one.

        Raises:
            ValueError, UnsupportedModelError: Another LoRA is in the models.
        """
        for name, model in kept.models.items():
            _check_free(name, model)
        self = cls.__new__(cls)
        self._names, self._models = tuple(kept.models), tuple(kept.models.values())
        pairs = list(zip(self._models, kept.values, strict=True))
        self._before = [
            {name: _parameter(model, name).clone() for name in values} for model, values in pairs
        ]
        for model, values in pairs:
            for name, value in values.items():
                _parameter(model, name).copy_(value)
            _OWNERS[model] = ref(self)
        return self

    def keep(self, component: str) -> KeptLora:
        """Copies of the fused weights."""
        return KeptLora(
            component=component,
            models=dict(zip(self._names, self._models, strict=True)),
            values=tuple(
                {name: _parameter(model, name).clone() for name in before}
                for model, before in zip(self._models, self._before, strict=True)
            ),
        )

    def check_removable(self) -> None:
        """Refuses to take it out from under another LoRA.

        Raises:
            ValueError: The pipeline has fused one since.
        """
        for model in self._models:
            merged = {name for layer in _adapter_layers(model) for name in layer.merged_adapters}
            if merged:
                raise ValueError(
                    f"LoRA {sorted(merged)} was fused by the pipeline after the engine's; call "
                    "pipeline.unfuse_lora() first, then engine.unfuse_lora()"
                )

    def restore(self) -> None:
        """Puts the weights back, bit for bit."""
        for model, before in zip(self._models, self._before, strict=False):
            for name, value in before.items():
                _parameter(model, name).copy_(value)
            _OWNERS.pop(model, None)

    def _fuse(
        self, pipeline: Any, file: LoraFile, touched: Mapping[str, Any], scale: float
    ) -> None:
        frames = [_Frame(model) for model in touched.values()]
        try:
            _load(pipeline, file, touched)
            self._before = [
                _copies(model, file.norms if name == "transformer" else ())
                for name, model in touched.items()
            ]
            for model in touched.values():
                _merge(model, scale)
            for name, value in file.norms.items():
                _parameter(touched["transformer"], name).copy_(value)
        except BaseException:
            self.restore()
            raise
        finally:
            # Leaves the fused weights, under their plain names, without PEFT's layers.
            for frame in frames:
                frame.restore()


class FusedLoras:
    """What an engine has fused, at most one LoRA for each transformer; false without any."""

    def __init__(self) -> None:
        self._fused: dict[str, FusedLora] = {}

    def __bool__(self) -> bool:
        return bool(self._fused)

    def fuse(
        self,
        pipeline: Any,
        lora: Any,
        scale: float,
        models: Sequence[nn.Module],
        **load_arguments: Any,
    ) -> None:
        """Fuses one; arguments and errors as of `FusedLora`."""
        if pipeline is None:
            raise UnsupportedModelError(
                "fuse_lora loads through the pipeline; this engine has a bare transformer"
            )
        kept = lora if isinstance(lora, KeptLora) else None
        component = kept.component if kept else lora_component(load_arguments)
        if component in self._fused:
            raise ValueError("a LoRA is fused already; call unfuse_lora() first")
        if kept is not None:
            if scale != 1 or load_arguments:
                raise ValueError(
                    "a kept LoRA has its scale and place; leave scale and other arguments out"
                )
            own = {"transformer": models, "text_encoder": [getattr(pipeline, "text_encoder", None)]}
            if not all(any(m is o for o in own[name]) for name, m in kept.models.items()):
                raise ValueError("got a LoRA that was kept of another engine; keep one of this")
            self._fused[component] = FusedLora.again(kept)
            return
        self._fused[component] = FusedLora(pipeline, lora, scale, models, **load_arguments)

    def keep(self) -> KeptLora:
        """What is fused, to fuse it again.

        Raises:
            ValueError: None is fused, or one for each of two transformers.
        """
        if len(self._fused) != 1:
            raise ValueError(f"{len(self._fused)} LoRAs are fused; one is kept at a time")
        ((component, fused),) = self._fused.items()
        return fused.keep(component)

    def unfuse(self) -> None:
        """Takes out all, or none where one is under a LoRA of the pipeline's.

        Raises:
            ValueError: That, or none is fused.
        """
        if not self._fused:
            raise ValueError("no LoRA is fused; fuse_lora(...) comes first")
        for fused in self._fused.values():
            fused.check_removable()
        for component in list(self._fused):
            self._fused[component].restore()
            del self._fused[component]


class _Frame:
    """The modules of a model, without their values: what loading a LoRA changes around them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (module, dict(module._modules), module.training)  # noqa: SLF001
            for module in model.modules()
        ]
        self._state = {k: v for k, v in vars(model).items() if k not in _TORCH_OWN}
        self._weights = [(one, one.data, one.requires_grad) for one in model.parameters()]

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
        for parameter, data, trained in self._weights:
            if parameter.data_ptr() != data.data_ptr():
                # DoRA is fused into a new tensor; the old one is what others may read.
                data.copy_(parameter.data)
                parameter.data = data
            parameter.requires_grad_(trained)


def _check_scale(scale: Any) -> None:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"got scale={scale!r}; expected a number, such as 1.0")
    if not math.isfinite(scale):
        raise ValueError(f"got scale={scale!r}; expected a finite number, such as 1.0")


def _transformer(pipeline: Any, component: str, models: Sequence[nn.Module]) -> nn.Module:
    found = getattr(pipeline, component, None)
    if not any(found is model for model in models):
        raise UnsupportedModelError(
            f"got {_SECOND}=True, and this engine runs no {component}; leave it out"
        )
    assert isinstance(found, nn.Module)
    return found


def _check_free(name: str, model: nn.Module) -> None:
    """Refuses a model that another LoRA is in."""
    owner = _OWNERS.get(model)
    if owner is not None and owner() is not None:
        raise ValueError(
            f"another engine has fused a LoRA into this pipeline's {name}; call its unfuse_lora() "
            "first"
        )
    if any(True for _ in _adapter_layers(model)):
        raise UnsupportedModelError(
            f"the pipeline's {name} has LoRA layers already, and the two could not be told apart; "
            "call pipeline.unload_lora_weights() first, which keeps fused ones in the weights, or "
            f"leave the {name}'s part of this LoRA out"
        )


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


def _merge(model: nn.Module, scale: float) -> None:
    """Adds the factors' products to the weights, in the precision of these."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        for layer in _adapter_layers(model):
            layer.scale_layer(scale)
            layer.merge(adapter_names=[_ADAPTER_NAME])


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _copies(model: nn.Module, norms: Mapping[str, Tensor] | tuple[()]) -> dict[str, Tensor]:
    """The weights of every layer that a LoRA is about to change."""
    names = list(norms)
    for path, module in model.named_modules():
        if base_of(module) is not module:
            names += [f"{path}.{name}" for name, _ in base_of(module).named_parameters()]
    return {name: _parameter(model, name).clone() for name in names}


def _parameter(model: nn.Module, name: str) -> Tensor:
    path, _, parameter = name.rpartition(".")
    # While one of PEFT's layers is there, the weight lies one level deeper.
    value = getattr(base_of(model.get_submodule(path)), parameter)
    assert isinstance(value, Tensor)
    return value.detach()
