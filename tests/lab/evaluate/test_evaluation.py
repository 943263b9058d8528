"""A whole evaluation on a tiny engine: its report, going on, and what it refuses."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import PROMPTS, run, settings
from extras import need
from PIL import Image

from ddit_rt import Engine, StaticPolicy
from ddit_rt.lab.evaluate.report import _unequal
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.statistics import mean_interval
from ddit_rt.policies import CacheFit

PLANS = ["fine", "default", "equal-steps", "equal-static"]


@pytest.fixture(scope="module")
def report(evaluation: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((evaluation / "report.json").read_text())
    return data


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def shown(folder: Path, plan: str, prompt: int, repeat: int) -> Any:
    with Image.open(folder / "pictures" / plan / f"{prompt:05d}-{repeat}.png") as image:
        return np.asarray(image)


def test_every_plan_is_there_with_cost_and_quality(report: dict[str, Any]) -> None:
    assert [plan["name"] for plan in report["plans"]] == PLANS
    fine, default, *others = report["plans"]
    assert fine["role"] == "reference"
    assert fine["speedup"] == 1
    # 8 steps of 64 tokens; 2p takes 16.
    assert fine["tokens"]["value"] == 8 * 64
    assert fine["scores"] == {}
    assert default["tokens"]["value"] < 8 * 64
    assert set(default["scores"]) == {"psnr", "ssim", "demo_frechet"}
    for plan in others:
        # Equal cost to half a fine step up and one step's saving down.
        assert plan["role"] == "rival"
        assert -64 < plan["tokens"]["value"] - default["tokens"]["value"] <= 32
    for name in PLANS:  # the same noise for every plan, and its own for every image
        images = [image for entry in report["prompts"] for image in entry["pictures"][name]]
        assert [image["seed"] for image in images] == [0, 1, 2, 3, 4, 5]


def test_scores_are_of_the_images_in_the_folder(report: dict[str, Any], evaluation: Path) -> None:
    for name in PLANS[1:]:
        means = []
        for index in range(len(PROMPTS)):
            pairs = [[shown(evaluation, plan, index, r) for r in (0, 1)] for plan in (name, "fine")]
            means.append(statistics.fmean(fidelity(*pairs).ssim))
        wanted = mean_interval(means)
        (plan,) = (plan for plan in report["plans"] if plan["name"] == name)
        found = plan["scores"]["ssim"]
        assert found["value"] == pytest.approx(wanted.value)
        assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
        assert found["pictures"] == 6


def test_wins_are_counted_over_prompts(report: dict[str, Any]) -> None:
    (entry,) = (
        e for e in report["wins"] if e["metric"] == "ssim" and e["against"] == "equal-steps"
    )

    def mean(prompt: dict[str, Any], plan: str) -> float:
        return statistics.fmean(p["scores"]["ssim"] for p in prompt["pictures"][plan])

    wins = [mean(p, "default") > mean(p, "equal-steps") for p in report["prompts"]]
    assert entry["share"]["value"] == pytest.approx(sum(wins) / 3)
    assert entry["prompts"] == 3


def test_worst_prompt_comes_first(report: dict[str, Any]) -> None:
    lowest = [
        min(image["scores"]["ssim"] for image in report["prompts"][i]["pictures"]["default"])
        for i in report["worst"]
    ]
    assert sorted(report["worst"]) == [0, 1, 2]
    assert lowest == sorted(lowest)


def test_report_names_what_is_missing(report: dict[str, Any]) -> None:
    (absent,) = report["absent"]
    assert absent["name"] == "TeaCache"
    assert "ddit-rt calibrate" in absent["reason"]
    assert [skipped["name"] for skipped in report["skipped"]] == ["lpips"]
    assert any("3 prompts" in note for note in report["notes"])


@pytest.mark.slow
def test_teacache_is_a_baseline_where_it_was_fitted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("torchmetrics")
    fit = CacheFit(kind="teacache", values=(1.0, 0.0), source="of this test")
    monkeypatch.setattr(engine, "artifact", engine.artifact.with_cache_fit(fit))
    report = run(engine, settings(tmp_path / "out"))
    assert [plan["name"] for plan in report["plans"]] == [*PLANS, "teacache"]
    assert report["absent"] == []
    cached, default = report["plans"][-1], report["plans"][1]
    assert cached["step_cache"]["step_cache"] == "TeaCache"
    assert 64 <= cached["tokens"]["value"] < 8 * 64
    assert cached["tokens"]["value"] == pytest.approx(default["tokens"]["value"], abs=64)
    assert default["step_cache"] == {"step_cache": "NoCache"}


def test_baseline_of_other_seconds_is_noted() -> None:
    names = {"a": 1.0, "b": 1.1, "c": 1.5, "d": 0.5}
    entries = [
        {"name": name, "title": name, "role": "rival", "seconds": {"value": seconds}}
        for name, seconds in names.items()
    ]
    slower, faster = _unequal(entries, "a")
    assert slower.startswith("c took 1.50 times the seconds of a")
    assert faster.startswith("d took 0.50 times")


def test_going_on_makes_and_scores_only_what_is_missing(
    engine: Engine, evaluation: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(evaluation, tmp_path / "copy")
    before = json.loads((copy / "report.json").read_text())
    # As after a stop: the last images are unnoted, a line is cut off, an image is lost.
    rows = (copy / "pictures.jsonl").read_text().splitlines(keepends=True)
    (copy / "pictures.jsonl").write_text("".join(rows[:-4]) + rows[-4][:50])
    lost = copy / "pictures" / "default" / "00000-0.png"
    lost.unlink()
    kept = copy / "pictures" / "default" / "00001-0.png"
    stamp = kept.stat().st_mtime_ns
    after = run(engine, settings(copy, seeds=2))
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == stamp
    # Two batches of four plans came anew; equal images have equal scores, read not computed.
    assert [session["pictures"] for session in after["sessions"]] == [16, 8]
    assert any("timed in 2 sessions" in note for note in after["notes"])
    assert [plan["scores"] for plan in after["plans"]] == [
        plan["scores"] for plan in before["plans"]
    ]
    keys = [
        (row["metric"], row["picture"], row["reference"]) for row in lines(copy / "scores.jsonl")
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 9}, "steps: 8 there, 9 now"),
        ({"seed": 5}, "seed: 0 there, 5 now"),
        ({"prompts": ("a fox",)}, r'prompts: \["a zebra".* there, \["a fox"\] now'),
        ({"policies": (("static", StaticPolicy("2p:0.4,p")),)}, r"policies: \[\] there, .*StaticP"),
    ],
)
def test_other_settings_are_refused_with_both(
    engine: Engine, evaluation: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*name another folder with --out"):
        run(engine, settings(evaluation, **{"seeds": 2, **fields}))


def test_folder_with_other_files_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"no evaluation \(no settings.json\)"):
        run(engine, settings(tmp_path))


@pytest.mark.slow
def test_batch_shares_its_time_and_one_prompt_has_no_interval(
    engine: Engine, tmp_path: Path
) -> None:
    need("torchmetrics")
    report = run(engine, settings(tmp_path / "a", batch=2, prompts=("a zebra", "a vase")))
    assert any("batches of 2" in note for note in report["notes"])
    rows = [row for row in lines(tmp_path / "a" / "pictures.jsonl") if row["plan"] == "fine"]
    assert rows[0]["seconds"] == rows[1]["seconds"]
    assert rows[0]["trace"]["batch"] == 2
    one = run(engine, settings(tmp_path / "b", prompts=("a zebra",)))
    assert one["plans"][1]["scores"]["ssim"]["low"] is None
    (few,) = (s for s in one["skipped"] if s["name"] == "demo_frechet")
    assert few["reason"] == "a distance of sets needs two images at least"
    json.dumps(one, allow_nan=False)


@pytest.mark.slow
def test_references_of_your_own_give_all_fine_a_distance(
    engine: Engine, evaluation: Path, tmp_path: Path
) -> None:
    folder = evaluation / "pictures" / "fine"
    report = run(engine, settings(tmp_path / "out", references=folder))
    fine = report["plans"][0]["scores"]["demo_frechet"]["value"]
    assert fine >= 0
    (metric,) = (m for m in report["metrics"] if m["name"] == "demo_frechet")
    assert metric["references"] == f"6 images in {folder}"


def test_bad_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no prompts"):
        settings(tmp_path, prompts=())
    with pytest.raises(ValueError, match="steps=8, seeds=0, batch=1, repeats=1"):
        settings(tmp_path, seeds=0)
    with pytest.raises(ValueError, match="got the cost 'euro'"):
        settings(tmp_path, cost_unit="euro")
    with pytest.raises(ValueError, match="fewer than two images"):
        settings(tmp_path, references=tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        settings(tmp_path, references=tmp_path / "none")
