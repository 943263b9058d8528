"""Text encoders and tokenizers for the small pipeline, so that it can be called with a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, tiny_pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

_T5 = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def save_tiny(folder: Path, seed: int) -> Path:
    """`tiny_pipeline(seed)` with text encoders, as `save_pretrained` writes it."""
    pipeline = tiny_pipeline(seed=seed)
    assert pipeline.transformer.config.in_channels == CHANNELS * 4
    add_text_encoders(pipeline).save_pretrained(folder)
    return folder


def add_text_encoders(pipeline: Any) -> Any:
    """Gives a FLUX pipeline what its prompts need."""
    clip_tokenizer, t5_tokenizer = clip_words(), t5_words()
    pipeline.register_modules(
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
        text_encoder=clip_model(clip_tokenizer),
        text_encoder_2=t5_model(len(t5_tokenizer)),
    )
    return pipeline


def clip_words() -> CLIPTokenizer:
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_words() -> T5TokenizerFast:
    pieces: list[Any] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def t5_model(words: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=words, **_T5)).eval()


def umt5_model(words: int) -> UMT5EncoderModel:
    """Always of the same weights."""
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(vocab_size=words, **_T5)).eval().requires_grad_(False)
