"""The prompt of a run, where its buckets read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddit_rt.buckets import Pass, StepModel
from ddit_rt.pipeline.guidance import passes_of


@dataclass(frozen=True, kw_only=True)
class RunPrompt:
    """The prompt of a run.

    Attributes:
        models: The models that the run may use.
        conditioning: The run's conditioning.
        passes: Of each model, in a step.
    """

    models: tuple[StepModel, ...]
    conditioning: Mapping[str, Tensor]
    passes: tuple[tuple[Pass, ...], ...]

    @classmethod
    def of(
        cls, models: Sequence[StepModel], conditioning: Mapping[str, Tensor], *, batched: bool
    ) -> RunPrompt:
        """Embeds a conditioning.

        Args:
            models: The models that the run may use.
            conditioning: Checked conditioning tensors.
            batched: Whether the halves of classifier-free guidance run as one batch.

        Raises:
            ShapeError: Halves of unequal text lengths cannot be one batch.
        """
        guidance = models[0].family.guidance(conditioning)
        parts = passes_of(conditioning, guidance, batched)
        passes = tuple(tuple(Pass.of(model, part) for part in parts) for model in models)
        return cls(models=tuple(models), conditioning=conditioning, passes=passes)

    def rewrite(self, changes: Mapping[str, Tensor]) -> None:
        """Gives the steps to come other conditioning tensors, by name; only the text may change."""
        changed = RunPrompt.of(
            self.models, {**self.conditioning, **changes}, batched=len(self.passes[0]) == 1
        )
        for own, new in zip(self.passes, changed.passes, strict=True):
            for one, other in zip(own, new, strict=True):
                one.text.copy_(other.text)
