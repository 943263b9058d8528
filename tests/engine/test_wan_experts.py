"""Wan 2.2: two experts that take turns in a run, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import FINE, trace_of
from made_once import Packages
from models import eager, noise, seeded
from safetensors.torch import save_file
from wan_models import CALL as WAN
from wan_models import (
    CHANNELS,
    euler,
    unipc,
    wan_conditioning,
    wan_pipeline,
    wan_transformer,
)

import ddit_rt
from ddit_rt import DDiTPolicy, StaticPolicy, TeaCache, TokenRanges
from ddit_rt.engine.memory import memory_of
from ddit_rt.errors import ArtifactMismatchError, ShapeError, UnsupportedModelError

CALL = {
    **WAN,
    "negative_prompt": "a dog",
    "height": 128,
    "width": 64,
    "num_inference_steps": 8,
}
BOUNDARY = 0.875
"""Of Wan 2.2 A14B; with a shift of 3 and 8 steps the first three lie above it."""


@pytest.mark.parametrize(
    ("scheduler", "batched", "scales"),
    [
        (unipc, True, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}),
        (euler, False, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}),
        (unipc, False, {}),
        (euler, True, {"guidance_scale": 1.0}),
    ],
)
def test_all_fine_equals_diffusers(scheduler: Any, batched: bool, scales: dict[str, float]) -> None:
    pipeline = wan_pipeline(scheduler(), boundary_ratio=BOUNDARY)
    engine = eager(pipeline)
    engine.batched_guidance = batched
    expected = pipeline(**CALL, **scales, generator=seeded()).frames
    actual = engine(**CALL, **scales, generator=seeded(), patch_policy=FINE).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert "steps 3 to 7: expert 2" in trace_of(engine).notes


@pytest.mark.parametrize(("boundary", "first"), [(0.0, True), (1.1, False)])
def test_either_expert_may_have_all_steps(boundary: float, first: bool) -> None:
    pipeline = wan_pipeline(boundary_ratio=boundary)
    alone = wan_pipeline(seed=0 if first else 1)
    expected = eager(alone)(**CALL, generator=seeded(), patch_policy=FINE).frames
    actual = eager(pipeline)(**CALL, generator=seeded(), patch_policy=FINE).frames
    assert torch.equal(actual, expected)


@pytest.mark.slow
def test_packages_serve_both_experts(tmp_path: Path, packages: Packages) -> None:
    """They hold no weights, so one per block class is enough; a fused change acts at once."""
    pipeline = wan_pipeline(boundary_ratio=BOUNDARY)
    with packages():
        engine = ddit_rt.compile(pipeline, progress=False)
    engine = ddit_rt.load(engine.save(tmp_path / "wan22.ddit"), pipeline, progress=False)
    assert len(engine.artifact.manifest.packages) == 1
    for _ in range(2):
        expected = pipeline(**CALL, generator=seeded()).frames
        actual = engine(**CALL, generator=seeded(), patch_policy=FINE).frames
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        weight = pipeline.transformer_2.blocks[0].ffn.net[2].weight
        weight.mul_(1.5)
    before = expected
    plan = StaticPolicy(["p", "2p", "4p", "4p", "2p", "p", "2p", "p"])
    expected = eager(pipeline)(**CALL, generator=seeded(), patch_policy=plan).frames
    actual = engine(**CALL, generator=seeded(), patch_policy=plan).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(actual, before, atol=0.01)


def test_moved_weights_of_the_second_expert_are_noticed() -> None:
    pipeline = wan_pipeline(boundary_ratio=BOUNDARY)
    engine = eager(pipeline)
    engine(**CALL, generator=seeded(), patch_policy=FINE)
    block = pipeline.transformer_2.blocks[1]
    block.ffn.net[2].weight = torch.nn.Parameter(
        2 * block.ffn.net[2].weight.detach().clone(), requires_grad=False
    )
    expected = pipeline(**CALL, generator=seeded()).frames
    actual = engine(**CALL, generator=seeded(), patch_policy=FINE).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    pipeline.transformer_2.to("meta")
    with pytest.raises(ArtifactMismatchError, match="is on meta now"):
        engine(**CALL, generator=seeded(), patch_policy=FINE)


def test_a_dynamic_run_starts_every_expert_at_p() -> None:
    engine = eager(wan_pipeline(boundary_ratio=0.5))
    call = {**CALL, "num_inference_steps": 12}
    policy = DDiTPolicy(tau=1e9, refresh=None, fine_tail=0)
    result = engine(**call, generator=seeded(), patch_policy=policy)
    trace = trace_of(engine)
    assert torch.isfinite(result.frames).all()
    (switch,) = [at for at, step in enumerate(trace) if step.reason == "first step of an expert"]
    assert f"steps {switch} to 11: expert 2" in trace.notes
    assert trace.patch_sizes() == ["p"] * 3 + ["4p"] * (switch - 3) + ["p"] + ["4p"] * (11 - switch)


def test_coarse_steps_keep_what_they_know_across_experts() -> None:
    """Two experts of equal weights are one model, whatever the plan."""
    pipeline = wan_pipeline(boundary_ratio=BOUNDARY)
    pipeline.transformer_2.load_state_dict(pipeline.transformer.state_dict())
    plan = StaticPolicy(["p", "2p", "4p", "4p", "2p", "p", "2p", "p"])
    expected = eager(wan_pipeline())(**CALL, generator=seeded(), patch_policy=plan).frames
    actual = eager(pipeline)(**CALL, generator=seeded(), patch_policy=plan).frames
    assert torch.equal(actual, expected)


def test_a_fitted_step_cache_is_refused() -> None:
    engine = eager(wan_pipeline(boundary_ratio=BOUNDARY))
    with pytest.raises(UnsupportedModelError, match="2 experts"):
        engine(**CALL, step_cache=TeaCache(0.1, coefficients=(1.0, 0.0)))


def test_denoise_takes_a_scale_for_each_expert() -> None:
    pipeline, latents = wan_pipeline(boundary_ratio=BOUNDARY), noise(1, CHANNELS, 3, 16, 8)
    engine = eager(pipeline)
    conditioning = wan_conditioning(guidance_scale=4.0)
    conditioning["guidance_scale"] = torch.tensor([4.0, 2.0])
    final = engine.denoise(latents, num_inference_steps=8, patch_policy=FINE, **conditioning)
    expected = pipeline(
        prompt_embeds=conditioning["encoder_hidden_states"],
        negative_prompt_embeds=conditioning["negative_encoder_hidden_states"],
        guidance_scale=4.0,
        guidance_scale_2=2.0,
        latents=latents,
        **{name: CALL[name] for name in ("height", "width", "num_frames", "output_type")},
        num_inference_steps=8,
    ).frames
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)
    single = eager(wan_transformer())
    with pytest.raises(ShapeError, match=r"got 2 guidance scales for 1 model"):
        single.denoise(latents, scheduler=unipc(), **conditioning)


def test_memory_counts_both_experts() -> None:
    engines = [eager(wan_pipeline(boundary_ratio=one)) for one in (None, BOUNDARY)]
    single, double = (
        memory_of(one.artifact, one.pipeline, height=128, width=64) for one in engines
    )
    assert double.weights_bytes == 2 * single.weights_bytes
    assert double.text_bytes == 2 * single.text_bytes
    assert (double.history_bytes, double.detail_bytes) == (
        single.history_bytes,
        single.detail_bytes,
    )


def test_experts_work_with_batches_and_intervals() -> None:
    """Four ways to run a step: either expert, guided or not."""
    pipeline = wan_pipeline(boundary_ratio=BOUNDARY)
    engine = eager(pipeline, ranges=TokenRanges(batch=(1, 4), image=(4, 32760)))
    call = {**CALL, "guidance_interval": (0.25, 0.625), "patch_policy": FINE}
    starts, finals = noise(2, CHANNELS, 3, 16, 8), []
    both = {"prompt": ["a cat", "the sea"], "negative_prompt": ["a dog", "rain"]}
    for batched in (True, False):
        engine.batched_guidance = batched
        finals.append(engine(**{**call, **both, "latents": starts}).frames)
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)
    trace = trace_of(engine)
    assert [note for note in trace.notes if note.startswith("steps")] == [
        "steps 0 to 1: unguided",
        "steps 3 to 4: expert 2",
        "steps 5 to 7: expert 2, unguided",
    ]
    single = {name: texts[1] for name, texts in both.items()}
    alone = engine(**{**call, **single, "latents": starts[1:]}).frames
    torch.testing.assert_close(finals[0][1:], alone, rtol=0, atol=1e-4)


def test_each_expert_takes_a_style_lora(tmp_path: Path) -> None:
    """Fused in place, as diffusers would run them, and taken out bit for bit."""
    pipeline = wan_pipeline(boundary_ratio=BOUNDARY)
    engine = eager(pipeline)
    before = engine(**CALL, generator=seeded(), patch_policy=FINE).frames
    name = "transformer.blocks.0.ffn.net.2"
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.safetensors")
        factors = {"lora_A": noise(2, 48, seed=seed), "lora_B": noise(32, 2, seed=seed + 5)}
        save_file({f"{name}.{key}.weight": value for key, value in factors.items()}, files[-1])
    engine.load_lora(str(files[0]))
    first = engine(**CALL, generator=seeded(), patch_policy=FINE).frames
    engine.load_lora(str(files[1]), load_into_transformer_2=True)
    both = engine(**CALL, generator=seeded(), patch_policy=FINE).frames
    assert not torch.allclose(first, before, atol=0.01)
    assert not torch.allclose(both, first, atol=0.01)
    engine.unload_loras()
    assert torch.equal(engine(**CALL, generator=seeded(), patch_policy=FINE).frames, before)
    pipeline.load_lora_weights(str(files[0]), adapter_name="high")
    pipeline.load_lora_weights(str(files[1]), adapter_name="low", load_into_transformer_2=True)
    expected = pipeline(**CALL, generator=seeded()).frames
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="loaded but not fused"):
        engine(**CALL, generator=seeded(), patch_policy=FINE)
