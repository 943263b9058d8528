"""How a model calls its blocks: nested arguments as flat tensors, and back.

A package takes flat tensors. A block takes arguments by name, some of them tuples of tensors, some
absent, some no tensors at all. A `CallForm` is all of a call but its tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.pairs import Pairs, RealPairs

_CONSTANTS = (bool, int, float, str, torch.dtype)

Arrange = Callable[[dict[str, Any]], dict[str, Any]]
"""Arguments of a block's call by name, as its package is to take them."""


def as_called(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments as they are."""
    return given


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor stands in nested arguments."""

    index: int
    is_complex: bool


@dataclass(frozen=True, slots=True)
class CallForm:
    """A block's call without its tensors.

    Attributes:
        names: Names of its tensors in order, such as `image_rotary_emb.0`.
        skeleton: Its arguments by name, as nested tuples, with places where tensors stand.
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[str, Any], ...]

    def beyond(self, other: CallForm) -> list[str]:
        """What sets it apart from another form: tensors that has not, and other plain values."""
        given = dict(other.skeleton)
        return [name for name in self.names if name not in other.names] + [
            f"{name}-{value}"
            for name, value in self.skeleton
            if isinstance(value, _CONSTANTS) and given.get(name) != value
        ]

    def run(self, block: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Calls a block with flat tensors; what it returns, flat."""
        arguments = dict.fromkeys(required_of(type(block).forward))
        arguments |= {name: _filled(value, tensors) for name, value in self.skeleton}
        with RealPairs() if self._is_complex(self.skeleton) else nullcontext():
            given = block(**arguments)
        return tuple(flat_outputs(given))

    def _is_complex(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return any(map(self._is_complex, value))
        return isinstance(value, _Place) and value.is_complex


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Place):
        tensor = tensors[value.index]
        return Pairs(tensor) if value.is_complex else tensor
    if isinstance(value, tuple):
        return tuple(_filled(one, tensors) for one in value)
    return value


@lru_cache(maxsize=64)
def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's parameters, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


@lru_cache(maxsize=64)
def required_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Those of them that have no default."""
    empty, parameters = inspect.Parameter.empty, inspect.signature(forward).parameters
    return tuple(name for name, one in parameters.items() if one.default is empty)[1:]


def flatten_call(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], arrange: Arrange = as_called
) -> tuple[CallForm, list[Tensor]]:
    """A block's call as its form and its tensors; complex ones as pairs of real numbers.

    Arguments that are None or an empty dictionary count as absent.

    Raises:
        UnsupportedModelError: An argument is neither a tensor nor a plain value.
    """
    given = {**dict(zip(parameters_of(type(block).forward), args, strict=False)), **kwargs}
    given = arrange(given)
    names: list[str] = []
    tensors: list[Tensor] = []

    def skeleton(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            names.append(name)
            tensors.append(torch.view_as_real(value) if value.is_complex() else value)
            return _Place(len(names) - 1, value.is_complex())
        if isinstance(value, (tuple, list)):
            return tuple(skeleton(f"{name}.{index}", one) for index, one in enumerate(value))
        if value is None or isinstance(value, _CONSTANTS):
            return value
        raise UnsupportedModelError(
            f"{type(block).__name__} is called with `{name}`, a {type(value).__name__}, which a "
            "compiled block cannot take; leave out what asks for it"
        )

    nested = tuple(
        (name, skeleton(name, value)) for name, value in given.items() if _says_something(value)
    )
    return CallForm(tuple(names), nested), tensors


def _says_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not value)


def flat_outputs(given: Any) -> Iterator[Tensor]:
    """Tensors that a block returned; it may give None in the place of one."""
    for one in given if isinstance(given, tuple) else (given,):
        if one is not None:
            yield one
