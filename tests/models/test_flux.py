"""The FLUX family against diffusers' own forward pass and helpers."""

import pytest
import torch
from diffusers import FluxPipeline
from family_suite import assert_same_times
from models import noise, tiny_conditioning, tiny_embeds, tiny_pipeline, tiny_transformer

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import family_named, family_of
from ddit_rt.models.base import Grid
from ddit_rt.models.flux import FluxFamily
from ddit_rt.steps import Detail, FineBucket, Pass, RunContext, SnrBucket, StepModel

FLUX = FluxFamily()


def eager_runners(transformer):
    """The blocks as they are, behind the runners' calling convention."""
    return {
        block_type.path: [
            (lambda *tensors, b=block, f=block_type.forward: f(b, *tensors))
            for block in block_type.blocks(transformer)
        ]
        for block_type in FLUX.block_types(transformer)
    }


@pytest.mark.parametrize(
    ("guidance_embeds", "height", "width", "batch"), [(False, 8, 8, 1), (True, 6, 10, 3)]
)
def test_fine_bucket_equals_the_model(guidance_embeds, height, width, batch):
    transformer = tiny_transformer(guidance_embeds=guidance_embeds)
    conditioning = tiny_conditioning(transformer, batch)
    latents = noise(batch, 4, height, width)
    model = StepModel(family=FLUX, transformer=transformer, base=eager_runners(transformer))
    timesteps = torch.tensor([1.0, 0.37])
    context = RunContext(
        passes=(Pass.of(model, conditioning),),
        height=height,
        width=width,
        sigmas=timesteps,
        timesteps=timesteps,
        detail=None,
    )
    bucket = FineBucket(model, context)
    packed = FluxPipeline._pack_latents(latents, batch, 4, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(
        batch, height // 2, width // 2, torch.device("cpu"), torch.float32
    )
    expected = transformer(
        hidden_states=packed,
        timestep=timesteps[1].expand(batch),
        img_ids=ids,
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
        **conditioning,
    )[0]
    expected = FluxPipeline._unpack_latents(expected, 4 * height, 4 * width, 4)
    # The time embedding of all steps is one matrix product here, so rounding may differ.
    torch.testing.assert_close(
        bucket.velocity(latents, torch.tensor([1])), expected, rtol=1e-5, atol=1e-6
    )
    assert bucket.tokens == height * width // 4


def test_first_coarse_step_after_a_fine_one_agrees_with_it():
    """Nothing has changed since, so whatever the small picture says is a disagreement."""
    transformer = tiny_transformer()
    conditioning = tiny_conditioning(transformer)
    sigmas = torch.tensor([0.9, 0.8, 0.7])
    detail = Detail((1, 4, 16, 16), torch.device("cpu"))
    model = StepModel(family=FLUX, transformer=transformer, base=eager_runners(transformer))
    context = RunContext(
        passes=(Pass.of(model, conditioning),),
        height=16,
        width=16,
        sigmas=sigmas,
        timesteps=sigmas,
        detail=detail,
    )
    coarse, latents = SnrBucket(model, context, 2), noise(1, 4, 16, 16)
    before = coarse.velocity(latents, torch.tensor([0]))
    detail.update(
        latents, FineBucket(model, context).velocity(latents, torch.tensor([0])), sigmas[0]
    )
    estimate = detail.estimate.clone()
    actual = coarse.velocity(latents, torch.tensor([1]))
    torch.testing.assert_close(actual, (latents - estimate) / 0.8, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, actual, atol=1e-2)
    # The disagreement fades: the next step moves away from the estimate.
    later = latents - 0.7 * coarse.velocity(latents, torch.tensor([2]))
    assert not torch.allclose(later, estimate, atol=1e-4)


def test_positions_stretch_to_patch_centres():
    transformer = tiny_transformer()
    fine = FLUX.positions(transformer, Grid(height=4, width=4), 0)
    coarse = FLUX.positions(transformer, Grid(height=2, width=2), 0, stretch=2)
    row, column = torch.tensor([0.5, 0.5, 2.5, 2.5]), torch.tensor([0.5, 2.5, 0.5, 2.5])
    ids = torch.stack([torch.zeros(4), row, column], dim=1)
    for ours, expected in zip(coarse, transformer.pos_embed(ids), strict=True):
        torch.testing.assert_close(ours, expected)
    assert fine[0].shape == (16, 16)


def test_unknown_transformer_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="Linear.*FluxTransformer2DModel"):
        family_of(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match="'sdxl'"):
        family_named("sdxl")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pooled_projections": None}, ValueError, "`pooled_projections` is missing"),
        ({"pooled_projections": torch.zeros(1, 3)}, ShapeError, r"\[1, 3\]; expected \[1, 20\]"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 24)}, ShapeError, "text tokens"),
        ({"guidance": torch.ones(1)}, ValueError, "guidance_embeds=False"),
        ({"colour": torch.ones(1)}, ValueError, r"unknown conditioning \['colour'\]"),
    ],
)
def test_bad_conditioning_is_named(change, error, message):
    transformer = tiny_transformer()
    conditioning = {**tiny_conditioning(transformer), **change}
    with pytest.raises(error, match=message):
        FLUX.check_conditioning(transformer, 1, conditioning)


def test_missing_guidance_is_named():
    transformer = tiny_transformer(guidance_embeds=True)
    conditioning = {**tiny_conditioning(transformer), "guidance": None}
    with pytest.raises(ValueError, match=r"`guidance` is missing.*\[1\]"):
        FLUX.check_conditioning(transformer, 1, conditioning)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_in_half_precision_the_model_sees_the_pipelines_times(guidance_embeds):
    call = {"height": 64, "width": 64, "output_type": "latent", **tiny_embeds()}
    assert_same_times(tiny_pipeline(guidance_embeds=guidance_embeds), call)
