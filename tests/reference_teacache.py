"""TeaCache in plain Python over diffusers' own forward pass: the reference of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import Tensor


class _Reference:
    """The rule, whose passes take turns with their states.

    Attributes:
        computed: Whether each forward pass so far ran its blocks.
    """

    def __init__(
        self,
        threshold: float,
        coefficients: Sequence[float],
        *,
        first: int,
        cutoff: int,
        passes: int = 1,
    ) -> None:
        self.computed: list[bool] = []
        self._threshold = threshold
        self._rescale = np.poly1d(coefficients)
        self._first, self._cutoff, self._passes = first, cutoff, passes
        self._accumulated = [0.0] * passes
        self._previous: list[Tensor | None] = [None] * passes
        self._residual: list[Tensor | None] = [None] * passes
        self._entered: Tensor | None = None

    def _decide(self, signal: Tensor) -> None:
        step, half = divmod(len(self.computed), self._passes)
        previous, self._previous[half] = self._previous[half], signal
        forced = step < self._first or step >= self._cutoff
        if not forced:
            assert previous is not None
            change = float((signal - previous).abs().mean() / previous.abs().mean())
            self._accumulated[half] += float(self._rescale(change))
        self.computed.append(forced or self._accumulated[half] >= self._threshold)
        if self.computed[-1]:
            self._accumulated[half] = 0.0

    @property
    def _half(self) -> int:
        return (len(self.computed) - 1) % self._passes

    def _kept(self) -> Tensor:
        residual = self._residual[self._half]
        assert residual is not None
        return residual


class ReferenceTeaCache(_Reference):
    """TeaCache4FLUX on a `FluxTransformer2DModel`, whose blocks it wraps; for batches of one."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        threshold: float,
        coefficients: Sequence[float],
        steps: int,
    ) -> None:
        super().__init__(threshold, coefficients, first=1, cutoff=steps - 1)
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
                self._decide(block.norm1(hidden_states, emb=temb)[0])
            if not self.computed[-1]:
                return encoder_hidden_states, hidden_states + self._kept() * last
            text, image = original(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                **others,
            )
            if last:
                self._residual[self._half] = image - self._entered
            return text, image

        block.forward = forward


class ReferenceWanTeaCache(_Reference):
    """TeaCache4Wan2.1 on a `WanTransformer3DModel`."""

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
        super().__init__(
            threshold,
            coefficients,
            first=5 if use_ret_steps else 1,
            cutoff=steps if use_ret_steps else steps - 1,
            passes=passes,
        )
        self._projected = use_ret_steps
        self._wrap_embedder(transformer.condition_embedder)
        for index, block in enumerate(transformer.blocks):
            self._wrap(block, first=index == 0, last=index == len(transformer.blocks) - 1)

    def _wrap_embedder(self, embedder: Any) -> None:
        original = embedder.forward

        def forward(*arguments: Any, **others: Any) -> Any:
            temb, projected, *rest = original(*arguments, **others)
            self._decide(projected if self._projected else temb)
            return temb, projected, *rest

        embedder.forward = forward

    def _wrap(self, block: Any, *, first: bool, last: bool) -> None:
        original = block.forward

        def forward(hidden_states: Tensor, *others: Any) -> Tensor:
            if first:
                self._entered = hidden_states
            if not self.computed[-1]:
                return hidden_states + self._kept() * last
            output: Tensor = original(hidden_states, *others)
            if last:
                self._residual[self._half] = output - self._entered
            return output

        block.forward = forward
