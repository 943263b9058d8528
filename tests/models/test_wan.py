"""The Wan family against diffusers' own forward pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from family_suite import assert_same_times
from models import noise
from wan_models import (
    CHANNELS,
    TEXT_TOKENS,
    euler,
    heun,
    unipc,
    wan_conditioning,
    wan_pipeline,
    wan_transformer,
)

import ddit_rt
from ddit_rt import ops
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import family_of
from ddit_rt.models.base import Grid
from ddit_rt.models.layered import ALL_BLOCKS
from ddit_rt.models.wan import WanFamily
from ddit_rt.steps import Detail, FineBucket, Pass, RunContext, SnrBucket, StepModel

WAN = WanFamily()


def step_model(transformer: WanTransformer3DModel) -> StepModel:
    """The blocks as they are, behind the runners' calling convention."""
    (block_type,) = WAN.block_types(transformer)
    runners: Any = {
        block_type.path: [
            (lambda *tensors, b=block: block_type.forward(b, *tensors))
            for block in block_type.blocks(transformer)
        ]
    }
    return StepModel(family=WAN, transformer=transformer, base=runners)


def pass_of(transformer: WanTransformer3DModel, batch: int, seeds: tuple[int, ...] = (1,)) -> Pass:
    """A pass with texts of some seeds, one after another in its batch."""
    width = transformer.config.text_dim
    text = torch.cat([noise(batch, TEXT_TOKENS, width, seed=seed) for seed in seeds])
    return Pass.of(step_model(transformer), {"encoder_hidden_states": text})


def context_of(
    transformer: WanTransformer3DModel,
    shape: tuple[int, ...],
    levels: list[float],
    *,
    detail: Detail | None = None,
    passes: tuple[Pass, ...] = (),
    scales: list[float] | None = None,
) -> RunContext:
    return RunContext(
        passes=passes or (pass_of(transformer, shape[0]),),
        scales=None if scales is None else torch.tensor(scales),
        height=shape[-2],
        width=shape[-1],
        frames=shape[2],
        sigmas=torch.tensor(levels),
        timesteps=torch.tensor(levels),
        detail=detail,
    )


def direct(
    transformer: WanTransformer3DModel, latents: torch.Tensor, level: float, text: torch.Tensor
) -> torch.Tensor:
    """What diffusers' model says at the timestep `1000 level`."""
    output: torch.Tensor = transformer(
        hidden_states=latents,
        timestep=torch.full((len(latents),), 1000 * level),
        encoder_hidden_states=text,
        return_dict=False,
    )[0]
    return output


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (1, CHANNELS, 3, 8, 8)),
        ({"num_attention_heads": 3, "attention_head_dim": 24}, (3, CHANNELS, 1, 6, 10)),
    ],
)
def test_fine_bucket_equals_the_model(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    transformer = wan_transformer(**config)
    context, latents = context_of(transformer, shape, [0.999, 0.37]), noise(*shape)
    bucket = FineBucket(step_model(transformer), context)
    text = context.passes[0].conditioning["encoder_hidden_states"]
    for step, level in enumerate((0.999, 0.37)):
        expected = direct(transformer, latents, level, text)
        # The patch embedding is a matrix product here, a convolution there: rounding differs.
        actual = bucket.velocity(latents, torch.tensor([step]))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert bucket.tokens == shape[2] * shape[3] * shape[4] // 4


def with_fewer_waves(latents: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """An axis as the sum of its `size` slowest cosines, taken at `size` places."""
    values = latents.double().movedim(axis, -1)
    old = (torch.arange(values.shape[-1], dtype=torch.float64) + 0.5) / values.shape[-1]
    new = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    total = values.mean(-1, keepdim=True).expand(*values.shape[:-1], size)
    for waves in range(1, size):
        height = 2 * (values * torch.cos(torch.pi * waves * old)).mean(-1, keepdim=True)
        total = total + height * torch.cos(torch.pi * waves * new)
    return total.movedim(-1, axis).float()


@pytest.mark.parametrize(("size", "small_size"), [((16, 16), (8, 8)), ((18, 10), (10, 6))])
def test_coarse_step_shows_the_model_the_small_video(
    size: tuple[int, int], small_size: tuple[int, int]
) -> None:
    """By hand, from the formulas of `steps/buckets.py` and diffusers' own forward pass."""
    transformer, shape, level = wan_transformer(), (2, CHANNELS, 3, *size), 0.6
    context, latents = context_of(transformer, shape, [level]), noise(*shape)
    actual = SnrBucket(step_model(transformer), context, 2).velocity(latents, torch.tensor([0]))
    small = with_fewer_waves(with_fewer_waves(latents, 3, small_size[0]), 4, small_size[1])
    left = level * math.sqrt(math.prod(small_size) / math.prod(size))  # of the noise
    small, small_level = small / (1 - level + left), left / (1 - level + left)
    velocity = direct(
        transformer, small, small_level, context.passes[0].conditioning["encoder_hidden_states"]
    )
    clean = small - small_level * velocity
    large = torch.stack(
        [
            torch.nn.functional.interpolate(frame.double(), size=size, mode="bicubic")
            for frame in clean.unbind(2)
        ],
        dim=2,
    )
    torch.testing.assert_close(actual, (latents - large.float()) / level, rtol=1e-4, atol=1e-4)


class KnownVideo(WanFamily):
    """A model that knows a clean video of one colour a frame, at every size: v = (z - x0) / t."""

    channels_last = False

    def __init__(self, clean: torch.Tensor) -> None:
        self.clean = clean

    def embed_time(self, transformer: Any, timesteps: Any, conditioning: Any) -> torch.Tensor:
        levels: torch.Tensor = timesteps[:, None]
        return levels

    def embed_tokens(self, transformer: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def run_blocks(
        self,
        runners: Any,
        hidden: torch.Tensor,
        text: Any,
        temb: Any,
        positions: Any,
        which: slice = ALL_BLOCKS,
    ) -> tuple[torch.Tensor, Any]:
        tokens = hidden.shape[1] // self.clean.shape[2]
        clean = self.clean[..., :1, :1].expand(*self.clean.shape[:3], 2, 2 * tokens)
        return (hidden - ops.pack(clean.contiguous(), 2)) / temb, text

    def modulate_output(self, transformer: Any, hidden: torch.Tensor, temb: Any) -> torch.Tensor:
        return hidden

    def project_output(self, transformer: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("detailed", [False, True])
@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("size", [(16, 16), (18, 14)])
def test_coarse_steps_are_exact_for_a_smooth_video(
    size: tuple[int, int], multiple: int, detailed: bool
) -> None:
    """Every frame has a colour of its own: frames must not mix. Noise is of full resolution."""
    transformer, shape = wan_transformer(), (2, CHANNELS, 3, *size)
    clean = noise(2, CHANNELS, 3, 1, 1, seed=5).expand(shape).contiguous()
    model = StepModel(family=KnownVideo(clean), transformer=transformer, base={})
    detail = Detail(shape, torch.device("cpu")) if detailed else None
    context = context_of(transformer, shape, [0.9, 0.6, 0.3], detail=detail)
    fine, coarse = FineBucket(model, context), SnrBucket(model, context, multiple)
    for step, level in enumerate((0.9, 0.6, 0.3)):
        latents, index = (1 - level) * clean + level * noise(*shape), torch.tensor([step])
        if step == 0:
            fine.velocity(latents, index)
        actual = coarse.velocity(latents, index)
        # Division by the levels, the smallest about 0.1 at 4p, multiplies fp32 rounding.
        torch.testing.assert_close(actual, (latents - clean) / level, rtol=0, atol=1e-4)


@pytest.mark.parametrize("multiple", [1, 2])
def test_guidance_as_one_batch_equals_two_passes(multiple: int) -> None:
    """With detail of a step at p; at p also the formula on diffusers' own forward passes."""
    transformer, shape = wan_transformer(), (2, CHANNELS, 3, 8, 8)
    model, results = step_model(transformer), []
    halves = tuple(pass_of(transformer, 2, (seed,)) for seed in (1, 2))
    for passes in ((pass_of(transformer, 2, (1, 2)),), halves):
        detail = Detail(shape, torch.device("cpu"))
        context = context_of(
            transformer, shape, [0.8, 0.6], detail=detail, passes=passes, scales=[4.0, 4.0]
        )
        fine = FineBucket(model, context)
        bucket = fine if multiple == 1 else SnrBucket(model, context, multiple)
        fine.velocity(noise(*shape), torch.tensor([0]))
        results.append(bucket.velocity(noise(*shape, seed=3), torch.tensor([1])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    if multiple == 1:
        texts = [one.conditioning["encoder_hidden_states"] for one in halves]
        prompt, negative = (direct(transformer, noise(*shape, seed=3), 0.6, t) for t in texts)
        expected = negative + 4 * (prompt - negative)
        torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)


def test_guided_coarse_step_is_that_of_the_guided_model() -> None:
    """The step is affine in the model's velocities, with weights that add up to 1."""
    transformer, shape, scale = wan_transformer(), (1, CHANNELS, 3, 8, 8), 3.0
    model, found = step_model(transformer), []
    halves = tuple(pass_of(transformer, 1, (seed,)) for seed in (1, 2))
    for passes in ((halves[0],), (halves[1],), halves):
        detail = Detail(shape, torch.device("cpu"))
        context = context_of(
            transformer,
            shape,
            [0.8, 0.6, 0.4],
            detail=detail,
            passes=passes,
            scales=[scale] * 3 if len(passes) == 2 else None,
        )
        fine, coarse = FineBucket(model, context), SnrBucket(model, context, 2)
        fine.velocity(noise(*shape), torch.tensor([0]))
        coarse.velocity(noise(*shape, seed=3), torch.tensor([1]))
        found.append(coarse.velocity(noise(*shape, seed=4), torch.tensor([2])))
    prompt, negative, guided = found
    expected = negative + scale * (prompt - negative)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_an_unguided_step_is_the_prompt_alone(batched: bool) -> None:
    """To the bit, whichever way the halves are held."""
    transformer, shape = wan_transformer().to(torch.bfloat16), (2, CHANNELS, 3, 8, 8)
    model, latents, step = step_model(transformer), noise(*shape), torch.tensor([0])
    halves = tuple(pass_of(transformer, 2, (seed,)) for seed in (1, 2))
    prompt = FineBucket(model, context_of(transformer, shape, [0.8], passes=halves[:1]))
    both = (pass_of(transformer, 2, (1, 2)),) if batched else halves
    context = context_of(transformer, shape, [0.8], passes=both, scales=[3.0])
    guided = FineBucket(model, context)
    expected = prompt.velocity(latents, step)
    assert torch.equal(guided.velocity(latents, step, guided=False), expected)
    assert not torch.equal(guided.velocity(latents, step), expected)


def test_positions_are_the_models_own() -> None:
    transformer = wan_transformer()
    own = transformer.rope(torch.empty(1, 1, 3, 8, 12))
    for ours, theirs in zip(
        WAN.positions(transformer, Grid(frames=3, height=4, width=6), 5), own, strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(ShapeError, match="at most 1024"):
        WAN.positions(transformer, Grid(height=2, width=1025), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": (1, 4, 4)}, r"patch_size=\(1, 4, 4\)"),
        ({"added_kv_proj_dim": 32, "image_dim": 16}, "image conditioning"),
        ({"in_channels": 9}, "in_channels=9 with out_channels=4"),
    ],
)
def test_other_variants_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ddit_rt.compile(wan_transformer(**config), backend="eager", progress=False)


def test_other_pipelines_are_refused_by_name() -> None:
    pipeline = wan_pipeline()
    pipeline.register_to_config(boundary_ratio=0.875)
    with pytest.raises(UnsupportedModelError, match="boundary_ratio without a transformer_2"):
        ddit_rt.compile(pipeline, backend="eager", progress=False)
    pipeline = wan_pipeline(boundary_ratio=0.875)
    pipeline.register_modules(transformer_2=wan_transformer(1, num_layers=3))
    with pytest.raises(UnsupportedModelError, match=r"another configuration \(num_layers\)"):
        ddit_rt.compile(pipeline, backend="eager", progress=False)
    pipeline.register_modules(transformer_2=wan_transformer(1).to(torch.bfloat16))
    with pytest.raises(UnsupportedModelError, match="bfloat16 on cpu beside a transformer of"):
        ddit_rt.compile(pipeline, backend="eager", progress=False)


def test_animate_and_a_pipeline_of_another_model_are_refused() -> None:
    from diffusers import WanAnimateTransformer3DModel, WanImageToVideoPipeline

    cls = WanAnimateTransformer3DModel
    with pytest.raises(UnsupportedModelError, match=f"got a {cls.__name__}.*WanTransformer3D"):
        family_of(cls.__new__(cls))
    base = wan_pipeline()
    other = WanImageToVideoPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        scheduler=base.scheduler,
        transformer=base.transformer,
    )
    with pytest.raises(UnsupportedModelError, match=r"model with in_channels=4 \(expected 12\)"):
        ddit_rt.compile(other, backend="eager", progress=False)


def test_adapters_are_refused() -> None:
    from ddit_rt.adapters import AdapterConfig, PatchAdapter

    with pytest.raises(UnsupportedModelError, match="no patch adapters for WanTransformer3DModel"):
        PatchAdapter.from_base(AdapterConfig(patch="2p"), WAN, wan_transformer())
    with pytest.raises(UnsupportedModelError, match="no patch adapters"):
        ddit_rt.compile(wan_transformer(), adapter="folder", backend="eager", progress=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(1, 3, 5)}, ShapeError, r"\[1, 3, 5\]; expected"),
        ({"guidance_scale": torch.tensor(2.0)}, ValueError, "both or neither"),
        (
            {**wan_conditioning(guidance_scale=2.0), "guidance_scale": torch.ones(1, 1)},
            ValueError,
            "without dimensions",
        ),
        ({"colour": torch.ones(1)}, ValueError, r"unknown conditioning \['colour'\]; a Wan"),
    ],
)
def test_bad_conditioning_is_named(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WAN.check_conditioning(wan_transformer(), 1, {**wan_conditioning(), **change})


@pytest.mark.parametrize("scheduler", [unipc, euler])
def test_given_noise_levels_are_shifted_and_taken(scheduler: Any) -> None:
    given = scheduler()
    WAN.set_timesteps(given, 3, [1.0, 0.6, 0.2], Grid(height=4, width=4))
    expected = torch.tensor([3 * level / (1 + 2 * level) for level in (1.0, 0.6, 0.2)])
    # UniPC starts 1e-6 below 1, where it would divide by 0.
    torch.testing.assert_close(given.sigmas[:-1], expected, rtol=0, atol=2e-6)


def test_scheduler_that_takes_no_noise_levels_is_named() -> None:
    with pytest.raises(ValueError, match="`sigmas`, which FlowMatchHeunDiscreteScheduler does not"):
        WAN.set_timesteps(heun(), 1, [1.0], Grid(height=4, width=4))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [euler, unipc])
def test_in_half_precision_the_model_sees_the_pipelines_times(scheduler: Any) -> None:
    size = {"height": 64, "width": 64, "num_frames": 5, "output_type": "latent"}
    call = {"prompt": "a cat", "negative_prompt": "", "guidance_scale": 4.0, **size}
    assert_same_times(wan_pipeline(scheduler()), call)
