"""The ComfyUI nodes, called as ComfyUI calls them."""

from __future__ import annotations

import inspect
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from extras import need
from models import seeded
from served import tiny_engine

import ddit_rt
from ddit_rt import Engine

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
TYPES = {"STRING", "INT", "FLOAT", "BOOLEAN"}
OWN = {"DDIT_ENGINE", "DDIT_TRACE", "IMAGE"}


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    """As ComfyUI loads a folder of `custom_nodes`."""
    spec = spec_from_file_location("custom_nodes.ddit_rt", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    mappings: dict[str, Any] = module.NODE_CLASS_MAPPINGS
    return mappings


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def call(node: Any, **given: Any) -> Any:
    """Runs a node with its defaults, all of them by name."""
    asked = node.INPUT_TYPES()
    inputs = {**asked["required"], **asked.get("optional", {})}
    defaults = {name: one[1]["default"] for name, one in inputs.items() if len(one) > 1}
    return getattr(node(), node.FUNCTION)(**{**defaults, **given})


def test_every_node_says_what_comfyui_asks_for(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        asked = node.INPUT_TYPES()
        assert set(asked) <= {"required", "optional"}
        inputs = {**asked["required"], **asked.get("optional", {})}
        takes = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert list(takes) == ["self", *inputs]
        for kind, *settings in inputs.values():
            assert kind in TYPES | OWN
            assert (kind in TYPES) == bool(settings)
        assert node.CATEGORY == "ddit_rt"
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert set(node.RETURN_TYPES) <= OWN


def test_an_artifact_is_loaded_and_trusted_only_if_its_user_says_so(
    nodes: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(artifact: str, model: str | None, **more: Any) -> Engine:
        asked.append((artifact, model, more["trust_code"]))
        return engine

    monkeypatch.setattr("ddit_rt.sources.load_engine", load)
    assert call(nodes["DditLoadArtifact"]) == (engine,)
    assert call(nodes["DditLoadArtifact"], artifact=" a.ddit", model="b ", trust_code=True)
    assert asked == [("demo", None, False), ("a.ddit", "b", True)]


def test_a_sample_is_the_engines_own_in_comfyuis_layout(
    nodes: dict[str, Any], engine: Engine
) -> None:
    given = {"engine": engine, "prompt": "a fox", "seed": 3, "steps": 4, "patch_policy": "fine"}
    images, trace = call(nodes["DditSample"], **given, width=96, batch_size=2)
    assert (images.dtype, images.shape) == (torch.float32, (2, 64, 96, 3))
    assert 0 <= images.min() < images.max() <= 1
    assert [step.patch_size for step in trace] == ["p"] * 4
    one = {"num_inference_steps": 4, "patch_policy": "fine", "width": 96, "output_type": "np"}
    for place, image in enumerate(images):
        expected = engine("a fox", generator=seeded(3 + place), **one).images[0]
        assert np.allclose(image.numpy(), expected, atol=1e-5)


def test_a_policy_is_text_or_a_speed(nodes: dict[str, Any], engine: Engine) -> None:
    given = {"engine": engine, "prompt": "a fox", "steps": 4}
    _, trace = call(nodes["DditSample"], **given, patch_policy="2p:0.5,p")
    assert [step.patch_size for step in trace] == ["2p", "2p", "p", "p"]
    with pytest.raises(ValueError, match="calibrat"):
        call(nodes["DditSample"], **given, patch_policy="0.5")
    with pytest.raises(ValueError, match="nonsense"):
        call(nodes["DditSample"], **given, patch_policy="nonsense")


def test_a_timeline_is_an_image(nodes: dict[str, Any], engine: Engine) -> None:
    need("matplotlib")
    engine("a fox", num_inference_steps=4, patch_policy="2p:0.5,p")
    (image,) = call(nodes["DditTimeline"], trace=engine.last_trace)
    assert image.dtype is torch.float32
    assert (image.shape[0], image.shape[-1]) == (1, 3)
    assert 0 <= image.min() < image.max() <= 1


def test_who_cancels_in_comfyui_ends_the_run_in_its_own_words(
    nodes: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    def throw() -> None:
        raise Interrupted

    management = ModuleType("comfy.model_management")
    vars(management).update(
        processing_interrupted=lambda: True, throw_exception_if_processing_interrupted=throw
    )
    package = ModuleType("comfy")
    vars(package)["model_management"] = management
    monkeypatch.setitem(sys.modules, "comfy", package)
    given = {"engine": engine, "prompt": "a fox", "steps": 4, "patch_policy": "fine"}
    with pytest.raises(Interrupted) as raised:
        call(nodes["DditSample"], **given)
    assert isinstance(raised.value.__context__, ddit_rt.RunCancelled)
