"""A compiled model: what every run of an engine shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ddit_rt.adapters import AdapterSet
from ddit_rt.blocks import TokenRanges
from ddit_rt.errors import ArtifactMismatchError, ShapeError
from ddit_rt.live import LiveModel
from ddit_rt.policies import patch_name
from ddit_rt.steps import Runners, StepModel


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A transformer with its blocks ready to run, for every patch size.

    Attributes:
        steps: The unmodified model.
        multiples: Patch sizes that were asked for, as multiples of p, ascending, 1 first.
        ranges: Batch sizes and token counts that the compiled blocks accept.
        adapters: Trained adapters; a coarse size without one runs training-free.
        adapter_runners: Blocks with LoRA, by multiple, for every adapter.
        experts: Models of the same class and size that take over in later steps; in order.
        live: What the models were when the engine was made; None without an engine.
    """

    steps: StepModel
    multiples: tuple[int, ...]
    ranges: TokenRanges
    adapters: AdapterSet = field(default_factory=AdapterSet)
    adapter_runners: Mapping[int, Runners] = field(default_factory=dict)
    experts: tuple[StepModel, ...] = ()
    live: LiveModel | None = None

    @property
    def models(self) -> tuple[StepModel, ...]:
        """All of them."""
        return (self.steps, *self.experts)

    def offered(
        self, height: int, width: int, frames: int = 0
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Patch sizes that a latent of `height` x `width` offers, and why others are not.

        Raises:
            ShapeError: Not even p divides the latent, or its tokens are out of range.
        """
        offered, notes = [], []
        for multiple in self.multiples:
            problem = self._problem(height, width, frames, multiple)
            if problem is None:
                offered.append(multiple)
            elif multiple == 1:
                raise ShapeError(f"cannot run a latent of {height} x {width}: {problem}")
            else:
                notes.append(f"{patch_name(multiple)} is not offered at this size: {problem}")
        return tuple(offered), tuple(notes)

    def _problem(self, height: int, width: int, frames: int, multiple: int) -> str | None:
        patch = self.steps.patch_size
        if height % patch or width % patch:
            return f"patches of {patch} latent pixels do not divide {height} x {width}"
        tokens = self.steps.grid(height, width, multiple, frames).tokens
        low, high = self.ranges.image
        if not low <= tokens <= high:
            return f"{tokens} image tokens are outside the compiled range {low} to {high}"
        return None

    def check_live(self, device: torch.device) -> None:
        """Refuses models that have left a device, or are not what the engine was made for."""
        for model in self.models:
            if model.device != device:
                raise ArtifactMismatchError(
                    f"the model was on {device} when this engine was made and is on {model.device} "
                    "now; move it back, or compile or load again"
                )
        if self.live is not None:
            self.live.check()

    def rebind(self) -> bool:
        """Binds runners again whose weights the model has moved; whether there were any."""
        moved = False
        bases = (model.base for model in self.models)
        for runners in (*bases, *self.adapter_runners.values()):
            for blocks in runners.values():
                for runner in blocks:
                    if runner.stale():
                        runner.rebind()
                        moved = True
        return moved

    def check_batch(self, samples: int) -> None:
        """Refuses a batch that the compiled blocks were not built for."""
        _check_range("batch size", samples, self.ranges.batch)

    def check_image(self, tokens: int) -> None:
        """Refuses image tokens, references among them, that the blocks were not built for."""
        _check_range("number of image tokens", tokens, self.ranges.image)

    def check_text(self, tokens: int) -> None:
        """Refuses a text length that the compiled blocks were not built for."""
        _check_range("text length", tokens, self.ranges.text)


def _check_range(name: str, count: int, bounds: tuple[int, int]) -> None:
    low, high = bounds
    if not low <= count <= high:
        raise ShapeError(
            f"got a {name} of {count}; the compiled range is {low} to {high}. Compile again with "
            "a wider range, or split the request"
        )
