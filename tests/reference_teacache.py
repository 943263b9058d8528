"""TeaCache in plain Python over diffusers' own forward pass: the reference of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import Tensor


class ReferenceTeaCache:
    """TeaCache4FLUX on a `FluxTransformer2DModel`, whose blocks it wraps; for batches of one.

    Attributes:
        computed: Whether each step so far ran its blocks.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        threshold: float,
        coefficients: Sequence[float],
        steps: int,
    ) -> None:
        self.computed: list[bool] = []
        self._threshold = threshold
        self._rescale = np.poly1d(coefficients)
        self._steps = steps
        self._accumulated = 0.0
        self._previous_input: Tensor | None = None
        self._residual: Tensor | None = None
        self._entered: Tensor | None = None
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for index, block in enumerate(blocks):
            self._wrap(block, first=index == 0, last=index == len(blocks) - 1)

    def _wrap(self, block: Any, *, first: bool, last: bool) -> None:
        original = block.forward

        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **others: Any
        ) -> tuple[Tensor, Tensor]:
            if first:
                self._entered = hidden_states
                self.computed.append(self._computes(block.norm1(hidden_states, emb=temb)[0]))
            if not self.computed[-1]:
                assert self._residual is not None
                return encoder_hidden_states, hidden_states + self._residual * last
            text, image = original(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                **others,
            )
            if last:
                self._residual = image - self._entered
            return text, image

        block.forward = forward

    def _computes(self, modulated: Tensor) -> bool:
        step, previous = len(self.computed), self._previous_input
        self._previous_input = modulated
        if step == 0 or step == self._steps - 1:
            self._accumulated = 0.0
            return True
        assert previous is not None
        change = float((modulated - previous).abs().mean() / previous.abs().mean())
        self._accumulated += float(self._rescale(change))
        if self._accumulated < self._threshold:
            return False
        self._accumulated = 0.0
        return True


class ReferenceWanTeaCache:
    """TeaCache4Wan2.1 on a `WanTransformer3DModel`, whose passes take turns with their states.

    Attributes:
        computed: Whether each forward pass so far ran its blocks.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        threshold: float,
        coefficients: Sequence[float],
        steps: int,
        *,
        passes: int,
        use_ret_steps: bool = False,
    ) -> None:
        self.computed: list[bool] = []
        self._threshold = threshold
        self._rescale = np.poly1d(coefficients)
        self._passes = passes
        self._projected = use_ret_steps
        self._first = 5 if use_ret_steps else 1
        self._cutoff = steps if use_ret_steps else steps - 1
        self._accumulated = [0.0] * passes
        self._previous: list[Tensor | None] = [None] * passes
        self._residual: list[Tensor | None] = [None] * passes
        self._entered: Tensor | None = None
        self._wrap_embedder(transformer.condition_embedder)
        for index, block in enumerate(transformer.blocks):
            self._wrap(block, first=index == 0, last=index == len(transformer.blocks) - 1)

    def _wrap_embedder(self, embedder: Any) -> None:
        original = embedder.forward

        def forward(*arguments: Any, **others: Any) -> Any:
            temb, projected, *rest = original(*arguments, **others)
            self.computed.append(self._computes(projected if self._projected else temb))
            return temb, projected, *rest

        embedder.forward = forward

    def _wrap(self, block: Any, *, first: bool, last: bool) -> None:
        original = block.forward

        def forward(hidden_states: Tensor, *others: Any) -> Tensor:
            half = (len(self.computed) - 1) % self._passes
            if first:
                self._entered = hidden_states
            if not self.computed[-1]:
                residual = self._residual[half]
                assert residual is not None
                return hidden_states + residual * last
            output: Tensor = original(hidden_states, *others)
            if last:
                self._residual[half] = output - self._entered
            return output

        block.forward = forward

    def _computes(self, signal: Tensor) -> bool:
        step, half = divmod(len(self.computed), self._passes)
        previous, self._previous[half] = self._previous[half], signal
        if step < self._first or step >= self._cutoff:
            self._accumulated[half] = 0.0
            return True
        assert previous is not None
        change = float((signal - previous).abs().mean() / previous.abs().mean())
        self._accumulated[half] += float(self._rescale(change))
        if self._accumulated[half] < self._threshold:
            return False
        self._accumulated[half] = 0.0
        return True
