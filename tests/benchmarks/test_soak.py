"""The soak: its draw, what it sees, and a short one."""

from __future__ import annotations

import mmap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from made_once import Packages
from strict_json import strict

import ddit_rt
from ddit_rt.sources import load_pipeline


def test_a_seed_draws_the_same_runs_of_every_kind() -> None:
    runs = import_module("soak_runs")
    drawn = runs.schedule(400, 3, 20)
    assert drawn == runs.schedule(400, 3, 20)
    assert drawn != runs.schedule(400, 4, 20)
    for name, known in (("ending", runs.ENDINGS), ("policy", runs.POLICIES), ("size", runs.SIZES)):
        assert {getattr(run, name) for run in drawn} == set(known)
    assert {len(run.loras) for run in drawn} == {0, 1, 2}
    assert not any(run.loras for run in drawn[::20])
    assert all(run.at < runs.SIZES[run.size] for run in drawn)
    spots = runs.spots(drawn, 6, 0)
    assert [any(run.loras.values()) for run in spots] == [True] * 3 + [False] * 3
    assert {run.ending for run in spots} == {"done"}


def looks(*values: int) -> list[dict[str, int]]:
    return [{"run": 20 * place, "rss_bytes": value} for place, value in enumerate(values)]


def test_growth_is_told_by_the_ends_and_by_the_trend() -> None:
    soak = import_module("bench_soak")
    steady = soak.growth(looks(*[100] * 10), "rss_bytes")
    assert steady == {
        "start": 100,
        "end": 100,
        "by_windows": 0,
        "by_trend": pytest.approx(0, abs=1e-12),
    }
    rising = soak.growth(looks(*range(100, 111)), "rss_bytes")
    assert rising["by_windows"] == pytest.approx(9 / 100.5)
    assert rising["by_trend"] == pytest.approx(10 / 100.5)
    report = {
        "growth": {**dict.fromkeys(soak.BOUNDED, steady), "threads": rising, "blocks": rising},
        "surprises": ["it was to fail"],
        "spots": [{"run": 7, "equal": False}],
    }
    first_words = [line.partition(" ")[0] for line in soak.broken(report)]
    assert first_words == ["it", "threads", "threads", "run"]


def test_latency_is_compared_kind_by_kind() -> None:
    soak, runs = import_module("bench_soak"), import_module("soak_runs")
    done = [run for run in runs.schedule(2000, 0, 20) if run.ending == "done"]
    times = [(2.0 if run.images == 2 else 1.0, 0.5) for run in done]
    late = [
        (3 * wall, cpu) if place > 800 else (wall, cpu) for place, (wall, cpu) in enumerate(times)
    ]
    for seconds, factor in ((times, 1.0), (late, 3.0)):
        wall, cpu = soak.latency(done, seconds)
        assert wall["min"] == wall["max"] == factor
        assert cpu["median"] == 1
        assert wall["count"] > 10


@pytest.fixture
def artifact(
    artifact_home: Path, packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The demo's, which this user's processes trust."""
    monkeypatch.setenv("DDIT_RT_HOME", str(artifact_home))
    with packages():
        engine = ddit_rt.compile(load_pipeline("demo"), height=128, width=128, progress=False)
    return engine.save(tmp_path / "demo.ddit")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_short_soak_makes_its_runs_and_sees_a_leak_and_other_images(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak, out = import_module("bench_soak"), tmp_path / "soak.json"
    arguments = ["--runs", "40", "--artifact", str(artifact), "--out", str(out)]
    soak.main([*arguments, "--spots", "2"])  # forty runs are too few to say that nothing grows
    report = strict(out)
    assert sum(report["endings"].values()) == report["settings"]["runs"] == 40
    assert report["surprises"] == []
    assert [spot["equal"] for spot in report["spots"]] == [True, True]
    assert any(report["spots"][0]["loras"].values())
    assert "seed 0" in import_module("made_tables.cpu").soak(report)

    kept: list[Any] = []
    perform = soak.perform

    def leaking(*given: Any) -> str | None:
        # Of the heap, and of pages that no earlier test of this process can have left in it.
        block, pages = b"x" * (4 << 20), mmap.mmap(-1, 4 << 20)
        pages.write(block)
        kept.append((block, pages))
        made: str | None = perform(*given)
        return made

    monkeypatch.setattr(soak, "perform", leaking)
    monkeypatch.setattr(soak, "again", lambda *_: "another")
    assert soak.main([*arguments, "--spots", "2"]) == 1
    leaky = strict(out)
    assert leaky["outputs"] == report["outputs"]  # a second soak, in the process of the first
    assert [spot["equal"] for spot in leaky["spots"]] == [False, False]
    told = " ".join(leaky["broken"])
    assert "rss_bytes grew" in told
    assert "live_bytes grew" in told
    assert "is not the same to the bit" in told
