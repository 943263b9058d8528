"""Traces in Chrome's trace-event format, against that format's rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from models import tiny_embeds, tiny_pipeline

import ddit_rt
from ddit_rt import DDiTPolicy, RunTrace, StaticCache, StepRecord
from ddit_rt.loop.perfetto import trace_events

PHASES = {"M", "X", "C"}
"""Of the format's phases those that are written: metadata, complete events, counters."""


def check_format(data: dict[str, Any]) -> None:
    """The rules of the format for these phases, and that slices of a track nest."""
    json.dumps(data, allow_nan=False)
    assert data["displayTimeUnit"] in ("ms", "ns")
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in data["traceEvents"]:
        assert event["ph"] in PHASES
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
        if event["ph"] == "X":
            assert isinstance(event["tid"], int)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
        if event["ph"] == "C":
            assert event["ts"] >= 0
            assert event["args"]
            for value in event["args"].values():
                assert isinstance(value, (int, float))
                assert math.isfinite(value)
    for (start, length), *steps in tracks.values():
        ends = [round((begins + lasts) * 1e3) for begins, lasts in steps]
        assert ends[:-1] == [round(begins * 1e3) for begins, _ in steps[1:]], "steps overlap"
        assert ends[-1:] in ([], [round((start + length) * 1e3)])


def step(k: int, **fields: Any) -> StepRecord:
    known = {"sigma": 0.5, "patch_size": "2p", "tokens": 16, "scores": {}, "thresholds": {}}
    return StepRecord(step=k, latency_ms=0.1 * (k + 1), reason="forced", **{**known, **fields})


def trace(*steps: StepRecord, **fields: Any) -> RunTrace:
    known = {"executor": "cpu", "solver": "Euler", "batch": 1}
    return RunTrace(steps=steps, **{**known, **fields})


def test_every_step_is_a_slice_with_what_it_did_and_what_it_was_judged_by() -> None:
    judged = step(1, scores={"2p": 0.5, "4p": 2.0}, thresholds={"2p": 1.0, "4p": 1.0})
    reused = step(2, reused=True, tokens=0, accumulated=0.25, cache_reason="reused: below")
    data = trace_events({"run": trace(step(0), judged, reused, notes=("slow",))})
    check_format(data)
    slices = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert [one["name"] for one in slices] == ["step loop", "2p", "2p", "2p reused"]
    assert slices[0]["args"]["notes"] == ["slow"]
    assert [one["dur"] for one in slices] == [600.0, 100.0, 200.0, 300.0]
    assert [one["ts"] for one in slices] == [0.0, 0.0, 100.0, 300.0]
    assert slices[2]["args"]["score 4p"] == 2.0
    assert slices[2]["args"]["threshold 4p"] == 1.0
    counters = [event for event in data["traceEvents"] if event["ph"] == "C"]
    assert {"score": 0.5, "threshold": 1.0} in [one["args"] for one in counters]
    assert {one["ts"] for one in counters if one["name"] == "score 2p"} == {100.0}
    assert [one["args"]["tokens"] for one in counters if one["name"] == "tokens"] == [16, 16, 0]


def test_numbers_that_are_not_finite_are_no_counters() -> None:
    scores = {"2p": math.nan, "4p": math.inf}
    bad = step(0, scores=scores, thresholds=dict.fromkeys(scores, math.inf), accumulated=math.nan)
    data = trace_events({"run": trace(bad, nonfinite=True)})
    check_format(data)
    assert [one["name"] for one in data["traceEvents"] if one["ph"] == "C"] == ["tokens"]
    assert data["traceEvents"][3]["args"]["score 2p"] == "nan"


def test_runs_are_processes_and_each_says_by_which_clock() -> None:
    data = trace_events({"a": trace(step(0)), "b": trace(step(0), executor="cuda-loop")})
    check_format(data)
    names = {one["pid"]: one["args"]["name"] for one in data["traceEvents"] if one["ph"] == "M"}
    assert names == {1: "steps (cpu)", 2: "steps (cuda-loop)"}
    times = data["otherData"]["times"]
    assert "host's wall clock" in times["a"]
    assert "starts not measured" in times["a"]
    assert "device's own clock" in times["b"]


def test_a_run_without_steps_is_an_empty_slice() -> None:
    data = trace_events({"run": trace(cancelled=True)})
    check_format(data)
    assert [one["dur"] for one in data["traceEvents"] if one["ph"] == "X"] == [0.0]


@pytest.mark.parametrize("by_callback", [False, True], ids=["table", "pipeline"])
def test_a_real_run_is_saved_in_both_forms(tmp_path: Path, *, by_callback: bool) -> None:
    engine = ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)
    more = {"callback_on_step_end": lambda *_: {}} if by_callback else {}
    engine(
        **tiny_embeds(),
        height=64,
        width=64,
        num_inference_steps=8,
        output_type="latent",
        patch_policy=DDiTPolicy(tau=0.5),
        step_cache=StaticCache(2, first=1),
        **more,
    )
    ran = engine.last_trace
    assert ran is not None
    plain = json.loads(ran.save(tmp_path / "run.json").read_text())
    assert plain == json.loads(json.dumps(ran.to_dict()))
    data = json.loads(ran.save(tmp_path / "run.perfetto.json").read_text())
    check_format(data)
    whole, *steps = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert len(steps) == 8
    assert whole["dur"] == pytest.approx(ran.latency_ms * 1e3, abs=0.01)
    assert [one["args"]["patch_size"] for one in steps] == ran.patch_sizes()
    assert sum(one["cat"] == "reused" for one in steps) == ran.reused > 0
    scored = {record.step for record in ran if record.scores}
    assert {one["args"]["step"] for one in steps if "score 2p" in one["args"]} == scored


@pytest.mark.parametrize("name", ["run.txt", "run", ".json.gz"])
def test_a_name_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.json"):
        trace(step(0)).save(tmp_path / name)
    assert not list(tmp_path.iterdir())
