from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from models import tiny_transformer
from peft import LoraConfig

from ddit_rt.artifact import (
    BucketEntry,
    Environment,
    FileEntry,
    Manifest,
    PackageEntry,
    mismatches,
    weight_fingerprint,
)
from ddit_rt.blocks import TokenRanges
from ddit_rt.errors import ArtifactError

CPU = torch.device("cpu")


@pytest.fixture
def manifest(transformer: FluxTransformer2DModel) -> Manifest:
    described = Manifest.describe(
        transformer,
        project_version="1.2.3",
        family="flux",
        ranges=TokenRanges(batch=(1, 4)),
        buckets=(
            BucketEntry(patch="p", method="base", variant=None),
            BucketEntry(patch="2p", method="adapter", variant="lora32"),
        ),
        policy={"name": "ddit", "tau": 1e-3},
        pipeline_defaults={"height": 256},
    )
    package = PackageEntry(sha256="0" * 64, bytes=10, block_type="Block", variant=None)
    return dataclasses.replace(
        described,
        packages={"Block/package.pt2": package},
        files={"a/b": FileEntry(sha256="1" * 64, bytes=3)},
    )


def edited(manifest: Manifest, **changes: Any) -> str:
    return json.dumps({**json.loads(manifest.to_json()), **changes})


def test_json_round_trip(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert dataclasses.replace(manifest, dtype="float16").digest != manifest.digest


def test_changes_of_blocks_stand_in_a_manifest_of_the_version_that_knows_them(
    manifest: Manifest, transformer: FluxTransformer2DModel
) -> None:
    """Others stay readable for older versions."""
    assert manifest.schema_version == 4
    assert "block_changes" not in json.loads(manifest.to_json())
    with pytest.raises(ArtifactError, match=r"unknown entries \['block_changes'\] in schema 4"):
        Manifest.from_json(edited(manifest, block_changes={}))
    changes = {"FluxTransformerBlock.attn.processor": "mine.Processor"}
    changed = Manifest.describe(
        transformer,
        project_version="1.2.3",
        family="flux",
        ranges=TokenRanges(),
        buckets=(),
        block_changes=changes,
    )
    assert changed.schema_version == 5
    assert Manifest.from_json(changed.to_json()) == changed
    assert not mismatches(changed, transformer, changes)
    (problem,) = mismatches(changed, transformer, {})
    assert "attn.processor was mine.Processor when compiled" in problem
    (problem,) = mismatches(manifest, transformer, changes)
    assert "the model has it mine.Processor; change it before loading" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "{}"])
def test_from_json_no_manifest(text: str) -> None:
    with pytest.raises(ArtifactError, match="not JSON|has schema None"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "has schema 99, this version reads"),
        ({"colour": "red"}, r"unknown entries \['colour'\]"),
        ({"dtype": 3}, "dtype: expected str, got int"),
        ({"buckets": {}}, "buckets: expected list, got dict"),
        (
            {"buckets": [{"patch": "p"}]},
            r"buckets: missing|missing entries \['method', 'variant'\]",
        ),
        ({"packages": {"x": {"sha256": "", "bytes": True}}}, "missing entries"),
        ({"files": {"x": {"sha256": "", "bytes": True}}}, "files.x: bytes: expected int, got bool"),
        ({"environment": None}, "environment: expected an object"),
        ({"ranges": {"batch": [1], "image": [4, 8], "text": [1, 2]}}, "expected 2 values, got 1"),
        ({"ranges": {"batch": [9, 1], "image": [4, 8], "text": [1, 2]}}, "range of batch"),
        ({"config": {}}, "config does not match config_hash"),
    ],
)
def test_from_json_wrong_entry(manifest: Manifest, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(edited(manifest, **changes))


def test_mismatches_name_what_differs(manifest: Manifest) -> None:
    assert mismatches(manifest, tiny_transformer()) == []
    for model, message in (
        (tiny_transformer(seed=1), "weights:"),
        (tiny_transformer(num_single_layers=3), "num_single_layers was 2 when compiled"),
        (tiny_transformer().to(torch.bfloat16), "torch_dtype=torch.float32"),
        (torch.nn.Linear(2, 2), "compiled for FluxTransformer2DModel, got Linear"),
    ):
        (problem,) = mismatches(manifest, model)
        assert message in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_version": "2.12.0+cpu"}, "torch: the artifact was built with 2.12.0"),
        ({"device": "cuda"}, "device: .* cuda"),
        ({"machine": "aarch64"}, "machine: .* aarch64"),
        ({"cuda_arch": "9.0"}, "CUDA architecture: .* 9.0"),
        ({"cpu_capability": "SVE256"}, "CPU capability: .* SVE256"),
        ({"cpu_features": ("amx_complex_two",)}, r"lacks \(amx_complex_two\)"),
        ({"libstdcxx": "99.0.1"}, "libstdcxx: .* 99.0.1"),
        ({"glibc": "99.1"}, "glibc: .* 99.1"),
    ],
)
def test_mismatches_other_machine(
    manifest: Manifest, transformer: FluxTransformer2DModel, changes: dict[str, Any], message: str
) -> None:
    environment = dataclasses.replace(manifest.environment, **changes)
    other = dataclasses.replace(manifest, environment=environment)
    (problem,) = mismatches(other, transformer)
    assert pytest.raises(ValueError, match=message).matches(ValueError(problem))
    assert "install" in problem or "compile" in problem


def test_mismatches_older_libraries_are_fine(
    manifest: Manifest, transformer: FluxTransformer2DModel
) -> None:
    older = dataclasses.replace(
        manifest.environment, libstdcxx="6.0.1", glibc="2.9", cpu_features=()
    )
    assert mismatches(dataclasses.replace(manifest, environment=older), transformer) == []


def test_environment_current_is_known() -> None:
    environment = Environment.current(CPU)
    assert environment.torch_version == torch.__version__
    assert environment.glibc
    assert environment.libstdcxx.startswith("6.")
    assert environment.cuda_arch == ""


def test_fingerprint_ignores_unfused_adapters(transformer: FluxTransformer2DModel) -> None:
    before = weight_fingerprint(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2", "proj_out"]))
    assert weight_fingerprint(transformer) == before


def test_fingerprint_sees_fused_weights_and_both_ends_of_a_tensor(
    transformer: FluxTransformer2DModel,
) -> None:
    seen = {weight_fingerprint(transformer)}
    transformer.single_transformer_blocks[1].proj_out.weight.mul_(1.01)
    seen.add(weight_fingerprint(transformer))
    for position in (0, -1):
        transformer.x_embedder.weight.view(-1)[position] += 1
        seen.add(weight_fingerprint(transformer))
    assert len(seen) == 4


def test_fingerprint_sees_type_and_shape(transformer: FluxTransformer2DModel) -> None:
    before = weight_fingerprint(transformer)
    half = weight_fingerprint(tiny_transformer().to(torch.bfloat16))
    longer = weight_fingerprint(tiny_transformer(num_single_layers=3))
    assert len({before, half, longer}) == 3
    assert weight_fingerprint(tiny_transformer()) == before


def test_fingerprint_sample_positions() -> None:
    # A change between samples goes unseen: the documented limit.
    model = torch.nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    before = weight_fingerprint(model)
    model.weight.view(-1)[1] += 1
    assert weight_fingerprint(model) == before
