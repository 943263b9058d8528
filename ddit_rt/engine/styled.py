"""The part of an engine that has style LoRAs act on its models."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ddit_rt.lora.loras import Loras
from ddit_rt.torch_state import without_autocast

if TYPE_CHECKING:
    from ddit_rt.engine.table_driven import Loop
    from ddit_rt.planning.compiled import CompiledModel


class Styled:
    """An engine's style LoRAs: several at once, fused in place, with nothing compiled again.

    A weight W of the model becomes W plus the sum of what each LoRA adds, times its weight. The sum
    is computed in float32 from the model's own values and rounded once, so it hangs on no history,
    and without LoRAs every bit is as it was. Where DoRA sets lengths of rows, these are whatever
    the weight is, as in PEFT; a norm that a control LoRA brings whole is blended.
    """

    __slots__ = ()

    pipeline: Any
    _compiled: CompiledModel
    _lock: threading.RLock
    _loop: Loop
    _loras: Loras

    def _check_state(self) -> None:
        """Refuses what the engine must not begin now."""
        raise NotImplementedError

    @property
    def loras(self) -> dict[str, float]:
        """Names and weights of the LoRAs that are loaded; one of weight 0 does not act."""
        return self._loras.weights

    @without_autocast()
    def load_lora(
        self, lora: Any, weight: float = 1.0, name: str | None = None, **load_arguments: Any
    ) -> str:
        """Loads a LoRA, which acts from the next run on, beside those that are loaded.

        Its layers for the text encoder and its norms are taken in too, as the pipeline's own
        `load_lora_weights` does; a file of which a part has no place is refused, and the part
        listed. On any error everything is as it was.

        Args:
            lora: What the pipeline's `load_lora_weights` takes: a path, a name on the Hub or a
                state dict.
            weight: Strength, a finite number; 0 loads it without letting it act.
            name: Name for `set_loras` and `unload_loras`; by default `default_0` and so on.
            load_arguments: As of `load_lora_weights`, such as `weight_name`;
                `load_into_transformer_2=True` is for the second expert of Wan 2.2.

        Returns:
            The name.

        Raises:
            TypeError, ValueError: An argument that is none, a name that is taken, an unreadable
                LoRA, or one for a model that another engine's LoRAs act on.
            UnsupportedModelError: A part of the LoRA has no place, or the pipeline has LoRA layers
                of its own there.
        """
        with self._lock:
            self._check_state()
            models = [model.transformer for model in self._compiled.models]
            return self._loras.load(
                self.pipeline, lora, models, weight=weight, name=name, arguments=load_arguments
            )

    @without_autocast()
    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Sets which LoRAs act from the next run on; the file of none is read again.

        Args:
            weights: Strength by name; every other LoRA stays loaded and does not act, so that
                `set_loras({})` is the model itself, bit for bit.

        Raises:
            TypeError, ValueError: No such LoRA is loaded, a weight is no finite number, or LoRAs of
                the pipeline's or of another engine's act on the same model.
        """
        with self._lock:
            self._check_state()
            self._loras.set_weights(weights)

    @without_autocast()
    def unload_loras(self, names: str | Iterable[str] | None = None) -> None:
        """Takes LoRAs out and forgets them; without any left, the model is what it was to the bit.

        Args:
            names: A name or several; by default all, of which there may be none.

        Raises:
            TypeError, ValueError: As of `set_loras`.
        """
        with self._lock:
            self._loop.check_alone()
            self._loras.unload(names)
