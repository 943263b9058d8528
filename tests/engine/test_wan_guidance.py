"""Classifier-free guidance of Wan: both halves, one decision, and intervals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import FINE, trace_of
from models import eager, seeded
from torch import Tensor
from wan_models import CALL, wan_pipeline

from ddit_rt import DDiTPolicy, MagCache, StaticPolicy
from ddit_rt.models.wan import WanFamily


def test_guidance_interval_without_steps_equals_no_guidance() -> None:
    """And an interval of all steps equals none; both to the bit."""
    engine = eager(wan_pipeline())
    engine.batched_guidance = False
    finals = [
        engine(**CALL, **options, generator=seeded(), patch_policy=FINE).frames
        for options in (
            {"guidance_scale": 1.0},
            {"guidance_interval": (0.5, 0.5)},
            {"guidance_interval": (0.0, 1.0)},
            {},
            {"guidance_interval": (0.0, 0.5)},
        )
    ]
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[2], finals[3])
    assert not torch.allclose(finals[4], finals[0], atol=0.01)
    assert not torch.allclose(finals[4], finals[3], atol=0.01)


def test_an_interval_that_is_shorter_than_a_step_is_told() -> None:
    engine = eager(wan_pipeline())
    call = {**CALL, "num_inference_steps": 8, "patch_policy": FINE}
    with pytest.warns(UserWarning, match=r"\(0.0, 0.05\) covers none of the 8 steps"):
        engine(**call, guidance_interval=(0.0, 0.05))
    assert engine.last_trace is not None
    assert any("covers none" in note for note in engine.last_trace.notes)


@pytest.mark.parametrize("batched", [True, False])
def test_steps_outside_the_interval_run_the_prompt_alone(
    batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every patch size, with a step cache too, which computes where guidance comes or goes."""
    engine, rows = eager(wan_pipeline()), []
    run_blocks = WanFamily.run_blocks

    def counting(family: WanFamily, runners: Any, hidden: Tensor, *inputs: Any) -> Tensor:
        rows.append(len(hidden))
        return run_blocks(family, runners, hidden, *inputs)

    monkeypatch.setattr(WanFamily, "run_blocks", counting)
    engine.batched_guidance = batched
    call = {**CALL, "num_inference_steps": 8, "guidance_interval": (0.25, 0.75)}
    engine(**call, patch_policy=StaticPolicy(["p", "2p"] * 4))
    guided = [2] if batched else [1, 1]
    assert rows == [1, 1, *guided * 4, 1, 1]
    trace = trace_of(engine)
    assert trace.notes == ("steps 0 to 1: unguided", "steps 6 to 7: unguided")
    rows.clear()
    ratios = (1.0,) * 8
    cache = MagCache(threshold=1.0, max_skip_steps=9, retention_ratio=0.0, mag_ratios=ratios)
    cached = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache).frames
    assert rows == [1, *guided, 1]
    trace = trace_of(engine)
    assert [step.reused for step in trace] == [step not in (0, 2, 6) for step in range(8)]
    again = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache).frames
    assert torch.equal(cached, again)


def test_guidance_modes_agree_and_the_policy_decides_once_for_both_halves() -> None:
    engine, finals, sizes = eager(wan_pipeline()), [], []
    call = {**CALL, "height": 128, "width": 128, "num_inference_steps": 12}
    for batched in (True, False):
        engine.batched_guidance = batched
        plan = StaticPolicy(["p", "2p", "4p", "p", "2p", "p"])
        finals.append(engine(**CALL, generator=seeded(), patch_policy=plan).frames)
        result = engine(**call, generator=seeded(), patch_policy=DDiTPolicy(tau=1e3))
        assert torch.isfinite(result.frames).all()
        sizes.append(trace_of(engine).patch_sizes())
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)
    assert sizes[0] == sizes[1]
    assert {"p", "4p"} <= set(sizes[0])
    assert len(sizes[0]) == 12
