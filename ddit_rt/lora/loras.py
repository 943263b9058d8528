"""Style LoRAs of an engine: several at once, each with a weight, fused into the live weights.

The compiled blocks hold no weights of their own, so what is fused in place acts at once, at every
patch size, with nothing compiled again. A parameter is always the base plus the weighted sum of
what the LoRAs add, computed anew from both in float32 and rounded once: no order of calls leaves a
trace in it. The base is kept as long as something acts on it, and copied back: subtracting in
floating point would not give the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ddit_rt import checks
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lora.file import check_arguments, read_lora
from ddit_rt.lora.terms import Place, Term, adapter_layers, make_terms, parameter_at

LOG = logging.getLogger("ddit_rt.lora")

_SECOND = "load_into_transformer_2"
"""Argument of `load_lora_weights` by which a LoRA is for the second expert of a Wan pipeline."""

_OWNERS: WeakKeyDictionary[nn.Module, ref[Loras]] = WeakKeyDictionary()
"""Whose LoRAs act on a model: engines may share it."""

Sums = dict[Place, tuple[tuple[Term, float], ...]]
"""What is added to each parameter, in the order in which it was loaded."""


class Loras:
    """The LoRAs that an engine has loaded, and what they act on."""

    def __init__(self) -> None:
        self._terms: dict[str, dict[Place, Term]] = {}
        self._weights: dict[str, float] = {}
        self._base: dict[Place, Tensor] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each by its name, in the order in which they were loaded."""
        return {name: self._weights.get(name, 0.0) for name in self._terms}

    def load(
        self,
        pipeline: Any,
        lora: Any,
        models: Sequence[nn.Module],
        *,
        weight: float,
        name: str | None,
        arguments: Mapping[str, Any],
    ) -> str:
        """Reads one, checks it, and lets it act; on any error everything is as it was.

        Args:
            pipeline: The diffusers pipeline.
            lora: What its `load_lora_weights` takes: a path, a Hub name or a state dict.
            models: The transformers that the engine runs.
            weight: Its weight.
            name: Its name; by default `default_0`, or the next that is free.
            arguments: As of `load_lora_weights`.

        Returns:
            Its name.

        Raises:
            TypeError: An argument of another type.
            ValueError: A weight that is not finite, a name that is taken, an unknown argument, an
                unreadable LoRA, or one for a model that another engine's acts on.
            UnsupportedModelError: There is no pipeline, a model has LoRA layers already, or not
                all of the LoRA has a place.
        """
        if pipeline is None:
            raise UnsupportedModelError(
                "load_lora loads through the pipeline; this engine has a bare transformer"
            )
        weight, name = checks.number("weight", weight), self._free_name(name)
        given = dict(arguments)
        targets: dict[str, Any] = {
            "transformer": _transformer(pipeline, given.pop(_SECOND, False), models)
        }
        check_arguments(given)
        if hasattr(pipeline, "load_lora_into_text_encoder"):
            targets["text_encoder"] = pipeline.text_encoder
        file = read_lora(pipeline, lora, targets, given)
        touched = {prefix: model for prefix, model in targets.items() if file.layers[prefix]}
        if file.norms:
            touched["transformer"] = targets["transformer"]
        for prefix, model in touched.items():
            _check_no_layers(prefix, model)
            self._check_owner(model)
        self._terms[name] = make_terms(pipeline, file, touched)
        try:
            self._act({**self._weights, name: weight})
        except BaseException:
            del self._terms[name]
            raise
        LOG.info("loaded %s, which changes %d parameters", name, len(self._terms[name]))
        return name

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Gives those that are named these weights, and every other one 0.

        Raises:
            TypeError: No weights by name.
            ValueError: A name that is not loaded, a weight that is not finite, or LoRAs of the
                pipeline's or of another engine's that act.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(checks.got("weights", weights, "weights by the LoRAs' names"))
        self._check_known(weights)
        self._act({name: checks.number(f"weights[{name!r}]", w) for name, w in weights.items()})

    def unload(self, names: str | Iterable[str] | None) -> None:
        """Takes LoRAs out and forgets them; None: all.

        Raises:
            TypeError, ValueError: As of `set_weights`.
        """
        if not (names is None or isinstance(names, Iterable)):
            raise TypeError(checks.got("names", names, "a LoRA's name, or several"))
        gone = [names] if isinstance(names, str) else list(self._terms if names is None else names)
        self._check_known(gone)
        self._act({name: w for name, w in self._weights.items() if name not in gone})
        for name in dict.fromkeys(gone):
            del self._terms[name]
        LOG.info("unloaded %s", ", ".join(gone) or "none")

    def _act(self, weights: Mapping[str, float]) -> None:
        """Fuses what these weights say; on any error everything is as it was."""
        before, after = self._sums(self._weights), self._sums(weights)
        places = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        for model in dict.fromkeys(model for model, _ in places):
            self._check_owner(model)
            _check_not_merged(model)
        started = time.perf_counter()
        copies = {one: parameter_at(one).clone() for one in places if one not in self._base}
        base = {**self._base, **copies}
        written = []
        try:
            for place in places:
                value = _sum(base[place], after.get(place, ()))
                written.append(place)
                parameter_at(place).copy_(value)
        except BaseException:
            for place in written:
                parameter_at(place).copy_(_sum(base[place], before.get(place, ())))
            raise
        self._weights, self._base = dict(weights), {place: base[place] for place in after}
        self._own({model for model, _ in before}, {model for model, _ in after})
        acting = {name: weight for name, weight in weights.items() if weight}
        LOG.info(
            "acting: %s; %d parameters written in %.3f s",
            *(acting or "none", len(places), time.perf_counter() - started),
        )

    def _sums(self, weights: Mapping[str, float]) -> Sums:
        found: Sums = {}
        for name, terms in self._terms.items():
            weight = weights.get(name, 0.0)
            if weight:
                for place, term in terms.items():
                    found[place] = (*found.get(place, ()), (term, weight))
        return found

    def _own(self, before: Iterable[nn.Module], after: Iterable[nn.Module]) -> None:
        for model in before:
            _OWNERS.pop(model, None)
        for model in after:
            _OWNERS[model] = ref(self)

    def _check_owner(self, model: nn.Module) -> None:
        owner = _OWNERS.get(model)
        other = None if owner is None else owner()
        if other is not None and other is not self:
            raise ValueError(
                f"LoRAs of another engine act on this {type(model).__name__}; call its "
                "unload_loras(), or its set_loras({}), first"
            )

    def _free_name(self, name: str | None) -> str:
        if name is None:
            names = (f"default_{place}" for place in range(len(self._terms) + 1))
            return next(name for name in names if name not in self._terms)
        if not checks.instance("name", name, str, "a name for the LoRA"):
            raise ValueError(checks.got("name", name, "a name for the LoRA"))
        if name in self._terms:
            raise ValueError(
                f"a LoRA named {name!r} is loaded already; give this one another name, or call "
                f"unload_loras({name!r}) first"
            )
        return name

    def _check_known(self, names: Iterable[Any]) -> None:
        for name in names:
            if not isinstance(name, str) or name not in self._terms:
                known = (
                    f"loaded are {list(self._terms)}" if self._terms else "load_lora comes first"
                )
                raise ValueError(f"no LoRA named {checks.show(name)} is loaded; {known}")


def _sum(base: Tensor, terms: Iterable[tuple[Term, float]]) -> Tensor:
    """The base, to the bit, or what it becomes with some terms: before it is rounded."""
    if not terms:
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide, memory_format=torch.contiguous_format, copy=True)
    for term, weight in terms:
        term.add_to(total, base, weight)
    return total


def _transformer(pipeline: Any, second: Any, models: Sequence[nn.Module]) -> nn.Module:
    component = "transformer_2" if checks.flag(_SECOND, second) else "transformer"
    found = getattr(pipeline, component, None)
    if not any(found is model for model in models):
        raise UnsupportedModelError(
            f"got {_SECOND}=True, and this engine runs no {component}; leave it out"
        )
    assert isinstance(found, nn.Module)
    return found


def _check_no_layers(name: str, model: nn.Module) -> None:
    """Refuses a model that has LoRA layers of its own."""
    if any(True for _ in adapter_layers(model)):
        raise UnsupportedModelError(
            f"the pipeline's {name} has LoRA layers already, and the two could not be told apart; "
            "call pipeline.unload_lora_weights() first, which keeps fused ones in the weights, or "
            f"leave the {name}'s part of this LoRA out"
        )


def _check_not_merged(model: nn.Module) -> None:
    """Refuses to change weights from under another LoRA."""
    merged = {name for _, layer in adapter_layers(model) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"LoRA {sorted(merged)} was fused by the pipeline after the engine's; call "
            "pipeline.unfuse_lora() first"
        )
