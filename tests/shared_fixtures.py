"""Fixtures that several areas share: `conftest.py` brings them in where tests run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import pytest
from block_models import CompiledBlocks
from diffusers import FluxTransformer2DModel
from emulated_graphs import EmulatedGraphs
from made_once import (
    Packages,
    compile_for_tests,
    made_once,
    packages_made_once,
    shared_folder,
)
from models import random_adapters, tiny_pipeline, tiny_transformer

import ddit_rt
from ddit_rt.artifact import read_manifest, trust
from ddit_rt.blocks import LoraSpec


@pytest.fixture(scope="session", autouse=True)
def cheap_compiles() -> Iterator[None]:
    """For every compile in this process."""
    with pytest.MonkeyPatch.context() as patch:
        compile_for_tests(patch)
        yield


@pytest.fixture(scope="session")
def artifact_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The trust list that knows `artifact_path`."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIT_RT_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Within `with packages():`, what this run has compiled before is not compiled again."""
    return partial(packages_made_once, shared_folder(tmp_path_factory) / "packages")


@pytest.fixture
def compiled_before(packages: Packages) -> Iterator[None]:
    """For tests that compile a model on their way: what was compiled before is copied."""
    with packages():
        yield


@pytest.fixture(scope="session")
def artifact_path(
    tmp_path_factory: pytest.TempPathFactory, artifact_home: Path, packages: Packages
) -> Path:
    """A saved artifact of `tiny_pipeline()` with its random adapters: compiled once for all."""

    def make(path: Path) -> None:
        pipeline = tiny_pipeline()
        with packages():
            engine = ddit_rt.compile(
                pipeline,
                height=64,
                width=64,
                adapter=random_adapters(pipeline),
                patch_policy=ddit_rt.StaticPolicy("2p:0.5,p"),
                progress=False,
            )
        engine.save(path)

    path = made_once(shared_folder(tmp_path_factory) / "tiny.ddit", make)
    trust(read_manifest(path).digest)  # of another worker's home, perhaps
    return path


@pytest.fixture(scope="session")
def compiled_blocks(artifact_path: Path) -> CompiledBlocks:
    """The packages of that artifact: plain blocks, and blocks with LoRA."""
    return CompiledBlocks(artifact_path, LoraSpec(rank=4, scaling=2.0))


@pytest.fixture(scope="session")
def emulated_runtime(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`ddit_rt._runtime` on a mock CUDA runtime with emulated kernels, compiled once for all."""
    headers = emulated.cuda_headers()
    if headers is None:
        pytest.skip("no headers of CUDA 12.8 or newer beside nvcc, in CUDA_HOME or /usr/local")
    folder = shared_folder(tmp_path_factory) / "emulated"
    return emulated.load(made_once(folder, lambda new: emulated.build(new, headers)))


@pytest.fixture
def graphs(emulated_runtime: ModuleType) -> Iterator[EmulatedGraphs]:
    """A CUDA device that a mock runtime makes of the CPU."""
    if emulated_runtime.live_objects()["pinned"]:
        gc.collect()  # so that no loop of an earlier test ends within this one
    emulated_runtime.reset()
    yield EmulatedGraphs(emulated_runtime)
    assert emulated_runtime.violation() == ""


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What OpenTelemetry exports: its SDK's `InMemorySpanExporter`.

    The process's own provider can be set but once, so that it stays as it is.
    """
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="pip install 'ddit_rt[test]'")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    """A fresh tiny model with the weights of seed 0."""
    return tiny_transformer()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps every test away from the user's list of trusted artifacts."""
    home = tmp_path / "ddit-home"
    monkeypatch.setenv("DDIT_RT_HOME", str(home))
    return home
