"""A family that tells its model's layers, which trained adapters and TeaCache need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import BlockType, Grid, Runner
from ddit_rt.models.calls import ModelCall, check_shape, model_arguments
from ddit_rt.models.family import Family

ALL_BLOCKS = slice(None)
FIRST_BLOCK = slice(1)
LATER_BLOCKS = slice(1, None)


class LayeredFamily(Family, ABC):
    """A family that tells its model's layers too: what trained adapters and TeaCache need.

    Its steps run them, on blocks in a form of the family's own, instead of the model's forward; all
    else is as of any family.
    """

    rehearsed: ClassVar[bool] = False

    def hidden_size(self, transformer: Any) -> int:
        """Heads times head width."""
        return int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)

    @abstractmethod
    def block_types(self, transformer: nn.Module) -> tuple[BlockType, ...]:
        """See `Family.block_types`: in the family's own form."""

    @abstractmethod
    def embed_text(self, transformer: nn.Module, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Text tokens as the blocks take them, `[B, T, d]`. The same at every step."""

    @abstractmethod
    def embed_time(
        self, transformer: nn.Module, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Modulation input of every step.

        Args:
            transformer: The model.
            timesteps: Noise levels t in [0, 1], `[N]`, float32.
            conditioning: The run's conditioning.

        Returns:
            `[N, B, *modulation_shape]`, in the model's dtype.
        """

    def modulation_shape(self, transformer: nn.Module) -> tuple[int, ...]:
        """Shape of one sample's modulation input; by default `[d]`."""
        return (self.hidden_size(transformer),)

    @abstractmethod
    def positions(
        self, transformer: nn.Module, grid: Grid, text_tokens: int, *, stretch: int = 1
    ) -> tuple[Tensor, ...]:
        """Position encodings that the blocks take for a grid of tokens.

        Args:
            transformer: The model.
            grid: Token rows and columns, and frames.
            text_tokens: Length of the text sequence.
            stretch: 1 for the natural positions 0, 1, 2, ...; s for tokens that each cover
                s x s base tokens of one frame, placed at the centres of what they cover.
        """

    @abstractmethod
    def positions_at(
        self, positions: tuple[Tensor, ...], places: Tensor, text_tokens: int
    ) -> tuple[Tensor, ...]:
        """Position encodings of the text and of some of the image tokens.

        Args:
            positions: As `positions` returned them.
            places: Which image tokens, `[n]`, int64.
            text_tokens: Length of the text sequence.
        """

    def embed_tokens(self, transformer: nn.Module, tokens: Tensor) -> Tensor:
        """The model's own patch embedding: `[B, n, C*p*p]` to `[B, n, d]`."""
        hidden: Tensor = self.embedding_layers(transformer)[0](tokens)
        return hidden

    @abstractmethod
    def run_blocks(
        self,
        runners: Mapping[str, Sequence[Runner]],
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        positions: tuple[Tensor, ...],
        which: slice = ALL_BLOCKS,
    ) -> tuple[Tensor, Tensor]:
        """Blocks one after the other.

        Args:
            runners: The blocks of each `BlockType.path`, in order.
            hidden: Image tokens, `[B, n, d]`.
            text: Text tokens, `[B, T, d]`.
            temb: Modulation input of this step, `[B, *modulation_shape]`.
            positions: As `positions` returned them.
            which: Those that run, of all in order.

        Returns:
            Image tokens and text tokens, of the same shapes.
        """

    def modulate_input(self, transformer: nn.Module, hidden: Tensor, temb: Tensor) -> Tensor:
        """The first block's modulated norm of embedded tokens, by whose change TeaCache goes.

        Of a family that is not `time_driven`.

        Args:
            transformer: The model.
            hidden: Image tokens, `[B, n, d]`.
            temb: Modulation input of this step, `[B, *modulation_shape]`.

        Returns:
            `[B, n, d]`.
        """
        raise NotImplementedError

    def time_signal(self, transformer: nn.Module, timesteps: Tensor, *, projected: bool) -> Tensor:
        """What TeaCache goes by in a family that is `time_driven`.

        Args:
            transformer: The model.
            timesteps: Noise levels t in [0, 1], `[N]`, float32.
            projected: Whether the projected time embedding is meant, not the embedding itself.

        Returns:
            `[N, m]`, float32.
        """
        raise NotImplementedError

    @abstractmethod
    def modulate_output(self, transformer: nn.Module, hidden: Tensor, temb: Tensor) -> Tensor:
        """The final modulated norm, before the de-embedding: `[B, n, d]`."""

    def project_output(self, transformer: nn.Module, hidden: Tensor) -> Tensor:
        """The model's own de-embedding: `[B, n, d]` to `[B, n, C*p*p]`.

        Features are ordered as `channels_last` says.
        """
        tokens: Tensor = self.embedding_layers(transformer)[1](hidden)
        return tokens

    def first_weight(self, transformer: nn.Module) -> Tensor:
        """See `Family.first_weight`: the patch embedding's."""
        return self.embedding_layers(transformer)[0].weight

    @abstractmethod
    def embedding_layers(self, transformer: nn.Module) -> tuple[nn.Linear | nn.Conv3d, nn.Linear]:
        """The patch embedding and de-embedding, from which adapters are initialised."""

    def prompt_names(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family.prompt_names`: none, as its layers take nothing else."""
        return ()

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`. The positions are those of `shape`, as the pipeline's."""
        names = ("hidden_states", "timestep", *self.prompt)
        given = model_arguments(arguments, names, self.sized)
        check_shape("hidden_states", given["hidden_states"], self.given_latents(shape))
        return super().read_model_call(transformer, shape, given)

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Clean latents of images, scaled as the model takes them.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            pixels: `[B, 3, height, width]`, in [-1, 1].

        Returns:
            `[B, C, H, W]`, float32.

        Raises:
            UnsupportedModelError: This version trains no adapters for the model.
        """
        raise UnsupportedModelError(
            f"this version trains no adapters for {self.transformer_class}; leave training out: "
            "coarse steps need none"
        )


def layered(family: Family, what: str) -> LayeredFamily:
    """A family as one that tells its layers.

    Args:
        family: The family.
        what: What needs them, for the message.

    Raises:
        UnsupportedModelError: It does not tell them.
    """
    if not isinstance(family, LayeredFamily):
        raise UnsupportedModelError(
            f"{what} for {family.transformer_class}, whose family does not tell its layers; leave "
            "it out for this model"
        )
    return family
