"""A watch follows a run step by step and ends it between two steps, however it is driven."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import FINE, trace_of
from models import eager, latents_of, prompting_pipeline, seeded

from ddit_rt import Engine
from ddit_rt.engine.watch import RunWatch, StepView
from ddit_rt.errors import RunCancelled

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 5,
    "output_type": "latent",
    "patch_policy": "2p:0.4,p",
}
DRIVERS = {"table": {}, "pipeline": {"callback_on_step_end": lambda *_: {}}}


@pytest.fixture
def engine() -> Engine:
    return eager(prompting_pipeline())


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_step_is_shown_with_what_the_trace_says(engine: Engine, driver: str) -> None:
    seen: list[StepView] = []
    call = {**CALL, **DRIVERS[driver]}
    watched = engine("a", **call, generator=seeded(), watch=RunWatch(stepped=seen.append))
    trace = trace_of(engine)
    assert [view.step for view in seen] == list(range(5))
    assert [view.patch_size for view in seen] == trace.patch_sizes()
    assert [view.sigmas[0] for view in seen] == [record.sigma for record in trace]
    assert seen[-1].sigmas[1] == 0
    packed = engine._compiled.steps.family.pack_latents(seen[-1].latents)
    assert torch.equal(packed, latents_of(watched))
    plain = engine("a", **call, generator=seeded())
    assert torch.equal(latents_of(plain), latents_of(watched))
    assert len(seen) == 5  # the second run was not watched


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_run_ends_within_a_step_and_the_next_is_unharmed(
    engine: Engine, driver: str, after: int
) -> None:
    call = {**CALL, **DRIVERS[driver]}
    expected = latents_of(engine("a", **call, generator=seeded()))
    seen: list[StepView] = []
    watch = RunWatch(stopped=lambda: len(seen) >= after, stepped=seen.append)
    with pytest.raises(RunCancelled, match=f"after {after} of 5"):
        engine("a", **call, generator=seeded(), watch=watch)
    assert len(seen) == after
    assert torch.equal(latents_of(engine("a", **call, generator=seeded())), expected)


def test_a_watch_of_another_type_is_refused(engine: Engine) -> None:
    with pytest.raises(TypeError, match="RunWatch"):
        engine("a", **CALL, watch=lambda: True)  # type: ignore[arg-type]


def test_a_call_is_checked_without_running(engine: Engine) -> None:
    given, request = engine.read_call("a", height=64, patch_policy="fine")
    assert given == {"prompt": "a", "height": 64}
    assert request.policy == FINE
    with pytest.raises(ValueError, match="unknown arguments"):
        engine.read_call("a", heigth=64)
    with pytest.raises(ValueError, match="calibration"):
        engine.read_call("a", patch_policy="balanced")
    assert engine.last_trace is None
