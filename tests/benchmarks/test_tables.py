from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from extras import need

MACHINE = {"cpu": "Test CPU", "gpu": {"name": "Test GPU"}}
VERSIONS = {"torch": "2.11", "diffusers": "0.42"}


def row(name: str, **values: Any) -> dict[str, Any]:
    seconds = {"median": 0.5, "min": 0.4, "max": 0.6}
    fields = {"tokens": None, "psnr": None, "ssim": 1.0, "speedup_denoise": 1.0}
    entry = {"name": name, "label": name, "seconds_denoise": seconds, "seconds": seconds}
    return {**entry, **fields, "speedup_end_to_end": 1.0, **values}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "machine": {"cpu": "Test CPU", "threads": 2},
        "versions": {"torch": "2.13", "diffusers": "0.42"},
        "settings": {"prompts": ["a", "b"], "repeats": 3},
        "batches": {
            "1": [row("eager"), row("dynamic", tokens=1920.0, speedup_denoise=2.0, psnr=25.14)],
            "4": [row("eager"), row("dynamic", tokens=1920.0, speedup_denoise=3.0, psnr=25.14)],
        },
    }


def test_table_replaces_what_stands_between_its_markers(
    report: dict[str, Any], tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    other = "<!-- table: other -->\nkept\n<!-- /table -->\n"
    readme.write_text(f"a\n<!-- table: cpu_demo -->\nold\n<!-- /table -->\nb\n{other}")
    tables = import_module("tables")
    for _ in range(2):  # a second time changes nothing
        tables.replace_table("cpu_demo", tables.cpu_demo(report), [readme])
        text = readme.read_text()
        assert "old" not in text
        assert (
            "| dynamic | 1920 | 500 (400 to 600) | 2.00x | 1.00x | 3.00x | 25.1 | 1.000 |" in text
        )
        assert text.startswith("a\n<!-- table: cpu_demo -->\n|")
        assert text.endswith(f"<!-- /table -->\nb\n{other}")
        assert text.count("Test CPU, 2 threads") == 1


def test_missing_marker_is_an_error(report: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="table: cpu_demo"):
        import_module("tables").update_tables("cpu_demo", report, [readme])


def test_documents_have_a_place_for_every_table_and_say_what_was_not_measured() -> None:
    # Or the table of a run of many minutes would find no place at its end.
    tables = import_module("tables")
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    for name in tables.TABLES:
        content = text.partition(f"<!-- table: {name} -->\n")[2].partition("<!-- /table -->")[0]
        record = name.partition(":")[0]
        measured = (tables.ROOT / "benchmarks" / "results" / f"{record}.json").exists()
        assert content, name
        assert content.startswith("Not measured yet") == (not measured)


def test_the_short_table_is_of_the_same_record(report: dict[str, Any]) -> None:
    tables = import_module("tables")
    report["batches"]["1"][0]["name"] = "diffusers"
    lines = tables.cpu_short(report).splitlines()
    assert lines[2:4] == [
        "| eager |  | 500 | 1.00x | 1.000 |",
        "| dynamic | 1920 | 500 | 2.00x | 1.000 |",
    ]


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": median * 0.9, "max": median * 1.1}


def loop_row(schedule: str, executor: str | None, median: float, **values: Any) -> dict[str, Any]:
    return {
        "label": f"way, {schedule}",
        "schedule": schedule,
        "executor": executor,
        "seconds": spread(median),
        "speedup": 6 / median,
        "relative_error": 0.012,
        **values,
    }


@pytest.fixture
def flux() -> dict[str, Any]:
    rows = {
        "diffusers_eager": loop_row("fine", None, 6.0),
        "first_block_cache": loop_row("fine", None, 4.0, computed_steps=3),
        "compile_full": {
            "label": "full",
            "schedule": "fine",
            "executor": None,
            "error": "TimeoutError: not ready",
        },
        "loop_paper": loop_row("paper_2.50x", "loop", 2.0, counted_speedup=2.5),
        "host_fine": loop_row("fine", "host", 5.0, counted_speedup=1.0),
    }
    step = {
        "seconds": spread(0.1),
        "floor_seconds": 0.08,
        "over_floor": 1.25,
        "bound": "operations",
    }
    return {
        "machine": MACHINE,
        "versions": VERSIONS,
        "model": {"preset": "flux-dev", "dtype": "bfloat16", "text_tokens": 512},
        "sections": {
            "loops": {
                "1024x1024/batch1/steps28": {"rows": rows},
                "512x512/batch1/steps28": {"rows": {"loop_paper": {"speedup": 1.5}}},
                "1024x1024/batch4/steps28": {"error": "no room"},
            },
            "buckets": {"1024x1024/batch1": {"rows": {"p": step, "4p": {"error": "no room"}}}},
        },
    }


def test_flux_table_shows_times_floors_and_failures(flux: dict[str, Any]) -> None:
    table = import_module("tables").TABLES["flux_cuda"](flux)
    lines = table.splitlines()
    assert lines[0].endswith("| speed-up | by count | error | 512x512/batch1/steps28 |")
    assert "| way, fine | 6.00 (5.40 to 6.60) | 1.00x |  | 1.2e-02 |  |" in lines
    # The hits of a cache, and coarse steps, say nothing about quality with random weights.
    assert "| way, fine | 4.00 (3.60 to 4.40) | 1.50x |  |  |  |" in lines
    assert "| full | failed |  |  |  |  |" in lines
    assert "| way, paper_2.50x | 2.00 (1.80 to 2.20) | 3.00x | 2.50x |  | 1.50x |" in lines
    assert "way, fine (host)" not in table
    assert "| 1024x1024/batch1, p | 100.000 | 80.000 | 1.25x | operations |" in lines
    assert "| 1024x1024/batch1, 4p | failed |  |  |  |" in lines
    assert table.count("Test GPU") == 1
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {7, 6}


def test_flux_table_of_an_unfinished_file_has_what_there_is(flux: dict[str, Any]) -> None:
    flux["sections"] = {}
    table = import_module("tables").TABLES["flux_cuda"](flux)
    assert table.startswith("Test GPU")


def test_ops_table() -> None:
    row = {"op": "pack p=2", "size": "FLUX 1024", "floor_us": 0.5}
    times = {"native": spread(2.0), "eager": spread(6.0), "copy": spread(1.5)}
    report = {
        "machine": MACHINE,
        "versions": VERSIONS,
        "copy_bytes_per_second": 4.2e12,
        "results": [
            {**row, "microseconds": times, "over_floor": 4.0},
            {**row, "op": "pack p=4", "error": "no room"},
        ],
    }
    table = import_module("tables").TABLES["ops_cuda"](report)
    assert "| pack p=2 | FLUX 1024 | 2.0 | 0.5 | 4.0x | 1.5 | 6.0 |" in table
    assert "| pack p=4 | FLUX 1024 | failed | 0.5 |  |  |  |" in table
    assert "a copy moves 4.20 TB/s" in table


def test_drivers_table_has_a_row_per_run_and_gaps_where_nothing_was_measured() -> None:
    run = {"model": "demo", "plan": "fine", "steps": 24, "ratio": 1.25, "relative_error": 3e-7}
    guided = {**run, "model": "demo-video", "plan": "dynamic", "relative_error": 2e-6}
    times = {"table": spread(8000.0), "pipeline": spread(10000.0), "diffusers": spread(16000.0)}
    apart = {"table": spread(8000.0), "table_apart": spread(9000.0), "pipeline": spread(10000.0)}
    report = {
        "machine": {"cpu": "Test CPU", "threads": 1},
        "versions": VERSIONS,
        "runs": [{**run, "microseconds": times}, {**guided, "microseconds": apart}],
    }
    table = import_module("tables").TABLES["drivers_cpu"](report)
    assert "| image | full resolution | 8.0 |  | 10.0 | 16.0 | 1.25x |" in table
    assert "| video, guided | dynamic | 8.0 | 9.0 | 10.0 |  | 1.25x |" in table
    assert "24 steps" in table
    assert "at most 2e-06 of the largest value" in table


def test_overhead_table_tells_of_the_look_where_it_was_measured() -> None:
    names = ("dynamic", "fine", "diffusers")
    step = {"latent_shape": [1, 16, 32, 32], "loop": 28.4}
    report: dict[str, Any] = {
        "machine": {"cpu": "Test CPU", "threads": 2},
        "versions": VERSIONS,
        "steps": [{**step, "microseconds": {name: spread(40.0) for name in names}}],
    }
    make = import_module("tables").TABLES["overhead_cpu"]
    without = make(report)
    assert "| 1 x 16 x 32 x 32 | 40 | 40 | 40 | 28 |" in without
    assert "live model" not in without
    report["look"] = {"blocks": 57, "modules": 1000, "milliseconds": spread(2.5)}
    assert make(report).startswith(without.rstrip())
    assert "2.5 ms for one of 57 blocks (1000 modules, one thread)" in make(report)


def test_the_table_of_the_server_counts_what_was_refused() -> None:
    half = {"p50": 40.0, "p95": 80.0}
    load = {
        "seconds": 60,
        "offered_per_second": 20.0,
        "images_per_second": 9.5,
        "answers": {"200": {"count": 570, **half}, "429": {"count": 600}, "503": {"count": 30}},
        "rss_mib": [700.0, 720.0, 712.0],
    }
    report = {
        "machine": {"cpu": "Test CPU", "threads": 2},
        "versions": VERSIONS,
        "steps": 24,
        "start": {"seconds": 12.0, "import_seconds": 9.0},
        "lora": {
            "layers": 60,
            "plain": 250.0,
            "first_of_process": 900.0,
            "first": 600.0,
            "next": 262.0,
        },
        "overhead": {
            way: dict.fromkeys(("engine", "encoded", "http"), half) for way in ("alone", "batched")
        },
        "load": dict.fromkeys(("alone", "batched"), load),
    }
    table = import_module("tables").TABLES["serving_cpu"](report)
    row = "40 / 80 | 40 / 80 | 40 / 80 | 20.0 | 9.5 | 10.5 | 40 / 80 | 700 / 720 / 712 |"
    assert f"| a run for each | {row}" in table
    assert f"| batched | {row}" in table
    assert "12.0 s, of which importing the libraries alone takes 9.0 s" in table


def test_the_servers_own_count_is_of_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    need("httpx", "fastapi")
    serving = import_module("bench_serving")
    page = (
        'ddit_rt_requests_total{endpoint="/v1/images/generations",status="200"} 5.0\n'
        'ddit_rt_requests_total{endpoint="/v1/images/generations",status="429"} 7.0\n'
        'ddit_rt_requests_total{endpoint="/health",status="200"} 9.0\n'
    )
    monkeypatch.setattr(serving.httpx, "get", lambda url: type("Page", (), {"text": page}))
    assert serving.counted("http://x") == {"200": 5, "429": 7}


def test_the_table_of_the_soak_tells_growth_endings_and_what_was_made_again() -> None:
    growth = {"start": 100 * 2**20, "end": 101 * 2**20, "by_windows": 0.01, "by_trend": -0.002}
    counts = ("rss_bytes", "live_bytes", "objects", "blocks", "descriptors", "threads")
    ratio = {"median": 1.01, "lower_quartile": 0.9, "upper_quartile": 1.1, "count": 40}
    report = {
        "machine": {"cpu": "Test CPU", "threads": 1},
        "versions": VERSIONS,
        "notes": "Beside tests.",
        "settings": {"runs": 2000, "seed": 0, "cadence": 20, "warm_up": 300},
        "endings": {"done": 1500, "callback raises": 500},
        "drawn": {"with LoRAs": 700, "guided": 400, "pipeline-driven": 300},
        "growth": dict.fromkeys(counts, growth),
        "latency": {"ratio": ratio, "cpu_ratio": {**ratio, "median": 1.0}},
        "spots": [{"equal": True, "loras": {"thin": 0.5}}, {"equal": False, "loras": {}}],
    }
    table = import_module("tables").TABLES["soak_cpu"](report)
    assert "| resident memory, MiB | 100.0 | 101.0 | +1.00% | -0.20% |" in table
    assert "500 callback raises; 1500 done" in table
    assert "1 with LoRAs among them, 1 of 2 were the same to the bit" in table
    assert "1.01x (quartiles 0.90 to 1.10) in wall time and 1.00x" in table
    assert "over 40 kinds of runs" in table
    assert table.rstrip().endswith("diffusers 0.42. Beside tests.")
    report["latency"] = {"ratio": None, "cpu_ratio": None}
    assert "kinds of runs" not in import_module("tables").TABLES["soak_cpu"](report)


def test_a_record_of_one_batch_size_has_no_column_for_a_larger_one(report: dict[str, Any]) -> None:
    tables = import_module("tables")
    both = tables.cpu_demo(report)
    report["batches"] = dict([*report["batches"].items()][:1])
    alone = tables.cpu_demo(report)
    assert "larger batch" in both
    assert "larger batch" not in alone
    assert alone.splitlines()[0].count("|") == both.splitlines()[0].count("|") - 1
