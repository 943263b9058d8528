from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from extras import need
from strict_json import strict

from ddit_rt import ops
from ddit_rt.adapters import AdapterConfig, AdapterSet, PatchAdapter, save_adapters
from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.prompts import held_out_prompts
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.models import family_of
from ddit_rt.policies import DDiTPolicy

ARGUMENTS = {"height": 64, "width": 64, "max_sequence_length": 16}
TABLES = ["statistic", "adapters", "static_dynamic"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained adapters of both variants, in the place of trained ones."""
    made = {}
    transformer = pipeline.transformer
    family = family_of(transformer)
    for variant in ("paper", "snr"):
        configs = [AdapterConfig(patch=size, rank=2, variant=variant) for size in ("2p", "4p")]
        adapters = [PatchAdapter.from_base(c, family, transformer) for c in configs]
        made[variant] = tmp_path_factory.mktemp(variant)
        by_multiple = {adapter.config.multiple: adapter for adapter in adapters}
        save_adapters(AdapterSet(adapters=by_multiple), made[variant], family, transformer)
    return made


@pytest.mark.slow
def test_quick_run_matches_costs_and_goes_on_from_what_it_kept(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need("matplotlib", "torchmetrics")
    out, cache = tmp_path / "quick.json", tmp_path / "cache"
    arguments = ["--quick", "--out", str(out), "--cache", str(cache)]
    arguments += ["--adapters-snr", str(folders["snr"]), "--adapters-paper", str(folders["paper"])]
    bench = import_module("bench_quality")
    assert bench.main([*arguments, "--tables", *TABLES]) == 0
    report = strict(out)
    assert list(report["tables"]) == TABLES
    check_baselines(report)
    check_paths(report)
    assert out.with_suffix(".png").stat().st_size > 10_000
    text = import_module("tables").TABLES["quality_demo"](report)
    assert "SNR, trained" in text
    assert "Not measured" not in text
    assert "better than fewer steps at equal time" in text
    capsys.readouterr()
    assert bench.main([*arguments, "--tables", "adapters"]) == 0
    assert "adapters: 0 images" in capsys.readouterr().err
    again = strict(out)
    assert again["tables"] == report["tables"]
    assert again["costs"] == report["costs"]


@pytest.mark.slow
def test_quick_videos_are_compared_frame_by_frame_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("matplotlib", "torchmetrics")
    out, cache = tmp_path / "quick.json", tmp_path / "cache"
    arguments = ["--quick", "--out", str(out), "--cache", str(cache), "--tables", "video"]
    bench = import_module("bench_quality")
    assert bench.main(arguments) == 0
    assert not out.exists()  # the ablations were not asked for
    report = strict(tmp_path / "quick_video.json")
    check_baselines(report)
    rows = {row["name"]: row for row in report["tables"]["video"]}
    plans = ["demo_static", "demo_dynamic", "2p_0.25", "4p_0.25", "2p_0.5_block", "4p_0.5_block"]
    plans += ["tau_0.04", "paper_0.01"]
    assert [name for name, row in rows.items() if row["kind"] != "fewer_steps"] == ["fine", *plans]
    check_videos(rows, report["settings"]["num_frames"])
    claims = [claim for claim in report["claims"] if claim["better"] == "demo_static"]
    assert [claim["worse"] for claim in claims] == list(rows["demo_static"]["fewer_steps"].values())
    check_video_table(report)
    # What was made is found again, without a single run.
    runs = import_module("quality_runs").Runs
    monkeypatch.setattr(runs, "_generate", lambda *_: pytest.fail("made again"))
    assert bench.main(arguments) == 0
    for row in strict(tmp_path / "quick_video.json")["tables"]["video"]:
        before = rows.pop(row["name"])
        assert row["steps_at"] == before["steps_at"]
        assert row["loop_ms"] == before["loop_ms"]
        assert row["flicker"] == before["flicker"]
        # Sums in float32 depend on where an array lies in memory.
        assert row["ssim_per_prompt"] == pytest.approx(before["ssim_per_prompt"], abs=1e-5)
    assert not rows


@pytest.mark.slow
def test_quick_ablations_of_the_study_model_are_judged_by_its_own_captions(
    tmp_path: Path,
) -> None:
    need("matplotlib", "torchmetrics")
    out, cache = tmp_path / "quick.json", tmp_path / "cache"
    arguments = ["--quick", "--out", str(out), "--cache", str(cache), "--tables", "study"]
    bench = import_module("bench_quality")
    assert bench.main(arguments) == 0
    assert not out.exists()
    report = strict(tmp_path / "quick_study.json")
    check_baselines(report)
    assert report["model"]["name"].startswith("study")
    assert report["settings"]["held_out"] == 2
    assert "adapters" not in report["tables"]
    rows = [row for table in report["tables"].values() for row in table]
    assert all(set(row["correct"]) == {"all"} for row in rows)
    assert "quality_study.png" in import_module("tables").TABLES["quality_study"](report)


def check_videos(rows: dict[str, Any], frames: int) -> None:
    fine = rows["fine"]
    assert fine["psnr"] is None
    assert fine["ssim"] == fine["ssim"] | {"value": 1, "low": 1, "high": 1}
    assert fine["flicker"]["value"] == 0
    assert rows["demo_static"]["steps_at"] == {"4p": 2, "p": 5}
    for row in rows.values():
        assert len(row["frames"]) == frames
        # Every video has as many frames, so means of means are the mean of all.
        means = [frame["ssim"] for frame in row["frames"]]
        assert row["ssim"]["value"] == pytest.approx(np.mean(means))
        if row["tokens_share"] < 1:
            assert 0 < row["flicker"]["value"] < 1
            assert row["ssim"]["value"] < 1
            assert row["flicker"]["low"] <= row["flicker"]["value"] <= row["flicker"]["high"]
    psnr = [frame["psnr"] for frame in rows["demo_static"]["frames"]]
    assert rows["demo_static"]["psnr"]["value"] == pytest.approx(np.mean(psnr))


def check_video_table(report: dict[str, Any]) -> None:
    lines = import_module("tables").TABLES["quality_demo_video"](report).splitlines()
    static = next(row for row in report["tables"]["video"] if row["name"] == "demo_static")
    (first, *frames) = [line for line in lines if line.startswith("| static, as in the demo |")]
    assert f" | {static['flicker']['value']:.4f} | " in first
    assert f"{static['fewer_steps']['equal_time'].split('_')[1]}: " in first
    assert frames == [
        "| static, as in the demo | "
        + " | ".join(f"{frame[value]:.{digits}f}" for frame in static["frames"])
        + " |"
        for value, digits in (("ssim", 3), ("psnr", 1))
    ]
    assert any(line.startswith("- A static plan is better than fewer steps") for line in lines)


def test_settings_of_a_table_stand_beside_those_of_the_others() -> None:
    bench = import_module("bench_quality")
    args = bench.parse([])
    ablations, video = bench.of_table(args, ""), bench.of_table(args, "video")
    assert (ablations.steps, ablations.prompts, ablations.seeds) == (28, 64, 2)
    assert (video.steps, video.prompts, video.seeds) == (24, 24, 1)
    assert video.out.name == "quality_demo_video.json"
    assert bench.of_table(args, "caches").out.name == "skip_demo.json"
    other = bench.parse(["--tables", "video", "--out", "x.json"])
    assert bench.of_table(other, "video").out.name == "x_video.json"


def check_baselines(report: dict[str, Any]) -> None:
    """Baselines cost no more than their plan, and one more step would."""
    step = report["costs"]["milliseconds"]["training_free"]["p"]
    for rows in report["tables"].values():
        by_name = {row["name"]: row for row in rows}
        assert len(by_name) == len(rows)
        for row in rows:
            if "static" in row:
                assert by_name[row["static"]]["loop_ms"] <= row["loop_ms"] * (1 + 1e-12)
            if "fewer_steps" in row:
                fewer = by_name[row["fewer_steps"]["equal_time"]]
                assert fewer["loop_ms"] == pytest.approx(fewer["steps"] * step)
                # The least is one step, the most as many as the reference has.
                if 1 < fewer["steps"] < row["reference_steps"]:
                    assert fewer["loop_ms"] <= row["loop_ms"] < fewer["loop_ms"] + step
                assert by_name[row["fewer_steps"]["equal_tokens"]]["tokens"] <= row["tokens"]


def check_paths(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["tables"]["adapters"]}
    assert report["missing"] == {}
    for plan in ("2p_40", "2p_60", "2p_80", "4p_20_2p_60", "interleaved"):
        # Without training, an adapter is the step that it starts from.
        for trained, untrained in (
            ("snr_trained", "training_free"),
            ("paper_trained", "paper_untrained"),
        ):
            pair = rows[f"{plan}/{trained}"], rows[f"{plan}/{untrained}"]
            # Rounding may flip a byte of a pixel here and there.
            assert pair[0]["ssim"]["value"] == pytest.approx(pair[1]["ssim"]["value"], abs=1e-4)
        free = rows[f"{plan}/training_free"]
        assert free["ssim"]["value"] > rows[f"{plan}/paper_untrained"]["ssim"]["value"]
        assert free["ssim"]["low"] <= free["ssim"]["value"] <= free["ssim"]["high"]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_mean_scores_are_those_by_hand(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    history = torch.randn(4, 2, 3, 8, 8, generator=generator)
    scores = import_module("quality_runs").mean_scores(history, [2, 4], 0.4, order, 3)
    assert scores.shape == (2, 2)
    # Slot 3 is the newest, then come 0, 1 and 2.
    z = history.roll(1, 0)[:, 1].double().numpy()
    difference = -np.diff(z[: order + 1], n=order, axis=0)[0] * (-1) ** (order + 1)
    deviations = [
        difference[:, row : row + 4, column : column + 4].std(ddof=1)
        for row in (0, 4)
        for column in (0, 4)
    ]
    assert float(scores[1, 1]) == pytest.approx(np.mean(deviations), rel=1e-6)


def test_statistic_of_a_plan_is_what_the_engines_loop_decides_by(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_of, paths_of = import_module("quality_runs"), import_module("quality_paths")
    paths, missing = paths_of.build_paths(pipeline, {}, untrained=False, backend="eager")
    assert set(missing) == {"paper_trained", "snr_trained"}
    runs, native = runs_of.Runs(paths=paths, arguments=ARGUMENTS), ops.patch_scores
    prompts = [Prompt(text=text, seed=seed) for seed, text in enumerate(held_out_prompts(2))]
    rule = DDiTPolicy.paper(2e-2)
    plans = [runs_of.Plan(policy=rule, steps=9, statistic=s) for s in ("quantile", "mean")]
    asked: list[tuple[int, ...]] = []

    def high(history: torch.Tensor, patch_sizes: Any, *_: Any) -> torch.Tensor:
        asked.append(tuple(patch_sizes))
        return torch.full((history.shape[1], len(patch_sizes)), 1e9)

    monkeypatch.setattr(runs_of, "mean_scores", high)
    quantile, mean = (runs.run(plan, prompts) for plan in plans)
    assert {one for own in quantile.branches for one in own} > {"p"}
    assert mean.branches == [["p"] * 9] * 2
    assert set(asked) == {(4, 8)}
    assert plans[1].to_dict()["policy"]["statistic"] == "mean"
    assert ops.patch_scores is native


def test_adapters_of_another_variant_are_refused(pipeline: Any, folders: dict[str, Path]) -> None:
    paths = import_module("quality_paths")
    with pytest.raises(ValueError, match="expected {'2p': 'paper', '4p': 'paper'}"):
        paths.trained(pipeline, folders["snr"], "paper")
    fingerprints = {
        paths.adapter_fingerprint(paths.trained(pipeline, folders[variant], variant))
        for variant in ("paper", "snr")
    }
    assert len(fingerprints) == 2


def entry(name: str, ssim: list[float], **values: Any) -> dict[str, Any]:
    return {"name": name, "kind": "dynamic", "ssim_per_prompt": ssim, **values}


@pytest.mark.parametrize(
    ("ours", "share", "verdict"),
    [
        ([0.91, 0.92, 0.95], 0.5, "yes"),
        ([0.71, 0.72, 0.75], 0.5, "no"),
        ([0.91, 0.72, 0.80], 0.5, "undecided"),
        ([0.91, 0.92, 0.95], 0.6, "unequal cost"),
    ],
)
def test_claims_follow_the_interval_of_the_paired_difference(
    ours: list[float], share: float, verdict: str
) -> None:
    others = {"target_share": 0.5, "tokens_share": 0.5}
    rows = [
        entry("order_2", [0.8, 0.8, 0.8], **others),
        entry("order_3", ours, target_share=0.5, tokens_share=share),
    ]
    (claim,) = import_module("quality_tables").claims({"order": rows})
    assert claim["holds"] == verdict
    assert claim["difference"]["value"] == pytest.approx(np.mean(ours) - 0.8)


def test_reported_prompts_are_held_out_first_and_never_searched_with() -> None:
    model = import_module("demo_models").image_model()
    captions, search = import_module("bench_quality").captions_of(model, 64, 6)
    assert len(set(captions)) == 64
    assert set(held_out_prompts()) <= set(captions)
    assert not {prompt.text for prompt in search} & set(captions)
    few, _ = import_module("bench_quality").captions_of(model, 12, 6)
    assert few == held_out_prompts(12)
