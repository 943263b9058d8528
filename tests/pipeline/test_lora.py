"""LoRA files: taken in whole, as diffusers does, or refused before anything changes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from models import latents_of, noise, seeded, tiny_pipeline
from safetensors import safe_open
from safetensors.torch import save_file
from text_encoders import clip_model, clip_words, t5_model, t5_words
from torch import Tensor, nn
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import FinePolicy
from ddit_rt.errors import UnsupportedModelError

CALL = {
    "prompt": "a fox",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "max_sequence_length": 16,
    "output_type": "latent",
}
State = dict[str, Tensor]


@pytest.fixture
def pipe() -> FluxPipeline:
    return speaking_pipeline()


def speaking_pipeline() -> FluxPipeline:
    """One that takes prompts; always of the same weights."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    clip, t5 = clip_words(), t5_words()
    pipeline.register_modules(
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=clip_model(clip),
        text_encoder_2=t5_model(len(t5)),
    )
    return pipeline


def eager(pipeline: Any) -> ddit_rt.Engine:
    return ddit_rt.compile(pipeline, backend="eager", progress=False)


def run(engine: ddit_rt.Engine) -> Tensor:
    return latents_of(engine(**CALL, generator=seeded(), patch_policy=FinePolicy()))


def factors(prefix: str, model: nn.Module, *ends: str, rank: int = 4, scale: float = 0.3) -> State:
    """A LoRA for the layers whose names end so."""
    state: State = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(ends):
            down, up = noise(rank, module.in_features), noise(module.out_features, rank, seed=1)
            state[f"{prefix}.{name}.lora_A.weight"] = down * scale
            state[f"{prefix}.{name}.lora_B.weight"] = up * scale
    return state


def style(pipeline: FluxPipeline) -> State:
    return factors("transformer", pipeline.transformer, "attn.to_q", "proj_mlp", "x_embedder")


def words(pipeline: FluxPipeline) -> State:
    return factors("text_encoder", pipeline.text_encoder, "q_proj", "fc1")


def norms(pipeline: FluxPipeline) -> State:
    """As control LoRAs bring them: whole values."""
    own = pipeline.transformer.state_dict()
    names = ("transformer_blocks.0.attn.norm_q", "single_transformer_blocks.1.attn.norm_k")
    return {f"transformer.{name}.weight": own[f"{name}.weight"] + 0.5 for name in names}


def everything(pipeline: Any) -> dict[str, Any]:
    """Values, modules by identity, flags and configuration of all models of a pipeline."""
    found: dict[str, Any] = {}
    for name, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        found |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
        found |= {
            f"{name}.{path} itself": (id(one), one.training, sorted(vars(one)))
            for path, one in model.named_modules()
        }
        found |= {
            f"{name}.{key} at": (one.data_ptr(), one.requires_grad)
            for key, one in model.named_parameters()
        }
        found[f"{name}.config"] = repr(model.config) + repr(vars(model.config))
    return found


def check_unchanged(pipeline: Any, before: Mapping[str, Any]) -> None:
    after = everything(pipeline)
    assert after.keys() == before.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


@pytest.mark.parametrize(
    "parts",
    [(style,), (words,), (style, words), (norms,), (style, norms), (style, words, norms)],
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
    engine.fuse_lora(lora)
    if words not in parts:
        assert torch.equal(torch.get_rng_state(), random)
    fused = run(engine)
    # fp32, latents of order 4: fused weights round once where PEFT's layers round per call.
    torch.testing.assert_close(fused, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(fused, plain, atol=1e-3)
    engine.unfuse_lora()
    check_unchanged(pipe, before)
    assert torch.equal(run(engine), plain)


@pytest.mark.parametrize("scale", [0.5, -1, 0])
def test_a_scale_acts_as_in_diffusers(pipe: FluxPipeline, scale: float) -> None:
    lora = {**style(pipe), **words(pipe)}
    other = speaking_pipeline()
    other.load_lora_weights(dict(lora))
    other.fuse_lora(components=["transformer", "text_encoder"], lora_scale=scale)
    expected = latents_of(other(**CALL, generator=seeded()))
    engine = eager(pipe)
    engine.fuse_lora(lora, scale=scale)
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)


def kohya(pipeline: FluxPipeline) -> State:
    return {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": noise(4, 32) * 0.3,
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": noise(32, 4) * 0.3,
        "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": noise(4, 20) * 0.3,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": noise(32, 4) * 0.3,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0),
    }


def with_alphas(pipeline: FluxPipeline) -> State:
    state = style(pipeline)
    names = {name.rsplit(".lora_", 1)[0] for name in state}
    return state | {f"{name}.alpha": torch.tensor(2.0) for name in names}


def old_names(pipeline: FluxPipeline) -> State:
    state = style(pipeline)
    renamed = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    for new, old in renamed.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


def flat_text_names(pipeline: FluxPipeline) -> State:
    state = words(pipeline)
    return {
        name.replace("encoder.encoder", "encoder.text_model.encoder"): state[name] for name in state
    }


@pytest.mark.parametrize("make", [kohya, with_alphas, old_names, flat_text_names])
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
    for source in (lora, file, str(file)):
        engine.fuse_lora(source)
        torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)
        engine.unfuse_lora()
    engine.fuse_lora(str(tmp_path), weight_name=file.name)
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)
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
    engine.fuse_lora(str(whole))
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)


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
    "nothing": (lambda pipe: {}, "0 entries"),
    "no tensors": (lambda pipe: {"transformer.x_embedder.lora_A.weight": "x"}, "1 of them no tens"),
    "a number": (lambda pipe: 3, "got a int"),
    "gibberish in Kohya's words": (
        lambda pipe: {"lora_unet_gibberish.lora_down.weight": noise(2, 2)},
        "diffusers cannot read",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_place_is_refused_before_anything_changes(
    pipe: FluxPipeline, kind: str
) -> None:
    make, message = REFUSED[kind]
    engine = eager(pipe)
    plain = run(engine)
    before = everything(pipe)
    with pytest.raises((ValueError, TypeError), match=message):
        engine.fuse_lora(make(pipe))
    check_unchanged(pipe, before)
    with pytest.raises(ValueError, match="no LoRA is fused"):
        engine.unfuse_lora()
    assert torch.equal(run(engine), plain)


def test_words_without_a_text_encoder_are_refused(pipe: FluxPipeline) -> None:
    lora = words(pipe)
    pipe.register_modules(text_encoder=None)
    engine = eager(pipe)
    with pytest.raises(UnsupportedModelError, match="layers for a text_encoder.*has none"):
        engine.fuse_lora(lora)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter_name": "mine"}, ValueError, "adapter_name='mine'.*leave it out"),
        ({"hotswap": True}, ValueError, "hotswap=True.*leave it out"),
        ({"strength": 1.0}, ValueError, r"unknown arguments \['strength'\].*weight_name"),
        ({"scale": float("nan")}, ValueError, "scale=nan; expected a finite number"),
        ({"scale": float("inf")}, ValueError, "scale=inf"),
        ({"scale": "1"}, TypeError, "scale='1'; expected a number"),
        ({"scale": True}, TypeError, "scale=True"),
        ({"scale": None}, TypeError, "scale=None"),
        ({"load_into_transformer_2": True}, UnsupportedModelError, "no transformer_2; leave it"),
        ({"load_into_transformer_2": "yes"}, TypeError, "'yes'; expected True or False"),
    ],
)
def test_bad_arguments_are_named(
    pipe: FluxPipeline, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = eager(pipe)
    before = everything(pipe)
    with pytest.raises(error, match=message):
        engine.fuse_lora(style(pipe), **arguments)
    check_unchanged(pipe, before)


def test_the_users_lora_elsewhere_stays(pipe: FluxPipeline) -> None:
    other, theirs = speaking_pipeline(), words(pipe)
    for one in (other, pipe):
        one.load_lora_weights(dict(theirs), adapter_name="words")
    other.load_lora_weights(style(pipe), adapter_name="style")
    expected = latents_of(other(**CALL, generator=seeded()))
    engine = eager(pipe)
    before = everything(pipe)
    engine.fuse_lora(style(pipe))
    torch.testing.assert_close(run(engine), expected, rtol=0, atol=2e-6)
    assert pipe.get_list_adapters() == {"text_encoder": ["words"]}
    engine.unfuse_lora()
    check_unchanged(pipe, before)


def test_words_beside_the_users_words_are_refused(pipe: FluxPipeline) -> None:
    theirs = words(pipe)
    pipe.load_lora_weights(dict(theirs), adapter_name="words")
    engine = eager(pipe)
    before = everything(pipe)
    with pytest.raises(UnsupportedModelError, match="text_encoder has LoRA layers already"):
        engine.fuse_lora(style(pipe) | theirs)
    check_unchanged(pipe, before)


def test_a_lora_that_the_pipeline_has_fused_is_kept_apart(pipe: FluxPipeline) -> None:
    ours = style(pipe)
    pipe.load_lora_weights(dict(ours), adapter_name="theirs")
    pipe.fuse_lora(components=["transformer"])
    engine = eager(pipe)
    own = run(engine)
    with pytest.raises(UnsupportedModelError, match="transformer has LoRA layers already"):
        engine.fuse_lora(ours)
    pipe.unload_lora_weights()
    engine.fuse_lora(words(pipe))
    engine.unfuse_lora()
    assert torch.equal(run(engine), own)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["load", "load words", "merge"])
def test_an_error_midway_leaves_everything_as_it_was(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    from peft.tuners.lora import Linear

    own, calls = Linear.merge, []

    def merge(layer: Any, **arguments: Any) -> None:
        calls.append(layer)
        if len(calls) == 5:
            raise error
        own(layer, **arguments)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    engine = eager(pipe)
    plain = run(engine)
    before = everything(pipe)
    lora = {**style(pipe), **words(pipe), **norms(pipe)}
    with monkeypatch.context() as patch:
        if place == "merge":
            patch.setattr(Linear, "merge", merge)
        elif place == "load words":
            patch.setattr(type(pipe), "load_lora_into_text_encoder", fail)
        else:
            patch.setattr("diffusers.loaders.peft.set_peft_model_state_dict", fail, raising=False)
            patch.setattr("peft.set_peft_model_state_dict", fail)
        with pytest.raises(error):
            engine.fuse_lora(lora)
    check_unchanged(pipe, before)
    assert torch.equal(run(engine), plain)
    engine.fuse_lora(lora)
    engine.unfuse_lora()
    check_unchanged(pipe, before)


def test_two_engines_of_one_pipeline_take_turns(pipe: FluxPipeline) -> None:
    first, second = eager(pipe), eager(pipe)
    before = everything(pipe)
    first.fuse_lora(style(pipe) | words(pipe))
    fused = run(first)
    for lora in (style(pipe), words(pipe)):
        with pytest.raises(ValueError, match="another engine has fused.*unfuse_lora"):
            second.fuse_lora(lora)
    with pytest.raises(ValueError, match="no LoRA is fused"):
        second.unfuse_lora()
    assert torch.equal(run(second), fused)
    first.unfuse_lora()
    check_unchanged(pipe, before)
    second.fuse_lora(words(pipe))
    second.unfuse_lora()
    check_unchanged(pipe, before)


def test_an_engine_that_is_gone_holds_nobody_up(pipe: FluxPipeline) -> None:
    first = eager(pipe)
    first.fuse_lora(style(pipe))
    del first
    gc.collect()
    engine = eager(pipe)
    before = everything(pipe)
    engine.fuse_lora(style(pipe))
    engine.unfuse_lora()
    check_unchanged(pipe, before)


def test_the_pipelines_own_lora_comes_out_first(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    before = everything(pipe)
    engine.fuse_lora(style(pipe))
    pipe.load_lora_weights(style(pipe), adapter_name="theirs")
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match=r"'theirs'.*pipeline\.unfuse_lora\(\) first"):
        engine.unfuse_lora()
    pipe.unfuse_lora(components=["transformer"])
    engine.unfuse_lora()
    pipe.unload_lora_weights()
    check_unchanged_values(pipe, before)


def check_unchanged_values(pipeline: Any, before: Mapping[str, Any]) -> None:
    for key, value in everything(pipeline).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[key]), key


def test_weights_are_changed_where_they_lie(pipe: FluxPipeline) -> None:
    engine = eager(pipe)
    at = {name: one.data_ptr() for name, one in pipe.transformer.named_parameters()}
    engine.fuse_lora(style(pipe) | norms(pipe))
    assert {name: one.data_ptr() for name, one in pipe.transformer.named_parameters()} == at


def test_training_flags_stay(pipe: FluxPipeline) -> None:
    pipe.transformer.requires_grad_(True)
    pipe.text_encoder.requires_grad_(True).train()
    engine = eager(pipe)
    before = everything(pipe)
    engine.fuse_lora(style(pipe) | words(pipe) | norms(pipe))
    engine.unfuse_lora()
    check_unchanged(pipe, before)


def test_weights_in_half_precision_come_back_bit_for_bit(pipe: FluxPipeline) -> None:
    pipe.to(torch.bfloat16)
    engine = eager(pipe)
    before = everything(pipe)
    engine.fuse_lora(style(pipe) | words(pipe) | norms(pipe))
    engine.unfuse_lora()
    check_unchanged(pipe, before)


def test_a_bare_transformer_takes_none(pipe: FluxPipeline) -> None:
    with pytest.raises(UnsupportedModelError, match="bare transformer"):
        eager(pipe.transformer).fuse_lora(style(pipe))


# Wan.

LAYER = "transformer.blocks.0.ffn.net.2"


def wan_lora(seed: int = 0) -> State:
    return {
        f"{LAYER}.lora_A.weight": noise(2, 48, seed=seed),
        f"{LAYER}.lora_B.weight": noise(32, 2, seed=seed + 5),
    }


@pytest.mark.parametrize("second", [False, True])
def test_a_lora_of_one_expert_leaves_the_other_and_no_trace(second: bool) -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    engine = eager(pipeline)
    before = everything(pipeline)
    engine.fuse_lora(wan_lora(), load_into_transformer_2=second)
    changed, other = ("transformer_2", "transformer")[:: 1 if second else -1]
    after = everything(pipeline)
    name = "blocks.0.ffn.net.2.weight"
    assert not torch.equal(after[f"{changed}.{name}"], before[f"{changed}.{name}"])
    assert torch.equal(after[f"{other}.{name}"], before[f"{other}.{name}"])
    engine.unfuse_lora()
    check_unchanged(pipeline, before)


@pytest.mark.parametrize("boundary", [None, 0.875])
def test_an_expert_that_does_not_run_takes_none(boundary: float | None) -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    if boundary is None:
        pipeline.register_to_config(boundary_ratio=None)
        engine = eager(pipeline)
        with pytest.raises(UnsupportedModelError, match="runs no transformer_2"):
            engine.fuse_lora(wan_lora(), load_into_transformer_2=True)
    else:
        engine = eager(wan_pipeline())
        with pytest.raises(UnsupportedModelError, match="runs no transformer_2"):
            engine.fuse_lora(wan_lora(), load_into_transformer_2=True)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": noise(2, 32)}, r"blocks\.9\.attn1"),
        ({"text_encoder.x.lora_A.weight": noise(2, 32)}, r"text_encoder\.x\.lora_A"),
        ({f"{LAYER}.alpha": torch.tensor(2.0)}, r"net\.2\.alpha"),
    ],
    ids=["block", "prefix", "alpha"],
)
def test_wan_files_are_taken_whole_too(second: bool, extra: State, message: str) -> None:
    pipeline = wan_pipeline(boundary_ratio=0.875)
    engine = eager(pipeline)
    before = everything(pipeline)
    with pytest.raises(UnsupportedModelError, match=message):
        engine.fuse_lora(wan_lora() | extra, load_into_transformer_2=second)
    check_unchanged(pipeline, before)


def test_differences_of_norms_are_taken_only_if_they_are_none() -> None:
    """Wan's own format brings them, and diffusers drops them."""
    pipeline = wan_pipeline()
    engine = eager(pipeline)
    lora = {
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": noise(2, 48),
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": noise(32, 2),
        "diffusion_model.blocks.0.ffn.2.diff_b": noise(32),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(32),
    }
    before = everything(pipeline)
    engine.fuse_lora(lora)
    bias = pipeline.transformer.blocks[0].ffn.net[2].bias
    torch.testing.assert_close(bias, before["transformer.blocks.0.ffn.net.2.bias"] + noise(32))
    engine.unfuse_lora()
    check_unchanged(pipeline, before)
    lora["diffusion_model.blocks.0.norm3.diff"] += 0.1
    with pytest.raises(UnsupportedModelError, match=r"leaves out.*norm3\.diff"):
        engine.fuse_lora(lora)
    check_unchanged(pipeline, before)
