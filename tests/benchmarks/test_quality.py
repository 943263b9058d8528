from __future__ import annotations

from dataclasses import replace
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
def test_ways_to_take_a_coarse_step_stand_side_by_side_and_are_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("torchmetrics")
    arguments = ["--quick", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    arguments += ["--adapters-snr", str(folders["snr"]), "--adapters-paper", str(folders["paper"])]
    arguments += ["--tables", "adapters"]
    bench = import_module("bench_quality")
    assert bench.main(arguments) == 0
    report = strict(tmp_path / "adapters_demo.json")
    check_baselines(report)
    check_paths(report)
    text = import_module("tables").TABLES["adapters_demo"](report)
    assert "SNR, trained" in text
    assert "Not measured" not in text
    assert "better than fewer steps at equal time" in text
    # What was made is found again, without a single run.
    runs = import_module("quality_runs").Runs
    monkeypatch.setattr(runs, "_generate", lambda *_: pytest.fail("made again"))
    assert bench.main(arguments) == 0
    again = strict(tmp_path / "adapters_demo.json")
    assert again["tables"] == report["tables"]
    assert again["costs"] == report["costs"]


@pytest.mark.slow
def test_quick_ablations_of_the_study_model_are_judged_by_its_own_captions(
    tmp_path: Path,
) -> None:
    need("matplotlib", "torchmetrics")
    arguments = ["--quick", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    bench = import_module("bench_quality")
    assert bench.main([*arguments, "--tables", "study"]) == 0
    report = strict(tmp_path / "quality_study.json")
    check_baselines(report)
    assert report["model"]["name"].startswith("study")
    assert report["settings"]["held_out"] == 2
    assert "adapters" not in report["tables"]
    rows = [row for table in report["tables"].values() for row in table]
    assert all(set(row["correct"]) == {"all"} for row in rows)
    assert (tmp_path / "quality_study.png").stat().st_size > 10_000
    assert "quality_study.png" in import_module("tables").TABLES["quality_study"](report)


def test_each_table_has_its_settings_and_its_record(tmp_path: Path) -> None:
    bench = import_module("bench_quality")
    args = bench.parse([])
    study, adapters = (bench.of_table(args, name) for name in ("study", "adapters"))
    assert (study.steps, study.prompts, study.seeds) == (50, 16, 1)
    assert (adapters.steps, adapters.prompts, adapters.seeds) == (28, 64, 2)
    assert study.out.name == "quality_study.json"
    other = bench.parse(["--out", str(tmp_path)])
    assert bench.of_table(other, "caches").out == tmp_path / "skip_study.json"


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
    paths, _ = paths_of.build_paths(pipeline, backend="eager")
    runs, native = runs_of.Runs(paths=paths, arguments=ARGUMENTS), ops.patch_scores
    prompts = [Prompt(text=text, seed=seed) for seed, text in enumerate(held_out_prompts(2))]
    rule = DDiTPolicy.paper(2e-2)
    first = runs_of.Plan(policy=rule, num_inference_steps=9)
    plans = [first, replace(first, statistic="mean")]
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
    assert len({paths.fingerprint_of(folder) for folder in folders.values()}) == 2


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
