from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

CPU = torch.device("cpu")


@pytest.fixture
def models() -> Any:
    return import_module("real_models")


@pytest.mark.parametrize(
    ("name", "preset", "kind", "parameters"),
    [
        # As many as in the published safetensors files.
        ("flux", "flux-dev", FluxTransformer2DModel, 11_901_408_320),
        ("wan", "wan-1.3b", WanTransformer3DModel, 1_418_996_800),
    ],
)
def test_full_preset_is_the_published_configuration(
    models: Any, name: str, preset: str, kind: Any, parameters: int
) -> None:
    own = models.MODELS[name].presets[preset]
    with torch.device("meta"):
        model = kind(**own.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert own.text_tokens == 512


def test_random_weights_are_the_same_every_time_and_keep_activations_finite(models: Any) -> None:
    preset = models.Flux.presets["small"]
    first, again = (models.Flux().transformer(preset, CPU, torch.bfloat16) for _ in range(2))
    other = models.Flux().transformer(preset, CPU, torch.bfloat16, seed=1)
    for (name, one), two in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.dtype == torch.bfloat16
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)
    pipeline = models.Flux().pipeline(first)
    case = models.Case(height=128, width=128, batch=1, steps=4)
    latents = pipeline(**models.Flux().request(pipeline, preset, case)).images
    assert torch.isfinite(latents).all()
    # A velocity of about unit scale: latents stay where they were in order of magnitude.
    assert 0.1 < latents.float().std() < 10


def test_pipelines_with_shared_weights_compute_the_same_from_one_copy(models: Any) -> None:
    preset = models.Flux.presets["tiny"]
    pipeline = models.Flux().pipeline(models.Flux().transformer(preset, CPU, torch.float32))
    shared = models.Flux().with_shared_weights(pipeline)
    ours, theirs = pipeline.transformer, shared.transformer
    assert ours is not theirs
    pointers = [{p.data_ptr() for p in model.parameters()} for model in (ours, theirs)]
    assert pointers[0] == pointers[1]
    request = models.Flux().request(
        pipeline, preset, models.Case(height=128, width=128, batch=1, steps=2)
    )
    assert torch.equal(pipeline(**request).images, shared(**request).images)


def test_sample_has_the_same_request_in_every_batch(models: Any) -> None:
    preset = models.Flux.presets["tiny"]
    pipeline = models.Flux().pipeline(models.Flux().transformer(preset, CPU, torch.float32))
    single, several = (
        models.Flux().request(
            pipeline, preset, models.Case(height=128, width=64, batch=batch, steps=2)
        )
        for batch in (1, 3)
    )
    for name in ("latents", "prompt_embeds", "pooled_prompt_embeds"):
        assert several[name].shape[0] == 3
        assert torch.equal(single[name], several[name][:1])
        assert not torch.equal(several[name][0], several[name][1])
