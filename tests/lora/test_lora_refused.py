"""LoRA files of which a part has no place are refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from lora_files import (
    State,
    check_unchanged,
    eager,
    everything,
    kohya,
    norms,
    run,
    speaking_pipeline,
    style,
    words,
)
from models import noise
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): value for name, value in state.items()}


def without(state: State, part: str) -> State:
    return {name: value for name, value in state.items() if part not in name}


REFUSED: dict[str, tuple[Callable[[FluxPipeline], Any], str]] = {
    "wider input": (
        lambda pipe: {
            "transformer.x_embedder.lora_A.weight": noise(4, 32),
            "transformer.x_embedder.lora_B.weight": noise(32, 4),
        },
        r"x_embedder of \[32, 32\].*has \[32, 16\].*control LoRA",
    ),
    "wider input, with norms": (
        lambda pipe: {
            **norms(pipe),
            "transformer.x_embedder.lora_A.weight": noise(4, 32),
            "transformer.x_embedder.lora_B.weight": noise(32, 4),
        },
        "control LoRA",
    ),
    "narrower input": (
        lambda pipe: {
            "transformer.x_embedder.lora_A.weight": noise(4, 8),
            "transformer.x_embedder.lora_B.weight": noise(32, 4),
        },
        r"x_embedder of \[32, 8\]",
    ),
    "ranks that differ": (
        lambda pipe: {
            "transformer.x_embedder.lora_A.weight": noise(4, 16),
            "transformer.x_embedder.lora_B.weight": noise(32, 2),
        },
        "rank 4 or 2",
    ),
    "blocks that are not there": (
        lambda pipe: renamed(style(pipe), "transformer_blocks.0.attn", "transformer_blocks.7.attn"),
        r"4 of 12 entries .*transformer_blocks\.7\.attn\.to_q\.lora_A\.weight",
    ),
    "another model's prefix": (
        lambda pipe: renamed(style(pipe), "transformer.", "unet."),
        r"12 of 12 entries .*unet\.",
    ),
    "a part for T5": (
        lambda pipe: style(pipe) | renamed(words(pipe), "text_encoder.", "text_encoder_2."),
        r"4 of 16 entries .*text_encoder_2\.",
    ),
    "half a layer": (
        lambda pipe: without(style(pipe), "x_embedder.lora_B"),
        r"transformer\.x_embedder\.lora_A\.weight",
    ),
    "a whole weight": (
        lambda pipe: style(pipe) | {"transformer.proj_out.weight": noise(16, 32)},
        r"1 of 13 entries .*transformer\.proj_out\.weight",
    ),
    "a norm of another size": (
        lambda pipe: (
            style(pipe) | {"transformer.transformer_blocks.0.attn.norm_q.weight": noise(8)}
        ),
        r"norm_q\.weight",
    ),
    "a layer of another kind": (
        lambda pipe: renamed(style(pipe), "x_embedder", "norm_out.norm"),
        r"norm_out\.norm\.lora_A",
    ),
    "an alpha without its layer": (
        lambda pipe: style(pipe) | {"transformer.proj_out.alpha": torch.tensor(1.0)},
        r"proj_out\.alpha",
    ),
    "an alpha for words without words": (
        lambda pipe: style(pipe) | {"text_encoder.encoder.layers.0.mlp.fc1.alpha": torch.ones(())},
        r"fc1\.alpha",
    ),
    "an alpha of another model": (
        lambda pipe: style(pipe) | {"unet.x.alpha": torch.ones(())},
        r"unet\.x\.alpha",
    ),
    "words that are not there": (
        lambda pipe: renamed(words(pipe), "layers.0", "layers.5"),
        r"text_encoder\.encoder\.layers\.5",
    ),
    "Kohya's second text encoder": (
        lambda pipe: kohya(pipe) | renamed(without(kohya(pipe), "unet"), "lora_te1_", "lora_te2_"),
        "lora_te2_.*diffusers leaves out|leaves out.*lora_te2_",
    ),
    "Kohya's layers around the blocks": (
        lambda pipe: (
            kohya(pipe)
            | {
                "lora_unet_img_in.lora_down.weight": noise(4, 16),
                "lora_unet_img_in.lora_up.weight": noise(32, 4),
            }
        ),
        "x_embedder",
    ),
    "DoRA": (
        lambda pipe: style(pipe) | {"transformer.x_embedder.dora_scale": noise(32)},
        "leaves out.*DoRA",
    ),
    "values that are not finite": (
        lambda pipe: {name: value / 0 for name, value in style(pipe).items()},
        "not finite",
    ),
    "factors in int8": (
        lambda pipe: {name: value.to(torch.int8) for name, value in style(pipe).items()},
        r"lora_A\.weight is torch.int8; expected",
    ),
    "nothing": (lambda pipe: {}, "0 entries"),
    "no tensors": (lambda pipe: {"transformer.x_embedder.lora_A.weight": "x"}, "1 of them no tens"),
    "a number": (lambda pipe: 3, "got a int"),
    "gibberish in Kohya's words": (
        lambda pipe: {"lora_unet_gibberish.lora_down.weight": noise(2, 2)},
        "diffusers cannot read",
    ),
}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, dict[str, Any], Tensor]:
    """An engine, everything of its pipeline, and what it makes: as no refusal may leave it."""
    engine = eager(speaking_pipeline())
    made = run(engine)
    return engine, everything(engine.pipeline), made


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_place_is_refused_before_anything_changes(plain: Any, kind: str) -> None:
    make, message = REFUSED[kind]
    engine, before, made = plain
    with pytest.raises((ValueError, TypeError), match=message):
        engine.load_lora(make(engine.pipeline))
    check_unchanged(engine.pipeline, before)
    assert engine.loras == {}
    assert torch.equal(run(engine), made)


def test_words_without_a_text_encoder_are_refused(pipe: FluxPipeline) -> None:
    lora = words(pipe)
    pipe.register_modules(text_encoder=None)
    engine = eager(pipe)
    with pytest.raises(UnsupportedModelError, match="layers for a text_encoder.*has none"):
        engine.load_lora(lora)


def test_words_for_a_quantised_text_encoder_are_refused(pipe: FluxPipeline) -> None:
    lora = words(pipe)
    pipe.text_encoder.quantization_method = "bitsandbytes"
    with pytest.raises(UnsupportedModelError, match="text_encoder, which is quantised with bits"):
        eager(pipe).load_lora(lora)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter_name": "mine"}, ValueError, "adapter_name='mine'; pass it as name"),
        ({"lora_scale": 0.5}, ValueError, "lora_scale=0.5; pass it as weight"),
        ({"hotswap": True}, ValueError, "hotswap=True.*leave it out"),
        ({"strength": 1.0}, ValueError, r"unknown arguments \['strength'\].*weight_name"),
        ({"weight": float("nan")}, ValueError, "weight=nan; expected a finite number"),
        ({"weight": float("inf")}, ValueError, "weight=inf"),
        ({"weight": "1"}, TypeError, "weight='1'; expected a finite number"),
        ({"weight": True}, TypeError, "weight=True"),
        ({"weight": None}, TypeError, "weight=None"),
        ({"name": ""}, ValueError, "name=''; expected a name"),
        ({"name": 3}, TypeError, "name=3; expected a name"),
        ({"load_into_transformer_2": True}, UnsupportedModelError, "no transformer_2; leave it"),
        ({"load_into_transformer_2": "yes"}, TypeError, "'yes'; expected True or False"),
    ],
)
def test_bad_arguments_are_named(
    plain: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine, before, _ = plain
    with pytest.raises(error, match=message):
        engine.load_lora(style(engine.pipeline), **arguments)
    check_unchanged(engine.pipeline, before)
