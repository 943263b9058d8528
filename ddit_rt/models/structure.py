"""What a model is besides the values of its tensors: classes, functions, attributes, shapes.

Packages are traced once and eager blocks are copied once, so what they compute is what the model
was at that moment. Two descriptions tell where two blocks differ, what a model has that its
configuration does not say, and what has changed since. Values are compared as objects; words are
for messages, and for artifacts, which another process reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.quantised import is_quantised, quantisation_of

MISSING = "missing"
"""In place of a description, of what a model lacks."""

# What these hold changes no result: a run takes no gradient, compiles for itself, and hooks,
# configuration and PEFT's layers are looked at in themselves.
_IGNORED = frozenset(vars(nn.Module())) | {
    "_cache_config",
    "_compiled_call_impl",
    "_diffusers_hook",
    "_gradient_checkpointing_func",
    "_hf_peft_config_loaded",
    "_internal_dict",
    "_prepare_lora_hotswap_kwargs",
    "extra_repr",
    "forward",
    "gradient_checkpointing",
}
METHODS = ("forward", "__call__")
"""By which a module is run; nothing but PyTorch's own class has the second."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_BY_IDENTITY = (nn.Module, Tensor, FunctionType, BuiltinFunctionType, type)
_DEPTH = 4
"""How far a description goes into the attributes of attributes."""

Differences = dict[str, tuple[str, str]]
"""What was, and what is now, by place."""


@dataclass(frozen=True, slots=True)
class Part:
    """One module, described without its children.

    Attributes:
        kind: Its class.
        methods: The functions that class runs it with, by name.
        values: Its attributes and the shapes of its tensors, as values that can be compared later.
        words: The same in words.
        hidden: Those attributes that hold tensors which no name leads to.
    """

    kind: type
    methods: Mapping[str, Any]
    values: Mapping[str, Any]
    words: Mapping[str, str]
    hidden: frozenset[str]


def base_of(module: nn.Module) -> nn.Module:
    """The layer that one of PEFT's stands for; any other module is its own."""
    inner = module._modules.get("base_layer")
    return module if inner is None else base_of(inner)


def parts(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path in the model without PEFT's layers."""
    module = base_of(model)
    yield path, module
    for name, child in module.named_children():
        yield from parts(child, f"{path}.{name}" if path else name)


def describe_parts(model: nn.Module) -> dict[str, Part]:
    """Every part of a model, by path."""
    return {path: _part(module) for path, module in parts(model)}


def reference(model: nn.Module) -> nn.Module:
    """The model that a configuration describes, on the meta device.

    Raises:
        UnsupportedModelError: Its class cannot be built from its configuration.
    """
    config: Any = model.config
    # diffusers sets some as attributes alone, and reads them there.
    fields = {
        name: getattr(config, name, value)
        for name, value in config.items()
        if name != "quantization_config"  # of the weights, which it has none of
    }
    try:
        with torch.device("meta"):
            built = type(model).from_config(fields)  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"the {type(model).__name__} cannot be built from its own configuration ({error}), so "
            "nothing tells what it is; load it with from_pretrained"
        ) from error
    assert isinstance(built, nn.Module)
    return built


def differences(was: Mapping[str, Part], now: Mapping[str, Part]) -> Differences:
    """Where two descriptions differ."""
    found = {path: (class_name(was[path].kind), MISSING) for path in was.keys() - now.keys()}
    for path, part in now.items():
        for name, change in _changes(was.get(path), part):
            found[f"{path}.{name}".strip(".")] = change
    return found


def relevant(live: Mapping[str, Part], plain: Mapping[str, Part]) -> dict[str, Part]:
    """A description without attributes that nothing reads, such as notes that users leave.

    Args:
        live: Description of the model.
        plain: Description of the model that its configuration describes.
    """
    return {path: _relevant(part, plain.get(path)) for path, part in live.items()}


def without_hidden(part: Part, tables: Sequence[str] = ()) -> Part:
    """A module without those of its attributes that hold tensors which no name leads to.

    Args:
        part: The module.
        tables: Attributes that hold some only later.
    """
    hidden = part.hidden | set(tables)
    if not hidden & part.values.keys():
        return part
    values, words = (
        {name: one for name, one in of.items() if name not in hidden}
        for of in (part.values, part.words)
    )
    return replace(part, values=values, words=words, hidden=frozenset())


def departures(live: Mapping[str, Part], plain: Mapping[str, Part]) -> dict[str, str]:
    """What a model has that the one of its configuration does not, in words, by place."""
    found = {place: now for place, (_, now) in differences(plain, live).items()}
    for path, part in live.items():
        for name in METHODS:
            replaced = replaced_function(part.kind, name)
            if replaced is not None:
                found[f"{path}.{name}".strip(".")] = replaced
    return found


def describe(value: Any, depth: int = _DEPTH) -> str:
    """A value in words, which are the same in another process."""
    if isinstance(value, (nn.Module, Tensor)):
        return class_name(type(value))
    if isinstance(value, type):
        return class_name(value)
    if isinstance(value, (FunctionType, MethodType)):
        return function_name(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(describe(item, depth - 1) for item in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(describe(item, depth - 1) for item in value))}}}"
    if isinstance(value, Mapping):
        items = (f"{key}: {describe(item, depth - 1)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, _PLAIN):
        return repr(value)
    return _object_words(value, depth)


def class_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def function_name(function: Any) -> str:
    """Where a function was written, behind all that decorates it."""
    names = []
    while function is not None:
        code = getattr(function, "__code__", None)
        module = getattr(function, "__globals__", {}).get("__name__")
        name = code.co_name if code else type(function).__qualname__
        names.append(f"{module or type(function).__module__}.{name}")
        function = getattr(function, "__wrapped__", None)
    return " around ".join(names)


def own_method(cls: type, name: str) -> Any:
    """A method as the class or one of its bases has it; None where none has."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def replaced_function(cls: type, name: str) -> str | None:
    """What stands in place of a class's own method; None where nothing does."""
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is None or owner is nn.Module:
        return None
    found = function_name(vars(owner)[name])
    *decorators, written = found.split(" around ")
    package = owner.__module__.partition(".")[0]
    own = written == f"{owner.__module__}.{name}"
    return None if own and all(one.startswith(f"{package}.") for one in decorators) else found


def walk(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """A value, and what its containers and attributes hold."""
    yield value
    if depth < 1 or isinstance(value, (*_PLAIN, *_BY_IDENTITY, MethodType)):
        return
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, Mapping):
        inner = list(value.values())
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from walk(item, depth - 1)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that may change what it computes."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _IGNORED
        and not (name == "p" and isinstance(module, nn.Dropout))
        and not _is_default(type(module), name, value)
    }


def _part(module: nn.Module) -> Part:
    values, words = {}, {}
    for registry in (module._parameters, module._buffers):
        for name, tensor in registry.items():
            if tensor is not None:
                shown = f"a tensor {list(tensor.shape)}"
                values[name] = words[name] = (
                    quantisation_of(tensor) if is_quantised(tensor) else shown
                )
    hidden = set()
    for name, value in attributes_of(module).items():
        values[name], words[name] = _frozen(value), describe(value)
        if any(isinstance(one, (Tensor, nn.Module)) for one in walk(value)):
            hidden.add(name)
    methods = {name: own_method(type(module), name) for name in METHODS}
    return Part(type(module), methods, values, words, frozenset(hidden))


def _changes(was: Part | None, now: Part) -> Iterator[tuple[str, tuple[str, str]]]:
    if was is None or was.kind is not now.kind:
        yield "", (MISSING if was is None else class_name(was.kind), class_name(now.kind))
        for name, words in now.words.items():
            yield name, (MISSING, words)
        return
    for name in METHODS:
        if was.methods[name] is not now.methods[name]:
            yield name, (function_name(was.methods[name]), function_name(now.methods[name]))
    new = {name for name in now.values.keys() - was.values.keys() if _counts(now, name)}
    for name in [*was.values, *new]:
        if was.values.get(name, MISSING) != now.values.get(name, MISSING):
            yield name, (was.words.get(name, MISSING), now.words.get(name, MISSING))


def _counts(part: Part, name: str) -> bool:
    """Whether an attribute counts that its class did not make: where it stands before one."""
    return hasattr(part.kind, name) or part.words[name].startswith("a tensor")


def _relevant(part: Part, like: Part | None) -> Part:
    if like is None or like.kind is not part.kind:
        return part
    names = [name for name in part.values if name in like.values or _counts(part, name)]
    if len(names) == len(part.values):
        return part
    values, words = ({name: of[name] for name in names} for of in (part.values, part.words))
    return replace(part, values=values, words=words, hidden=part.hidden & values.keys())


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Equal to nothing but the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any, depth: int = _DEPTH) -> Any:
    """A value as it is now, to be compared with a later one."""
    if isinstance(value, (*_PLAIN, MethodType)):
        return value
    if depth < 1 or isinstance(value, _BY_IDENTITY):
        return _Same(value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_frozen(item, depth - 1) for item in value)
    if isinstance(value, Mapping):
        return {key: _frozen(item, depth - 1) for key, item in value.items()}
    if not hasattr(value, "__dict__"):
        return _Same(value)
    cls, own = type(value), vars(value).items()
    kept = {name: _frozen(one, depth - 1) for name, one in own if not _is_default(cls, name, one)}
    return cls, own_method(cls, "__call__"), kept


def _object_words(value: Any, depth: int) -> str:
    """Class, replaced call and attributes of an attention processor and the like."""
    cls = type(value)
    if depth < 1:
        return class_name(cls)
    entries = [
        f"{name}={describe(own, depth - 1)}"
        for name, own in getattr(value, "__dict__", {}).items()
        if not _is_default(cls, name, own)
    ]
    replaced = replaced_function(cls, "__call__")
    if replaced is not None:
        entries.insert(0, f"__call__={replaced}")
    return class_name(cls) + (f"({', '.join(entries)})" if entries else "")


def _is_default(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute says what its class says anyway."""
    default = getattr(cls, name, MISSING)
    return default is value or (isinstance(value, str) and default == value)
