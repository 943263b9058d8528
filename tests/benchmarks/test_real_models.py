from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def models() -> Any:
    return import_module("real_models")


def test_flux_dev_preset_is_the_published_configuration(models: Any) -> None:
    from diffusers import FluxTransformer2DModel

    preset = models.Flux.presets["flux-dev"]
    with torch.device("meta"):
        model = FluxTransformer2DModel(**preset.config)
    # The parameter count of the published safetensors files.
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
    assert preset.text_tokens == 512


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


def test_published_config_is_that_of_the_1_3b_model() -> None:
    """Parameters of Wan 2.1 T2V 1.3B, counted without memory."""
    from diffusers import WanTransformer3DModel

    preset = import_module("real_models").Wan.presets["wan-1.3b"]
    with torch.device("meta"):
        model = WanTransformer3DModel(**preset.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_418_996_800
