"""The live models of a pipeline: what an engine takes them for, and whether they still are that.

`LiveModel` looks at compile, at load and at every run. The first look is a whole one: what compiled
blocks cannot honour is refused by name, a model must be what its configuration describes, and all
blocks of a type must be alike. It ends in a snapshot, and the look of a run is a comparison with
that, below a millisecond for the 57 blocks of FLUX. Only where something differs, it looks again
and says what: some changes, such as a LoRA that came and went, leave the model as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ddit_rt.blocks import check_identical
from ddit_rt.errors import ArtifactMismatchError, UnsupportedModelError
from ddit_rt.models import Family
from ddit_rt.models.base import BlockType
from ddit_rt.models.plain import (
    FORWARD_HOOKS,
    attention_backend,
    check_plain,
    check_process,
    process_state,
)
from ddit_rt.models.quantised import QUANTISED
from ddit_rt.models.structure import (
    METHODS,
    Differences,
    Part,
    attributes_of,
    class_name,
    departures,
    describe_parts,
    differences,
    own_method,
    parts,
    reference,
    relevant,
    walk,
    without_hidden,
)

_AS_CONFIGURED = "as its configuration says"
_SINCE = "since this engine was made"
_AGAIN = "put it back, or compile or load again"


class LiveModel:
    """The models that an engine runs.

    Attributes:
        block_changes: What the blocks have that their configuration does not say, such as an
            attention processor: a description by class and place. Packages are compiled with it.
    """

    def __init__(self, family: Family, transformer: nn.Module, pipeline: Any) -> None:
        """Looks at the models, and remembers what they are.

        Args:
            family: Their family.
            transformer: The first of them.
            pipeline: The pipeline, or None for a bare transformer.

        Raises:
            UnsupportedModelError: A model carries what compiled blocks cannot honour, is not what
                its configuration describes, or has blocks of one type that differ.
        """
        self._family, self._pipeline = family, pipeline
        experts = () if pipeline is None else family.experts(pipeline)
        self._models = {_name(index): model for index, model in enumerate((transformer, *experts))}
        self._check_plain()
        self._plain = {name: self._configured(name) for name in self._models}
        described = self._describe()
        found = [self._block_changes(name, described[name]) for name in self._models]
        self.block_changes = found[0]
        for name, changes in zip(self._models, found, strict=True):
            _refuse_unlike_experts(name, self.block_changes, changes)
        if self._backend() not in (None, "native"):
            self.block_changes["attention backend"] = attention_backend()
        self._remember(described)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The transformer, then its experts."""
        return tuple(self._models.values())

    def check(self) -> None:
        """Looks again, before a run.

        Raises:
            UnsupportedModelError: A model carries what compiled blocks cannot honour.
            ArtifactMismatchError: A model is not what it was when this engine was made.
        """
        self._check_same()
        if self._snapshot.holds():
            return
        self._check_plain()
        described = self._describe()
        for name, model in self._models.items():
            config = _differing(self._configs[name], _config(model))
            _refuse(_SINCE, {f"{name}.config.{key}": change for key, change in config.items()})
            _refuse(_SINCE, _exchanged(name, self._parts[name], dict(parts(model))))
            changes = differences(self._described[name], described[name])
            _refuse(_SINCE, {f"{name}.{place}": change for place, change in changes.items()})
        backends = (str(self._kept_backend), str(self._backend()))
        _refuse(_SINCE, {"diffusers' attention backend": backends})
        self._remember(described)

    def _check_same(self) -> None:
        """Refuses other models in the places of those that the engine was made for."""
        pipeline = self._pipeline
        if pipeline is None:
            return
        now = (getattr(pipeline, "transformer", None), *self._family.experts(pipeline))
        for index in range(max(len(now), len(self._models))):
            was = self._models.get(_name(index))
            live = now[index] if index < len(now) else None
            if live is not was:
                raise ArtifactMismatchError(
                    f"the pipeline's {_name(index)} is another one than when this engine was made "
                    f"({type(live).__name__}); {_AGAIN}"
                )
        self._family.check_model(pipeline.transformer, pipeline)

    def _check_plain(self) -> None:
        check_process()
        for name, model in self._models.items():
            check_plain(model, name)

    def _configured(self, name: str) -> dict[str, Part]:
        """What a model is by its configuration, in which it must agree on the number of blocks."""
        model = self._models[name]
        self._check_class(name, model)
        plain = reference(model)
        types = self._family.block_types(model)
        for block_type in types:
            _check_count(name, block_type, model, plain)
        # Tables that a class itself keeps outside its blocks are read anew in every run.
        blocks = tuple(f"{block_type.path}." for block_type in types)
        return {
            path: part if path.startswith(blocks) else without_hidden(part, self._family.tables)
            for path, part in describe_parts(plain).items()
        }

    def _describe(self) -> dict[str, dict[str, Part]]:
        found = {}
        for name, model in self._models.items():
            found[name] = relevant(describe_parts(model), self._plain[name])
            _refuse_hidden(name, found[name])
        return found

    def _remember(self, described: dict[str, dict[str, Part]]) -> None:
        self._described, self._kept_backend = described, self._backend()
        self._parts = {name: dict(parts(model)) for name, model in self._models.items()}
        self._configs = {name: _config(model) for name, model in self._models.items()}
        self._snapshot = Snapshot(self._models.values())

    def _backend(self) -> str | None:
        """The attention backend of the process; None where no processor goes by it."""
        for model in self._models.values():
            for module in model.modules():
                if getattr(getattr(module, "processor", None), "_attention_backend", "own") is None:
                    return attention_backend()
        return None

    def _block_changes(self, name: str, described: Mapping[str, Part]) -> dict[str, str]:
        """Compares a model with its configuration, and its blocks with each other."""
        model = self._models[name]
        types = self._family.block_types(model)
        blocks, around = _by_block(departures(described, self._plain[name]), types)
        _refuse_around(name, around)
        changes: dict[str, str] = {}
        for block_type in types:
            _check_alike(name, block_type, described, self._family.numbering)
            check_identical(block_type, block_type.blocks(model))
            first = blocks.get(block_type.block_path(0), {})
            changes |= {f"{block_type.name}.{place}": is_ for place, is_ in first.items()}
        for block, modules in self._family.own_blocks.items():
            for place in (f"{block}.{module}.forward".replace("..", ".") for module in modules):
                if place in changes:
                    raise UnsupportedModelError(
                        f"{place} was replaced, and ddit_rt computes this block in a form of its "
                        "own, which would ignore that; put the class's forward back"
                    )
        return dict(sorted(changes.items()))

    def _check_class(self, name: str, model: nn.Module) -> None:
        """Refuses a forward that is not the family's: the engine runs that in steps of its own."""
        owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
        if owner.__name__ != self._family.transformer_class:
            raise UnsupportedModelError(
                f"{name} is a {class_name(owner)} with a forward of its own, which the engine "
                f"would not run; load it as {self._family.transformer_class}"
            )


def _refuse(since: str, changes: Differences) -> None:
    """Names the first of the changes."""
    real = {place: change for place, change in changes.items() if change[0] != change[1]}
    if real:
        place = min(real, key=lambda one: (one.count("."), one))
        was, now = real[place]
        more = f" (and {len(real) - 1} more)" if len(real) > 1 else ""
        raise ArtifactMismatchError(
            f"{place} has changed {since}: it was {was} and is {now}{more}; {_AGAIN}"
        )


def _exchanged(
    name: str, was: Mapping[str, nn.Module], now: Mapping[str, nn.Module]
) -> Differences:
    """Modules that are not the very ones that were there: runners are bound to those."""
    return {
        f"{name}.{path}": (_kind(was.get(path)), f"another {_kind(now.get(path))}")
        for path in was.keys() | now.keys()
        if was.get(path) is not now.get(path)
    }


def _kind(module: nn.Module | None) -> str:
    return "missing" if module is None else type(module).__name__


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    keys = sorted(was.keys() | now.keys())
    return {key: (repr(was.get(key)), repr(now.get(key))) for key in keys}


def _refuse_unlike_experts(name: str, first: Mapping[str, str], own: Mapping[str, str]) -> None:
    for place in sorted(first.keys() | own.keys()):
        one, other = first.get(place, _AS_CONFIGURED), own.get(place, _AS_CONFIGURED)
        if one != other:
            raise UnsupportedModelError(
                f"{place} of {name} is {other}, and {one} in {_name(0)}; both run the same "
                "packages, so change both or neither"
            )


def _check_count(name: str, block_type: BlockType, model: nn.Module, plain: nn.Module) -> None:
    live, configured = (
        len(list(one.get_submodule(block_type.path).children())) for one in (model, plain)
    )
    if live != configured:
        raise UnsupportedModelError(
            f"{name}.{block_type.path} holds {live} blocks, and its configuration says "
            f"{configured}; load the whole model, or register the number with "
            f"{name}.register_to_config"
        )


def _by_block(
    found: Mapping[str, str], types: Iterable[BlockType]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Departures inside each block, by the block, and those around the blocks."""
    paths = "|".join(re.escape(block_type.path) for block_type in types)
    inside = re.compile(rf"((?:{paths})\.\d+)(?:\.(.*))?")
    blocks: dict[str, dict[str, str]] = {}
    around: dict[str, str] = {}
    for place, words in found.items():
        match = inside.fullmatch(place)
        if match is None:
            around[place] = words
        else:
            blocks.setdefault(match[1], {})[match[2] or "class"] = words
    return blocks, around


def _refuse_around(name: str, around: Mapping[str, str]) -> None:
    # What is not compiled runs as the model has it.
    around = {place: words for place, words in around.items() if not words.startswith(QUANTISED)}
    if around:
        place = min(around, key=lambda one: (one.count("."), one))
        raise UnsupportedModelError(
            f"{name}.{place} is {around[place]}, which its configuration does not say, and the "
            "engine would not run it as the model does; load the model as its configuration "
            "describes it"
        )


def _refuse_hidden(name: str, described: Mapping[str, Part]) -> None:
    """Refuses tensors that no name leads to: nobody would notice when they change."""
    for path, part in described.items():
        for attribute in sorted(part.hidden):
            raise UnsupportedModelError(
                f"{name}.{path}.{attribute} holds tensors that are not parameters or buffers of "
                "the model; make what holds them an nn.Module and register them"
            )


def _check_alike(
    name: str, block_type: BlockType, described: Mapping[str, Part], numbering: Sequence[str]
) -> None:
    blocks: dict[int, dict[str, Part]] = {}
    start = f"{block_type.path}."
    for path, part in described.items():
        if path.startswith(start):
            index, _, rest = path.removeprefix(start).partition(".")
            if block_type.members is None or int(index) in block_type.members:
                blocks.setdefault(int(index), {})[rest] = part
    one, *_ = blocks
    for number, block in blocks.items():
        for place, (first, own) in sorted(differences(blocks[one], block).items()):
            if place in numbering:
                continue
            raise UnsupportedModelError(
                f"{name}.{start}{number}.{place} is {own}, and {first} in {start}{one}; one "
                "package serves all blocks of a type, so change all of them before compiling, "
                "or none"
            )


def _name(index: int) -> str:
    return f"transformer_{index + 1}" if index else "transformer"


def _config(model: nn.Module) -> dict[str, Any]:
    """A configuration as diffusers reads it: by its attributes."""
    return {name: one for name, one in vars(model.config).items() if not name.startswith("_")}


_TORCH_OWN = frozenset(vars(nn.Module()))


class Snapshot:
    """What models were, with everything that hangs on them.

    Whether that still holds is asked before every run: about 0.5 us for each module. The attribute
    dictionaries of all modules are compared with copies of theirs. Nearly all values are the very
    same objects, so that the comparison of two lists of dictionaries stays within the interpreter's
    own C code. It tells only whether, not what, and errs towards "changed".
    """

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
