"""Compile, save, load: the whole way, and every way in which it must stop."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from models import (
    noise,
    random_adapters,
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
    generator = torch.Generator().manual_seed(0)
    result = engine(
        **tiny_embeds(), num_inference_steps=6, output_type="latent", generator=generator, **call
    )
    assert isinstance(result.images, torch.Tensor)
    return result.images


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
    eager = ddit_rt.compile(
        pipeline, adapter=random_adapters(pipeline), backend="eager", progress=False
    )
    for plan in ("4p:0.5,p", "2p:0.5,p"):
        policy = StaticPolicy(plan)
        expected = picture(eager, height=64, width=64, patch_policy=policy)
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
    engine = ddit_rt.compile(transformer, adapter=tmp_path, backend="eager", progress=False)
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


@pytest.mark.slow
def test_loading_in_another_process_gives_the_same_picture(
    engine: ddit_rt.Engine, artifact_path: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch
        import ddit_rt
        from models import tiny_embeds, tiny_pipeline
        engine = ddit_rt.load({str(artifact_path)!r}, tiny_pipeline(), progress=False)
        result = engine(**tiny_embeds(), num_inference_steps=6, output_type="latent",
                        generator=torch.Generator().manual_seed(0))
        torch.save(result.images, {str(tmp_path / "latents.pt")!r})
        """)
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "latents.pt"), picture(engine))


def test_fused_style_lora_acts_at_once_and_leaves_no_trace(
    engine: ddit_rt.Engine, tmp_path: Path
) -> None:
    before = picture(engine)
    weights = {k: v.clone() for k, v in engine.pipeline.transformer.state_dict().items()}
    lora = {
        f"transformer.transformer_blocks.0.attn.{layer}.lora_{side}.weight": noise(*shape) * 0.3
        for layer in ("to_q", "to_v")
        for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    engine.load_lora(lora, 0.8)
    fused = picture(engine)
    assert not torch.allclose(before, fused, atol=1e-3)
    engine.unload_loras()
    assert torch.equal(picture(engine), before)
    for name, value in engine.pipeline.transformer.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_weights_moved_to_new_storage_are_followed(engine: ddit_rt.Engine) -> None:
    before = picture(engine)
    for parameter in engine.pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(picture(engine), before)
    layer = engine.pipeline.transformer.transformer_blocks[0].ff.net[2]
    layer.weight.data = noise(*layer.weight.shape)
    assert not torch.allclose(picture(engine), before, atol=1e-3)


def test_other_weights_are_refused_unless_asked_for(artifact_path: Path) -> None:
    other = tiny_pipeline(seed=1)
    with pytest.raises(ArtifactMismatchError, match="weights: .*other weights"):
        ddit_rt.load(artifact_path, other, progress=False)
    engine = ddit_rt.load(artifact_path, other, check_weights=False, progress=False)
    assert picture(engine).isfinite().all()


def test_other_configuration_is_refused_by_field(artifact_path: Path) -> None:
    with pytest.raises(ArtifactMismatchError, match="num_single_layers was 2.*has 1"):
        ddit_rt.load(artifact_path, tiny_pipeline(num_single_layers=1), progress=False)


def test_other_torch_is_refused_with_both_versions(
    artifact_path: Path, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(ArtifactMismatchError, match=r"torch: .*built with 2\..*this is 2\.99\.0"):
        ddit_rt.load(artifact_path, pipeline, progress=False)


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


def test_things_that_are_no_model_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got a dict"):
        ddit_rt.compile({})
    with pytest.raises(UnsupportedModelError, match="got a Linear"):
        ddit_rt.compile(torch.nn.Linear(1, 1))


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
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    with pytest.raises(ArtifactError, match="nothing to save"):
        engine.save(tmp_path / "eager.ddit")
    assert not (tmp_path / "eager.ddit").exists()


def test_interrupted_compile_leaves_nothing_behind(
    pipeline: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddit_rt.blocks.compile.export_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ddit_rt.compile(pipeline, progress=False)
    assert list(tmp_path.iterdir()) == []
