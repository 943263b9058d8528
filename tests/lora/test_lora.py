"""LoRA files, taken in as diffusers does, beside others, and taken out without a trace."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from lora_files import (
    CALL,
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
from models import latents_of, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lora import terms


@pytest.mark.parametrize(
    "parts",
    [(style,), (words,), (norms,), (style, words, norms)],
    ids=lambda parts: "+".join(part.__name__ for part in parts),
)
def test_every_part_acts_as_in_diffusers_and_leaves_no_trace(
    pipe: FluxPipeline, parts: tuple[Callable[[FluxPipeline], State], ...]
) -> None:
    lora = {key: value for part in parts for key, value in part(pipe).items()}
    other = speaking_pipeline()
    other.load_lora_weights(dict(lora))
    expected = latents_of(other(**CALL, generator=seeded()))
    engine = eager(pipe)
    plain = run(engine)
    before = everything(pipe)
    random = torch.get_rng_state()
    engine.load_lora(lora)
    if words not in parts:
        assert torch.equal(torch.get_rng_state(), random)
    fused = run(engine)
    # fp32, latents of order 4: fused weights round once where PEFT's layers round per call.
    torch.testing.assert_close(fused, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(fused, plain, atol=1e-3)
    engine.unload_loras()
    check_unchanged(pipe, before)
    assert torch.equal(run(engine), plain)


def with_alphas(pipeline: FluxPipeline, part: Callable[[FluxPipeline], State] = style) -> State:
    state = part(pipeline)
    names = {name.rsplit(".lora_", 1)[0] for name in state}
    return state | {f"{name}.alpha": torch.tensor(2.0) for name in names}


def old_names(pipeline: FluxPipeline) -> State:
    state = style(pipeline)
    renamed = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    for new, old in renamed.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


def flat_text_names(state: State) -> State:
    return {
        name.replace("encoder.encoder", "encoder.text_model.encoder"): state[name] for name in state
    }


def with_biases(pipeline: FluxPipeline) -> State:
    state = style(pipeline)
    ups = {name: value for name, value in state.items() if "lora_B" in name}
    biases = {name.replace("lora_B.weight", "lora_B.bias"): one[:, 0] for name, one in ups.items()}
    return state | biases


def with_magnitudes(pipeline: FluxPipeline) -> State:
    """DoRA as PEFT writes it, which diffusers takes."""
    state = style(pipeline)
    ups = {name: value for name, value in state.items() if "lora_B" in name}
    return state | {
        name.replace("lora_B.weight", "lora_magnitude_vector"): one[:, 0].abs() + 1
        for name, one in ups.items()
    }


@pytest.mark.parametrize(
    "make",
    [
        kohya,
        with_alphas,
        lambda pipeline: with_alphas(pipeline, words),
        with_biases,
        with_magnitudes,
        old_names,
        lambda pipeline: flat_text_names(words(pipeline)),
        lambda pipeline: flat_text_names(with_alphas(pipeline, words)),
    ],
)
def test_formats_act_as_in_diffusers(
    pipe: FluxPipeline, make: Callable[[FluxPipeline], State], tmp_path: Path
) -> None:
    lora = make(pipe)
    other = speaking_pipeline()
    plain = latents_of(other(**CALL, generator=seeded()))
    other.load_lora_weights(dict(lora))
    expected = latents_of(other(**CALL, generator=seeded()))
    assert not torch.allclose(expected, plain, atol=1e-3)
    file = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in lora.items()}, file)
    engine = eager(pipe)
    names = set(lora)
    before = everything(pipe)
    for source in (lora, file):
        engine.load_lora(source)
        torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)
        engine.unload_loras()
        check_unchanged(pipe, before)
    assert set(lora) == names  # diffusers takes alphas out of the caller's own


def test_the_configuration_in_a_files_header_counts(pipe: FluxPipeline, tmp_path: Path) -> None:
    """PEFT's alpha stands there, and only there."""
    other = speaking_pipeline()
    other.load_lora_weights(style(pipe), adapter_name="style")
    other.transformer.peft_config["style"].lora_alpha = 1
    other.transformer.save_lora_adapter(tmp_path, adapter_name="style")
    saved = next(tmp_path.glob("*.safetensors"))
    with safe_open(saved, "pt") as file:
        entries = {f"transformer.{name}": file.get_tensor(name) for name in list(file.keys())}
        config = file.metadata()["lora_adapter_metadata"]
    header = {f"transformer.{key}": value for key, value in json.loads(config).items()}
    whole = tmp_path / "whole.safetensors"
    save_file(entries, whole, metadata={"lora_adapter_metadata": json.dumps(header)})
    reference = speaking_pipeline()
    reference.load_lora_weights(str(whole))
    expected = latents_of(reference(**CALL, generator=seeded()))
    engine = eager(pipe)
    engine.load_lora(str(tmp_path), weight_name=whole.name)
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)


def test_the_users_lora_elsewhere_stays(pipe: FluxPipeline) -> None:
    other, theirs = speaking_pipeline(), words(pipe)
    for one in (other, pipe):
        one.load_lora_weights(dict(theirs), adapter_name="words")
    other.load_lora_weights(style(pipe), adapter_name="style")
    expected = latents_of(other(**CALL, generator=seeded()))
    engine = eager(pipe)
    before = everything(pipe)
    engine.load_lora(style(pipe))
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)
    assert pipe.get_list_adapters() == {"text_encoder": ["words"]}
    engine.unload_loras()
    check_unchanged(pipe, before)


def test_words_beside_the_users_words_are_refused(pipe: FluxPipeline) -> None:
    theirs = words(pipe)
    pipe.load_lora_weights(dict(theirs), adapter_name="words")
    engine = eager(pipe)
    before = everything(pipe)
    with pytest.raises(UnsupportedModelError, match="text_encoder has LoRA layers already"):
        engine.load_lora(style(pipe) | theirs)
    check_unchanged(pipe, before)


def test_a_lora_that_the_pipeline_has_fused_is_kept_apart(pipe: FluxPipeline) -> None:
    ours = style(pipe)
    pipe.load_lora_weights(dict(ours), adapter_name="theirs")
    pipe.fuse_lora(components=["transformer"])
    engine = eager(pipe)
    own = run(engine)
    with pytest.raises(UnsupportedModelError, match="transformer has LoRA layers already"):
        engine.load_lora(ours)
    pipe.unload_lora_weights()
    engine.load_lora(words(pipe))
    engine.unload_loras()
    assert torch.equal(run(engine), own)


@pytest.mark.parametrize(
    ("place", "error"),
    [("load", RuntimeError), ("load words", KeyboardInterrupt), ("add", KeyboardInterrupt)],
)
def test_an_error_midway_leaves_everything_as_it_was(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    own, calls = terms.Product.add_to, []

    def add_to(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise error
        own(*args)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    engine = eager(pipe)
    plain = run(engine)
    before = everything(pipe)
    lora = {**style(pipe), **words(pipe), **norms(pipe)}
    with monkeypatch.context() as patch:
        if place == "add":
            patch.setattr(terms.Product, "add_to", add_to)
        elif place == "load words":
            patch.setattr(type(pipe), "load_lora_into_text_encoder", fail)
        else:
            patch.setattr("diffusers.loaders.peft.set_peft_model_state_dict", fail, raising=False)
            patch.setattr("peft.set_peft_model_state_dict", fail)
        with pytest.raises(error):
            engine.load_lora(lora)
    check_unchanged(pipe, before)
    assert torch.equal(run(engine), plain)
    engine.load_lora(lora)
    engine.unload_loras()
    check_unchanged(pipe, before)


def test_two_engines_of_one_pipeline_take_turns(pipe: FluxPipeline) -> None:
    first, second = eager(pipe), eager(pipe)
    before = everything(pipe)
    first.load_lora(style(pipe) | words(pipe))
    fused = run(first)
    for lora in (style(pipe), words(pipe)):
        with pytest.raises(ValueError, match=r"LoRAs of another engine act.*unload_loras\(\)"):
            second.load_lora(lora)
    second.unload_loras()
    assert torch.equal(run(second), fused)
    first.unload_loras()
    check_unchanged(pipe, before)
    second.load_lora(words(pipe))
    second.unload_loras()
    check_unchanged(pipe, before)


def test_pipelines_of_one_transformer_take_turns(pipe: FluxPipeline) -> None:
    first, second = eager(pipe), eager(FluxPipeline(**pipe.components))
    first.load_lora(style(pipe))
    with pytest.raises(ValueError, match="LoRAs of another engine act"):
        second.load_lora(style(pipe))


def test_autocast_takes_no_precision_from_the_weights(pipe: FluxPipeline) -> None:
    other = speaking_pipeline()
    eager(other).load_lora(style(other) | words(other))
    engine = eager(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.load_lora(style(pipe) | words(pipe))
    for name in ("transformer", "text_encoder"):
        ours, theirs = getattr(pipe, name).parameters(), getattr(other, name).parameters()
        assert all(torch.equal(one, same) for one, same in zip(ours, theirs, strict=True))


def test_an_engine_that_is_gone_holds_nobody_up(pipe: FluxPipeline) -> None:
    first = eager(pipe)
    first.load_lora(style(pipe))
    del first
    gc.collect()
    engine = eager(pipe)
    before = everything(pipe)
    engine.load_lora(style(pipe))
    engine.unload_loras()
    check_unchanged(pipe, before)


def test_the_pipelines_own_lora_comes_out_first(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    before = everything(pipe)
    engine.load_lora(style(pipe))
    pipe.load_lora_weights(style(pipe), adapter_name="theirs")
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match=r"'theirs'.*pipeline\.unfuse_lora\(\) first"):
        engine.unload_loras()
    pipe.unfuse_lora(components=["transformer"])
    engine.unload_loras()
    pipe.unload_lora_weights()
    for key, value in everything(pipe).items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[key]), key


def test_weights_are_changed_where_they_lie(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    at = {name: one.data_ptr() for name, one in pipe.transformer.named_parameters()}
    engine.load_lora(style(pipe) | norms(pipe))
    assert {name: one.data_ptr() for name, one in pipe.transformer.named_parameters()} == at


def test_training_flags_stay(pipe: FluxPipeline) -> None:
    pipe.transformer.requires_grad_(True)
    pipe.text_encoder.requires_grad_(True).train()
    engine = eager(pipe)
    before = everything(pipe)
    engine.load_lora(style(pipe) | words(pipe) | norms(pipe))
    engine.unload_loras()
    check_unchanged(pipe, before)


def test_a_bare_transformer_takes_none(pipe: FluxPipeline) -> None:
    with pytest.raises(UnsupportedModelError, match="bare transformer"):
        eager(pipe.transformer).load_lora(style(pipe))
