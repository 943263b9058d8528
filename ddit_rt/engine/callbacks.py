"""The step callback of a pipeline's own loop, in all forms that diffusers knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class StepEnd:
    """Stands before a user's `callback_on_step_end`, and sees the latents of every step.

    The user's is given what it asks for, and what it returns is the pipeline's to take.

    Attributes:
        running: Whether the user's is running.
    """

    running = False

    def __init__(
        self,
        arguments: Mapping[str, Any],
        stepped: Callable[[int, Tensor], None],
        returned: Callable[[Tensor], None],
    ) -> None:
        """Prepares it.

        Args:
            arguments: Arguments of the pipeline's call.
            stepped: Told a step's index and the latents that the scheduler made.
            returned: Told the latents that the pipeline goes on from.
        """
        self.running = False
        self._user = arguments.get("callback_on_step_end")
        # Callback objects of diffusers say themselves what they need; not every pipeline asks them.
        own = getattr(self._user, "tensor_inputs", None)
        default = ["latents"] if own is None else []
        names = arguments.get("callback_on_step_end_tensor_inputs", default)
        self._names = tuple(dict.fromkeys((*(own or ()), *(names or ()))))
        self._stepped = stepped
        self._returned = returned

    def arguments(self) -> dict[str, Any]:
        """What the pipeline's call takes in the place of the user's callback."""
        names = dict.fromkeys((*self._names, "latents"))
        return {
            "callback_on_step_end": self._call,
            "callback_on_step_end_tensor_inputs": list(names),
        }

    def _call(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        latents = tensors["latents"]
        self._stepped(index, latents)
        changed: Any = {}
        if self._user is not None:
            given = {name: tensors[name] for name in self._names}
            self.running = True
            try:
                changed = self._user(pipeline, index, timestep, given)
            finally:
                self.running = False
            changed = {} if changed is None else changed
            latents = _latents_of(changed, latents)
        self._returned(latents)
        return changed


def _latents_of(changed: Any, own: Tensor) -> Tensor:
    """The latents among what a callback returned, else the pipeline's own."""
    if not isinstance(changed, dict):
        raise TypeError(
            f"callback_on_step_end returned {type(changed).__name__}; expected the dictionary of "
            "tensors that it was given, or None"
        )
    latents = changed.get("latents", own)
    if not isinstance(latents, Tensor):
        raise TypeError(
            f"callback_on_step_end returned {type(latents).__name__} as latents; expected a "
            "tensor, or leave the key out"
        )
    return latents
