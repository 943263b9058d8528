"""Small random LongCat-AudioDiT models of the real classes, for tests."""

from __future__ import annotations

import random
import warnings
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model
from text_encoders import t5_words, umt5_model

RATE = 800
"""Samples of a second; a latent frame has 8."""


def tiny_transformer(*, seed: int = 0, **config: Any) -> LongCatAudioDiTTransformer:
    """A LongCat transformer of three blocks, random but with every path alive."""
    fields: dict[str, Any] = {
        "dit_dim": 32,
        "dit_depth": 3,
        "dit_heads": 2,
        "dit_text_dim": TEXT_WIDTH,
        "latent_dim": CHANNELS,
    }
    return random_model(LongCatAudioDiTTransformer, {**fields, **config}, seed)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> LongCatAudioDiTPipeline:
    """A LongCat pipeline whose tokenizer knows letters: call it with `tiny_prompts`."""
    transformer = tiny_transformer(seed=seed, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers uses torch's older weight_norm
        vae = LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 2, 2],
            strides=[2, 4],
            latent_dim=CHANNELS,
            encoder_latent_dim=2 * CHANNELS,
            downsampling_ratio=8,
            sample_rate=RATE,
        )
    words = t5_words()
    return pipeline_of(
        LongCatAudioDiTPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        vae=vae.eval().requires_grad_(False),
        text_encoder=umt5_model(len(words)),
        tokenizer=words,
        transformer=transformer,
    )


def tiny_prompts(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, list[str]]:
    """Texts of that many tokens, as a pipeline call takes them."""
    drawn = random.Random(seed)
    return {f"{prefix}prompt": ["".join(drawn.choices("abcdefgh", k=one - 2)) for one in lengths]}
