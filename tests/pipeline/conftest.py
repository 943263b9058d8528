"""One compiled tiny pipeline, with adapters, for all tests of the pipeline layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from models import noise, tiny_pipeline

import ddit_rt
from ddit_rt.adapters import AdapterConfig, AdapterSet, PatchAdapter, untrained_lora
from ddit_rt.families.flux import FluxFamily


def random_adapters(pipeline: FluxPipeline) -> AdapterSet:
    """Adapters in which every part does something."""
    family, adapters = FluxFamily(), {}
    for name in ("2p", "4p"):
        config = AdapterConfig(patch=name, rank=4, lora_alpha=4)
        torch.manual_seed(0)  # the residual's first layer starts random
        adapter = PatchAdapter.from_base(config, family, pipeline.transformer)
        adapter.requires_grad_(False)
        adapter.identifier.copy_(noise(*adapter.identifier.shape) * 0.1)
        adapter.residual_out.weight.copy_(noise(*adapter.residual_out.weight.shape) * 0.05)
        lora = untrained_lora(family, pipeline.transformer, config)
        adapter.lora = {
            key: noise(*value.shape, seed=index) * 0.1
            for index, (key, value) in enumerate(lora.items())
        }
        adapters[adapter.config.multiple] = adapter
    return AdapterSet(adapters=adapters)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trust list of the tests' own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIT_RT_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One trust list for all tests here, since they share an artifact."""
    monkeypatch.setenv("DDIT_RT_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A saved artifact of `tiny_pipeline()` with its random adapters."""
    pipeline = tiny_pipeline()
    engine = ddit_rt.compile(
        pipeline,
        height=64,
        width=64,
        adapter=random_adapters(pipeline),
        patch_policy=ddit_rt.StaticPolicy("2p:0.5,p"),
        progress=False,
    )
    return engine.save(tmp_path_factory.mktemp("artifact") / "tiny.ddit")


@pytest.fixture
def pipeline() -> FluxPipeline:
    """A fresh `tiny_pipeline()`: the same weights every time."""
    return tiny_pipeline()


@pytest.fixture
def engine(artifact_path: Path, pipeline: FluxPipeline) -> ddit_rt.Engine:
    """The compiled engine, loaded for a fresh pipeline."""
    return ddit_rt.load(artifact_path, pipeline, progress=False)
