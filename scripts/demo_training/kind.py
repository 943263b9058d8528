"""What the models have to say for the recipe that trains any of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import T5TokenizerFast

if TYPE_CHECKING:
    from demo_training.image import ImageKind
    from demo_training.video import VideoKind

Kind: TypeAlias = "ImageKind | VideoKind"
"""One of the models; `ImageKind` tells what each attribute and method is."""

Size = tuple[int, int]
"""Height and width in px."""

MAX_SEQUENCE_LENGTH = 16
WIDTH = 64
"""Of the text encoders."""


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


def t5_encoder(
    words: Sequence[str], config: Any, model: Any, read: Callable[[Any, Tensor], Tensor]
) -> TextEncoder:
    """An untrained T5 or UMT5 of two layers; its pieces are the words, then ASCII characters.

    Args:
        words: Of the captions.
        config: Class of the configuration.
        model: Class of the encoder.
        read: See `TextEncoder`.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in dict.fromkeys(words)]
    pieces += [(chr(code), -10.0) for code in range(33, 127)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    own = config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return TextEncoder(tokenizer=tokenizer, model=model(own), length=MAX_SEQUENCE_LENGTH, read=read)


def reduce(x: Tensor, factor: int) -> Tensor:
    """Means over `factor` x `factor` of every image or frame ``[..., H, W]``."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    small = torch.nn.functional.avg_pool2d(flat, factor)
    return small.reshape(*x.shape[:-2], *small.shape[-2:])
