"""What `import ddit_rt` offers, as editors and users meet it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_type_hints

import diffusers
import pytest
from models import tiny_pipeline
from packaging.version import Version

import ddit_rt
from ddit_rt import errors
from ddit_rt.engine.typed import CallArguments
from ddit_rt.models import FAMILIES


def test_every_public_name_is_there_and_completed() -> None:
    assert set(ddit_rt.__all__) <= set(dir(ddit_rt))
    for name in ddit_rt.__all__:
        assert getattr(ddit_rt, name) is not None


def test_every_error_is_exported() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised <= set(ddit_rt.__all__)


def test_ops_are_reachable_and_the_import_alone_loads_no_torch() -> None:
    code = (
        "import sys, ddit_rt; assert 'torch' not in sys.modules; assert ddit_rt.DditError; "
        "assert 'torch' not in sys.modules; assert callable(ddit_rt.ops.patch_scores)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="compil"):
        ddit_rt.compil  # noqa: B018


def test_engine_says_what_it_is_and_refuses_a_misspelt_attribute() -> None:
    engine = ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)
    said = repr(engine)
    for part in ("FluxPipeline", "p,2p,4p", "DDiTPolicy", "NoCache", "cpu", "float32", "eager"):
        assert part in said
    with pytest.raises(AttributeError):
        engine.batched_guidence = False


def test_how_a_run_goes_is_an_argument_of_compile() -> None:
    pipeline = tiny_pipeline()
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False, batched_guidance=False)
    assert engine.batched_guidance is False
    with pytest.raises(TypeError, match="batched_guidance"):
        ddit_rt.compile(pipeline, backend="eager", batched_guidance="no")


@pytest.mark.parametrize("name", ["executor", "batched_guidance", "patch_sizes"])
def test_a_call_says_where_what_changes_how_it_runs_belongs(name: str) -> None:
    engine = ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)
    with pytest.raises(ValueError, match=f"{name}.*compile"):
        engine("a zebra", **{name: "auto"})


def test_the_typed_call_has_the_arguments_of_every_pipeline_and_no_others() -> None:
    names = {name for family in FAMILIES for name in family.pipeline_classes}
    calls = [getattr(diffusers, name).__call__ for name in names]
    taken = {name for call in calls for name in inspect.signature(call).parameters}
    arguments = set(get_type_hints(CallArguments))
    assert taken - {"self", "prompt"} <= arguments
    if Version(diffusers.__version__) >= Version("0.42"):  # older pipelines take fewer
        assert arguments == taken - {"self", "prompt"}
