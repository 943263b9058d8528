"""What is read from files that others wrote: understood, or refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import DEEP, damaged, drawn, edited
from hypothesis import given
from hypothesis import strategies as st
from lora_files import check_unchanged, eager, everything, kohya, speaking_pipeline, style, words
from models import random_adapters, tiny_pipeline, tiny_transformer
from safetensors.torch import load_file, save, save_file

from ddit_rt.adapters import load_adapters, save_adapters
from ddit_rt.artifact import BucketEntry, Manifest, open_artifact
from ddit_rt.artifact.trust import is_trusted
from ddit_rt.blocks import TokenRanges
from ddit_rt.blocks.package import METADATA_KEY, PackageInfo, read_info
from ddit_rt.errors import ArtifactError, ArtifactMismatchError, DditError
from ddit_rt.models import FluxFamily

FLUX = FluxFamily()
PACKAGE = json.dumps(
    {
        "block": "Block",
        "inputs": [["x", ["batch", "image", 32], "float32"], ["rope", ["image", 8], "float32"]],
        "device": "cpu",
        "ranges": {"batch": [1, 8], "image": [4, 4096], "text": [1, 512]},
        "constants": {"ff.weight": [[32, 32], "float32"]},
        "attention": ["math"],
    }
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """One with entries of every kind."""
    described = Manifest.describe(
        tiny_transformer(),
        project_version="1.2.3",
        family="flux",
        ranges=TokenRanges(),
        buckets=(BucketEntry(patch="p", method="base", variant=None),),
        policy={"name": "fine"},
        pipeline_defaults={"height": 256},
        block_changes={"Block.attn.processor": "mine.Processor"},
    )
    entry = {"sha256": "0" * 64, "bytes": 1}
    plain: dict[str, Any] = json.loads(described.to_json())
    plain["packages"] = {"B/package.pt2": {**entry, "block_type": "B", "variant": None}}
    return plain | {"files": {"adapters/2p/x.safetensors": entry}}


@drawn(200)
@given(data=st.data())
def test_manifests(manifest: dict[str, Any], data: Any) -> None:
    text = json.dumps(data.draw(edited(manifest)))
    if data.draw(st.booleans()):
        text = data.draw(damaged(text.encode())).decode(errors="replace")
    try:
        read = Manifest.from_json(text)
    except ArtifactError:
        return
    assert Manifest.from_json(read.to_json()) == read


@drawn(200)
@given(data=st.data())
def test_what_packages_say(data: Any) -> None:
    text = json.dumps(data.draw(edited(json.loads(PACKAGE))))
    try:
        info = PackageInfo.from_json(text)
    except ArtifactError:
        return
    assert PackageInfo.from_json(info.to_json()) == info


def package(path: Path, text: str = PACKAGE, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        metadata = json.dumps({METADATA_KEY: text})
        archive.writestr("package/data/aotinductor/model/m_metadata.json", metadata, **options)
    return path


@drawn(300)
@given(data=st.data())
def test_packages(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = package(tmp_path_factory.getbasetemp() / "drawn.pt2")
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        read_info(path)
    except ArtifactError:
        return


def test_text_too_deep_to_read_is_refused_everywhere(tmp_path: Path, own_home: Path) -> None:
    artifact = tmp_path / "model.ddit"
    artifact.mkdir()
    (artifact / "manifest.json").write_text(DEEP)
    own_home.mkdir()
    (own_home / "trusted.json").write_text(DEEP)
    readers = (
        lambda: open_artifact(artifact),
        lambda: PackageInfo.from_json(DEEP),
        lambda: read_info(package(tmp_path / "p.pt2", DEEP)),
        lambda: is_trusted("0" * 64),
        lambda: load_adapters(adapter_saying(tmp_path, DEEP), FLUX, tiny_transformer()),
    )
    for read in readers:
        with pytest.raises(ArtifactError):
            read()


def test_a_package_that_would_unpack_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    """A bomb: 64 MiB of zeros in less than one; of ours nothing is compressed."""
    path = package(tmp_path / "bomb.pt2")
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("package/data/aotinductor/model/m.so", "w") as file,
    ):
        for _ in range(64):
            file.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(ArtifactError, match="compressed.*do not use it"):
        read_info(path)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline, folder = tiny_pipeline(), tmp_path_factory.mktemp("adapters")
    save_adapters(random_adapters(pipeline), folder, FLUX, pipeline.transformer)
    return folder


def adapter_saying(folder: Path, text: str) -> Path:
    """An adapter of no tensors whose metadata are any text."""
    target = folder / "adapters" / "2p"
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {"x": torch.zeros(1)}, target / "patch_adapter.safetensors", {"ddit_rt_adapter": text}
    )
    return target


@drawn(60)
@given(data=st.data())
def test_adapters(adapters: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    from safetensors import safe_open

    source = adapters / "2p" / "patch_adapter.safetensors"
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    (key,) = metadata
    text = json.dumps(data.draw(edited(json.loads(metadata[key]))))
    content = save(load_file(source), {key: text})
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    folder = tmp_path_factory.getbasetemp() / "drawn_adapters" / "2p"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.name).write_bytes(content)
    try:
        load_adapters(folder, FLUX, tiny_transformer())
    except (ArtifactError, ArtifactMismatchError):
        return


@pytest.fixture(scope="module")
def styled() -> Any:
    pipeline = speaking_pipeline()
    return eager(pipeline), everything(pipeline)


@drawn(60)
@given(data=st.data())
def test_loras(styled: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    engine, before = styled
    state = {**style(engine.pipeline), **words(engine.pipeline)}
    if data.draw(st.booleans()):
        state = kohya(engine.pipeline)
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        value = state.pop(name)
        kind = data.draw(st.sampled_from(["renamed", "gone", "shape", "type", "number"]))
        if kind == "renamed":
            state[data.draw(st.text("abA_.01", min_size=1)) + name[5:]] = value
        elif kind == "shape":
            state[name] = torch.zeros(data.draw(st.lists(st.integers(0, 4), max_size=4)))
        elif kind == "type":
            kinds = [torch.int8, torch.float16, torch.float64, torch.bool]
            state[name] = value.to(data.draw(st.sampled_from(kinds)))
        elif kind == "number":
            state[name] = value * data.draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
    content = save({name: value.contiguous() for name, value in state.items()})
    if len(state) == 12 and data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    path.write_bytes(content)
    try:
        engine.load_lora(str(path), data.draw(st.floats(-2, 2)))
    except (ValueError, TypeError, DditError):
        assert engine.loras == {}
    engine.unload_loras()
    check_unchanged(engine.pipeline, before)
