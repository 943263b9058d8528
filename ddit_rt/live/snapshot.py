"""Whether a model is what it was, asked before every run: about 0.5 us for each module.

The attribute dictionaries of all modules are compared with copies of theirs. Nearly all values are
the very same objects, so that the comparison of two lists of dictionaries stays within the
interpreter's own C code. It tells only whether, not what, and errs towards "changed".
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from ddit_rt.models.plain import FORWARD_HOOKS, process_state
from ddit_rt.models.structure import METHODS, attributes_of, own_method, walk

_TORCH_OWN = frozenset(vars(nn.Module()))


class Snapshot:
    """What models were, with everything that hangs on them."""

    def __init__(self, models: Iterable[Any]) -> None:
        """Takes it.

        Args:
            models: diffusers models; they are kept alive.
        """
        # Imported here: it pulls in much of diffusers.
        from diffusers.hooks import HookRegistry

        models = tuple(models)
        for model in models:
            # diffusers' pipelines leave an empty one behind at their first call.
            HookRegistry.check_if_exists_or_initialize(model)
        self._modules = [module for model in models for module in model.modules()]
        objects = _objects_of(self._modules)
        configs = [model.config for model in models]
        self._live = [vars(one) for one in (*self._modules, *objects, *configs)]
        self._kept = [_copied(state) for state in self._live]
        self._hooks = [
            vars(module)[registry] for module in self._modules for registry in FORWARD_HOOKS
        ]
        registries = (vars(module)["_parameters"] for module in self._modules)
        self._parameters = [registry for registry in registries if registry]
        self._tensor_kinds = self._tensor_kinds_now()
        self._kinds = list(map(type, self._modules))
        functions = {(kind, name) for kind in set(self._kinds) for name in METHODS}
        functions |= {(type(one), "__call__") for one in objects}
        # A class without one answers with a new object at every question.
        functions = {key for key in functions if own_method(*key) is not None}
        self._functions = [(*key, getattr(*key)) for key in functions]
        self._process = process_state()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        try:
            same = self._live == self._kept
        except (RuntimeError, ValueError, TypeError):
            # A tensor or array that was exchanged has no one truth value.
            return False
        return (
            same
            and not any(self._hooks)
            and self._tensor_kinds == self._tensor_kinds_now()
            and self._kinds == list(map(type, self._modules))
            and all(getattr(cls, name, None) is kept for cls, name, kept in self._functions)
            and process_state() == self._process
        )

    def _tensor_kinds_now(self) -> list[tuple[type, torch.dtype]]:
        """Class and data type of every weight: quantisers bring some of their own."""
        tensors = chain.from_iterable(map(dict.values, self._parameters))
        return [(type(tensor), tensor.dtype) for tensor in tensors if tensor is not None]


def _objects_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Attention processors and other plain objects with attributes, each once."""
    found = {
        id(one): one
        for module in modules
        for value in attributes_of(module).values()
        for one in walk(value)
        if hasattr(one, "__dict__") and not isinstance(one, (nn.Module, type))
    }
    return list(found.values())


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which containers are copied too: they may be changed in place.

    Those of torch's own stay: parameters may move, and hooks are looked at in themselves.
    """
    kept = {
        name: value if name in _TORCH_OWN else _copied_value(value) for name, value in state.items()
    }
    if "_modules" in kept:
        kept["_modules"] = dict(kept["_modules"])
    return kept


def _copied_value(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copied_value(one) for key, one in value.items()}
    if type(value) is list:
        return list(map(_copied_value, value))
    return set(value) if type(value) is set else value
