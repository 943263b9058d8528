"""What the first block of a pass makes of the image at p, ahead of the step's decision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-16
"""For a block that adds nothing."""


class FirstBlock:
    """The first block of one pass.

    A step cache may go by what it adds to the image tokens. It then runs before the step is
    decided, and the other blocks of a step at p, or the residual that stands for them, go on from
    what it gave.
    """

    def __init__(self) -> None:
        """It has not run yet."""
        self._outputs: tuple[Tensor, ...] = ()
        self._added: tuple[Tensor, Tensor] | None = None  # now, and in the latest computed step

    def take(self, before: Tensor, outputs: Sequence[Tensor], image: int) -> None:
        """Takes over what the block has made.

        Args:
            before: Image tokens `[B, n, d]` that it was given.
            outputs: All that it gave, each with the batch first.
            image: Which of them are the image tokens.
        """
        if self._added is None:
            self._outputs = tuple(torch.empty_like(output).contiguous() for output in outputs)
            self._added = torch.zeros_like(before), torch.zeros_like(before)
        # In place: what lives across steps must lie where a captured graph finds it again.
        for own, output in zip(self._outputs, outputs, strict=True):
            own.copy_(output)
        torch.sub(outputs[image], before, out=self._added[0])

    def given(self, rows: int) -> tuple[Tensor, ...]:
        """All that the block gave, of the first samples of the pass."""
        # Sliced only now: a captured run's tensors change places.
        return tuple(output[:rows] for output in self._outputs)

    def change(self) -> Tensor:
        """Relative L1 change of what it adds since the latest computed step, `[B]`, float32."""
        assert self._added is not None, "the first block has run"
        now, then = (added.flatten(1).float() for added in self._added)
        return (now - then).abs().mean(1) / (then.abs().mean(1) + _TINY)

    def keep(self) -> None:
        """Notes that the step in progress computes."""
        assert self._added is not None, "the first block has run"
        now, then = self._added
        then.copy_(now)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it keeps."""
        return (*self._outputs, *(self._added or ()))
