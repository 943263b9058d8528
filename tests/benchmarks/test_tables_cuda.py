from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

MACHINE = {"cpu": "Test CPU", "gpu": {"name": "Test GPU"}}
VERSIONS = {"torch": "2.11", "diffusers": "0.42"}


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
        "loop_mixed": loop_row("mixed", "loop", 2.0, counted_speedup=2.5),
        "host_mixed": loop_row("mixed", "host", 2.4, counted_speedup=2.5),
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
                "512x512/batch1/steps28": {"rows": {"loop_mixed": {"speedup": 1.5}}},
                "1024x1024/batch4/steps28": {"error": "no room"},
            },
            "buckets": {"1024x1024/batch1": {"rows": {"p": step, "4p": {"error": "no room"}}}},
            "memory": {"1024x1024/batch1": {"ratio_of_used_bytes": 1.0625}},
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
    assert "| way, mixed | 2.00 (1.80 to 2.20) | 3.00x | 2.50x |  | 1.50x |" in lines
    assert "| way, mixed (host) | 2.40 (2.16 to 2.64) | 2.50x | 2.50x |  |  |" in lines
    assert "way, fine (host)" not in table
    assert "| 1024x1024/batch1, p | 100.000 | 80.000 | 1.25x | operations |" in lines
    assert "| 1024x1024/batch1, 4p | failed |  |  |  |" in lines
    assert table.count("Test GPU") == 1
    assert "What it takes: memory at 1024x1024/batch1: 1.06x diffusers eager." in lines
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
