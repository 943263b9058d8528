"""What the models have to say for the recipe that trains any of them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width in px."""

MAX_SEQUENCE_LENGTH = 16
WIDTH = 64
"""Of the text encoders."""


class Attributes(Protocol):
    """What a caption says."""

    @property
    def caption(self) -> str:
        """The caption."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Class indices, in the order of the kind's `attribute_sizes`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Attributes:
        tokenizer: Of transformers.
        model: The encoder.
        length: Tokens that a caption is padded to.
        read: From the encoder's output and the mask of tokens ``[B, length]``, vectors ``[B, d]``
            from which the attributes can be named.
    """

    tokenizer: Any
    model: torch.nn.Module
    length: int
    read: Callable[[Any, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VaeRecipe:
    """How the autoencoder is trained.

    Attributes:
        counts: Samples that are drawn, by size, the largest first.
        rates: Highest and lowest learning rate, on a cosine.
        weights: Of the terms of the loss; 1 where none is given.
        shown: Samples whose statistics the transformer relies on.
    """

    counts: Mapping[Size, int]
    rates: tuple[float, float]
    weights: Mapping[str, float]
    shown: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of the transformer's training.

    Attributes:
        share: Of the time.
        rates: Learning rate at its beginning and end, on a cosine.
        mixture: Share of the steps by size.
    """

    share: float
    rates: tuple[float, float]
    mixture: Mapping[Size, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerRecipe:
    """How the transformer is trained.

    Attributes:
        counts: Samples that are drawn, by size.
        batches: Samples a step, by size: fewer of the larger ones, so that steps take alike.
        shifts: Of the logit-normal times, by size: later for more tokens.
        phases: One after the other; the last has every size.
        eager: Sizes that are too rare to be worth the minute that compiling for them takes.
        average: Decay of the averaged weights.
        empty: Share of the captions that are left out, which guidance needs.
        reworded: Share of the captions that may be worded otherwise.
        on_gpu: How many times more samples there are on a GPU, in all and a step.
    """

    counts: Mapping[Size, int]
    batches: Mapping[Size, int]
    shifts: Mapping[Size, float]
    phases: tuple[Phase, ...]
    eager: frozenset[Size]
    average: float
    empty: float
    reworded: float = 0.4
    on_gpu: int = 1


class Kind(Protocol):
    """One of the models. Samples are ``[B, 3, H, W]``, of videos ``[B, 3, F, H, W]``.

    Attributes:
        name: As on the command line.
        folder: Where the repository keeps the model.
        stages: In their order.
        minutes: Of training, by stage.
        text_steps: Steps that the text encoders are trained for.
        text_rate: Their highest learning rate.
        attribute_sizes: Number of classes of every attribute.
        attributes: Every combination.
        classifier: Weights of the network that tells them from a sample.
        classifier_steps: Steps that it is trained for.
        phrasings: Ways to word the same attributes.
        vae: See `VaeRecipe`.
        transformer: See `TransformerRecipe`.
        half: Parts of the pipeline that are stored as float16.
        shown: Side of the grids of samples, in px.
        evaluated: Sides that `evaluate` measures, in px.
        batch: Samples that `evaluate` generates at once.
    """

    name: str
    folder: pathlib.Path
    stages: tuple[str, ...]
    minutes: Mapping[str, float]
    text_steps: int
    text_rate: float
    attribute_sizes: Mapping[str, int]
    attributes: Sequence[Any]
    classifier: pathlib.Path
    classifier_steps: int
    phrasings: int
    vae: VaeRecipe
    transformer: TransformerRecipe
    half: tuple[str, ...]
    shown: tuple[int, ...]
    evaluated: tuple[int, ...]
    batch: int

    def series(self, size: Size) -> tuple[Callable[..., Any], Any]:
        """What draws a series of samples, given the configuration, seed, first index and count."""

    def phrase(self, attributes: Any, phrasing: int) -> str:
        """One of the ways (0 is the caption) in which training words the same attributes."""

    def text_encoders(self) -> list[TextEncoder]:
        """Untrained."""

    def build_vae(self, **statistics: Any) -> Any:
        """An untrained autoencoder; the statistics are part of its configuration."""

    def statistics(self, z: Tensor) -> dict[str, Any]:
        """What makes the mean of latents 0 and their deviation 1, as the autoencoder keeps it."""

    def normalise(self, z: Tensor, config: Any) -> Tensor:
        """Latents as the transformer sees them."""

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        """Samples, not clamped: a clamp has no gradient outside [-1, 1]."""

    def colours(self, x: Tensor) -> Tensor:
        """Mean colours ``[B, 3, ...]`` of each latent's pixels."""

    def frames(self, x: Tensor) -> list[Tensor]:
        """Some images ``[B, 3, H, W]`` of samples, for a grid."""

    def vae_batch(
        self, data: Mapping[Size, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Samples in [-1, 1], and the factor between the scales that this step ties together."""

    def build_transformer(self) -> Any:
        """Untrained, every block the identity and the output zero (adaLN-Zero of DiT)."""

    def velocity(self, model: Any, noisy: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The transformer's output for latents at times t in (0, 1), as `layout` lays them out."""

    def layout(self, latents: Tensor) -> Tensor:
        """Latents as the transformer gives its output."""

    def pipeline(self, encoders: Sequence[TextEncoder], vae: Any, transformer: Any) -> Any:
        """A pipeline around trained parts."""

    def embed(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts, exactly as sampling makes them."""

    def sample(
        self, pipeline: Any, prompts: list[str], side: int, steps: int, generator: torch.Generator
    ) -> Tensor:
        """Generated samples in [0, 1], ``[B, 3, H, W]`` or ``[B, F, 3, H, W]``."""

    def expected(self) -> dict[str, list[Any]]:
        """Attributes that `evaluate` asks for: of trained combinations, and of held-out ones."""

    def drawn(self, expected: Sequence[Any]) -> Tensor:
        """Drawn samples of the same attributes, as `sample` gives generated ones."""

    def noise(self, seed: int) -> Callable[[int], torch.Generator]:
        """Of the samples of `evaluate`, by the index of a batch's first one."""

    def hits(self, samples: Tensor, expected: list[Any]) -> dict[str, Tensor]:
        """By attribute ``[B]``, whether a sample of `sample` shows it."""


def build_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Unigram pieces and their scores: the words, then single printable ASCII characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in dict.fromkeys(words)]
    return [*pieces, *((chr(code), -10.0) for code in range(33, 127))]


def reduce(x: Tensor, factor: int) -> Tensor:
    """Means over `factor` x `factor` of every image or frame ``[..., H, W]``."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    small = torch.nn.functional.avg_pool2d(flat, factor)
    return small.reshape(*x.shape[:-2], *small.shape[-2:])
