"""Artifacts whose packages are arbitrary bytes."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxTransformer2DModel

from ddit_rt.artifact import Artifact, BucketEntry, Manifest
from ddit_rt.blocks import TokenRanges

PACKAGE = "FluxTransformerBlock/package.pt2"
VARIANT = "FluxTransformerBlock.lora32x0.5/package.pt2"
ADAPTER = "adapters/2p/adapter_model.safetensors"


def make_artifact(directory: Path, transformer: FluxTransformer2DModel, salt: str = "") -> Artifact:
    """An artifact whose packages are arbitrary bytes: the store does not look into them."""
    for name in (PACKAGE, VARIANT, ADAPTER):
        path = directory / name
        path.parent.mkdir(parents=True)
        path.write_bytes(f"{name}{salt}".encode() * 100)
    manifest = Manifest.describe(
        transformer,
        project_version="1.2.3",
        family="flux",
        ranges=TokenRanges(),
        buckets=(BucketEntry(patch="p", method="base", variant=None),),
        policy={"name": "fine"},
        pipeline_defaults={"height": 256},
    )
    return Artifact.unsaved(directory, manifest)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
