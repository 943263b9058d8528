from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from extras import need
from strict_json import strict


def test_overhead_of_a_null_model_is_reported(tmp_path: Path) -> None:
    bench = import_module("bench_overhead")
    entry = bench.step_times((1, 4, 16, 16), steps=6, rounds=2)
    times = entry["microseconds"]
    assert set(times) == {"dynamic", "fine", "diffusers", "scores", "decide", "solver"}
    assert all(0 < value["min"] <= value["median"] <= value["max"] for value in times.values())
    out = tmp_path / "overhead.json"
    assert bench.main(["--no-model", "--rounds", "1", "--steps", "5", "--out", str(out)]) == 0
    assert strict(out)["schema_version"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_quick_run_sets_the_pipelines_loop_beside_the_tables(tmp_path: Path) -> None:
    out = tmp_path / "drivers.json"
    assert import_module("bench_drivers").main(["--quick", "--out", str(out)]) == 0
    runs = {(run["model"], run["plan"]): run for run in strict(out)["runs"]}
    assert len(runs) == 6
    for (model, plan), run in runs.items():
        names = {"table", "pipeline"} | ({"table_apart"} if model == "demo-video" else set())
        assert set(run["microseconds"]) == names | ({"diffusers"} if plan == "fine" else set())
        assert run["relative_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("compiled_before")
def test_quick_run_compares_all_methods(tmp_path: Path) -> None:
    need("torchmetrics")
    out = tmp_path / "quick.json"
    arguments = ["--quick", "--batches", "1", "--out", str(out)]
    assert import_module("bench_cpu").main(arguments) == 0
    rows = {row["name"]: row for row in strict(out)["batches"]["1"]}
    assert list(rows) == [
        "diffusers",
        "torch_compile",
        *(["openvino"] if find_spec("openvino") else []),
        "first_block_cache",
        "first_block_cache_best",
        "fine",
        "static",
        "dynamic",
        "fine_cached",
        "fewer_steps",
    ]
    assert rows["diffusers"]["speedup_denoise"] == 1
    assert rows["fine"]["ssim"] == pytest.approx(1)
    # Eager and compiled diffusers and ours differ by rounding only.
    assert rows["diffusers"]["ssim"] > 0.999
    assert rows["torch_compile"]["ssim"] > 0.999
