"""Several LoRAs at once: they act as in diffusers, add up, and leave no trace of their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import z_image_models
from diffusers import FluxPipeline
from diffusers.utils import peft_utils
from lora_files import (
    CALL,
    State,
    check_unchanged,
    eager,
    everything,
    factors,
    norms,
    run,
    speaking_pipeline,
    style,
    words,
)
from models import latents_of, noise, seeded
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

import ddit_rt
from ddit_rt.lora import terms


def strokes(pipeline: FluxPipeline) -> State:
    """Another rank, on some of the same layers."""
    return factors("transformer", pipeline.transformer, "attn.to_q", "ff.net.2", rank=1)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # of diffusers itself
def test_they_act_together_as_in_diffusers(pipe: FluxPipeline) -> None:
    other, loras = speaking_pipeline(), {"ink": style(pipe) | words(pipe), "strokes": strokes(pipe)}
    for name, lora in loras.items():
        other.load_lora_weights(dict(lora), adapter_name=name)
    engine = eager(pipe)
    before = everything(pipe)
    for name, lora in loras.items():
        assert engine.load_lora(lora, name=name) == name
    for weights in ({"ink": 0.7, "strokes": -0.3}, {"strokes": 1.5, "ink": 1}, {"strokes": 1}):
        other.set_adapters(list(weights), list(weights.values()))
        engine.set_loras(weights)
        assert engine.loras == {"ink": 0.0, "strokes": 0.0} | weights
        expected = latents_of(other(**CALL, generator=seeded()))
        # fp32, latents of order 4: fused weights round once where PEFT's layers round per call.
        torch.testing.assert_close(run(engine), expected, rtol=0, atol=4e-6)
    engine.unload_loras()
    check_unchanged(pipe, before)


def test_only_what_acts_stands_in_the_weights_whatever_came_before(pipe: FluxPipeline) -> None:
    engine, fresh = eager(pipe), eager(speaking_pipeline())
    before, ink = everything(pipe), style(pipe) | norms(pipe)
    engine.load_lora(ink, 0.5, "ink")
    engine.load_lora(strokes(pipe), -2, "strokes")
    engine.set_loras({"strokes": 0.25})
    engine.set_loras({"strokes": 0.25, "ink": 1})
    engine.load_lora(words(pipe), name="words")
    engine.unload_loras("strokes")
    fresh.load_lora(words(pipe))
    fresh.load_lora(ink)
    expected = everything(fresh.pipeline)
    for key, value in everything(pipe).items():
        assert not isinstance(value, Tensor) or torch.equal(value, expected[key]), key
    assert engine.loras == {"ink": 1.0, "words": 1.0}
    engine.set_loras({})
    check_unchanged(pipe, before)


def test_the_base_is_copied_only_while_something_acts(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    engine.load_lora(style(pipe), 0, "ink")
    assert not engine._loras._base
    weight = pipe.transformer.x_embedder.weight
    engine.set_loras({"ink": 1})
    assert len(engine._loras._base) == len(style(pipe)) / 2
    engine.set_loras({})
    assert not engine._loras._base
    weight.add_(1)  # what the caller makes of the model meanwhile is the base
    own = weight.clone()
    engine.set_loras({"ink": 1})
    assert not torch.equal(weight, own)
    engine.unload_loras()
    assert torch.equal(weight, own)


def test_names_are_given_where_none_is(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    assert [engine.load_lora(style(pipe), 0) for _ in range(2)] == ["default_0", "default_1"]
    engine.unload_loras("default_0")
    assert engine.load_lora(words(pipe), 0.5) == "default_0"
    assert engine.loras == {"default_1": 0.0, "default_0": 0.5}
    assert "loras={'default_1': 0.0, 'default_0': 0.5}" in repr(engine)
    engine.unload_loras(["default_0", "default_1"])
    assert engine.loras == {}
    engine.unload_loras()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.load_lora(style(e.pipeline), name="ink"), ValueError, "'ink' is loaded alre"),
        (lambda e: e.set_loras({"ikn": 1}), ValueError, r"no LoRA named 'ikn'.*loaded are \['ink'"),
        (lambda e: e.set_loras({"ink": "1"}), TypeError, r"weights\['ink'\]='1'; expected a finit"),
        (lambda e: e.set_loras({"ink": float("nan")}), ValueError, "=nan; expected a finite"),
        (lambda e: e.set_loras(["ink"]), TypeError, r"weights=\['ink'\]; expected weights by"),
        (lambda e: e.unload_loras("ikn"), ValueError, "no LoRA named 'ikn' is loaded"),
        (lambda e: e.unload_loras(3), TypeError, "names=3; expected a LoRA's name, or several"),
        (lambda e: e.unload_loras([["ink"]]), ValueError, r"no LoRA named \['ink'\] is loaded"),
    ],
)
def test_mistakes_change_nothing(
    pipe: FluxPipeline, call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    engine = eager(pipe)
    engine.load_lora(style(pipe), 0.5, "ink")
    before = everything(pipe)
    with pytest.raises(error, match=message):
        call(engine)
    assert engine.loras == {"ink": 0.5}
    check_unchanged(pipe, before)


@pytest.mark.parametrize(
    ("place", "error"), [(0, RuntimeError), (4, KeyboardInterrupt), (8, RuntimeError)]
)
def test_an_error_midway_of_a_change_leaves_what_acted(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, place: int, error: type[BaseException]
) -> None:
    engine = eager(pipe)
    engine.load_lora(style(pipe), 0.5, "ink")
    engine.load_lora(strokes(pipe), 0, "strokes")
    acting, own, calls = everything(pipe), terms.Product.add_to, []

    def add_to(*args: Any) -> None:
        calls.append(args)
        if len(calls) == place + 1:
            raise error
        own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(terms.Product, "add_to", add_to)
        with pytest.raises(error):
            engine.set_loras({"ink": 1, "strokes": 1})
    assert engine.loras == {"ink": 0.5, "strokes": 0.0}
    check_unchanged(pipe, acting)


def test_a_callback_within_a_run_changes_none(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    engine.load_lora(style(pipe), 0, "ink")

    def switch(*_: Any) -> dict[str, Any]:
        for change in (lambda: engine.set_loras({"ink": 1}), engine.unload_loras):
            with pytest.raises(ValueError, match="a callback called the engine"):
                change()
        return {}

    engine(**CALL, generator=seeded(), callback_on_step_end=switch)
    assert engine.loras == {"ink": 0.0}


def test_factors_in_half_precision_are_multiplied_in_float32(pipe: FluxPipeline) -> None:
    pipe.to(torch.bfloat16)
    engine, half = eager(pipe), {name: one.bfloat16() for name, one in style(pipe).items()}
    layer = "transformer_blocks.0.attn.to_q"
    weight = pipe.transformer.get_submodule(layer).weight
    up, down = (half[f"transformer.{layer}.lora_{side}.weight"].double() for side in "BA")
    exact = weight.double() + 0.6 * (up @ down)
    engine.load_lora(half, 0.6)
    # Half a unit in the last place of bfloat16, and what float32 may add to it.
    error = (weight.double() - exact).abs()
    assert bool((error <= 2**-8 * exact.abs() + 1e-6).all())


def kronecker(*, decomposed: bool) -> State:
    """LoKr for two layers of Z-Image, 32 x 32, as `left [4, 4]` and `right [8, 8]`."""
    state: State = {}
    for seed, layer in enumerate(("layers.0.attention.to_q", "layers.2.attention.to_out.0")):
        state[f"{layer}.lokr_w1"] = noise(4, 4, seed=seed) * 0.3
        if decomposed:
            state[f"{layer}.lokr_w2_a"] = noise(8, 2, seed=seed + 5) * 0.3
            state[f"{layer}.lokr_w2_b"] = noise(2, 8, seed=seed + 9) * 0.3
            state[f"{layer}.alpha"] = torch.tensor(1.0)
        else:
            state[f"{layer}.lokr_w2"] = noise(8, 8, seed=seed + 5) * 0.3
    return {f"diffusion_model.{name}": one for name, one in state.items()}


@pytest.mark.parametrize("decomposed", [False, True])
def test_lokr_acts_as_in_diffusers(decomposed: bool, tmp_path: Path) -> None:
    if not hasattr(peft_utils, "_create_lokr_config"):
        pytest.skip("this diffusers loads no LoKr")
    lora, pipeline = kronecker(decomposed=decomposed), z_image_models.tiny_pipeline()
    file = tmp_path / "lokr.safetensors"
    save_file(lora, file)
    engine = eager(pipeline)
    before = everything(pipeline)
    call = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "output_type": "latent",
        "guidance_scale": 0.0,
        **z_image_models.tiny_embeds(),
    }
    plain = latents_of(engine(**call, generator=seeded(), patch_policy=ddit_rt.FinePolicy()))
    engine.load_lora(str(file))
    ours = latents_of(engine(**call, generator=seeded(), patch_policy=ddit_rt.FinePolicy()))
    assert float((ours - plain).abs().max()) > 1e-3
    engine.unload_loras()
    check_unchanged(pipeline, before)
    pipeline.load_lora_weights(str(file))
    theirs = latents_of(pipeline(**call, generator=seeded()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lora: {k: v for k, v in lora.items() if "0.attention.to_q.lokr_w1" not in k}, "w2"),
        (lambda lora: {k.replace("layers.2", "layers.7"): v for k, v in lora.items()}, "layers.7"),
        (
            lambda lora: {k: v[:, :7] if k.endswith("w2") else v for k, v in lora.items()},
            r"of \[32, 28\]",
        ),
    ],
)
def test_lokr_that_has_no_place_is_refused(change: Callable[[State], State], message: str) -> None:
    pipeline = z_image_models.tiny_pipeline()
    engine = eager(pipeline)
    before = everything(pipeline)
    # Before 0.42 diffusers itself refuses such a file.
    refused = (ddit_rt.UnsupportedModelError, message)
    if Version(diffusers.__version__) < Version("0.42"):
        refused = (ValueError, "diffusers cannot read this LoRA")
    with pytest.raises(refused[0], match=refused[1]):
        engine.load_lora(change(kronecker(decomposed=False)))
    check_unchanged(pipeline, before)
