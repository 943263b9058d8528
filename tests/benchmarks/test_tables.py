from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

MACHINE = {"cpu": "Test CPU", "gpu": {"name": "Test GPU"}}
VERSIONS = {"torch": "2.11", "diffusers": "0.42"}


def record(name: str) -> dict[str, Any]:
    """A record that is kept."""
    path = import_module("tables").ROOT / "benchmarks" / "results" / f"{name}.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def test_table_replaces_what_stands_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    other = "<!-- table: other -->\nkept\n<!-- /table -->\n"
    readme.write_text(f"a\n<!-- table: cpu_demo -->\nold\n<!-- /table -->\nb\n{other}")
    tables = import_module("tables")
    for _ in range(2):  # a second time changes nothing
        tables.replace_table("cpu_demo", "| new |\n", [readme])
        text = readme.read_text()
        assert text == f"a\n<!-- table: cpu_demo -->\n| new |\n<!-- /table -->\nb\n{other}"


def test_missing_marker_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="table: drivers_cpu"):
        import_module("tables").update_tables("drivers_cpu", record("drivers_cpu"), [readme])


def test_documents_show_the_tables_of_the_records_and_say_what_was_not_measured() -> None:
    tables = import_module("tables")
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    for name, make in tables.TABLES.items():
        shown = text.partition(f"<!-- table: {name} -->\n")[2].partition("<!-- /table -->")[0]
        kept = name.partition(":")[0]
        if (tables.ROOT / "benchmarks" / "results" / f"{kept}.json").exists():
            assert shown == make(record(kept)), name
        else:  # or the table of a run of many minutes would find no place at its end
            assert shown.startswith("Not measured yet"), name


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


def test_what_was_not_measured_is_not_spoken_of() -> None:
    tables, overhead, soak = (
        import_module("tables").TABLES,
        record("overhead_cpu"),
        record("soak_cpu"),
    )
    del overhead["look"]
    assert "live model" not in tables["overhead_cpu"](overhead)
    soak["latency"] = {"ratio": None, "cpu_ratio": None}
    assert "kinds of runs" not in tables["soak_cpu"](soak)
