"""Wan image to video against diffusers' own pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from driving import FINE, assert_equal, runs
from family_suite import MIXED, STEPS, WAYS, FamilyCase, LoopSuite, eager, generated, trace_of
from made_once import Packages
from models import noise
from wan_image_models import (
    GUIDED,
    VIDEO,
    WanSuite,
    embeds,
    experts_pipeline,
    image_pipeline,
    picture,
    with_picture,
)
from wan_models import euler

import ddit_rt
from ddit_rt import DDiTPolicy, StaticPolicy
from ddit_rt.errors import ArtifactMismatchError, ShapeError, UnsupportedModelError

ODD = (80, 112)
"""5 x 7 tokens: neither 2p nor 4p divides them."""


class TestWanExperts(WanSuite, LoopSuite):
    """Two experts, each with a scale of its own."""

    case = FamilyCase(
        pipeline=experts_pipeline,
        prompts=embeds,
        guided={**GUIDED, "guidance_scale_2": 2.0},
        inputs=with_picture,
        sizes=((64, 96), ODD),
        schedulers={"euler": euler},
        captured=("2p", "2p expert 2", "p", "p expert 2"),
        more=VIDEO,
    )

    @pytest.mark.slow
    def test_compiled_blocks_equal_diffusers(self, packages: Packages, tmp_path: Path) -> None:
        pipeline = experts_pipeline()
        with packages():
            engine = ddit_rt.compile(pipeline, patch_sizes="p,2p", progress=False)
        engine = ddit_rt.load(engine.save(tmp_path / "a14b.ddit"), pipeline, progress=False)
        for call in (self.case.call((7,)), self.case.call((7,), (5,))):
            assert_equal(*runs(pipeline, engine, call), tolerance=1e-5)
        ours = generated(engine, call, patch_policy=MIXED)
        assert_equal(ours, generated(eager(pipeline), call, patch_policy=MIXED), tolerance=1e-4)
        with pytest.raises(ArtifactMismatchError):
            ddit_rt.load(engine.artifact.directory, embedded(), progress=False)

    # Experts have no MagCache, which tests/engine/test_wan_experts.py tries.
    test_a_step_cache_reuses_what_the_blocks_added = None
    test_a_first_block_may_run_ahead_of_the_others = None
    test_what_magcache_has_to_know_is_measured = None


@pytest.mark.slow
@pytest.mark.parametrize(
    "scales",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 5.0, "guidance_scale_2": 1.5},
        {"guidance_scale": 2.0, "guidance_scale_2": 1.0},
    ],
    ids=["one scale", "two scales", "second off"],
)
def test_each_expert_has_its_scale(scales: Any) -> None:
    pipeline = experts_pipeline()
    engine = eager(pipeline)
    call = TestWanExperts.case.call((7,), (7,), **scales)
    for driven in WAYS:
        assert_equal(*runs(pipeline, engine, call, **driven), tolerance=1e-5)
        assert "steps 2 to 3: expert 2" in trace_of(engine).notes


@pytest.mark.parametrize(
    ("last", "batch"), [(False, 1), (True, 2)], ids=["first frame", "first and last of two"]
)
def test_image_embeddings_reach_the_blocks(last: bool, batch: int) -> None:
    pipeline = embedded(last)
    engine, call = eager(pipeline), embedded_call(last, batch)
    for driven in WAYS:
        assert_equal(*runs(pipeline, engine, call, **driven), tolerance=1e-5)


def embedded(last: bool = False) -> Any:
    """With image embeddings of one picture, or of two."""
    return image_pipeline(embedded=True, **({"pos_embed_seq_len": 514} if last else {}))


def embedded_call(last: bool = False, batch: int = 1, **more: Any) -> dict[str, Any]:
    """With guidance, as one batch, of prompts of 512 tokens."""
    pictures = {"guidance_scale_2": None, **({"last_image": picture(2)} if last else {})}
    return TestWanExperts.case.call((512,) * batch, (512,) * batch, **pictures, **more)


def test_image_embeddings_are_made_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, products, own = eager(embedded(last=True)), [], F.linear
    embedder = engine.pipeline.transformer.condition_embedder.image_embedder
    weight = embedder.ff.net[0].proj.weight

    def linear(values: Any, factor: Any, *more: Any) -> Any:
        products.extend([1] if factor is weight else [])
        return own(values, factor, *more)

    monkeypatch.setattr(F, "linear", linear)
    for steps in (3, 6):
        plan = StaticPolicy(["p", "2p", *["p"] * (steps - 2)])
        call = embedded_call(last=True, num_inference_steps=steps)
        assert torch.isfinite(generated(engine, call, patch_policy=plan)).all()
        assert len(products) == 2, "once for each patch size"
        products.clear()


def test_a_last_frame_reaches_a_model_without_image_embeddings() -> None:
    pipeline = experts_pipeline()
    call = TestWanExperts.case.call((7,), (5,), last_image=picture(2))
    ours, theirs = runs(pipeline, eager(pipeline), call)
    assert_equal(ours, theirs, tolerance=1e-5)
    call.pop("last_image")
    assert float((generated(eager(pipeline), call, patch_policy=FINE) - ours).abs().max()) > 1e-3


def test_coarse_steps_run_where_no_patch_divides() -> None:
    engine = eager(experts_pipeline(), patch_sizes="p,2p,4p")
    height, width = ODD
    call = TestWanExperts.case.call((7,), (5,), height=height, width=width, num_inference_steps=8)
    for policy in ("4p:0.5,p", DDiTPolicy(tau=1.0, fine_tail=1)):
        assert torch.isfinite(generated(engine, call, patch_policy=policy)).all()
        assert "4p" in trace_of(engine).patch_sizes()


def test_denoise_takes_picture_and_scales() -> None:
    pipeline, case = experts_pipeline(), TestWanExperts.case
    engine = eager(pipeline)
    conditioning = {
        "encoder_hidden_states": embeds((7,))["prompt_embeds"],
        "negative_encoder_hidden_states": embeds((7,), seed=3)["prompt_embeds"],
        "condition": noise(1, 8, 3, 8, 12),
        "guidance_scale": torch.tensor([4.0, 2.0]),
    }
    latents = noise(1, 4, 3, 8, 12, seed=4)
    final = engine.denoise(latents, num_inference_steps=STEPS, patch_policy=FINE, **conditioning)
    assert final.shape == latents.shape
    pipeline.prepare_latents = lambda *_, **__: (latents, conditioning["condition"])
    theirs = pipeline(**case.call((7,), (7,))).frames
    assert_equal(final, theirs, tolerance=1e-5)
    with pytest.raises(ShapeError, match="one for each expert"):
        engine.denoise(latents, **{**conditioning, "guidance_scale": torch.ones(1, 2)})


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (embedded, {"max_sequence_length": 12, "prompt_embeds": None}, r"prompts of \[12, 512\]"),
        (embedded, embeds((7,)), r"prompts of \[7, 512\] tokens.*512 for granted"),
        (embedded, {"last_image": picture(2)}, r"2 image\(s\).*leave `last_image` out"),
        (partial(embedded, True), {}, r"1 image\(s\).*give `last_image` too"),
    ],
)
def test_calls_that_image_embeddings_cannot_serve_are_named(
    make: Any, call: Any, message: str
) -> None:
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        generated(eager(make()), {**embedded_call(), **call})


def test_models_that_do_not_fit_are_named() -> None:
    for config, message in (
        ({"in_channels": 8}, r"in_channels=8 \(expected 12\)"),
        ({"patch_size": (1, 4, 4)}, "patch_size"),
        ({"pos_embed_seq_len": 100, "embedded": True}, r"pos_embed_seq_len=100 \(expected 514\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            eager(image_pipeline(**config))
