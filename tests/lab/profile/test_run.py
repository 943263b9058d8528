"""The profiler of a run: its table against the run's own trace."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import eager, seeded
from profiles import PLAN, ceilings, profiled, tiny_subject
from text_encoders import save_tiny
from wan_models import CALL as WAN
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt.cli import main
from ddit_rt.engine.cost import step_cost
from ddit_rt.lab.profile import accounting
from ddit_rt.lab.profile.events import Event
from ddit_rt.lab.profile.report import report_of, text_of
from ddit_rt.lab.profile.subject import subject_of

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "profile.py"


def rows_of(entry: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["patch"], row["phase"]): row for row in entry["rows"]}


def test_table_adds_up_to_the_loop_and_fits_the_trace(tmp_path: Path) -> None:
    """And the Chrome trace holds the ranges."""
    entry = profiled(tiny_subject(), None, tmp_path)
    rows = rows_of(entry)
    phases = ("decide", "model", "solver")
    assert list(rows) == [*((p, f) for p in ("p", "2p", "4p") for f in phases), ("", "other")]
    calls = Counter(PLAN)
    assert all(row["calls"] == calls[patch] for (patch, _), row in rows.items() if patch)
    assert entry["clock"] == "wall"
    total = sum(row["ms"] for row in rows.values())
    assert total == pytest.approx(entry["loop_ms"], rel=1e-9)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, rel=1e-9)
    # Each step's own clock starts before its phases and stops after them; the two clocks agree to
    # well below a millisecond over such a run.
    for patch in calls:
        steps = [s["latency_ms"] for s in entry["trace"]["steps"] if s["patch_size"] == patch]
        assert 0 < sum(rows[patch, phase]["ms"] for phase in phases) <= sum(steps) + 1
    assert entry["trace"]["latency_ms"] <= entry["loop_ms"] + 1
    with gzip.open(entry["chrome_trace"], "rt") as file:
        events = json.load(file)["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert names["ddit_rt/run"] == 1
    assert names["ddit_rt/decide"] == names["ddit_rt/solver"] == len(PLAN)
    assert [names[f"ddit_rt/model/{patch}"] for patch in ("p", "2p", "4p")] == [1, 3, 2]


def test_rates_are_the_least_work_over_the_time(tmp_path: Path) -> None:
    policy = ddit_rt.DDiTPolicy(tau=1e-9, refresh=None)
    subject = tiny_subject(policy=policy)
    entry = profiled(subject, None, tmp_path)
    rows, latents = rows_of(entry), subject.latents
    model, decide, solver = (rows["p", phase] for phase in ("model", "decide", "solver"))
    cost = step_cost(subject.model, height=16, width=24, multiple=1, batch=2, text_tokens=7)
    seconds = model["ms"] / 1e3
    assert model["flops_per_s"] * seconds == pytest.approx(cost.flops * model["calls"])
    assert model["flops_of_ceiling"] == pytest.approx(model["flops_per_s"] / 1e9)
    assert model["bytes_per_s"] * seconds == pytest.approx(cost.weight_bytes * model["calls"])
    scored = [step for step in entry["trace"]["steps"] if step["patch_size"] == "p"]
    scored = [step for step in scored if step["scores"]]
    assert scored
    moved = decide["bytes_per_s"] * decide["ms"] / 1e3
    assert moved == pytest.approx(4 * latents.numel() * 4 * len(scored))
    moved = solver["bytes_per_s"] * solver["ms"] / 1e3
    assert moved == pytest.approx(4 * latents.numel() * 4 * solver["calls"])
    assert solver["flops_per_s"] is None


def no_work(*_: Any) -> Any:
    return accounting.Work(flops=0, bytes=0)


def span(name: str, start: float) -> Any:
    """Half a microsecond."""
    return Event("user_annotation", name, start, start + 0.5)


def test_ranges_of_another_run_are_refused() -> None:
    trace = tiny_subject().run()
    names = [name for p in PLAN for name in ("decide", f"model/{p}", "solver")]
    spans = [span(name, k) for k, name in enumerate(names)]
    assert accounting.account_of_spans(spans, trace, no_work, "device")
    with pytest.raises(ValueError, match="of a run of 6 steps"):
        accounting.account_of_spans(spans[:-1], trace, no_work, "device")
    spans[1] = span("model/p", 1)
    with pytest.raises(ValueError, match="the trace says"):
        accounting.account_of_spans(spans, trace, no_work, "device")


@pytest.mark.parametrize("cache", [ddit_rt.StaticCache(2, first=1), ddit_rt.FirstBlockCache(9.0)])
def test_steps_that_reuse_have_rows_of_their_own(cache: ddit_rt.StepCache, tmp_path: Path) -> None:
    subject = tiny_subject(policy=ddit_rt.StaticPolicy(["2p", "2p", *["p"] * 4]), step_cache=cache)
    entry = profiled(subject, None, tmp_path)
    rows = rows_of(entry)
    steps = entry["trace"]["steps"]
    for patch, count in Counter(step["patch_size"] for step in steps).items():
        reused = sum(step["reused"] for step in steps if step["patch_size"] == patch)
        assert 0 < reused < count
        assert rows[patch, "reuse"]["calls"] == reused
        assert rows[patch, "model"]["calls"] == count - reused
        work = [rows[patch, phase] for phase in ("reuse", "model")]
        least = [row["flops_per_s"] * row["ms"] / row["calls"] for row in work]
        assert 0 < least[0] < least[1] / 2
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(entry["loop_ms"], rel=1e-9)


def test_a_video_is_profiled_with_both_passes_of_guidance(tmp_path: Path) -> None:
    engine = eager(wan_pipeline())
    arguments = {name: value for name, value in WAN.items() if name != "prompt"}
    policy, cache = ddit_rt.StaticPolicy("2p:0.5,p"), ddit_rt.NoCache()
    subject = subject_of(engine, policy, cache, ["a cat"], {**arguments, "generator": seeded()})
    report = report_of(subject, ceilings(), [profiled(subject, None, tmp_path)])
    shape = tuple(subject.latents.shape)
    assert len(shape) == 5
    assert f"latents {' x '.join(map(str, shape))}" in text_of(report)
    (run,) = report["runs"]
    assert subject.passes == 2
    counts = {"batch": 2, "text_tokens": subject.text_tokens, "frames": shape[2]}
    size = {"height": shape[3], "width": shape[4]}
    for patch, multiple in (("p", 1), ("2p", 2)):
        row = rows_of(run)[patch, "model"]
        cost = step_cost(subject.model, multiple=multiple, **size, **counts)
        flops = row["flops_per_s"] * row["ms"] / 1e3
        assert flops == pytest.approx(cost.flops * row["calls"])


def test_phases_that_a_profiler_cannot_see_are_in_the_rest() -> None:
    trace = tiny_subject().run()
    names = [f"model/{patch}" for patch in PLAN]
    spans = [span(name, k) for k, name in enumerate(names)]
    account = accounting.account_of_spans(spans, trace, no_work, "device")
    *models, rest = account.rows
    assert [(row.patch, row.phase, row.calls) for row in models] == [
        ("p", "model", 1),
        ("2p", "model", 3),
        ("4p", "model", 2),
    ]
    assert account.seconds == pytest.approx(trace.latency_ms / 1e3)
    assert rest.seconds == pytest.approx(account.seconds - 6 * 0.5e-6)


def test_whole_steps_where_the_device_decides() -> None:
    subject = tiny_subject()
    trace = subject.run()
    work_of = accounting.floors(subject, trace)
    account = accounting.account_of_trace(trace, work_of)
    assert [(row.patch, row.phase, row.calls) for row in account.rows] == [
        ("p", "step", 1),
        ("2p", "step", 3),
        ("4p", "step", 2),
    ]
    assert sum(row.seconds for row in account.rows) == pytest.approx(trace.latency_ms / 1e3)
    model, solver = work_of("model", 0), work_of("solver", 0)
    assert account.rows[2].bytes == 2 * (model.bytes + solver.bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["host", "loop"])
def test_table_on_cuda(form: str, tmp_path: Path) -> None:
    entry = profiled(tiny_subject("cuda"), form, tmp_path)
    assert entry["executor"] == f"cuda-{form}"
    assert entry["clock"] == ("device" if form == "host" else "trace")
    calls = {(row["patch"], row["calls"]) for row in entry["rows"] if row["patch"]}
    assert calls == set(Counter(PLAN).items())


@pytest.mark.slow
def test_artifact_is_profiled_with_its_model(
    artifact_path: Path,
    artifact_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DDIT_RT_HOME", str(artifact_home))
    model = save_tiny(tmp_path / "model", seed=0)
    arguments = ["profile", str(artifact_path), f"--model={model}", "--tool=torch", "--steps=4"]
    arguments += ["--max-sequence-length=8", f"--out={tmp_path}", "--policy=2p:0.5,p"]
    assert main([*arguments, "--prompt", "a zebra"]) == 0
    report = json.loads((tmp_path / "profile.json").read_text())
    assert report["settings"]["latents"] == [1, 4, 16, 16]
    assert report["settings"]["text_tokens"] == 8
    (run,) = report["runs"]
    assert run["trace"]["latency_ms"] > 0
    assert [step["patch_size"] for step in run["trace"]["steps"]] == ["2p", "2p", "p", "p"]
    text = capsys.readouterr().out
    assert all(f"{row['ms']:.2f}" in text for row in run["rows"])


@pytest.mark.slow
def test_newcomer_can_try_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "demo", "--tool=torch", "--steps=6", "--out", "out"]
    # One thread: with several, other processes on the machine can stretch a run a hundredfold.
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "peak, measured now" in done.stdout
    assert (tmp_path / "out" / "trace-cpu.json.gz").is_file()
