"""Compile, save, load: the whole way, and every way in which it must stop."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from models import (
    eager,
    latents_of,
    noise,
    random_adapters,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)
from peft import PeftModel

import ddit_rt
from ddit_rt import FinePolicy, StaticPolicy
from ddit_rt.adapters import save_adapters
from ddit_rt.blocks import LoadedPackage
from ddit_rt.errors import (
    ArtifactError,
    ArtifactMismatchError,
    UnsupportedModelError,
    UntrustedArtifactError,
)
from ddit_rt.models.base import BlockType
from ddit_rt.models.flux import FluxFamily


def picture(engine: ddit_rt.Engine, **call: Any) -> torch.Tensor:
    fixed = {"num_inference_steps": 6, "output_type": "latent", "generator": seeded()}
    return latents_of(engine(**tiny_embeds(), **fixed, **call))


def test_blocks_that_share_their_packages_have_the_same_bits(
    artifact_path: Path,
    engine: ddit_rt.Engine,
    pipeline: FluxPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA: one loaded package for all blocks of a type and variant, adapters included."""
    loaded = []
    original = LoadedPackage.__init__

    def counted(package: LoadedPackage, path: Path, **options: Any) -> None:
        loaded.append(path)
        original(package, path, **options)

    monkeypatch.setattr(LoadedPackage, "__init__", counted)
    monkeypatch.setattr(LoadedPackage, "shared", True)
    sharing = ddit_rt.load(artifact_path, pipeline, progress=False)
    packages = sharing.artifact.manifest.packages
    assert sorted(loaded) == sorted(artifact_path / name for name in packages)
    plan = StaticPolicy("4p:0.34,2p:0.33,p")
    expected = picture(engine, patch_policy=plan)
    assert torch.equal(picture(sharing, patch_policy=plan), expected)
    pipeline.transformer.to(torch.float64).to(torch.float32)  # new storage, as after pipe.to(...)
    for parameter in pipeline.transformer.parameters():
        parameter.mul_(0.9)
    moved = picture(sharing, patch_policy=plan)
    assert torch.equal(moved, picture(engine, patch_policy=plan))
    assert not torch.equal(moved, expected)


def test_compiled_adapters_equal_the_eager_ones(
    engine: ddit_rt.Engine, pipeline: FluxPipeline
) -> None:
    uncompiled = eager(pipeline, adapter=random_adapters(pipeline))
    for plan in ("4p:0.5,p", "2p:0.5,p"):
        policy = StaticPolicy(plan)
        expected = picture(uncompiled, height=64, width=64, patch_policy=policy)
        torch.testing.assert_close(
            picture(engine, patch_policy=policy), expected, rtol=0, atol=1e-4
        )
    assert not torch.allclose(expected, picture(engine, patch_policy=FinePolicy()), atol=1e-2)


def test_adapter_step_equals_peft_on_the_whole_model(
    tmp_path: Path, pipeline: FluxPipeline
) -> None:
    """Embedding, LoRA blocks and de-embedding against PEFT's own model, built independently."""
    family, transformer = FluxFamily(), pipeline.transformer
    adapters = random_adapters(pipeline)
    save_adapters(adapters, tmp_path, family, transformer)
    engine = eager(transformer, adapter=tmp_path)
    conditioning = tiny_conditioning(transformer)
    latents = noise(1, 4, 16, 16)
    actual = engine.denoise(
        latents, sigmas=[1.0], patch_policy=StaticPolicy(["2p"]), **conditioning
    )

    reference = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path / "2p")).eval()
    adapter = adapters.adapters[2]
    base = reference.get_base_model()
    tokens = torch.nn.functional.unfold(latents, 4, stride=4).transpose(1, 2)
    base.x_embedder = torch.nn.Identity()
    base.proj_out = torch.nn.Identity()
    centres = torch.tensor([0.5, 2.5, 4.5, 6.5])
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = centres.repeat_interleave(4), centres.repeat(4)
    with torch.no_grad():
        hidden = reference(
            hidden_states=adapter.embed(tokens) + adapter.identifier,
            timestep=torch.ones(1),
            img_ids=ids,
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
            **conditioning,
        )[0]
        residual = adapter.residual_out(torch.nn.functional.gelu(adapter.residual_in(tokens)))
        velocity = adapter.project(hidden) + residual
    velocity = torch.nn.functional.fold(velocity.transpose(1, 2), 16, 4, stride=4)
    torch.testing.assert_close(actual, latents - velocity, rtol=1e-4, atol=1e-5)


def test_other_weights_are_refused_unless_asked_for(artifact_path: Path) -> None:
    other = tiny_pipeline(seed=1)
    with pytest.raises(ArtifactMismatchError, match="weights: .*other weights"):
        ddit_rt.load(artifact_path, other, progress=False)
    engine = ddit_rt.load(artifact_path, other, check_weights=False, progress=False)
    assert picture(engine).isfinite().all()


def test_packages_of_a_version_that_calls_blocks_otherwise_are_refused(
    artifact_path: Path, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = FluxFamily.block_types

    def other(family: FluxFamily, transformer: Any) -> tuple[BlockType, ...]:
        double, single = own(family, transformer)
        return replace(double, inputs=double.inputs[1:]), single

    monkeypatch.setattr(FluxFamily, "block_types", other)
    with pytest.raises(ArtifactMismatchError, match=r"takes hidden_states \[.*: compile the model"):
        ddit_rt.load(artifact_path, pipeline, progress=False)


def test_foreign_artifact_needs_the_users_say(
    artifact_path: Path,
    tmp_path: Path,
    pipeline: FluxPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDIT_RT_HOME", str(tmp_path / "somebody-else"))
    with pytest.raises(UntrustedArtifactError, match="trust_code=True"):
        ddit_rt.load(artifact_path, pipeline, progress=False)
    ddit_rt.load(artifact_path, pipeline, trust_code=True, progress=False)


def test_model_on_another_device_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"on \['meta'\].*one CUDA device"):
        ddit_rt.compile(tiny_transformer().to("meta"))


def test_other_pipeline_of_the_same_transformer_is_refused(pipeline: FluxPipeline) -> None:
    class FluxControlNetPipeline(FluxPipeline):  # type: ignore[misc]
        pass

    other = FluxControlNetPipeline(**pipeline.components)
    with pytest.raises(UnsupportedModelError, match=r"supported pipelines are \['FluxPipeline'"):
        ddit_rt.compile(other)


def test_eager_engine_has_nothing_to_save(pipeline: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to save"):
        eager(pipeline).save(tmp_path / "eager.ddit")
    assert not (tmp_path / "eager.ddit").exists()


def test_interrupted_compile_leaves_nothing_behind(
    pipeline: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddit_rt.blocks.compile.export_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ddit_rt.compile(pipeline, progress=False)
    assert list(tmp_path.iterdir()) == []
